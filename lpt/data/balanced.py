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


def balanced(
    images: Images | Files,
    num_classes: int,
    per_class: Literal["min", "median", "max"] | int,
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
    counts = torch.bincount(images.labels, minlength=num_classes)
    present = counts[counts > 0]
    size = {"min": present.min(), "median": present.median(), "max": present.max()}.get(str(per_class), per_class)
    labels = images.labels.numpy()
    drawn: list[tuple[int, int]] = []  # (row, its view; -1 is the image itself)
    for k in counts.nonzero().flatten().tolist():
        order = np.random.default_rng((seed, 13, k)).permutation(np.flatnonzero(labels == k)).tolist()
        for i in range(int(size)):
            turn, row = divmod(i, len(order))[0], order[i % len(order)]
            drawn += [(row, -1)] * originals + [(row, turn * views + j) for j in range(views)]
    ids = tuple(f"{images.ids[row]}#{j}" if j >= 0 else images.ids[row] for row, j in drawn)
    chosen = images.labels[torch.tensor([row for row, _ in drawn])]

    def view(image: Tensor, row: int, j: int) -> Tensor:
        if j < 0:
            return image
        key = hashlib.sha256(f"{seed}/{images.ids[row]}/{j}".encode()).digest()
        return augmented(image[None], [int.from_bytes(key[:7], "big")], augmenter)[0]

    if isinstance(images, Images):
        return Images(torch.stack([view(images.pixels[row], row, j) for row, j in drawn]), chosen, ids)
    files = images

    def content(i: int) -> bytes:
        row, j = drawn[i]
        (file,) = files.take(torch.tensor([row]))
        changed = view(torch.from_numpy(np.array(decoded(file))).permute(2, 0, 1), row, j)
        buffer = io.BytesIO()
        Image.fromarray(changed.permute(1, 2, 0).numpy()).save(buffer, format="bmp")
        return buffer.getvalue()

    fingerprints = tuple(f"{files.fingerprints[row]}#{augmenter}{j}" for row, j in drawn)
    return Files(content, chosen, ids, fingerprints, files.stamp)
