"""Which images make batch t: pure functions of (seed, step), the same for any number of processes.

Every sampler gives the *global* batch of a step; process r of w takes rows r::w. Exact resume therefore needs
one integer, the step.
"""

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from lpt.errors import DataError


class _Cycle:
    """Items in shuffled passes, without end: item at position p is perm(seed, pass)[p mod n]."""

    def __init__(self, items: np.ndarray, seed: tuple[int, ...]):
        self.items, self.seed = items, seed
        self._passes: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    def at(self, position: int) -> int:
        number, offset = divmod(position, len(self.items))
        order = self._passes.get(number)
        if order is None:
            order = np.random.default_rng((*self.seed, number)).permutation(self.items)
            self._passes[number] = order
            if len(self._passes) > 3:
                self._passes.popitem(last=False)
        return int(order[offset])


class InstanceBalanced:
    """Every image once per pass, in a fresh order; passes follow one another without dropping images."""

    def __init__(self, labels: Tensor, *, batch_size: int, seed: int):
        if len(labels) == 0:
            raise DataError("there are no training images to sample from")
        self.batch_size = batch_size
        self._cycle = _Cycle(np.arange(len(labels)), (seed, 1))

    def batch(self, step: int) -> Tensor:
        """Image indices [batch_size] of step `step`."""
        first = step * self.batch_size
        return torch.tensor([self._cycle.at(first + i) for i in range(self.batch_size)])


class InstancePerStep:
    """A fresh permutation of all images every step, its first rows taken (LPT's code: i.i.d. batches)."""

    def __init__(self, labels: Tensor, *, batch_size: int, seed: int):
        if len(labels) == 0:
            raise DataError("there are no training images to sample from")
        self.num_images, self.batch_size, self.seed = len(labels), batch_size, seed

    def batch(self, step: int) -> Tensor:
        """Image indices [batch_size] of step `step`; images repeat only when there are fewer of them."""
        order = np.random.default_rng((self.seed, 2, step)).permutation(self.num_images)
        return torch.from_numpy(np.resize(order, self.batch_size))


class ClassBalanced:
    """A shuffled cycle over the classes; each draw takes `per_class` items of that class's own shuffled cycle.

    A class with fewer images repeats them inside a batch; a class without images is never drawn. (LPT §3:
    4 per class.) A batch that is no multiple of `per_class` ends inside a draw, and the next one goes on there.
    """

    def __init__(self, labels: Tensor, *, batch_size: int, per_class: int = 4, seed: int):
        if len(labels) == 0:
            raise DataError("there are no training images to sample from")
        of = labels.cpu().numpy()
        order = np.argsort(of, kind="stable")  # once, not a pass over all labels for each class
        present, first = np.unique(of[order], return_index=True)
        self.batch_size, self.per_class = batch_size, per_class
        self._classes = _Cycle(present, (seed, 3))
        self._num_present = len(present)
        items = zip(present.tolist(), np.split(order, first[1:]), strict=True)
        self._items = {k: _Cycle(rows, (seed, 4, k)) for k, rows in items}

    def batch(self, step: int) -> Tensor:
        """Image indices [batch_size] of step `step`."""
        indices = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            draw, within = divmod(position, self.per_class)
            # Each pass over the classes draws each once, so a class has been drawn `earlier` times before.
            earlier = draw // self._num_present
            cycle = self._items[self._classes.at(draw)]
            indices.append(cycle.at(earlier * self.per_class + within))
        return torch.tensor(indices)


def instance_weight(start: float, progress: float) -> float:
    """η = max(0, η0 (E - e)/E), the weight of the instance-balanced stream; `progress` is e/E. (LPT §2.6)

    >>> round(instance_weight(0.5, 89 / 90), 4)
    0.0056
    """
    return max(0.0, start * (1 - progress))
