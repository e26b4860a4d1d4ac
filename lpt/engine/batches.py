"""What a step is given: batches of views, drawn so that a run goes on after a kill exactly as it would have.

Rows are drawn from (seed, step), views, noise and dropout from (seed, phase, step), for all processes at once.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lpt.data.augment import augmented
from lpt.data.preprocess import Preprocess


class Batch(NamedTuple):
    """Views [B 3 H W] (or features [B D']), labels [B], and the rows [B] of the stream's images that they are of."""

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


@dataclass(frozen=True)
class Stream:
    """What a step is given under one name: which images, and how they are seen.

    `images` are the training images by default. `strong` changes them by RandAugment and cutout: images in memory
    before they are cropped and flipped, files after, at the size of the view. With `features` a view is a row of them
    [N D'], and the backbone does not run; of several views of every image [V N D'] each row is one by chance.
    """

    sampler: Sampler
    images: Images | None = None
    strong: bool = False
    features: Tensor | None = None


class Drawn(NamedTuple):
    """A stream's part of a batch before it is a view: pixels and their `chance` [B 5], or bytes cut from files, or
    features."""

    found: Tensor
    chance: Tensor | None
    labels: Tensor
    rows: Tensor


def draw(
    streams: Mapping[str, Stream], progress: Progress, default: Images, preprocess: Preprocess
) -> dict[str, Drawn]:
    """What the host has to do for a step, in a thread ahead of it: files are decoded, or memory is gathered. `default`
    are the images of streams that name none."""
    out = {}
    for name, stream in streams.items():
        images = stream.images or default
        mine = stream.sampler.batch(progress.step)[progress.rank :: progress.world]
        labels, rows = images.labels[mine], len(mine)
        if (kept := stream.features) is not None:
            view = (progress.uniform(f"view/{name}", rows) * len(kept)).long() if kept.dim() == 3 else None
            out[name] = Drawn(kept[mine] if view is None else kept[view, mine], None, labels, mine)
            continue
        found, chance = images.take(mine), progress.uniform(f"view/{name}", rows, 5)
        cut = None if isinstance(found, Tensor) else preprocess.cut(found, chance)
        pixels = found if cut is None else cut
        if stream.strong:
            seeds = (progress.uniform(f"strong/{name}", rows) * 2**24).long().tolist()
            pixels = augmented(pixels, seeds, "strong")
        out[name] = Drawn(pixels, chance if cut is None else None, labels, mine)
    return out


def seen(
    drawn: Mapping[str, Drawn], preprocess: Preprocess, device: torch.device, dtype: torch.dtype
) -> dict[str, Batch]:
    """What the device does for it: pixels become views."""
    batches = {}
    for name, (found, chance, labels, rows) in drawn.items():
        views = found.to(device, non_blocking=True)
        if chance is not None:
            views = preprocess.train(views, chance.to(device), dtype=dtype)
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
