"""From which probability on a label is accepted, found for each class on held-out images whose labels are known.

Shapes: held-out images [N], classes [C], candidates [T]. Groups are those of the class that is predicted.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

PRIOR_IMAGES = 10.0
"""What the group of a class says of it counts like so many held-out images of its own: a class has few."""
CANDIDATES = 512
FOLDS = 5
STRICTER = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the wanted rate of errors that are tried for a group, until labels of other images keep to it."""
EM_STEPS = 200
Z = 1.959964
"""Of intervals: 95 % of the normal distribution."""


@dataclass(frozen=True)
class HeldOut:
    """Of each held-out image the class that is predicted, its probability, and the true class; and how much it counts,
    1 on average, so that classes are as frequent as among the images to be labeled."""

    predicted: np.ndarray
    confidence: np.ndarray
    truth: np.ndarray
    weight: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        return self.predicted == self.truth

    def subset(self, rows: np.ndarray) -> "HeldOut":
        return HeldOut(self.predicted[rows], self.confidence[rows], self.truth[rows], self.weight[rows])


def class_shares(predicted: np.ndarray, truth: np.ndarray, pool_counts: np.ndarray) -> np.ndarray:
    """How frequent each class is [C] among images of which `pool_counts` [C] are predicted to be of each, by what is
    predicted for held-out images [N] of known class.

    The likeliest shares p of q(ŷ) = Σ_y P(ŷ|y) p(y) by expectation maximization (Saerens 2002, on classes in place of
    probabilities), where P(ŷ|y) has one more image that is predicted rightly, and p one more image, for each class.
    """
    classes = len(pool_counts)
    pairs = np.concatenate([truth.astype(np.int64) * classes + predicted, np.arange(classes) * (classes + 1)])
    pairs, number = np.unique(pairs, return_counts=True)  # few of C² occur
    y, guess = pairs // classes, pairs % classes
    likelihood = number / np.bincount(y, weights=number, minlength=classes)[y]
    shares = np.full(classes, 1 / classes)
    for _ in range(EM_STEPS):
        joint = likelihood * shares[y]
        responsible = joint / np.bincount(guess, weights=joint, minlength=classes)[guess]
        images = np.bincount(y, weights=responsible * pool_counts[guess], minlength=classes) + 1
        shares = images / images.sum()
    return shares


