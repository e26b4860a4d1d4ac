"""Which of several candidates is taken, from what each got right on the same held-out images.

Shapes: labels, right [H] (whether a prediction is right), weights [H], counts [C].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lpt.data.longtail import shot_groups

Metric = Literal["class_mean", "few", "accuracy"]
Z_SHOWN, Z_CHOICE = 1.96, 1.2816
"""Half widths of intervals in standard errors: 95 % in tables, 80 % where one candidate is preferred to another. So one
in ten is preferred for nothing where there is no difference; with 95 %, half of the differences of four points would be
taken for noise on a thousand held-out images, and the cheaper at that price."""
CHEAPER = 1.5
"""How many times more a candidate must cost than another one to be the dearer of the two."""


class Estimate(NamedTuple):
    """A number from held-out images, and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Finalist:
    """A candidate at its full schedule: what it got right [H], nan where it was not asked, and the seconds that its
    training on all images takes by the plan. `is_reference` marks the one that others have to beat."""

    name: str
    right: Tensor
    seconds: float
    is_reference: bool = False


def image_weights(labels: Tensor, counts: Tensor, *, metric: Metric, group_rule: str) -> Tensor:
    """The share [H] of each held-out image in a metric, so that it is Σ w · right; they sum to 1, and to 0 where no
    held-out image takes part.

    Classes count alike in `class_mean`, those of the few-shot group alone in `few`, and by their training images in
    `accuracy`: the held-out part is balanced, and images to come are not.
    """
    held_out = torch.bincount(labels, minlength=len(counts))
    of_class = torch.ones(len(counts), dtype=torch.double)
    if metric == "accuracy":
        of_class = counts.double()
    elif metric == "few":
        few = shot_groups(counts, group_rule)["few"]
        of_class = torch.zeros_like(of_class).index_fill_(0, few, 1.0)
    of_class[held_out == 0] = 0
    weights = (of_class / held_out.clamp(min=1))[labels]
    return weights / weights.sum() if weights.sum() > 0 else weights


def estimate(values: Tensor, weights: Tensor, *, z: float = Z_SHOWN) -> Estimate:
    """Σ w v of `values` [H] in -1..1, with an interval of ± z errors, from Σ w² (v - mean)² over images as independent
    draws.

    Two images more of mean weight, one with +1 and one with -1, are in the interval but not in the value (after Agresti
    and Min 2005): of three images that agree, nobody is sure.
    """
    asked = ~values.isnan()
    total = weights[asked].sum()
    if total <= 0:
        return Estimate(math.nan, -math.inf, math.inf)
    w, v = weights[asked] / total, values[asked].double()
    extra = (w.square().sum() / w.sum()).item()  # the weight of an image as it counts in the variance
    mean = (w * v).sum().item()
    center = mean / (1 + 2 * extra)
    variance = (w.square() * (v - center).square()).sum().item()
    variance += extra**2 * ((1 - center) ** 2 + (1 + center) ** 2)
    half = z * math.sqrt(variance) / (1 + 2 * extra)
    return Estimate(mean, center - half, center + half)


def score(right: Tensor, weights: Tensor) -> Estimate:
    """The metric of one candidate, whose `right` [H] are 0 and 1: as `estimate`, from 2 · right - 1 in -1..1."""
    found = [(1 + value) / 2 for value in estimate(2 * right.double() - 1, weights)]
    return Estimate(found[0], max(0.0, found[1]), min(1.0, found[2]))


def difference(one: Tensor, other: Tensor, weights: Tensor, *, z: float = Z_SHOWN) -> Estimate:
    """`one` minus `other`, by the images that both were asked."""
    return estimate(one.double() - other.double(), weights, z=z)


def halved(scores: Mapping[str, float], keep: int) -> list[str]:
    """The `keep` best by score, ties in the order given.

    Successive halving (Jamieson 2016) in a line: Optuna's pruners are made for long queues, and its successive halving
    lets every one of the first four trials through; scikit-learn's HalvingGridSearchCV trains estimators on growing
    shares of the data, and an adapter for ours is 35 lines.
    """
    return sorted(scores, key=lambda name: -scores[name])[:keep]


def choose(finalists: Sequence[Finalist], weights: Tensor) -> Finalist:
    """The reference, unless others are better by more than noise: then the best of those, or one that is cheaper where
    the difference between the two is noise.

    What cannot be told apart from the reference is never taken in its place, cheaper or not: with few held-out images
    class means may seem as good as a probe by chance, and save seconds.
    """
    reference = next(one for one in finalists if one.is_reference)

    def is_better(one: Finalist) -> bool:
        return one is not reference and difference(one.right, reference.right, weights, z=Z_CHOICE).low > 0

    better = [one for one in finalists if is_better(one)]
    return _cheapest_of_the_best(better, weights) if better else reference


def _cheapest_of_the_best(finalists: Sequence[Finalist], weights: Tensor) -> Finalist:
    best = max(finalists, key=lambda one: score(one.right, weights).value)
    tied = [
        one
        for one in finalists
        if CHEAPER * one.seconds <= best.seconds and difference(best.right, one.right, weights, z=Z_CHOICE).low <= 0
    ]
    return _cheapest_of_the_best(tied, weights) if tied else best
