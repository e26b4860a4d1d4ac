"""What a step is given: batches of views, drawn so that a run continues after a kill exactly as it would have.

Rows are drawn from (seed, step), views, noise and dropout from (seed, phase, step) and the row's place in the batch of
all processes.

Shapes: pixels [B 3 h w] uint8, views [B 3 S S] float, features [B D'], labels [B].
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lpt.data.augment import Augmenter
from lpt.data.loader import AHEAD, Made, Order, Workers, made_ahead, workers_of
from lpt.data.preprocess import Preprocess

MOST_AHEAD = 2**22
"""Random numbers of a row that are drawn before they are asked for: of more, those of several steps would take much
memory."""


class Batch(NamedTuple):
    """Views [B 3 S S] (or features [B D']), labels [B], and the rows [B] of the stream's images that they are of."""

    views: Tensor
    labels: Tensor
    rows: Tensor


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
    asked: dict["Numbers", int] = field(default_factory=dict, compare=False, repr=False)
    """What the steps of the phase have asked of `uniform` and its like, and the last that did."""
    ready: dict["Numbers", Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What of that is drawn for this step."""

    @property
    def epoch(self) -> int:
        """The epoch that this step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def epochs(self) -> int:
        """Epochs of the phase; the last one may be shorter."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def steps_in_epoch(self) -> int:
        """Steps of this epoch that are done when this one is."""
        return self.step % self.steps_per_epoch + 1

    @property
    def ends_epoch(self) -> bool:
        return self.steps_in_epoch == self.steps_per_epoch or self.step + 1 == self.steps

    def uniform(self, name: str, rows: int, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) for this process's `rows` of the global batch, [rows *shape]. On the CPU, or where
        they have been drawn ahead, on the device of the batch."""
        return self._asked(Numbers("uniform", name, rows, shape))

    def normal(self, name: str, rows: int, *shape: int) -> Tensor:
        """Standard normal numbers for this process's `rows` of the global batch, as `uniform` ones."""
        return self._asked(Numbers("normal", name, rows, shape))

    def shared_normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal numbers [*shape], the same ones on every process. On the CPU or the device, as `normal`."""
        return self._asked(Numbers("shared", name, 1, shape))[0]

    def _asked(self, numbers: "Numbers") -> Tensor:
        if math.prod(numbers.shape) <= MOST_AHEAD:
            self.asked[numbers] = self.step
        ready = self.ready.pop(numbers, None)
        return self._draw(numbers) if ready is None else ready

    def draw_ahead(self, *, pinned: bool = False) -> None:
        """Draws what the steps before have asked for: the same numbers as when they are asked for, only sooner."""
        for numbers, step in list(self.asked.items()):
            if step >= self.step - 2 * AHEAD:
                drawn = self._draw(numbers)
                self.ready[numbers] = drawn.pin_memory() if pinned else drawn

    def move_to(self, device: torch.device) -> None:
        """Sends what is drawn to the device, which need not be waited for."""
        for numbers, drawn in self.ready.items():
            self.ready[numbers] = drawn.to(device, non_blocking=True)

    def _draw(self, numbers: "Numbers") -> Tensor:
        kind, name, rows, shape = numbers
        size = math.prod(shape)
        rank, world = (0, 1) if kind == "shared" else (self.rank, self.world)
        if kind == "uniform":
            return self._rows(name, rows, size, rank, world).view(rows, *shape)
        half = -(-size // 2)
        uniform = self._rows(name, rows, 2 * half, rank, world)
        # Box and Muller 1958: pairs sqrt(-2 log u) (cos, sin)(2 pi v), with u in (0, 1].
        radius = (1 - uniform[:, :half]).log_().mul_(-2).sqrt_()
        angle = uniform[:, half:].mul_(2 * math.pi)
        pairs = torch.empty(rows, 2, half)
        torch.mul(radius, angle.cos(), out=pairs[:, 0])
        torch.mul(radius, angle.sin_(), out=pairs[:, 1])
        return pairs.view(rows, 2 * half)[:, :size].reshape(rows, *shape)

    def chance(self, name: str, rows: int, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) as `uniform`, of which a row needs a few: which views are shown of it."""
        # The global batch is drawn and sliced, so that any number of processes sees the same numbers.
        generator = torch.Generator().manual_seed(int.from_bytes(self._key(name)[:7], "big"))
        return torch.rand(rows * self.world, *shape, generator=generator)[self.rank :: self.world]

    def _rows(self, name: str, rows: int, size: int, rank: int, world: int) -> Tensor:
        """Uniform numbers in [0, 1) for the `rows` of the global batch of process `rank` of `world`, [rows size].

        Philox is counted and not run through (Salmon 2011): each row of the global batch has 2^128 of its counts, and a
        process draws its own rows alone.
        """
        bits = np.random.Philox(key=np.frombuffer(self._key(name)[:16], dtype="<u8"))
        generator, state, numbers = np.random.Generator(bits), bits.state, np.empty((rows, size), dtype=np.float32)
        for i in range(rows):
            state["state"]["counter"][:] = (0, 0, rank + i * world, 0)
            bits.state = state
            generator.random(dtype=np.float32, out=numbers[i])
        return torch.from_numpy(numbers)

    def _key(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed}/{self.phase}/{self.step}/{name}".encode()).digest()


class Numbers(NamedTuple):
    """Random numbers [rows *shape] that a step asks for under a name; `shared` ones are normal, and those of process 0
    on every process."""

    kind: Literal["uniform", "normal", "shared"]
    name: str
    rows: int
    shape: tuple[int, ...]


class Sampler(Protocol):
    """Which rows of a stream's images make the global batch of a step: a pure function of the step."""

    def batch(self, step: int) -> Tensor: ...


class ImageSource(Protocol):
    """Training images: labels [N], a digest of what they are, and for indices [B] uint8 pixels [B 3 h w] or a list of
    encoded files."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def digest(self) -> Any: ...

    def take(self, indices: Tensor) -> Any: ...


@dataclass(frozen=True)
class Stream:
    """What a step is given under one name: which images, and how they are seen.

    `images` are the training images by default. `strong` changes them by RandAugment and cutout: images in memory
    before they are cropped and flipped, files after, at the size of the view. With `features` a view is a row of them
    [N D'], and the backbone does not run; of several views of every image [V N D'] each row is one by chance.
    """

    sampler: Sampler
    images: ImageSource | None = None
    strong: bool = False
    features: Tensor | None = None


class DrawnBatch(NamedTuple):
    """A stream's part of a batch before it is a view. `content` is pixels (with the `chance` [B 5] that crops and
    flips them), or bytes cut from files at the size of the view, or features."""

    content: Tensor
    chance: Tensor | None
    labels: Tensor
    rows: Tensor

    def pinned(self) -> "DrawnBatch":
        """In memory that a GPU copies while it works."""
        chance = None if self.chance is None else self.chance.pin_memory()
        return DrawnBatch(self.content.pin_memory(), chance, self.labels.pin_memory(), self.rows)


@contextlib.contextmanager
def drawn_ahead(
    streams: Mapping[str, Stream],
    steps: Iterable[Progress],
    default: ImageSource,
    preprocess: Preprocess,
    *,
    number: int,
    workers: Workers = "auto",
    pinned: bool = False,
) -> Iterator[Iterator[tuple[Progress, dict[str, DrawnBatch]]]]:
    """What the host has to do for each of the `number` of `steps`, a few of them ahead of the one that the device is
    at: files are decoded and strong views made, by processes where there are many; memory is gathered, noise drawn.
    `default` are the images of streams that name none."""

    def jobs() -> Iterator[tuple[tuple[Progress, dict[str, DrawnBatch], list[str]], list[Order]]]:
        for progress in steps:
            drawn: dict[str, DrawnBatch] = {}
            orders: dict[str, Order] = {}
            for name, stream in streams.items():
                drawn[name], order = _drawn(name, stream, progress, default, preprocess)
                if order is not None:
                    orders[name] = order
            progress.draw_ahead(pinned=pinned)
            yield (progress, drawn, list(orders)), list(orders.values())

    made = sum(len(stream.sampler.batch(0)) for stream in streams.values() if _is_made(stream, default)) * number
    with made_ahead(jobs(), workers=workers_of(workers, made) if made else 0, pinned=pinned) as results:
        yield (_whole(*item, made, pinned=pinned) for item, made in results)


def draw(
    streams: Mapping[str, Stream], progress: Progress, default: ImageSource, preprocess: Preprocess
) -> dict[str, DrawnBatch]:
    """`drawn_ahead` for one step, in this process."""
    with drawn_ahead(streams, [progress], default, preprocess, number=1, workers=0) as batches:
        return next(batches)[1]


def _is_made(stream: Stream, default: ImageSource) -> bool:
    """Whether its views are made and not gathered: of files, and strong ones."""
    if stream.features is not None:
        return False
    return stream.strong or not isinstance((stream.images or default).take(torch.zeros(1, dtype=torch.long)), Tensor)


def _whole(
    progress: Progress, drawn: dict[str, DrawnBatch], names: Sequence[str], made: Sequence[Made], *, pinned: bool
) -> tuple[Progress, dict[str, DrawnBatch]]:
    for name, one in zip(names, made, strict=True):
        drawn[name] = drawn[name]._replace(content=one.checked())
    return progress, {name: batch.pinned() if pinned else batch for name, batch in drawn.items()}


def _drawn(
    name: str, stream: Stream, progress: Progress, default: ImageSource, preprocess: Preprocess
) -> tuple[DrawnBatch, Order | None]:
    """(a stream's part of a batch, the order of what its content is to be, where that is made)."""
    images = stream.images or default
    rows = stream.sampler.batch(progress.step)[progress.rank :: progress.world]
    labels = images.labels[rows]
    if stream.features is not None:
        return DrawnBatch(_feature_rows(name, stream.features, rows, progress), None, labels, rows), None

    content, chance = images.take(rows), progress.chance(f"view/{name}", len(rows), 5)
    changes: list[tuple[Augmenter, int] | None] = []
    if stream.strong:
        # 24 bits: the integers that a float32 in [0, 1) can tell apart.
        seeds = (progress.chance(f"strong/{name}", len(rows)) * 2**24).long().tolist()
        changes = [("strong", seed) for seed in seeds]
    if not isinstance(content, Tensor):  # files are cropped, flipped and resized here; memory on the device
        preprocess = preprocess.in_epoch(progress.epoch, progress.epochs)
        order = Order(files=content, preprocess=preprocess, chance=chance.numpy(), changes=changes)
        return DrawnBatch(torch.empty(0), None, labels, rows), order
    order = Order(pixels=content.numpy(), changes=changes) if changes else None
    return DrawnBatch(content, chance, labels, rows), order


def _feature_rows(name: str, features: Tensor, rows: Tensor, progress: Progress) -> Tensor:
    """Cached features of `rows`: of [V N D'] one of the V views of each by chance."""
    if features.dim() == 2:
        return features[rows]
    view = (progress.chance(f"view/{name}", len(rows)) * len(features)).long()
    return features[view, rows]


def to_views(
    drawn: Mapping[str, DrawnBatch], preprocess: Preprocess, device: torch.device, dtype: torch.dtype
) -> dict[str, Batch]:
    """What the device has to do for a step: pixels become normalised views in `dtype`. `preprocess` is of its epoch."""
    batches = {}
    for name, (content, chance, labels, rows) in drawn.items():
        views = content.to(device, non_blocking=True)
        if chance is not None:
            views = preprocess.train(views, chance.to(device, non_blocking=True), dtype=dtype)
        elif views.dtype == torch.uint8:
            views = preprocess.normalized(views, dtype=dtype)
        batches[name] = Batch(views, labels.to(device, non_blocking=True), rows)
    return batches


@dataclass(frozen=True)
class InOrder:
    """A sampler of every image once; the last batch is filled up with the first ones."""

    images: int
    size: int

    def batch(self, step: int) -> Tensor:
        return torch.arange(step * self.size, (step + 1) * self.size) % self.images
