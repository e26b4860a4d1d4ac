"""What tests of semi-supervised methods share: a task with unlabeled images, and runs that can be watched and killed.

Shapes: views [B 3 S S], features [B D'], logits [B C].
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lpt.data.task import Task
from lpt.engine.history import History
from lpt.engine.loop import follow
from lpt.engine.phase import Phase, Step
from lpt.engine.processes import rank_and_world
from lpt.engine.session import Session
from tests.support.toy import toy_images, toy_task
from tests.support.training import bind, recipe_of, with_steps

COUNTS = (14, 7, 3, 2)
UNLABELED = (9, 11, 5, 6)
FAST: dict[str, Any] = {"steps": 3, "rounds": 1, "lr": 0.05, "weight_decay": 0.0, "bottleneck": 4}


def semi_task(unlabeled: tuple[int, ...] = UNLABELED, counts: tuple[int, ...] = COUNTS) -> Task:
    labels = torch.arange(len(unlabeled)).repeat_interleave(torch.tensor(unlabeled))
    return replace(toy_task(counts), unlabeled=toy_images(labels, seed=2))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(row):
    return row / (row * row).sum().sqrt()


def cross_entropy(logits, target):
    """-log softmax(logits)[target] of one image; `logits` is a list or a row."""
    return sum(z.exp() for z in logits).log() - logits[target]


class Killed(Exception):
    pass


@dataclass
class Seen:
    """A step as it was: the model before it, its batches, what it logged in all, and the gradients it left."""

    model: Any
    batches: Any
    logged: dict[str, float]
    gradients: dict[str, torch.Tensor]


@dataclass
class Watched:
    """What every step of a recipe's phases saw; or the recipe dies in one."""

    session: Session
    killed_at: int | None = None
    keep: bool = False
    seen: list[Seen] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    phase: Any = None

    @property
    def streams(self) -> Any:
        return self.phase.streams

    @property
    def memory(self) -> Any:
        return self.phase.memory

    @property
    def history(self) -> History:
        return self.session.history

    @property
    def costs(self) -> Any:
        return self.session.costs

    def step_of(self, phase: Phase) -> Step:
        self.phase = phase

        def watched(model, batches, progress):
            if progress.step == self.killed_at:
                raise Killed
            before = copy.deepcopy(model) if self.keep else None
            logged: dict[str, float] = {}
            terms = phase.step(model, batches, progress)
            for part in (terms,) if isinstance(terms, dict) else terms:
                for name, value in part.items():
                    logged[name] = logged.get(name, 0.0) + value.item()
                yield part
            self.losses.append(logged["loss"])
            if self.keep:
                gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                self.seen.append(Seen(before, batches, logged, gradients))

        return watched


def semi(
    method,
    backbone,
    task=None,
    *,
    folder=None,
    batch_size=4,
    seed=0,
    killed_at=None,
    keep=False,
    gnm=0.0,
    **settings,
):
    """(model, what was watched, what was said) of a method; `folder` for checkpoints and the table of pseudo-labels."""
    task, said = task or semi_task(), []
    main = rank_and_world()[0] == 0
    session = bind(
        task,
        backbone,
        batch_size=batch_size,
        seed=seed,
        history=History(folder / "history.jsonl" if folder and main else None),
        checkpoints=folder / "checkpoints" if folder else None,
        pseudo_labels=folder / "pseudo_labels" if folder else None,
        checkpoint_seconds=0.0,
        log=said.append,
        gnm=gnm,
    )
    watched = Watched(session, killed_at, keep)
    recipe = recipe_of(method, task, backbone, session, **settings)
    model = follow(with_steps(recipe, watched.step_of), session)
    return model, watched, said
