"""Which labels are probably wrong, by cleanlab (Northcutt 2021, confident learning).

Shapes: probabilities [N C], labels [N].
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from lpt.errors import LptError, require

CERTAIN = 0.3
"""A label is listed below this share of 1/C, the probability of a guess among C classes. cleanlab's own list is as long
as the probe's mistakes are many: where that is right in six of ten images, half of all are on it."""


class Suspicion(NamedTuple):
    """Of each image [N]: whether its label is probably wrong, how good it is (0 to 1), and the likeliest other one."""

    is_issue: np.ndarray
    quality: np.ndarray
    suggested: np.ndarray


def suspicions(probabilities: Tensor, labels: Tensor, *, certain: float = CERTAIN) -> Suspicion:
    """What cleanlab makes of held-out probabilities: it counts how often images of a class are confidently of another,
    more than that one's own images are on average, and takes as many of the worst for wrong. Listed are those of them
    whose label, by its probability, is below `certain` / C; that probability is the quality. Classes without an image
    are left out. Raises NotInstalled, and LptError for fewer than two classes with images."""
    require("cleanlab", extra="audit", gives="a list of likely label errors")
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    present, own = np.unique(labels.numpy(), return_inverse=True)
    if len(present) < 2:
        raise LptError("an audit needs images of two classes: there is one")
    table = probabilities.numpy().astype(np.float64)[:, present]
    table = table / table.sum(1, keepdims=True).clip(min=1e-300)
    rows = np.arange(len(own))
    quality = get_label_quality_scores(own, table, method="self_confidence")
    issues = find_label_issues(own, table, n_jobs=1) & (quality < certain / len(present))
    others = table.copy()
    others[rows, own] = -1
    return Suspicion(issues, quality, present[others.argmax(1)])
