"""A balanced set of augmented images, drawn once from a training set (pre-finetuning's first step).

Shapes: pixels [N 3 h w] uint8, labels [N].
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lpt.data.augment import Augmenter
from lpt.data.loader import Order, Workers, made_ahead, workers_of
from lpt.data.preprocess import File
from lpt.data.task import Files, Images

PerClass = Literal["min", "median", "max"] | int
ORIGINAL = -1
"""Stands for the number of a view where the image itself is meant."""


AT_ONCE = 256
"""Images that are augmented in one order."""


@dataclass(frozen=True)
class ChangedFiles(Files):
    """Image files whose views are augmented, each as its own of `changes` says, the name of an augmentation and a
    seed."""

    changes: tuple[tuple[Augmenter, int] | None, ...] = ()

    def take(self, indices: Tensor) -> list[File]:
        """As of `Files`, with the change of each."""
        return [File(self.ids[i], self.source(i), self.changes[i]) for i in indices.tolist()]

    def subset(self, indices: Iterable[int]) -> "ChangedFiles":
        rows = [int(i) for i in indices]
        fewer = super().subset(rows)
        changes = tuple(self.changes[row] for row in rows)
        return ChangedFiles(fewer.source, fewer.labels, fewer.ids, fewer.fingerprints, fewer.stamp, changes)


def balanced(
    images: Images | Files,
    num_classes: int,
    per_class: PerClass,
    views: int,
    augmenter: Augmenter,
    *,
    seed: int,
    originals: bool = False,
    workers: Workers = "auto",
) -> Images | Files:
    """`views` augmented views of `per_class` images of each class that has any, and these images themselves with
    `originals`.

    A class with fewer images repeats them, in cycles of a shuffled order, each time under other views. Images in
    memory are augmented at once and whole, files when they are read, at the size of the view; the augmentation of view
    j of an image is a function of (seed, image, j).
    """
    size = _class_size(images.labels, num_classes, per_class)
    drawn = _draw(images.labels, size, views, seed, originals)
    ids = tuple(images.ids[row] if view == ORIGINAL else f"{images.ids[row]}#{view}" for row, view in drawn)
    labels = images.labels[torch.tensor([row for row, _ in drawn])]

    changes: list[tuple[Augmenter, int] | None] = []
    for row, view in drawn:
        key = hashlib.sha256(f"{seed}/{images.ids[row]}/{view}".encode()).digest()
        # 56 bits: torch takes 64.
        changes.append(None if view == ORIGINAL else (augmenter, int.from_bytes(key[:7], "big")))
    rows = [row for row, _ in drawn]
    if isinstance(images, Images):
        return Images(_augmented(images, rows, changes, workers), labels, ids)
    source = images.source
    fingerprints = tuple(f"{images.fingerprint(row)}#{augmenter}{view}" for row, view in drawn)
    return ChangedFiles(lambda i: source(rows[i]), labels, ids, fingerprints, images.stamp, tuple(changes))


def _augmented(
    images: Images, rows: list[int], changes: list[tuple[Augmenter, int] | None], workers: Workers
) -> Tensor:
    """The pixels of `rows` of `images`, each changed."""
    parts = (slice(first, first + AT_ONCE) for first in range(0, len(rows), AT_ONCE))
    jobs = ((None, [Order(pixels=images.pixels[rows[part]].numpy(), changes=changes[part])]) for part in parts)
    with made_ahead(jobs, workers=workers_of(workers, len(rows))) as made:
        return torch.cat([one.views for _, (one,) in made])


def _class_size(labels: Tensor, num_classes: int, per_class: PerClass) -> int:
    """How many images to draw of each class, where `per_class` may be a statistic of the classes that have any."""
    if isinstance(per_class, int):
        return per_class
    counts = torch.bincount(labels, minlength=num_classes)
    present = counts[counts > 0]
    statistics = {"min": present.min(), "median": present.median(), "max": present.max()}
    return int(statistics[per_class])


def _draw(labels: Tensor, size: int, views: int, seed: int, originals: bool) -> list[tuple[int, int]]:
    """(row, number of its view) of each image to make, class by class."""
    drawn: list[tuple[int, int]] = []
    for k in labels.unique().tolist():
        rows = np.flatnonzero(labels.numpy() == k)
        shuffled = np.random.default_rng((seed, 13, k)).permutation(rows).tolist()
        for i in range(size):
            turn, position = divmod(i, len(shuffled))
            row = shuffled[position]
            if originals:
                drawn.append((row, ORIGINAL))
            drawn += [(row, turn * views + j) for j in range(views)]
    return drawn
