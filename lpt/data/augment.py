"""Augmentation of whole images: torchvision's operations, each as a function of the image and a seed.

They are done by Pillow, which takes half of the time that they take as tensors. Shapes: images [B 3 h w] uint8.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Augmenter = Literal["trivial", "rand", "weak", "strong"]
"""`trivial` (Müller 2021), `rand` (Cubuk 2020, 2 operations of strength 10 of 30), `weak` (crop, flip and color), and
`strong`, which is `rand` and then a gray square of up to a quarter of the area, as FixMatch's views have it."""


SQUARE = (0.01, 0.25)
"""The area of the gray square, as a share of the image's."""
GRAY = 127


def augmented(images: Tensor, seeds: Sequence[int], augmenter: Augmenter) -> Tensor:
    """Each image [B 3 h w] changed as its own of B seeds says. → uint8 [B 3 h w]."""
    operation = _operation(augmenter)
    changed: list[Tensor] = []
    # torchvision draws from the global generator, whose state must come back as it was.
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            # Not torch.manual_seed: where CUDA sleeps, that writes down who called it for each GPU, half of the time.
            torch.default_generator.manual_seed(seed)
            after = operation(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
            changed.append(torch.from_numpy(np.array(after)).permute(2, 0, 1))
            if augmenter == "strong":
                _cover(changed[-1], *torch.rand(3).tolist())
    return torch.stack(changed)


def _cover(image: Tensor, area: float, top: float, left: float) -> None:
    """Puts a gray square into an image [3 h w], where three numbers in [0, 1) say (DeVries 2017, as FixMatch has it).
    torchvision's RandomErasing takes longer than all else."""
    height, width = image.shape[1:]
    smallest, largest = SQUARE
    side = round(math.sqrt((smallest + (largest - smallest) * area) * height * width))
    side = min(max(1, side), height, width)
    y, x = int(top * (height - side + 1)), int(left * (width - side + 1))
    image[:, y : y + side, x : x + side] = GRAY


@cache
def _operation(augmenter: Augmenter) -> Callable[[Image.Image], Any]:
    from torchvision.transforms import v2

    if augmenter == "trivial":
        return v2.TrivialAugmentWide()
    if augmenter in ("rand", "strong"):
        return v2.RandAugment(num_ops=2, magnitude=10)

    def weak(image: Image.Image) -> Any:
        crop = v2.RandomResizedCrop([image.height, image.width], scale=(0.5, 1.0))
        return v2.ColorJitter(0.4, 0.4, 0.4)(v2.RandomHorizontalFlip()(crop(image)))

    return weak
