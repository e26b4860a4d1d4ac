"""Training images held out again and again, each at most once: what settings are chosen by, never the test set.

Shapes: labels [N], held-out rows [H] of a fold.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpt.data.task import rows_by_class

FEWEST = 3
"""Images of a class that gives one away: two stay to learn from."""
SHARE = 5
"""One image of so many is held out in a fold."""
MOST_OF_A_CLASS = 20
"""Images of a class in a fold: the part is balanced but for the tail, which has not so many."""
MOST_OF_ALL = 10_000
"""Images of a fold, about."""
ENOUGH = 5
"""Held-out images of the smallest class that gives any, from which on a single fold says enough of the tail."""


class Folds(NamedTuple):
    """Rows held out in each fold, sorted; the classes that give none, since they have too few images."""

    held_out: tuple[Tensor, ...]
    whole: tuple[int, ...]

    def rest(self, fold: int, number: int) -> Tensor:
        """The rows of all `number` images that are trained on in a fold."""
        kept = torch.ones(number, dtype=torch.bool)
        kept[self.held_out[fold]] = False
        return kept.nonzero().flatten()


def held_out_folds(labels: Tensor, num_classes: int, *, seed: int) -> Folds:
    """A fifth of each class, 20 images at most and one at least, of classes with three images or more, as sorted rows.

    Where the smallest of these classes gives fewer than five images, there are up to five folds, in which no image is
    held out twice: a class of three images is in three of them. No class gives any where all have too few.
    """
    most = max(1, min(MOST_OF_A_CLASS, MOST_OF_ALL // num_classes))
    rng = np.random.default_rng((seed, 19))
    parts: list[list[np.ndarray]] = [[] for _ in range(SHARE)]
    whole = set(range(num_classes))
    smallest = most
    for k, rows in rows_by_class(np.arange(len(labels)), labels.cpu().numpy()).items():
        if len(rows) < FEWEST:
            continue
        whole.discard(k)
        size = min(most, max(1, len(rows) // SHARE))
        smallest = min(smallest, size)
        shuffled = rng.permutation(rows)
        for fold in range(min(SHARE, len(rows) // size)):
            parts[fold].append(shuffled[fold * size : (fold + 1) * size])
    used = parts if smallest < min(ENOUGH, most) else parts[:1]
    held_out = tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in used if part)
    return Folds(held_out, tuple(sorted(whole)))
