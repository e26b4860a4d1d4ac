"""What a run would do, without training: its phases, what they train, and what they cost.

A few steps of every phase are timed on the real images, with random weights of the backbone's shapes; nothing is
written, downloaded or kept. Shapes: features [N D'].
"""

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lpt.config import Config
from lpt.data.task import Files, Images
from lpt.device import PRECISIONS, peak_memory, used_memory
from lpt.engine.batches import ImageSource, Sampler, to_views
from lpt.engine.clock import Clock
from lpt.engine.evaluate import features, predict
from lpt.engine.loop import batches_ahead, images_per_step, train_step
from lpt.engine.phase import Phase
from lpt.engine.phase_state import PhaseState
from lpt.engine.query import MOST_FITTED, fit_query_map
from lpt.engine.session import Cost, Session
from lpt.methods import build_recipe
from lpt.model.classifier import PromptedClassifier
from lpt.setup import Setup

TIMED_STEPS = 4
PHASE_SECONDS = 15.0
"""About how long the timed steps of one phase may take; of larger steps a part of the batch is timed."""
FEW_ROWS = 4
"""Rows of a stream, at least, in the steps that count FLOPs, which are a linear function of the rows."""
PROBE_IMAGES = 64
"""Images whose features or predictions are timed, of all that a run computes."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase. `parameters` are those that train, by name with `*` for the number of a block. `seconds` is None where
    no step was timed; `timed_share` is the part of a batch that was."""

    name: str
    parameters: dict[str, int]
    steps: int
    images: int
    flops: int
    epochs: int
    optimizer: str
    lr: float
    seconds: float | None
    timed_share: float


@dataclass
class Plan:
    """A run as it would be. `other_seconds` are outside of the steps, by what they are spent on; `memory_bytes` is the
    peak of the process, on the GPU where the run is there."""

    method: str
    backbone: str
    data: str
    device: str
    precision: str
    trainable_parameters: int = 0
    phases: list[PhasePlan] = field(default_factory=list)
    other_seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0

    @property
    def seconds(self) -> float | None:
        """In all; None where steps were not timed."""
        total = sum(self.other_seconds.values())
        for phase in self.phases:
            if phase.seconds is None:
                return None
            total += phase.seconds
        return total

    def spend(self, what: str, seconds: float) -> None:
        self.other_seconds[what] = self.other_seconds.get(what, 0.0) + seconds

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def plan_run(config: Config, *, timed_steps: int = TIMED_STEPS) -> Plan:
    """The plan of `config`; with `timed_steps=0` no step is timed. Raises LptError for what cannot be run."""
    began = time.perf_counter()
    setup = Setup(config, read_weights=False)
    plan = Plan(
        method=config.method["name"],
        backbone=setup.backbone.name,
        data=setup.task.summary_lines()[0],
        device=str(setup.device),
        precision=setup.precision,
    )
    plan.spend("start-up", time.perf_counter() - began)
    session = PlanningSession(
        images=setup.task.train,
        preprocess=setup.backbone.preprocess,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        start_seed=config.train.start_seed,
        dtype=PRECISIONS[setup.precision],
        gnm=config.train.gnm,
        count_flops=not config.train.compile,  # a compiled block is one operation to the counter
        plan=plan,
    )
    memory = MemoryProbe(setup.device)
    recipe = build_recipe(config.method, setup.task, setup.backbone, session)
    for phase in _between_timed(recipe.phases or (), session):
        plan.phases.append(plan_phase(phase, recipe.model, session, memory, timed_steps))
    plan.trainable_parameters = recipe.model.trainable_parameters
    if timed_steps:
        plan_evaluations(setup, recipe.model, plan)
    plan.memory_bytes = memory.peak()
    return plan


