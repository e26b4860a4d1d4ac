"""Where a task's images lie among the features of the bare backbone: by that an image finds its task.

Shapes: features [N D'], labels [N], means [C D'], scores [101].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.metrics import row_slices
from lpt.terms import NUM_SCORES

IMAGES_OF_A_CLASS = 50
"""Of which a mean is made, at most: more would move it by little, and cost a pass of the backbone each."""
UNKNOWN = -1.0
"""The score of a task where none was measured: every image has a larger one."""


class TaskMeans(NamedTuple):
    """`means` [C D'] are unit class means of unit features, zero for a class without images. `scores` [101] are the
    quantiles, from the smallest to the largest, of what the task's own images have as their largest cosine with a mean
    that they are no part of; every class counts the same in them."""

    means: Tensor
    scores: Tensor


def sampled_rows(labels: Tensor) -> Tensor:
    """At most `IMAGES_OF_A_CLASS` rows of each class, evenly among its own; in order. [N] → [M]."""
    rows: list[Tensor] = []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        number = min(len(own), IMAGES_OF_A_CLASS)
        rows.append(own[torch.arange(number) * len(own) // number])
    return torch.cat(rows).sort().values


def task_means(features: Tensor, labels: Tensor, num_classes: int) -> TaskMeans:
    """Of all of `features`. Each image is held out of the mean of its own class when its score is taken, which is
    Σ u - u_i up to its length."""
    unit = F.normalize(features.float().cpu(), dim=1, eps=1e-12)
    sums = torch.zeros(num_classes, unit.shape[1]).index_add_(0, labels, unit)
    counts = torch.bincount(labels, minlength=num_classes)
    means = F.normalize(sums, dim=1, eps=1e-12)
    scores = torch.empty(len(unit))
    for rows in row_slices(len(unit), num_classes):
        cosines = unit[rows] @ means.T
        cosines[:, counts == 0] = UNKNOWN
        without = F.normalize(sums[labels[rows]] - unit[rows], dim=1, eps=1e-12)
        cosines.scatter_(1, labels[rows][:, None], (without * unit[rows]).sum(1, keepdim=True))
        scores[rows] = cosines.max(1).values
    known = counts[labels] > 1  # else nothing is left of its class
    return TaskMeans(means, _quantiles(scores[known], 1 / counts[labels][known]))


def means_of_sample(features: Tensor, labels: Tensor, num_classes: int) -> TaskMeans:
    """Of those rows of `features` that `sampled_rows` takes: the same whether the others were computed or not."""
    rows = sampled_rows(labels)
    return task_means(features[rows], labels[rows], num_classes)


def _quantiles(values: Tensor, weights: Tensor) -> Tensor:
    """The smallest value below or at which are 0, 1, … 100 % of the weight. [N], [N] → [101]."""
    if not len(values):
        return torch.full((NUM_SCORES,), UNKNOWN)
    order = values.argsort()
    shares = weights[order].double().cumsum(0)
    wanted = torch.linspace(0, 1, NUM_SCORES, dtype=torch.double) * shares[-1]
    return values[order][torch.searchsorted(shares, wanted).clamp(max=len(values) - 1)]
