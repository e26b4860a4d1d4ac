"""Phases as values: what a method wants trained, in what order, and nothing of how it is run.

A method returns a `Recipe`; the loop (`lpt.engine.loop`) runs it. Shapes: see the steps of the methods.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lpt.engine.batches import Batch, Progress, Stream
from lpt.engine.optim import Optimizer, Warmup
from lpt.engine.step_memory import StepMemory
from lpt.errors import TrainingError
from lpt.model.classifier import PromptedClassifier

LossTerms = Mapping[str, Tensor]
"""`loss`, a scalar with a graph, and whatever else is worth a number in the history, scalars too."""
Step = Callable[[Any, dict[str, Batch], Progress], LossTerms | Iterator[LossTerms]]
"""`(model, {stream: batch}, progress) -> {"loss": scalar, ...to log}`. It may also yield several of them, parts of one
sum: each part's backward has run before the next one is computed, so that the activations of one are held at a time."""
EpochEnd = Callable[[Any, Progress], Mapping[str, Any]]
"""Called when an epoch ends; what it returns joins that epoch's line in the history."""


class TunableModel(Protocol):
    """What the loop needs of a model; `PromptedClassifier` is one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self, mode: bool = True) -> Any: ...

    def only_train(self, *prefixes: str) -> Any:
        """Parameters whose name starts with one of `prefixes` train, all others are frozen."""
        ...

    def learned_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model, by name."""
        ...

    def load_learned_state(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Phase:
    """All that the loop needs to train one phase. Each has an optimizer and a schedule of its own, and a name that no
    other phase of the run has: its checkpoint is called by it, and its random numbers are drawn from it.

    >>> import lpt, torch
    >>> from lpt.methods.supervised import stage
    >>> task, backbone = lpt.load_task("digits-lt"), lpt.load_backbone("nano")
    >>> session = lpt.Session(images=task.train, preprocess=backbone.preprocess, batch_size=32)
    >>> phase = stage(session, "all", lpt.model(task, backbone), task, train=["head."], loss="ce", epochs=2, lr=0.01)
    >>> phase.name, phase.trains, phase.steps == 2 * phase.steps_per_epoch
    ('all', ('head.',), True)
    """

    name: str
    trains: tuple[str, ...]
    """How the names of the parameters that train begin; everything else is frozen."""
    step: Step
    streams: Mapping[str, Stream]
    steps: int
    steps_per_epoch: int
    optimizer: Optimizer
    lr: float
    weight_decay: float
    warmup: Warmup = "linear"
    clip: float | None = None
    """The largest norm of all gradients together; None does not clip."""
    row_multiple: int = 1
    """Each process's rows of a stream come in multiples of this: the number of micro-batches."""
    memory: StepMemory = field(default_factory=StepMemory)
    """What steps leave for one another; the method that made the phase holds the same object."""
    on_epoch: EpochEnd | None = None
    before_update: Callable[[], None] = lambda: None
    """Called in every step when all gradients are there, with the weights that the step began with."""
    evaluated: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Inside it the model has the weights that an evaluation after an epoch is to see, if they are not those that
    train."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.steps_per_epoch < 1:
            raise TrainingError(
                f"phase {self.name} of {self.steps} steps, {self.steps_per_epoch} an epoch: use 1 or more"
            )


@dataclass(frozen=True)
class Recipe:
    """What a method returns: a model at its start, and the phases that train it, asked for one by one.

    `phases` is usually a generator: what it does between two `yield`s sees the model as the phase before has left it.
    None where nothing trains. A recipe is followed once.

    >>> import lpt
    >>> model = lpt.model(lpt.load_task("digits-lt"), lpt.load_backbone("nano"))
    >>> lpt.Recipe(model).phases is None
    True
    """

    model: PromptedClassifier
    phases: Iterable[Phase] | None = None


def checked_recipe(method: str, recipe: Any) -> Recipe:
    """`recipe`, if it is one. Raises TrainingError for whatever else a method has returned: a generator, for example,
    would train nothing and say nothing."""
    if isinstance(recipe, Recipe):
        return recipe
    raise TrainingError(
        f"method {method} returned a {type(recipe).__name__}, which trains nothing: return Recipe(model, phases)"
    )
