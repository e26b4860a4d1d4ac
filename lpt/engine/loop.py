"""The loop: one for every method and phase.

A step is a function `(model, {stream: batch}, progress) -> {"loss": scalar, ...scalars to log}`. It may also yield
several of them, parts of one sum: each part's backward has run before the next one is computed, so that activations
of one part are held at a time. Batches are
drawn from (seed, step), views, noise and dropout from (seed, phase, step), so that a run goes on after a kill exactly
as it would have.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lpt.engine.checkpoint import (
    Checkpoint,
    everywhere,
    load_checkpoint,
    optimizer_moments,
    restore_moments,
    save_checkpoint,
)
from lpt.engine.optim import Optimizer, Warmup, lr_at, make_optimizer
from lpt.errors import TrainingError
from lpt.history import History
from lpt.preprocess import Preprocess


class Batch(NamedTuple):
    views: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Progress:
    """Where a phase is, and the source of everything random in this step."""

    phase: str
    step: int
    steps: int
    steps_per_epoch: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def epochs(self) -> int:
        return -(-self.steps // self.steps_per_epoch)

    def uniform(self, name: str, rows: int, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) for this process's `rows` of the global batch, [rows *shape]."""
        return self._draw(torch.rand, name, rows, shape)

    def normal(self, name: str, rows: int, *shape: int) -> Tensor:
        """Standard normal numbers for this process's `rows` of the global batch, [rows *shape]."""
        return self._draw(torch.randn, name, rows, shape)

    def _draw(self, draw: Callable[..., Tensor], name: str, rows: int, shape: tuple[int, ...]) -> Tensor:
        # The global batch is drawn and sliced, so that any number of processes sees the same numbers.
        key = hashlib.sha256(f"{self.seed}/{self.phase}/{self.step}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        return draw(rows * self.world, *shape, generator=generator)[self.rank :: self.world]


class Sampler(Protocol):
    def batch(self, step: int) -> Tensor: ...


class Images(Protocol):
    """Training images: labels [N], a digest of what they are, and for indices [B] uint8 pixels [B 3 h w] or a list of
    encoded files."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def digest(self) -> Any: ...

    def take(self, indices: Tensor) -> Any: ...


class Drawn(NamedTuple):
    """A stream's part of a batch before it is a view: pixels and their `chance` [B 5], or bytes cut from files, or
    features."""

    found: Tensor
    chance: Tensor | None
    labels: Tensor


Part = Mapping[str, Tensor]
Step = Callable[[Any, dict[str, Batch], Progress], Part | Iterator[Part]]
EpochEnd = Callable[[Any, Progress], Mapping[str, Any]]


@dataclass
class Fit:
    """Bound once by a run with device, data, history and folder; called once for every phase.

    `batch_size` is the global batch of a stream. `accelerator` (accelerate) gives device and processes; None is
    one process on the model's device. `say` gets a line of text for people, `show` the running numbers.
    """

    images: Images
    preprocess: Preprocess
    batch_size: int
    seed: int = 0
    history: History = field(default_factory=History)
    checkpoints: Path | None = None
    feature_cache: Path | None = None
    """A folder for features of fixed views, which several runs may share (`lpt.evaluate.features`)."""
    run_hash: str = ""
    accelerator: Any = None
    dtype: torch.dtype = torch.float32
    checkpoint_seconds: float = 30.0
    on_start: Callable[[], None] | None = None
    """Called once, when the method has accepted its settings and before anything is written or trained."""
    on_epoch: EpochEnd | None = None
    before: Callable[[Any], None] | None = None
    """A first step that a method puts before another's first phase: called once, with the model that is to train."""
    seconds_before: dict[str, float] = field(default_factory=dict)
    """Seconds by phase that earlier, killed processes have spent on what this one did not do again."""
    say: Callable[[str], None] = lambda text: None
    show: Callable[[str, int, int, str], None] = lambda phase, step, steps, text: None

    def __call__(
        self,
        phase: str,
        model: Any,
        step: Step,
        streams: Mapping[str, Sampler],
        *,
        steps: int,
        steps_per_epoch: int,
        optimizer: Optimizer,
        lr: float,
        weight_decay: float,
        warmup: Warmup = "linear",
        images: Images | None = None,
        features: Tensor | None = None,
        clip: float | None = None,
        on_epoch: EpochEnd | None = None,
    ) -> None:
        """Trains what `requires_grad` in `model`; returns when `steps` are done (at once if they were before).

        A stage on other images than the training images gives `images`. One that trains the head alone gives the
        `features` [N D'] of all its images: a batch's views are rows of them, and the backbone does not run. `clip` is
        the largest norm of all gradients together.
        """
        self.start()
        self.go_before(model)
        images = images or self.images
        rank, world = 0, 1
        if self.accelerator is not None:
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.batch_size % world:
            raise TrainingError(
                f"train.batch_size {self.batch_size} cannot be shared by {world} processes: use a multiple"
            )
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = {p: name for name, p in trained.items()}
        device = next(iter(trained.values())).device
        optim = make_optimizer(optimizer, trained.values(), weight_decay=weight_decay)
        place = self.checkpoints / f"{phase}.safetensors" if self.checkpoints else None

        first, before = 0, 0.0
        if place and (found := load_checkpoint(place, run_hash=self.run_hash)):
            model.load_adapted(found.tensors)
            before = found.seconds
            self.seconds_before[phase] = before
            if found.finished:
                self.say(f"{phase}: finished before")
                return
            restore_moments(optim, found.moments, trained)
            first = found.step
            self.say(f"{phase}: goes on at step {first} of {steps}")
        if rank == 0:
            self.history.rewind(phase, first)

        clock = _Clock()

        def save(done: int) -> None:
            if place and rank == 0:
                spent = before + clock.total()
                state = Checkpoint(done, done == steps, spent, model.adapted(), optimizer_moments(optim, names))
                save_checkpoint(place, state, run_hash=self.run_hash)

        model.train()
        sums: dict[str, float] = {}
        with ThreadPoolExecutor(1) as ahead:
            progress = Progress(phase, first, steps, steps_per_epoch, self.seed, rank, world)
            waiting = ahead.submit(self._draw, images, streams, features, progress)
            for t in range(first, steps):
                with clock.charge("wait"):
                    drawn = waiting.result()
                    following = replace(progress, step=t + 1)
                    if t + 1 < steps:
                        waiting = ahead.submit(self._draw, images, streams, features, following)
                with clock.charge("views"):
                    batches = self._views(drawn, device)
                with clock.charge("compute"):
                    rate = lr_at(t, steps=steps, steps_per_epoch=steps_per_epoch, lr=lr, warmup=warmup)
                    for group in optim.param_groups:
                        group["lr"] = rate
                    optim.zero_grad(set_to_none=True)
                    found = step(model, batches, progress)
                    logged: dict[str, Tensor] = {}
                    for part in (found,) if isinstance(found, Mapping) else found:
                        part["loss"].backward()
                        for key, value in part.items():
                            logged[key] = logged.get(key, 0) + value.detach().float()
                    self._share_gradients(list(trained.values()), world)
                    numbers = torch.stack(list(logged.values())).tolist()  # waits for the device once
                    values = dict(zip(logged, numbers, strict=True))
                    _check_finite(values["loss"], progress, rate, place)
                    if clip:
                        torch.nn.utils.clip_grad_norm_(trained.values(), clip)
                    optim.step()
                for key, value in values.items():
                    sums[key] = sums.get(key, 0.0) + value
                done = t + 1
                epoch_ends = done % steps_per_epoch == 0 or done == steps
                if epoch_ends:
                    since = (t % steps_per_epoch) + 1
                    line = {k: v / min(since, done - first) for k, v in sums.items()}
                    line |= {"lr": rate, "seconds": round(clock.total(), 2)}
                    line |= {f"{k}_seconds": round(v, 2) for k, v in clock.spent.items()}
                    extra: dict[str, Any] = {}
                    for hook in (on_epoch, self.on_epoch):
                        extra |= hook(model, progress) if hook else {}
                    model.train()
                    if rank == 0:
                        self.history.write(phase=phase, step=done, epoch=progress.epoch + 1, **line, **extra)
                    self.say(_epoch_line(progress, line, extra, clock.left(done - first, steps - done)))
                    sums = {}
                if done == steps or clock.due("save", self.checkpoint_seconds):
                    save(done)
                progress = following
                a_step = len(streams) * self.batch_size
                self.show(phase, done, steps, clock.rate(a_step, done - first, steps - done, values["loss"]))
        optim.zero_grad(set_to_none=True)  # what the next phase does not train must not keep a gradient

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns of the training images, kept beside the checkpoints: a resumed run need not compute it
        again, unless an image file was written anew."""
        self.start()
        place = self.checkpoints / f"{name}-{self.images.digest[:12]}.safetensors" if self.checkpoints else None
        if everywhere(bool(place and place.exists())):
            assert place is not None
            found = load_checkpoint(place, run_hash=self.run_hash)
            assert found is not None
            return found.tensors["value"]
        value = make()
        if place and (self.accelerator is None or self.accelerator.is_main_process):
            save_checkpoint(place, Checkpoint(0, True, 0.0, {"value": value}, {}), run_hash=self.run_hash)
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

    def _draw(
        self, images: Images, streams: Mapping[str, Sampler], features: Tensor | None, progress: Progress
    ) -> dict[str, Drawn]:
        """Runs ahead in a thread: files are decoded (or memory is gathered) while the step before is computed."""
        out = {}
        for name, sampler in streams.items():
            mine = sampler.batch(progress.step)[progress.rank :: progress.world]
            labels = images.labels[mine]
            if features is not None:
                out[name] = Drawn(features[mine], None, labels)
                continue
            found, chance = images.take(mine), progress.uniform(f"view/{name}", len(mine), 5)
            cut = None if isinstance(found, Tensor) else self.preprocess.cut(found, chance)
            out[name] = Drawn(found, chance, labels) if cut is None else Drawn(cut, None, labels)
        return out

    def _views(self, drawn: Mapping[str, Drawn], device: torch.device) -> dict[str, Batch]:
        batches = {}
        for name, (found, chance, labels) in drawn.items():
            views = found.to(device, non_blocking=True)
            if chance is not None:
                views = self.preprocess.train(views, chance.to(device), dtype=self.dtype)
            elif views.dtype == torch.uint8:
                views = self.preprocess.normalised(views, dtype=self.dtype)
            batches[name] = Batch(views, labels.to(device, non_blocking=True))
        return batches

    def _share_gradients(self, parameters: list[Any], world: int) -> None:
        """One all-reduce a step, of the trained gradients alone (about the size of a prompt file)."""
        if world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in grads]), reduction="mean")
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def _check_finite(loss: float, progress: Progress, rate: float, place: Path | None) -> None:
    if math.isfinite(loss):
        return
    kept = f"; {place} keeps the last finite state" if place and place.exists() else ""
    raise TrainingError(
        f"the loss of {progress.phase} is {loss} at step {progress.step} (epoch {progress.epoch + 1}, batch "
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


class _Clock:
    """Wall time of this process's part of a phase: in all, and by what it was spent on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.spent: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def total(self) -> float:
        return time.perf_counter() - self.start

    def charge(self, what: str) -> "_Charge":
        return _Charge(self, what)

    def due(self, what: str, seconds: float) -> bool:
        now = time.perf_counter()
        if now - self._last.setdefault(what, self.start) < seconds:
            return False
        self._last[what] = now
        return True

    def left(self, done: int, more: int) -> float:
        return self.total() / max(done, 1) * more

    def rate(self, images: int, done: int, more: int, loss: float) -> str:
        speed = images * done / max(self.total(), 1e-9)
        return f"loss {loss:.3f}  {speed:.0f} images/s  {self.left(done, more):.0f} s left"


class _Charge:
    def __init__(self, clock: _Clock, what: str):
        self.clock, self.what = clock, what

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = self.clock.spent
        spent[self.what] = spent.get(self.what, 0.0) + time.perf_counter() - self.began