@dataclass(frozen=True, kw_only=True)
class PlanningSession(Session):
    """A session in which features are not computed: those of a few images are timed, and random ones stand in."""

    plan: Plan
    probe_seconds: list[float] = field(default_factory=list)
    """What the probes themselves have taken."""

    def features(self, name: str, model: PromptedClassifier, images: Images | Files) -> Tensor:
        few = images.subset(range(min(PROBE_IMAGES, len(images))))
        return self._stand_in(lambda: features(model, few), len(few), len(images))

    def query_map(self, model: PromptedClassifier, images: Images | Files) -> Tensor:
        few = images.subset(range(min(PROBE_IMAGES, len(images))))
        began = time.perf_counter()
        fitted = fit_query_map(model, few)
        self.probe_seconds.append(seconds := time.perf_counter() - began)
        self.plan.spend("features", seconds / len(few) * min(len(images), MOST_FITTED))
        return fitted

    def view_features(
        self, name: str, model: PromptedClassifier, images: ImageSource, *, strong: bool = False
    ) -> Tensor:
        assert isinstance(images, Images | Files)
        few = images.subset(range(min(PROBE_IMAGES, len(images))))
        self.costs[name] = Cost(images=len(images))
        return self._stand_in(lambda: self._view_features(name, model, few, strong), len(few), len(images))

    def _stand_in(self, compute: Any, few: int, total: int) -> Tensor:
        compute()  # the first time, caches and kernels are made
        began = time.perf_counter()
        width = compute().shape[1]
        seconds = time.perf_counter() - began
        self.probe_seconds.append(2 * seconds)
        self.plan.spend("features", seconds / few * total)
        return torch.randn(total, width, generator=torch.Generator().manual_seed(0))


def _between_timed(phases: Iterable[Phase], session: PlanningSession) -> Iterator[Phase]:
    """The phases that have steps; what the method does between them is timed too."""
    following = iter(phases)
    while True:
        session.probe_seconds.clear()
        began = time.perf_counter()
        phase = next(following, None)
        session.plan.spend("between phases", max(0.0, time.perf_counter() - began - sum(session.probe_seconds)))
        if phase is None:
            return
        if phase.steps:
            yield phase