def weights(truth: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """How much each held-out image counts [N], 1 on average, for classes to have `shares` [C]."""
    present = np.bincount(truth, minlength=len(shares))
    weight = shares[truth] / present[truth]
    return weight / weight.mean()


def thresholds(held_out: HeldOut, group_of: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """The smallest probability [C] from which on labels of a class are right with the `precision` [G] of its group;
    infinite where there is none.

    What is right of class k from t on is (n_k r_k + m r_g) / (n_k + m): r_k of its own n_k images and r_g of those of
    its group and one more that is wrong, weighted, with n_k = (Σw)²/Σw² and m = 10. `group_of` [C] is the number of
    each class's group.
    """
    found = np.full(len(group_of), math.inf)
    order = np.argsort(held_out.predicted, kind="stable")
    bounds = np.searchsorted(held_out.predicted[order], np.arange(len(group_of) + 1))
    groups = {}
    for group in np.unique(group_of).tolist():
        rows = np.flatnonzero(group_of[held_out.predicted] == group)
        inside = held_out.subset(rows if len(rows) else np.arange(len(held_out.truth)))
        steps = np.unique(np.quantile(inside.confidence, np.linspace(0, 1, CANDIDATES), method="nearest"))
        of_group, images = _shares_from(inside, steps)
        groups[group] = steps, of_group * images / (images + 1)
    for k, group in enumerate(group_of.tolist()):
        steps, of_group = groups[group]
        of_class, images = _shares_from(held_out.subset(order[bounds[k] : bounds[k + 1]]), steps)
        estimate = (images * of_class + PRIOR_IMAGES * of_group) / (images + PRIOR_IMAGES)
        if (enough := np.flatnonzero(estimate >= precision[group])).size:
            found[k] = steps[enough[0]]
    return found


def _shares_from(held_out: HeldOut, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the share [T] that is right of what is at least as sure as each of `steps` [T], how many images that is of)."""
    order = np.argsort(held_out.confidence)[::-1]
    weight, right = held_out.weight[order], held_out.is_right[order]
    totals = np.concatenate([[[0.0, 0.0, 0.0]], np.cumsum(np.stack([weight, weight * right, weight**2], 1), 0)])
    number = np.searchsorted(-held_out.confidence[order], -steps, side="right")
    total, total_right, squares = totals[number].T
    share = np.divide(total_right, total, out=np.zeros_like(total), where=total > 0)
    return share, np.divide(total**2, squares, out=np.zeros_like(total), where=squares > 0)


class Chosen(NamedTuple):
    """`thresholds` [C], and which held-out images [N] are sure enough for thresholds that were found without them."""

    thresholds: np.ndarray
    kept: np.ndarray


def choose(held_out: HeldOut, group_of: np.ndarray, precision: float, groups: int = 3) -> Chosen:
    """Thresholds for a wanted `precision`. `group_of` [C] are numbers below `groups`.

    Each fifth of the held-out images is judged by thresholds that were found on the others, since thresholds look
    better than they are on the images that they were found on. For the same reason a group's may have to be stricter:
    they are those of the largest share of the rate of errors, of a few that are tried, with which the judged images
    keep to `precision`.
    """
    group = group_of[held_out.predicted]
    wanted, settled = np.full(groups, precision), np.zeros(groups, dtype=bool)
    kept = np.zeros(len(group), dtype=bool)
    for share in STRICTER:
        wanted = np.where(settled, wanted, 1 - (1 - precision) * share)
        judged = _judged(held_out, group_of, wanted)
        for number in np.flatnonzero(~settled).tolist():
            kept[group == number] = judged[group == number]
            rows = kept & (group == number)
            weight = held_out.weight[rows]
            settled[number] = not rows.any() or weight @ held_out.is_right[rows] >= precision * weight.sum()
        if settled.all():
            break
    return Chosen(thresholds(held_out, group_of, wanted), kept)


def expected(held_out: HeldOut, chosen: Chosen, inside: np.ndarray, pool: int, labeled: int) -> dict[str, Any]:
    """What is to be expected of `pool` images that are predicted to be of classes `inside` [C], and of the `labeled`
    ones of them: `precision` and `coverage` as `interval` has them, and how many held-out images say so. The coverage
    of these thresholds is known once the images are labeled; the expected one is that of thresholds found like them."""
    mask = inside[held_out.predicted]
    sure = mask & chosen.kept
    return {
        "precision": interval(held_out.is_right[sure], held_out.weight[sure], among=labeled),
        "coverage": interval(chosen.kept[mask], held_out.weight[mask], among=pool),
        "held_out_images": int(mask.sum()),
        "held_out_kept": int(sure.sum()),
    }


def _judged(held_out: HeldOut, group_of: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Which images [N] are sure enough for thresholds that were found without their fifth of the images."""
    rows = np.random.default_rng(0).permutation(len(held_out.truth))
    kept = np.zeros(len(rows), dtype=bool)
    for fold in range(FOLDS):
        judged, others = rows[fold::FOLDS], np.concatenate([rows[i::FOLDS] for i in range(FOLDS) if i != fold])
        if len(judged) and len(others):
            limits = thresholds(held_out.subset(others), group_of, precision)
            kept[judged] = held_out.confidence[judged] >= limits[held_out.predicted[judged]]
    return kept


def interval(is_so: np.ndarray, weight: np.ndarray, *, among: int = 0) -> dict[str, float] | None:
    """A weighted share r, and Wilson's 95 % interval for the share among other images: that many, or any number. None
    of no image.

    It is of n images, 1/n = 1/n_held + 1/`among`, n_held being the smaller of (Σw)²/Σw² and what the variance of the
    share says, r (1 - r) (Σw)²/Σ(w (x - r))²: where what is wrong weighs more, fewer images have to be accepted.

    >>> {key: round(value, 3) for key, value in interval(np.arange(10) < 9, np.ones(10)).items()}
    {'estimate': 0.9, 'low': 0.596, 'high': 0.982}
    """
    if not len(is_so):
        return None
    share = float(weight @ is_so / weight.sum())
    spread = float(np.square(weight * (is_so - share)).sum())
    n = float(weight.sum() ** 2 / (weight @ weight))
    if spread > 0:
        n = min(n, share * (1 - share) * float(weight.sum() ** 2) / spread)
    if among:
        n = 1 / (1 / n + 1 / among)
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return {"estimate": share, "low": max(0.0, center - half), "high": min(1.0, center + half)}
