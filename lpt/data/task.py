"""A task: training, held-out and test images of one label set, frozen and hashed.

Shapes: pixels [N 3 h w] uint8, labels [N], counts [C].
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpt.data.preprocess import File
from lpt.errors import DataError


@dataclass(frozen=True)
class Images:
    """Labelled images that fit in memory as uint8; views are drawn from them batch by batch."""

    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.pixels) == len(self.labels) == len(self.ids)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids and pixels, in this order."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(f"{tuple(self.pixels.shape)}".encode())
        digest.update(self.pixels.numpy().tobytes())
        return digest.hexdigest()

    def take(self, indices: Tensor) -> Tensor:
        """[B] → uint8 [B 3 h w]."""
        return self.pixels[indices]

    def subset(self, indices: Iterable[int]) -> "Images":
        chosen = torch.as_tensor(list(indices), dtype=torch.long)
        return Images(self.pixels[chosen], self.labels[chosen], tuple(self.ids[i] for i in chosen.tolist()))

    def content(self, rows: np.ndarray) -> bytes:
        """What a split's hash covers beside ids and labels: the pixels."""
        return self.pixels[torch.from_numpy(rows)].numpy().tobytes()


@dataclass(frozen=True)
class Files:
    """Labelled image files, read when they are asked for.

    `source(i)` is the path of image i, or its encoded bytes; `fingerprints` say what is in each (size, hash) without
    regard to where and when it was written; `stamp` changes also when a file is only written anew, or lies elsewhere.
    """

    source: Callable[[int], str | bytes]
    labels: Tensor
    ids: tuple[str, ...]
    fingerprints: tuple[str, ...]
    stamp: str = ""

    def __post_init__(self) -> None:
        assert len(self.labels) == len(self.ids) == len(self.fingerprints)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids, in this order, fingerprints and stamp."""
        return hashlib.sha256("\n".join([self.stamp, *self.ids, *self.fingerprints]).encode()).hexdigest()

    def take(self, indices: Tensor) -> list[File]:
        """[B] → encoded images, for `Preprocess.cut`."""
        return [File(self.ids[i], self.source(i)) for i in indices.tolist()]

    def subset(self, indices: Iterable[int]) -> "Files":
        chosen = [int(i) for i in indices]
        ids, fingerprints = (tuple(of[i] for i in chosen) for of in (self.ids, self.fingerprints))
        source = self.source
        return Files(lambda i: source(chosen[i]), self.labels[chosen], ids, fingerprints, self.stamp)

    def plus(self, other: "Files") -> "Files":
        mine, n = self.source, len(self)
        ids, fingerprints = self.ids + other.ids, self.fingerprints + other.fingerprints
        labels = torch.cat([self.labels, other.labels])
        return Files(
            lambda i: mine(i) if i < n else other.source(i - n), labels, ids, fingerprints, self.stamp + other.stamp
        )

    def content(self, rows: np.ndarray) -> bytes:
        """What a split's hash covers beside ids and labels: the fingerprints, so that a long list starts at once."""
        return "\n".join(self.fingerprints[i] for i in rows.tolist()).encode()


