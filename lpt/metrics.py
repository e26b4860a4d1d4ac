"""Metrics as pure functions of predictions; nothing here knows a model.

Shapes: logits or probabilities [N C], labels [N], counts [C] (training images per class). Fractions, not
percentages. A class without test images has accuracy NaN and takes part in no mean. What is asked of [N C] is asked of
some rows at a time: 24,426 images of 8,142 classes are 0.8 GB, and twice as much in double precision.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lpt.data.longtail import shot_groups


def per_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Recall of each class [C]; NaN where the test set has no image of it."""
    total = torch.bincount(labels, minlength=num_classes).double()
    correct = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    return correct / total  # 0/0 is NaN on purpose


def mean_of_present(values: Tensor) -> float | None:
    """Mean of `values` [C], NaN for a class without test images, over the other classes; None where there are none."""
    present = values[~values.isnan()]
    return present.mean().item() if len(present) else None


def paired_difference(first: Tensor, second: Tensor, labels: Tensor) -> tuple[float, float, float] | None:
    """(difference, low, high) of the class means of `first` and `second` [N], whether each answer is right, on the same
    images: Σ_c d̄_c / C with its 95 % normal interval over images, stratified by class, ± 1.96 √(Σ_c s_c²/n_c) / C. A
    class with a single image has the variance within the other classes. None without images."""
    if len(labels) == 0:
        return None
    difference = first.double() - second.double()
    counts = torch.bincount(labels)
    sums = torch.zeros(len(counts), dtype=torch.double).index_add_(0, labels, difference)
    squares = torch.zeros(len(counts), dtype=torch.double).index_add_(0, labels, difference.square())
    present = counts > 0
    n, means = counts[present].double(), sums[present] / counts[present]
    within = (squares[present] - n * means.square()).clamp(min=0)
    freedom = (n - 1).sum()
    pooled = within.sum() / freedom if freedom > 0 else difference.square().mean()
    variance = torch.where(n > 1, within / (n - 1).clamp(min=1), pooled)
    middle, half = means.mean().item(), 1.96 * (variance / n).sum().sqrt().item() / len(n)
    return middle, middle - half, middle + half


NUMBERS_AT_ONCE = 2**21
"""Entries of [N C] that are looked at together: 16 MiB in double precision."""


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices that together are all `rows` of a matrix, each of a few MiB.

    >>> [(part.start, part.stop) for part in row_slices(5, NUMBERS_AT_ONCE // 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, NUMBERS_AT_ONCE // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class Scores(NamedTuple):
    """What metrics need of each image [N]: the class of largest probability, that probability, the one of the true
    class, and Σ_k (p_k - [y = k])²."""

    predicted: Tensor
    confidence: Tensor
    of_truth: Tensor
    squares: Tensor

    @classmethod
    def joined(cls, parts: Iterable["Scores"]) -> "Scores":
        """The scores of all images from those of some at a time."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def scores(probabilities: Tensor, labels: Tensor) -> Scores:
    """Each image's scores, in double precision but for `predicted`."""
    parts = [_scores(probabilities[rows], labels[rows]) for rows in row_slices(*probabilities.shape)]
    return Scores.joined(parts or [_scores(probabilities, labels)])


def _scores(probabilities: Tensor, labels: Tensor) -> Scores:
    exact = probabilities.double()
    of_truth = exact.gather(1, labels[:, None]).squeeze(1)
    confidence = exact.amax(1) if exact.shape[1] else exact.new_zeros(len(exact))
    differences = exact.clone() if exact is probabilities else exact
    differences.scatter_(1, labels[:, None], of_truth[:, None] - 1)
    return Scores(probabilities.argmax(1), confidence, of_truth, differences.square_().sum(1))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """ECE = Σ_b n_b/n · |acc_b - conf_b| over equal-width bins of the top probability (Guo 2017)."""
    scored = scores(probabilities, labels)
    return calibration_error(scored.confidence, scored.predicted == labels, bins=bins)


def calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """ECE from confidences [N] and whether each prediction is right [N]."""
    # Bins are (a, b]; a confidence of exactly 0 belongs to the first.
    bin_of = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, bin_of, correct.double() - confidence.double())
    return gap.abs().sum().item() / max(len(confidence), 1)


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean -log p_y."""
    return _mean_surprise(scores(probabilities, labels).of_truth)


def _mean_surprise(of_truth: Tensor) -> float:
    return -of_truth.clamp(min=1e-300).log().mean().item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean Σ_k (p_k - [y = k])², in 0..2."""
    return scores(probabilities, labels).squares.mean().item()


def geometric_mean(accuracies: Tensor) -> float | None:
    """(Π a_k)^(1/C) over the present classes; 0 if any is 0 (LIFT, no floor), None where no class is present."""
    present = accuracies[~accuracies.isnan()]
    if len(present) == 0:
        return None
    if not bool((present > 0).all()):
        return 0.0
    return math.exp(present.log().mean().item())


def harmonic_mean(accuracies: Tensor, *, floor: float = 1e-5) -> float | None:
    """C / Σ 1/max(a_k, δ) over the present classes, δ = 1e-5 as a fraction (LIFT); None where there are none."""
    present = accuracies[~accuracies.isnan()]
    if len(present) == 0:
        return None
    return len(present) / (1 / present.clamp(min=floor)).sum().item()


def summarize(probabilities: Tensor, labels: Tensor, counts: Tensor, *, group_rule: str = "lt20") -> dict[str, object]:
    """Everything `report.json` says about predictions. `class_accuracy` is the mean of per-class accuracies.

    A class without test images has None in `per_class`, and a group without such images is None: JSON has no NaN.
    """
    return summarize_scores(scores(probabilities, labels), labels, counts, group_rule=group_rule)


def summarize_scores(scored: Scores, labels: Tensor, counts: Tensor, *, group_rule: str = "lt20") -> dict[str, object]:
    """`summarize` of probabilities that need not be there at once."""
    predicted = scored.predicted
    per_class = per_class_accuracy(predicted, labels, len(counts))
    groups = shot_groups(counts, group_rule)
    worst = per_class.nan_to_num(nan=math.inf).min().item()
    return {
        "accuracy": (predicted == labels).double().mean().item(),
        "class_accuracy": mean_of_present(per_class),
        **{name: mean_of_present(per_class[classes]) for name, classes in groups.items()},
        "worst_class": worst if math.isfinite(worst) else None,
        "geometric_mean": geometric_mean(per_class),
        "harmonic_mean": harmonic_mean(per_class),
        "per_class": [None if math.isnan(a) else a for a in per_class.tolist()],
        "ece": calibration_error(scored.confidence, predicted == labels),
        "nll": _mean_surprise(scored.of_truth),
        "brier": scored.squares.mean().item(),
        "group_rule": group_rule,
        "group_sizes": {name: len(classes) for name, classes in groups.items()},
    }
