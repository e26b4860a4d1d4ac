"""Classifiers on the pooled feature.

Shapes: feature [B D], weight [C D], logits [B C].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """cos(f, w_j) in [-1, 1], no bias. Training losses bring their own scale; `scale` is for probabilities.

    Start: uniform in (-1, 1), then unit rows (LPT's code); or give `weight` from class means or text.
    """

    def __init__(self, *, num_classes: int, width: int, scale: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        weight = torch.empty(num_classes, width).uniform_(-1, 1, generator=generator)
        self.weight = nn.Parameter(F.normalize(weight, dim=1))
        self.scale = scale

    def forward(self, feature: Tensor) -> Tensor:
        feature = F.normalize(feature.float(), dim=1, eps=1e-12)
        return feature @ F.normalize(self.weight.float(), dim=1, eps=1e-12).T


class LinearHead(nn.Module):
    """f Wᵀ + b on the raw feature; its logits carry their own scale. Start: zero, which makes every class alike."""

    scale = 1.0

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, width))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, feature: Tensor) -> Tensor:
        return F.linear(feature.float(), self.weight.float(), self.bias.float())


Head = CosineHead | LinearHead


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Unit means of the unit features of each class; a class without images gets the mean of all.

    [N D], [N] → [C D]. Balanced by construction: each class counts once whatever its number of images.
    """
    unit = F.normalize(features.float(), dim=1, eps=1e-12)
    sums = torch.zeros(num_classes, unit.shape[1], dtype=unit.dtype, device=unit.device)
    sums.index_add_(0, labels, unit)
    absent = torch.bincount(labels, minlength=num_classes) == 0
    sums[absent] = unit.mean(0)
    return F.normalize(sums, dim=1, eps=1e-12)
