"""Images that are nearly the same picture, by their neighbors among features.

Shapes: features [N D].
"""

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS = 10
"""Copies of an image that are found, at most."""
SHARE_OF_MEDIAN = 0.2
"""Of the median distance between an image and its nearest neighbor: a pair that is nearer is one picture."""


class Pair(NamedTuple):
    """Rows of two images, the lower first, and their cosine."""

    first: int
    second: int
    cosine: float


def near_duplicates(features: Tensor, *, share: float = SHARE_OF_MEDIAN) -> tuple[list[Pair], float]:
    """(pairs that are nearly the same picture, the nearest first; the cosine from which on they are taken for that).

    The distance is 1 - cosine of features. How near two different pictures of a dataset are depends on the dataset and
    the backbone, so the threshold is no fixed cosine: it is `share` of the median over images of the distance to the
    nearest neighbor. FAISS searches exactly.
    """
    import faiss

    unit = np.ascontiguousarray(F.normalize(features.float(), dim=1).numpy())
    if len(unit) < 2:
        return [], 1.0
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)  # type: ignore[call-arg]
    cosines, neighbors = index.search(unit, min(NEIGHBORS + 1, len(unit)))  # type: ignore[call-arg]
    own = np.arange(len(unit))[:, None]
    distances = np.where(neighbors == own, np.inf, np.maximum(0, 1 - cosines))
    limit = share * float(np.median(distances.min(1)))
    pairs: dict[tuple[int, int], float] = {}
    for row, place in np.argwhere(distances <= limit).tolist():
        other = int(neighbors[row, place])
        pairs[min(row, other), max(row, other)] = float(min(1.0, cosines[row, place]))
    found = [Pair(first, second, cosine) for (first, second), cosine in pairs.items()]
    return sorted(found, key=lambda pair: (-pair.cosine, pair.first, pair.second)), 1 - limit
