"""Augmentation of whole images: torchvision's operations, each as a function of the image and a seed.

Shapes: images [B 3 h w] uint8.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Augmenter = Literal["trivial", "rand", "weak", "strong"]
"""`trivial` (Müller 2021), `rand` (Cubuk 2020, 2 operations of strength 10 of 30), `weak` (crop, flip and color), and
`strong`, which is `rand` and then a gray square of up to a quarter of the area, as FixMatch's views have it."""


def augmented(images: Tensor, seeds: Sequence[int], augmenter: Augmenter) -> Tensor:
    """Each image [B 3 h w] changed as its own of B seeds says. → uint8 [B 3 h w]."""
    operation = _operation(augmenter)
    changed: list[Tensor] = []
    # torchvision draws from the global generator, whose state must come back as it was.
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            # Not torch.manual_seed: where CUDA sleeps, that writes down who called it for each GPU, half of the time.
            torch.default_generator.manual_seed(seed)
            changed.append(operation(image))
    return torch.stack(changed)


@cache
def _operation(augmenter: Augmenter) -> Callable[[Tensor], Any]:
    from torchvision.transforms import v2

    if augmenter == "trivial":
        return v2.TrivialAugmentWide()
    if augmenter == "rand":
        return v2.RandAugment(num_ops=2, magnitude=10)
    if augmenter == "strong":
        square = v2.RandomErasing(p=1.0, scale=(0.01, 0.25), ratio=(1.0, 1.0), value=127)
        return v2.Compose([v2.RandAugment(num_ops=2, magnitude=10), square])

    def weak(image: Tensor) -> Tensor:
        crop = v2.RandomResizedCrop(list(image.shape[-2:]), scale=(0.5, 1.0), antialias=True)
        return v2.ColorJitter(0.4, 0.4, 0.4)(v2.RandomHorizontalFlip()(crop(image)))

    return weak
