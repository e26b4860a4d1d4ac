"""Whose image is this? The task with the class mean nearest to its feature under the bare backbone, or none.

Shapes: features [N D'], means [M D'] of all classes of all tasks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.errors import LptError
from lpt.model.task_means import TaskMeans
from lpt.terms import NUM_SCORES

MOST_FLAT = 100_000
"""Means up to which all are compared with an image; of more, those in the nearest `PROBED` of about 4 sqrt(M) cells."""
PROBED = 64


class Route(NamedTuple):
    """`task` is whose image it is, None where that is nobody's; `nearest` has the mean of largest cosine, which is
    `score`. It is nobody's below `threshold`."""

    task: str | None
    nearest: str
    score: float
    threshold: float


class Router:
    """The class means of many tasks in a FAISS index, which is made in memory and never read from disk."""

    def __init__(self, tasks: Mapping[str, TaskMeans], *, accept: float = 0.95, most_flat: int = MOST_FLAT) -> None:
        """`accept` is the share of a task's own images that its threshold is to let pass. Raises LptError for no task,
        and for a share that is none."""
        if not 0 <= accept <= 1:
            raise LptError(f"accept {accept}: give a share of a task's own images from 0 to 1")
        if not tasks:
            raise LptError("no task can be routed to: files of before have no class means, train them again")
        self.names = tuple(tasks)
        means, owners = [], []
        for number, task in enumerate(tasks.values()):
            present = task.means.float().norm(dim=1) > 0  # a class without images has no mean
            means.append(F.normalize(task.means[present].float(), dim=1, eps=1e-12).cpu())
            owners += [number] * int(present.sum())
        self.owners = np.array(owners)
        self.thresholds = [_threshold(task.scores, accept) for task in tasks.values()]
        self.index = _index(torch.cat(means).numpy(), most_flat)

    def routes(self, features: Tensor) -> list[Route]:
        """Of each of `features` [N D']."""
        unit = F.normalize(features.float().cpu(), dim=1, eps=1e-12)
        scores, rows = self.index.search(unit.numpy(), 1)
        found = []
        for score, row in zip(scores[:, 0].tolist(), rows[:, 0].tolist(), strict=True):
            number = int(self.owners[row])
            name, threshold = self.names[number], self.thresholds[number]
            found.append(Route(name if score >= threshold else None, name, score, threshold))
        return found


def _threshold(scores: Tensor, accept: float) -> float:
    """What `accept` of a task's own images are at or above."""
    return float(scores.float()[round((1 - accept) * (NUM_SCORES - 1))])


def _index(means: np.ndarray, most_flat: int) -> Any:
    import faiss

    width = means.shape[1]
    if len(means) <= most_flat:
        index: Any = faiss.IndexFlatIP(width)
    else:
        cells = int(4 * len(means) ** 0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1
        index.train(means)
        index.nprobe = min(PROBED, cells)
    index.add(means)
    return index
