"""Which images make the batch of a step: pure functions of (seed, step), the same for any number of processes.

Every sampler gives the *global* batch of a step; process r of w takes rows r::w. Exact resume therefore needs
one integer, the step. Shapes: labels [N], batches [B] of image indices.
"""

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from lpt.data.task import rows_by_class
from lpt.errors import DataError


class _Cycle:
    """n items in shuffled passes, without end: the item at position p is permutation(seed, p // n)[p mod n]."""

    def __init__(self, items: np.ndarray, seed: tuple[int, ...]):
        self.items, self.seed = items, seed
        # The latest three alone: steps come in order, so earlier passes are not asked for again.
        self._passes: OrderedDict[int, np.ndarray] = OrderedDict()

    def at(self, position: int) -> int:
        number, offset = divmod(position, len(self.items))
        if number not in self._passes:
            self._passes[number] = np.random.default_rng((*self.seed, number)).permutation(self.items)
            if len(self._passes) > 3:
                self._passes.popitem(last=False)
        return int(self._passes[number][offset])


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
    """The first rows of a fresh permutation of all images at every step: independent batches, as in LPT's code."""

    def __init__(self, labels: Tensor, *, batch_size: int, seed: int):
        if len(labels) == 0:
            raise DataError("there are no training images to sample from")
        self.num_images, self.batch_size, self.seed = len(labels), batch_size, seed

    def batch(self, step: int) -> Tensor:
        """Image indices [batch_size] of step `step`; images repeat only when there are fewer of them."""
        order = np.random.default_rng((self.seed, 2, step)).permutation(self.num_images)
        return torch.from_numpy(np.resize(order, self.batch_size))


class ClassBalanced:
    """A shuffled cycle over the classes; each draw takes `per_class` images of that class's own shuffled cycle (LPT §3,
    with 4 per class).

    A class with fewer images repeats them inside a batch; a class without images is never drawn. A batch that is no
    multiple of `per_class` ends inside a draw, and the next one continues there.
    """

    def __init__(self, labels: Tensor, *, batch_size: int, per_class: int = 4, seed: int):
        if len(labels) == 0:
            raise DataError("there are no training images to sample from")
        self.batch_size, self.per_class = batch_size, per_class
        by_class = rows_by_class(np.arange(len(labels)), labels.cpu().numpy())
        self._classes = _Cycle(np.array(list(by_class)), (seed, 3))
        self._images = {k: _Cycle(rows, (seed, 4, k)) for k, rows in by_class.items()}

    def batch(self, step: int) -> Tensor:
        """Image indices [batch_size] of step `step`."""
        indices = []
        num_classes = len(self._images)
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            draw, within_draw = divmod(position, self.per_class)
            # Each pass over the classes draws each once, so this one has been drawn as often as there were passes.
            earlier_draws = draw // num_classes
            images = self._images[self._classes.at(draw)]
            indices.append(images.at(earlier_draws * self.per_class + within_draw))
        return torch.tensor(indices)


def instance_weight(start: float, progress: float) -> float:
    """η = max(0, η0 (E - e)/E), the weight of the instance-balanced stream; `progress` is e/E (LPT §2.6).

    >>> round(instance_weight(0.5, 89 / 90), 4)
    0.0056
    """
    return max(0.0, start * (1 - progress))