@dataclass(frozen=True)
class Task:
    """One dataset with its label set. `counts` always come from the training part, never from labels present."""

    name: str
    classes: tuple[str, ...]
    train: Images | Files
    test: Images | Files
    val: Images | Files | None = None
    unlabeled: Images | Files | None = None
    """Images whose labels no method may train on; where the truth is known they hold it, for the audit, else -1."""
    group_rule: str = "lt20"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DataError(f"{self.name} has {len(self.classes)} class: a task needs at least 2")

    @cached_property
    def counts(self) -> Tensor:
        """Training images of each class [C]; 0 for a class without any."""
        return torch.bincount(self.train.labels, minlength=len(self.classes))

    @property
    def imbalance_factor(self) -> float:
        """n_max / n_min over the classes that have training images."""
        present = self.counts[self.counts > 0]
        return round((present.max() / present.min()).item(), 4)

    def manifest(self) -> dict[str, Any]:
        """What exactly is in the split: facts, counts, ids and a SHA-256 over ids, roles, labels and pixels (of files:
        their sizes, or a hash of their bytes in a table; of those in published or own lists nothing but their paths).

        The hash depends on neither file-system order nor working directory: rows are sorted by role and id.
        """
        digest = hashlib.sha256()
        parts: dict[str, Any] = {}
        roles = {"train": self.train, "unlabeled": self.unlabeled, "val": self.val, "test": self.test}
        names = [*self.classes, ""]  # the last, -1, is an unknown label
        for role, images in roles.items():
            if images is None:
                continue
            order = np.argsort(np.array(images.ids))
            for i in order.tolist():
                digest.update(f"{role}\t{images.ids[i]}\t{names[int(images.labels[i])]}\n".encode())
            digest.update(images.content(order))
            parts[role] = {"images": len(images), "ids": [images.ids[i] for i in order.tolist()]}
        return {
            "name": self.name,
            **self.facts,
            "imbalance_factor": self.imbalance_factor,
            "classes": list(self.classes),
            "counts": self.counts.tolist(),
            "sha256": digest.hexdigest(),
            "parts": parts,
        }

    def summary_lines(self) -> list[str]:
        """What a run says of its data before it trains: a line on sizes, and a warning for each thing amiss."""
        held = f", {len(self.unlabeled)} unlabelled" if self.unlabeled else ""
        held += f", {len(self.val)} held out" if self.val else ""
        split = f" ({self.facts['test_part']})" if "test_part" in self.facts else ""
        lines = [
            f"{self.name} ({self.facts.get('variant')}): {len(self.train)} training images of {len(self.classes)} "
            f"classes, {int(self.counts.max())} to {int(self.counts.min())} each{held}, {len(self.test)} test images"
            + split
        ]
        warnings = {
            "left_out": "{} images belong to no class and are left out",
            "skipped": "{} images cannot be decoded and are skipped",
            "leaked": "{} unlabelled images are test images too",
            "empty_folders": "{} folders hold no image and are no classes",
        }
        for fact, text in warnings.items():
            if names := self.facts.get(fact):
                lines.append(f"warning: {text.format(len(names))}, for example {names[0]}")
        for name in self.absent_classes():
            lines.append(f"warning: class {name!r} has no training image; it is kept, and cannot be learned")
        return lines

    def absent_classes(self) -> list[str]:
        """Classes without a single training image; they stay in the label set and are reported."""
        return [name for name, n in zip(self.classes, self.counts.tolist(), strict=True) if n == 0]


def hold_out(
    candidates: np.ndarray, chosen: np.ndarray, labels: np.ndarray, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A balanced held-out part of a training set: → (chosen without it, held out), as sorted indices.

    As ImageNet-LT does it: `per_class` images of each class from `candidates`, the official training images
    that the long tail leaves out, topped up from the class's own chosen images where too few are left.
    """
    rng = np.random.default_rng((seed, 7))
    held: list[np.ndarray] = []
    spare = rows_by_class(np.setdiff1d(candidates, chosen), labels)
    mine, none = rows_by_class(np.sort(chosen), labels), chosen[:0]
    for k in np.unique(labels[candidates]).tolist():
        free = rng.permutation(spare.get(k, none))[:per_class]
        own = mine.get(k, none)
        missing = min(per_class - len(free), max(len(own) - 1, 0))
        taken = rng.permutation(own)[:missing] if missing > 0 else none
        held += [free, taken]
    out = np.sort(np.concatenate([none, *held]))
    return np.setdiff1d(chosen, out), out


def rows_by_class(rows: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """The `rows` of each class that has some, in their order; `labels` are those of all rows."""
    if len(rows) == 0:
        return {}
    order = np.argsort(labels[rows], kind="stable")
    present, first = np.unique(labels[rows][order], return_index=True)
    return dict(zip(present.tolist(), np.split(rows[order], first[1:]), strict=True))
