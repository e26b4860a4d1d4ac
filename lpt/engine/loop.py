"""The loop: one for every method and phase.

A step is a function `(model, {stream: batch}, progress) -> {"loss": scalar, ...scalars to log}`. It may also yield
several of them, parts of one sum: each part's backward has run before the next one is computed, so that activations
of one part are held at a time.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpt.data.preprocess import Preprocess
from lpt.engine.batches import Batch, Images, InOrder, Progress, Stream, draw, seen
from lpt.engine.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_moments,
    restore_moments,
    save_checkpoint,
    unreadable,
)
from lpt.engine.clock import Clock
from lpt.engine.history import History
from lpt.engine.memory import Memory
from lpt.engine.optim import Optimizer, Warmup, lr_at, make_optimizer
from lpt.engine.processes import averaged, everywhere, gathered, rank_and_world, summed
from lpt.engine.stopping import Stop, Stopped
from lpt.errors import TrainingError

Part = Mapping[str, Tensor]
Step = Callable[[Any, dict[str, Batch], Progress], Part | Iterator[Part]]
EpochEnd = Callable[[Any, Progress], Mapping[str, Any]]


@dataclass
class Fit:
    """Bound once by a run with device, data, history and folder; called once for every phase.

    `batch_size` is the global batch of a stream. `say` gets a line of text for people, `show` the running numbers.
    """

    images: Images
    preprocess: Preprocess
    batch_size: int
    seed: int = 0
    history: History = field(default_factory=History)
    checkpoints: Path | None = None
    feature_cache: Path | None = None
    """A folder for features of fixed views, which several runs may share (`lpt.engine.evaluate.features`)."""
    run_hash: str = ""
    dtype: torch.dtype = torch.float32
    checkpoint_seconds: float = 30.0
    on_start: Callable[[], None] | None = None
    """Called once, when the method has accepted its settings and before anything is written or trained."""
    on_epoch: EpochEnd | None = None
    before: Callable[[Any], None] | None = None
    """A first step that a method puts before another's first phase: called once, with the model that is to train."""
    seconds_before: dict[str, float] = field(default_factory=dict)
    """Seconds by phase that earlier, killed processes have spent on what this one did not do again."""
    memory: Memory = field(default_factory=Memory)
    """What the phase that runs keeps between steps, empty where it begins."""
    cost: dict[str, dict[str, int]] = field(default_factory=dict)
    """By phase: steps, images (views through the model, or rows of features) and FLOPs, of all processes."""
    count_flops: bool = True
    stop: Stop = field(default_factory=Stop)
    audit: Path | None = None
    """Where a method that labels images by itself writes what it thought of each."""
    say: Callable[[str], None] = lambda text: None
    show: Callable[[str, int, int, str], None] = lambda phase, step, steps, text: None

    def __call__(
        self,
        phase: str,
        model: Any,
        step: Step,
        streams: Mapping[str, Stream],
        *,
        steps: int,
        steps_per_epoch: int,
        optimizer: Optimizer,
        lr: float,
        weight_decay: float,
        warmup: Warmup = "linear",
        clip: float | None = None,
        on_epoch: EpochEnd | None = None,
        evaluated: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Trains what `requires_grad` in `model`; returns when `steps` are done (at once if they were before).

        `clip` is the largest norm of all gradients together. Inside `evaluated()` the model has the weights that an
        evaluation after an epoch is to see, if they are others than those that train.
        """
        self.start()
        self.go_before(model)
        rank, world = rank_and_world()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {p: name for name, p in trained.items()}
        device = next(iter(trained.values())).device
        optim = make_optimizer(optimizer, trained.values(), weight_decay=weight_decay)
        place = self.checkpoints / f"{phase}.safetensors" if self.checkpoints else None

        memory, first, before, flops = self.memory, 0, 0.0, 0
        memory.restore({}, device)
        self.cost[phase] = cost = {"steps": steps, "images": 0, "flops": 0}
        cost["images"] = steps * sum(len(stream.sampler.batch(0)) for stream in streams.values())
        kept = load_checkpoint(place, run_hash=self.run_hash) if place else None
        at = kept.step if kept else -1
        if place and summed(torch.tensor(at, device=device)).item() != at * world:
            raise TrainingError(f"the processes see different files {place}: --out must be on a disk that all see")
        if place and kept:
            try:
                model.load_learned_state(kept.tensors)
                memory.restore(kept.memory, device)
                restore_moments(optim, kept.moments, trained)
                if not 0 <= kept.step <= steps or kept.finished != (kept.step == steps):
                    raise ValueError(f"step {kept.step} of {steps}")
            except (AssertionError, KeyError, ValueError, RuntimeError) as error:
                raise unreadable(place, f"it does not fit this model: {error}") from None
            before, flops = kept.seconds, kept.flops
            self.seconds_before[phase] = before
            if kept.finished:
                cost["flops"] = steps * flops
                self.say(f"{phase}: finished before")
                return
            first = kept.step
            self.say(f"{phase}: goes on at step {first} of {steps}")
        if rank == 0:
            self.history.rewind(phase, first)

        clock = Clock()

        def save(done: int) -> None:
            adapted = model.learned_state()
            # The gradients were finite, but a step far too long may have left the range of numbers.
            if bad := [name for name, value in adapted.items() if not bool(torch.isfinite(value).all())]:
                raise _not_finite(f"{bad[0]} of {phase}", "not finite after", progress, rate, place)
            noted = memory.tensors()  # of all processes
            if place and rank == 0:
                spent = before + clock.total()
                moments = optimizer_moments(optim, names)
                state = Checkpoint(done, done == steps, spent, adapted, moments, noted, flops)
                save_checkpoint(place, state, run_hash=self.run_hash)

        model.train()
        with self.stop.while_steps_run(), ThreadPoolExecutor(1) as ahead:
            progress = Progress(phase, first, steps, steps_per_epoch, self.seed, rank, world)
            waiting = ahead.submit(draw, streams, progress, self.images, self.preprocess)
            for t in range(first, steps):
                with clock.charge("wait"):
                    drawn = waiting.result()
                    following = replace(progress, step=t + 1)
                    if t + 1 < steps:
                        waiting = ahead.submit(draw, streams, following, self.images, self.preprocess)
                with clock.charge("views"):
                    batches = seen(drawn, self.preprocess, device, self.dtype)
                with clock.charge("compute"):
                    rate = lr_at(t, steps=steps, steps_per_epoch=steps_per_epoch, lr=lr, warmup=warmup)
                    for group in optim.param_groups:
                        group["lr"] = rate
                    optim.zero_grad(set_to_none=True)
                    logged: dict[str, Tensor] = {}
                    with _counting(self.count_flops and not flops) as counted:
                        found = step(model, batches, progress)
                        for part in (found,) if isinstance(found, Mapping) else found:
                            part["loss"].backward()
                            for key, value in part.items():
                                logged[key] = logged.get(key, 0) + value.detach().float()
                    flops = flops or counted() * world
                    grads = [p.grad for p in trained.values() if p.grad is not None]
                    logged["gradient"] = torch.nn.utils.get_total_norm(grads).float()
                    due = rank == 0 and clock.due("save", self.checkpoint_seconds)
                    for name, flag in (("stop", self.stop.asked), ("save", due)):
                        logged[name] = torch.full((), float(flag), device=device)  # filled there: nothing is copied
                    numbers = _shared(grads, torch.stack(list(logged.values())))
                    values = dict(zip(logged, numbers.tolist(), strict=True))  # waits for the device once
                    # Of any process: all save and end after the same step.
                    asked, due = (values.pop(name) > 0 for name in ("stop", "save"))
                    for what, value in (("loss", values["loss"]), ("gradient", values.pop("gradient"))):
                        if not math.isfinite(value):
                            raise _not_finite(f"the {what} of {phase}", f"{value} at", progress, rate, place)
                    if clip:
                        torch.nn.utils.clip_grad_norm_(trained.values(), clip)
                    optim.step()
                for key, value in values.items():
                    memory.sums[key] = memory.sums.get(key, 0.0) + value
                done = t + 1
                epoch_ends = done % steps_per_epoch == 0 or done == steps
                if epoch_ends:
                    since = (t % steps_per_epoch) + 1
                    line = {k: v / since for k, v in memory.sums.items()}
                    line |= {"lr": rate, "seconds": round(clock.total(), 2)}
                    line |= {f"{k}_seconds": round(v, 2) for k, v in clock.spent.items()}
                    extra: dict[str, Any] = {}
                    with evaluated():
                        for hook in (on_epoch, self.on_epoch):
                            extra |= hook(model, progress) if hook else {}
                    model.train()
                    if rank == 0:
                        self.history.write(phase=phase, step=done, epoch=progress.epoch + 1, **line, **extra)
                    self.say(_epoch_line(progress, line, extra, clock.left(done - first, steps - done)))
                    memory.sums = {}
                if asked or due or done == steps:
                    save(done)
                if asked:
                    everywhere(True)  # nobody leaves before the first has saved: a launcher ends the others then
                    raise Stopped(self.stop.asked or signal.SIGTERM)
                progress = following
                speed = clock.rate(cost["images"] // steps, done - first, steps - done, values["loss"])
                self.show(phase, done, steps, speed)
            if summed(torch.tensor(self.stop.asked, device=device)) > 0:  # after the last step had looked; it is saved
                raise Stopped(self.stop.asked or signal.SIGTERM)
        cost["flops"] = steps * flops
        optim.zero_grad(set_to_none=True)  # what the next phase does not train must not keep a gradient

    def once(self, name: str, make: Callable[[], Tensor], images: Images | None = None) -> Tensor:
        """What `make` returns of `images`, the training images by default, kept beside the checkpoints: a resumed run
        need not compute it again, unless their digest is another. What it cost under `name` is kept with it."""
        self.start()
        digest = (images or self.images).digest[:12]
        place = self.checkpoints / f"{name}-{digest}.safetensors" if self.checkpoints else None
        if everywhere(bool(place and place.exists())):
            assert place is not None
            found = load_checkpoint(place, run_hash=self.run_hash)
            assert found is not None
            if "value" not in found.tensors:
                raise unreadable(place, "it holds no value")
            if found.memory:
                self.cost[name] = {key: int(number) for key, number in found.memory.items()}
            self.seconds_before.setdefault(name, found.seconds)
            return found.tensors["value"]
        began = time.perf_counter()
        value = make()
        self.seconds_before[name] = 0.0  # this process has spent them
        if place and rank_and_world()[0] == 0:
            cost = {key: torch.tensor(number) for key, number in self.cost.get(name, {}).items()}
            made = Checkpoint(0, True, time.perf_counter() - began, {"value": value}, {}, cost)
            save_checkpoint(place, made, run_hash=self.run_hash)
        return value

    def start(self) -> None:
        """Calls `on_start`, once: by the first phase, or by the run where a method has none."""
        if self.on_start:
            self.on_start()
            self.on_start = None

    def go_before(self, model: Any) -> None:
        """Runs `before`; what it trains for itself is not what the phase trains."""
        if self.before is None:
            return
        first, self.before = self.before, None
        trains = {name: p.requires_grad for name, p in model.named_parameters()}
        first(model)
        for name, p in model.named_parameters():
            p.requires_grad_(trains[name])

    @torch.no_grad()
    def view_features(self, name: str, model: Any, images: Images, *, strong: bool = False) -> Tensor:
        """The features [N D'] of one random view of each of `images`, in order: a stream's `features`, for stages in
        which the backbone learns nothing. `name` draws the views."""
        device = next(model.parameters()).device
        rank, world = rank_and_world()
        size, found, flops = -(-min(128, len(images.labels)) // world) * world, [], 0  # the same rows for any number
        steps = -(-len(images.labels) // size)
        in_order = {name: Stream(InOrder(len(images.labels), size), images, strong)}
        for t in range(steps):
            progress = Progress(name, t, steps, steps, self.seed, rank, world)
            drawn = draw(in_order, progress, images, self.preprocess)
            views = seen(drawn, self.preprocess, device, self.dtype)[name].views
            with _counting(self.count_flops and t == 0) as counted:
                found.append(model.feature(views))
            flops = flops or counted() // size * world * len(images.labels)
            self.show(name, t + 1, steps, "")
        self.cost[name] = {"steps": 0, "images": len(images.labels), "flops": flops}
        return gathered(torch.cat(found), steps * size)[: len(images.labels)].cpu()


def _shared(grads: list[Tensor], numbers: Tensor) -> Tensor:
    """One all-reduce a step, of the trained gradients (about the size of a prompt file) and of what is logged: the
    means over processes, so that all see the same numbers, a loss that is not finite too."""
    if rank_and_world()[1] == 1:
        return numbers
    flat = averaged(torch.cat([*(grad.flatten() for grad in grads), numbers]))
    *parts, shared = flat.split([*(grad.numel() for grad in grads), len(numbers)])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
    return shared


@contextlib.contextmanager
def _counting(wanted: bool) -> Iterator[Callable[[], int]]:
    """Counts the floating-point operations of what runs inside: two for each multiply-add of the matrix products."""
    if not wanted:
        yield lambda: 0
        return
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


def _not_finite(what: str, how: str, progress: Progress, rate: float, place: Path | None) -> TrainingError:
    kept = f"; {place} keeps the last finite state" if place and place.exists() else ""
    return TrainingError(
        f"{what} is {how} step {progress.step} (epoch {progress.epoch + 1}, batch "
        f"{progress.step % progress.steps_per_epoch}, learning rate {rate:.3g}): lower method.lr, or try "
        f"train.precision=fp32{kept}"
    )


def _epoch_line(progress: Progress, line: dict[str, Any], extra: Mapping[str, Any], left: float) -> str:
    parts = [f"{progress.phase} epoch {progress.epoch + 1}/{progress.epochs}", f"loss {line['loss']:.4f}"]
    for key in ("class_accuracy", "few"):
        if isinstance(extra.get("val", {}).get(key), float):
            parts.append(f"val {key} {extra['val'][key]:.3f}")
    if "train_few" in extra:
        parts.append(f"training few {extra['train_few']:.3f}")
    if "key_usage" in extra:
        parts.append(f"key perplexity {extra['key_usage']['perplexity']:.1f}")
    return "  ".join([*parts, f"{line['seconds']:.0f} s", f"{left:.0f} s left"])
