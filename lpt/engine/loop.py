"""The loop: it follows any method's recipe, phase by phase, and is the only code that trains.

Where it is, is in checkpoints; what it measured, in the history. Resume costs a method nothing: a finished phase loads
and the next one is asked for.
"""

import contextlib
import math
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.engine.batches import Batch, DrawnBatch, Progress, drawn_ahead, to_views
from lpt.engine.clock import Clock
from lpt.engine.gnm import in_neighborhood
from lpt.engine.optim import lr_at
from lpt.engine.phase import LossTerms, Phase, Recipe, TunableModel
from lpt.engine.phase_state import PhaseState
from lpt.engine.processes import all_agree, all_reduce_mean, all_reduce_sum, rank_and_world
from lpt.engine.session import Cost, Session, counting_flops
from lpt.engine.stopping import Stopped
from lpt.errors import TrainingError
from lpt.memory import naming_lack_of_memory
from lpt.model.classifier import PromptedClassifier


def follow(recipe: Recipe, session: Session) -> PromptedClassifier:
    """Trains the phases of `recipe` one after the other; returns its model.

    Raises TrainingError where numbers leave their range, and Stopped where the run was asked to stop: it has saved.
    """
    session.on_start()
    for phase in recipe.phases or ():
        if not isinstance(phase, Phase):
            raise TrainingError(f"a recipe yields phases, and not {type(phase).__name__}: yield what a stage returns")
        if phase.steps:
            run_phase(phase, recipe.model, session)
    return recipe.model


def run_phase(phase: Phase, model: TunableModel, session: Session) -> None:
    """Trains `model` until the steps of `phase` are done; returns at once where they were done before."""
    session.on_start()
    model.only_train(*phase.trains)
    file = session.checkpoints / f"{phase.name}.safetensors" if session.checkpoints else None
    state = PhaseState(phase, model, file=file, run_hash=session.run_hash)
    cost = Cost(phase.steps, phase.steps * images_per_step(phase))
    session.costs[phase.name] = cost

    # Ways to begin: afresh, within the phase, or not at all.
    if state.load():
        session.seconds_before[phase.name] = state.seconds_before
        if state.finished:
            cost.flops = phase.steps * state.flops
            session.log(f"{phase.name}: finished before")
            return
        session.log(f"{phase.name}: continues at step {state.step} of {phase.steps}")
    if rank_and_world()[0] == 0:
        session.history.rewind(phase.name, state.step)

    clock, first = Clock(before=state.seconds_before, spent=state.spent_before), state.step
    model.train()
    here = naming_lack_of_memory(lambda: f"in step {state.step} of {phase.name} ({images_per_step(phase)} images)")
    ahead = batches_ahead(phase, session, first, pinned=state.device.type == "cuda")
    with session.stop.while_steps_run(), here, ahead as batches:
        for _ in range(first, phase.steps):
            with clock.charge("wait"):
                progress, drawn = next(batches)
            with clock.charge("views"):
                progress.move_to(state.device)
                preprocess = session.preprocess.in_epoch(progress.epoch, progress.epochs)
                views = to_views(drawn, preprocess, state.device, session.dtype)
            with clock.charge("compute"):
                result = train_step(state, session, views, progress, clock)
            images = images_per_step(phase) * (state.step - first)
            if session.tracking:
                numbers = {**result.values, "lr": state.lr, "images_per_second": clock.speed(images)}
                session.tracking.step(phase.name, state.step, phase.steps, numbers)
            if progress.ends_epoch:
                end_epoch(state, session, progress, clock)
            if result.stop or result.save or state.finished:
                state.save(progress, clock)
            if result.stop:
                all_agree(True)  # nobody leaves before process 0 has saved: a launcher ends the others then
                raise Stopped(session.stop.asked or signal.SIGTERM)
            rates = clock.rate(images, clock.left(state.step, phase.steps - state.step), result.values["loss"])
            session.on_step(phase.name, state.step, phase.steps, rates)
        # A signal may have come after the last step had looked for it; all of that step is saved.
        if all_reduce_sum(torch.tensor(session.stop.asked, device=state.device)) > 0:
            raise Stopped(session.stop.asked or signal.SIGTERM)
    cost.flops = phase.steps * state.flops
    state.optimizer.zero_grad(set_to_none=True)  # what the next phase does not train must not keep a gradient


class StepResult(NamedTuple):
    """What the step has logged, means over processes, its loss among it, and whether all processes are to save, or to
    save and stop, after it."""

    values: dict[str, float]
    save: bool
    stop: bool