def plan_phase(
    phase: Phase,
    model: PromptedClassifier,
    session: Session,
    memory: "MemoryProbe",
    timed_steps: int,
    *,
    most_seconds: float | None = None,
) -> PhasePlan:
    """Steps of parts of the batch count the FLOPs and say how much of it can be timed, in `most_seconds` about."""
    model.only_train(*phase.trains)
    parameters = _trained_parameters(model)
    shares = _shares(phase)
    state = PhaseState(phase, model, file=None, run_hash="")
    most_seconds = PHASE_SECONDS if most_seconds is None else most_seconds
    flops = _flops_of_a_step(state, session, shares)
    share, estimate = shares[0], None
    if timed_steps:
        seconds = _run_steps(state, session, share, 1)  # without counting
        for candidate in shares[1:]:
            if seconds / shares[0] * candidate * (timed_steps + 1) <= most_seconds:
                share = candidate
        memory.start()
        _run_steps(state, session, share, 1)
        estimate = _run_steps(state, session, share, timed_steps) / timed_steps / share * phase.steps
        memory.stop(share)
    return PhasePlan(
        name=phase.name,
        parameters=parameters,
        steps=phase.steps,
        images=phase.steps * images_per_step(phase),
        flops=flops * phase.steps,
        epochs=-(-phase.steps // phase.steps_per_epoch),
        optimizer=phase.optimizer,
        lr=phase.lr,
        seconds=estimate,
        timed_share=share,
    )


def _flops_of_a_step(state: PhaseState, session: Session, shares: list[float]) -> int:
    """FLOPs of a whole step, from those of its smallest parts: a part for the prompts, and one for each image."""
    counts = []
    for share in shares[:2]:
        state.flops = 0  # to be counted again
        _run_steps(state, session, share, 1)
        counts.append(state.flops)
    if len(counts) == 1:
        return counts[0]
    return round(counts[0] + (counts[1] - counts[0]) * (1 - shares[0]) / (shares[1] - shares[0]))


@dataclass(frozen=True)
class FirstRows:
    """A sampler of the first rows of another one's batches."""

    sampler: Sampler
    share: float

    def batch(self, step: int) -> Tensor:
        rows = self.sampler.batch(step)
        return rows[: round(len(rows) * self.share)]


def _shares(phase: Phase) -> list[float]:
    """Parts of a batch that can be run by themselves, from the smallest to the whole."""
    sizes = [len(stream.sampler.batch(0)) for stream in phase.streams.values()]
    shares = [1.0]
    while True:
        half = shares[0] / 2
        rows = [size * half for size in sizes]
        if min(rows) < FEW_ROWS or any(number % phase.row_multiple for number in rows):
            return shares
        shares.insert(0, half)


def _run_steps(state: PhaseState, session: Session, share: float, number: int) -> float:
    """Seconds of `number` steps on `share` of each batch, drawn ahead as a run draws them."""
    streams = {
        name: replace(stream, sampler=FirstRows(stream.sampler, share)) for name, stream in state.phase.streams.items()
    }
    part = replace(state.phase, streams=streams, steps=max(number, 1))
    clock = Clock()
    began = time.perf_counter()
    with batches_ahead(part, session, 0, pinned=state.device.type == "cuda") as batches:
        for progress, drawn in batches:
            progress.move_to(state.device)
            views = to_views(drawn, session.preprocess, state.device, session.dtype)
            train_step(state, session, views, replace(progress, steps=state.phase.steps), clock)
    return time.perf_counter() - began


def _trained_parameters(model: PromptedClassifier) -> dict[str, int]:
    """Numbers of what trains, by name; blocks are added up under `*`."""
    numbers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = re.sub(r"\.\d+\.", ".*.", name)
            numbers[key] = numbers.get(key, 0) + parameter.numel()
    return numbers


def plan_evaluations(setup: Setup, model: PromptedClassifier, plan: Plan) -> None:
    """Seconds of the evaluations after epochs and at the end, from a few test images."""
    task, settings = setup.task, setup.config.train
    few = task.test.subset(range(min(PROBE_IMAGES, len(task.test))))
    predict(model, few)
    began = time.perf_counter()
    predict(model, few)
    seconds_an_image = (time.perf_counter() - began) / len(few)
    plan.spend("evaluation", seconds_an_image * len(task.test))
    for phase in plan.phases:
        epochs = phase.epochs
        if task.val is not None:
            plan.spend("evaluation", seconds_an_image * len(task.val) * epochs)
        plan.spend("evaluation", seconds_an_image * len(task.test) * min(epochs, settings.watch_test))


class MemoryProbe:
    """The peak memory of timed steps. Of a part of a batch, what was needed beyond the model is scaled to the whole."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.estimate = 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.before = used_memory(self.device)

    def stop(self, share: float) -> None:
        needed = max(0, peak_memory(self.device) - self.before)
        self.estimate = max(self.estimate, round(self.before + needed / share))

    def peak(self) -> int:
        return max(self.estimate, peak_memory(self.device))


def table(plan: Plan) -> str:
    """The plan as aligned text."""
    head = ["phase", "trains", "steps", "images", "TFLOPs", "time"]
    rows = []
    for phase in plan.phases:
        trained = f"{sum(phase.parameters.values()):,}"
        time_text = "not timed" if phase.seconds is None else _seconds(phase.seconds)
        flops = f"{phase.flops / 1e12:,.1f}" if phase.flops else "-"
        rows.append([phase.name, trained, f"{phase.steps:,}", f"{phase.images:,}", flops, time_text])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [plan.data, f"{plan.method} on {plan.backbone}, {plan.precision} on {plan.device}", ""]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    if not plan.phases:
        lines.append("nothing trains")
    lines.append("")
    for phase in plan.phases:
        parts = ", ".join(f"{name} {number:,}" for name, number in phase.parameters.items())
        lines.append(f"{phase.name} trains {parts}; {phase.optimizer}, learning rate {phase.lr:g}")
    others = ", ".join(f"{what} {_seconds(seconds)}" for what, seconds in plan.other_seconds.items() if seconds >= 0.5)
    lines.append(f"beside the steps: {others or 'less than a second'}")
    total = "not timed" if plan.seconds is None else f"about {_seconds(plan.seconds)}"
    lines.append(f"in all {total}, memory about {plan.memory_bytes / 2**20:,.0f} MiB")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    """As people say it.

    >>> _seconds(4.24), _seconds(400), _seconds(9000)
    ('4.2 s', '6.7 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
