"""A balanced set of augmented images, drawn once from a training set (pre-finetuning's first step).

Shapes: pixels [N 3 h w] uint8, labels [N].
"""

import hashlib
import io
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpt.data.augment import Augmenter, augmented
from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images

PerClass = Literal["min", "median", "max"] | int
ORIGINAL = -1
"""Stands for the number of a view where the image itself is meant."""


def balanced(
    images: Images | Files,
    num_classes: int,
    per_class: PerClass,
    views: int,
    augmenter: Augmenter,
    *,
    seed: int,
    originals: bool = False,
) -> Images | Files:
    """`views` augmented views of `per_class` images of each class that has any, and these images themselves with
    `originals`.

    A class with fewer images repeats them, in cycles of a shuffled order, each time under other views. Images in
    memory are augmented at once, files when they are read; view j of an image is a function of (seed, image, j).
    """
    size = _class_size(images.labels, num_classes, per_class)
    drawn = _draw(images.labels, size, views, seed, originals)
    ids = tuple(images.ids[row] if view == ORIGINAL else f"{images.ids[row]}#{view}" for row, view in drawn)
    labels = images.labels[torch.tensor([row for row, _ in drawn])]

    def seen_as(image: Tensor, row: int, view: int) -> Tensor:
        if view == ORIGINAL:
            return image
        key = hashlib.sha256(f"{seed}/{images.ids[row]}/{view}".encode()).digest()
        seed_of_view = int.from_bytes(key[:7], "big")  # 56 bits: torch takes 64
        return augmented(image[None], [seed_of_view], augmenter)[0]

    if isinstance(images, Images):
        return Images(torch.stack([seen_as(images.pixels[row], row, view) for row, view in drawn]), labels, ids)
    files = images

    def encoded(i: int) -> bytes:
        row, view = drawn[i]
        (file,) = files.take(torch.tensor([row]))
        image = torch.from_numpy(np.array(decoded(file))).permute(2, 0, 1)
        changed = seen_as(image, row, view).permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(changed).save(buffer, format="bmp")  # loses nothing, and takes no time to compress
        return buffer.getvalue()

    fingerprints = tuple(f"{files.fingerprints[row]}#{augmenter}{view}" for row, view in drawn)
    return Files(encoded, labels, ids, fingerprints, files.stamp)


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