def train_step(
    state: PhaseState, session: Session, batches: dict[str, Batch], progress: Progress, clock: Clock
) -> StepResult:
    """One step: rate, backward (with `session.gnm` beside the weights), mean over processes, look at the numbers,
    update."""
    phase = state.phase
    state.lr = lr_at(
        progress.step, steps=phase.steps, steps_per_epoch=phase.steps_per_epoch, lr=phase.lr, warmup=phase.warmup
    )
    for group in state.optimizer.param_groups:
        group["lr"] = state.lr
    state.optimizer.zero_grad(set_to_none=True)

    # Every step costs the same, so that the first of a phase is counted for all.
    counting = counting_flops(session.count_flops and not state.flops)
    with counting as counted, in_neighborhood(state.trained, session.gnm, progress):
        logged = _backward(phase.step(state.model, batches, progress))
    state.flops = state.flops or counted() * progress.world
    gradients = [p.grad for p in state.trained.values() if p.grad is not None]
    logged["gradient"] = torch.nn.utils.get_total_norm(gradients).float()

    # Two flags travel with the numbers: if any process is asked to stop, or process 0 to save, all do after this step.
    save_is_due = progress.rank == 0 and clock.due("save", session.checkpoint_seconds)
    for name, flag in (("stop", session.stop.asked), ("save", save_is_due)):
        logged[name] = torch.full((), float(flag), device=state.device)  # filled there: nothing is copied
    numbers = _mean_over_processes(gradients, torch.stack(list(logged.values())))
    values = dict(zip(logged, numbers.tolist(), strict=True))  # the one wait for the device in a step
    stop, save = values.pop("stop") > 0, values.pop("save") > 0

    # Before the update, so that checkpoint and weights stay finite.
    for what, value in (("loss", values["loss"]), ("gradient", values.pop("gradient"))):
        if not math.isfinite(value):
            raise state.not_finite(f"the {what} of {phase.name}", f"{value} at", progress)
    if phase.clip:
        torch.nn.utils.clip_grad_norm_(state.trained.values(), phase.clip)
    phase.before_update()
    state.optimizer.step()

    state.step = progress.step + 1
    for key, value in values.items():
        state.sums[key] = state.sums.get(key, 0.0) + value
    return StepResult(values, save, stop)


def _backward(terms: LossTerms | Iterator[LossTerms]) -> dict[str, Tensor]:
    """Backward through the parts of a step's loss, one after the other; returns the sums of what they log."""
    logged: dict[str, Tensor] = {}
    for part in (terms,) if isinstance(terms, Mapping) else terms:
        part["loss"].backward()
        for key, value in part.items():
            logged[key] = logged.get(key, 0) + value.detach().float()
    return logged


def end_epoch(state: PhaseState, session: Session, progress: Progress, clock: Clock) -> None:
    """The epoch's means, what the hooks measure, a line in the history and one for people."""
    phase = state.phase
    line: dict[str, Any] = {key: total / progress.steps_in_epoch for key, total in state.sums.items()}
    line |= {"lr": state.lr, "seconds": round(clock.whole(), 2)}
    line |= {f"{kind}_seconds": round(seconds, 2) for kind, seconds in clock.spent.items()}
    measured: dict[str, Any] = {}
    with phase.evaluated():
        for hook in (phase.on_epoch, session.on_epoch):
            if hook:
                measured |= hook(state.model, progress)
    state.model.train()  # an evaluation has left it in eval mode
    if progress.rank == 0:
        session.history.write(phase=phase.name, step=state.step, epoch=progress.epoch + 1, **line, **measured)
        if session.tracking:
            session.tracking.epoch(phase.name, state.step, {**line, **measured})
    seconds_left = clock.left(state.step, phase.steps - state.step)
    session.log(_epoch_line(progress, line, measured, seconds_left))
    state.sums = {}


def batches_ahead(
    phase: Phase, session: Session, first: int, *, pinned: bool = False
) -> contextlib.AbstractContextManager[Iterator[tuple[Progress, dict[str, DrawnBatch]]]]:
    """The batches of steps `first`.. of the phase, a few of them made while the device works on one."""
    rank, world = rank_and_world()
    start = Progress(phase.name, first, phase.steps, phase.steps_per_epoch, session.seed, rank, world)
    return drawn_ahead(
        phase.streams,
        (replace(start, step=step, ready={}) for step in range(first, phase.steps)),
        session.images,
        session.preprocess,
        number=phase.steps - first,
        workers=session.workers,
        pinned=pinned,
    )


def images_per_step(phase: Phase) -> int:
    """Rows of all streams in a step, of all processes together."""
    return sum(len(stream.sampler.batch(0)) for stream in phase.streams.values())


def _mean_over_processes(gradients: list[Tensor], numbers: Tensor) -> Tensor:
    """One all-reduce a step, of the gradients (about the size of a prompt file; in place) and of what is logged: all
    processes see the same numbers, a loss that is not finite too."""
    if rank_and_world()[1] == 1:
        return numbers
    flat = all_reduce_mean(torch.cat([*(gradient.flatten() for gradient in gradients), numbers]))
    *parts, means = flat.split([*(gradient.numel() for gradient in gradients), len(numbers)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return means


def _epoch_line(progress: Progress, line: Mapping[str, Any], measured: Mapping[str, Any], seconds_left: float) -> str:
    """What people read when an epoch ends."""
    parts = [f"{progress.phase} epoch {progress.epoch + 1}/{progress.epochs}", f"loss {line['loss']:.4f}"]
    for key in ("class_accuracy", "few"):
        value = measured.get("val", {}).get(key)
        if isinstance(value, float):
            parts.append(f"val {key} {value:.3f}")
    if "train_few" in measured:
        parts.append(f"training few {measured['train_few']:.3f}")
    if "key_usage" in measured:
        parts.append(f"key perplexity {measured['key_usage']['perplexity']:.1f}")
    return "  ".join([*parts, f"{line['seconds']:.0f} s", f"{seconds_left:.0f} s left"])
