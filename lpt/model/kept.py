"""Results that are kept for as long as the tensors that they were computed from stay as they are."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Kept(Generic[Result]):
    """The last result of a computation, which is done again once a tensor that it comes from has been written to."""

    def __init__(self) -> None:
        self._last: tuple[tuple[object, ...], Result] | None = None

    def of(self, tensors: Iterable[Tensor], make: Callable[[], Result], *, beside: object = None) -> Result:
        """What `make` returns, which depends on `tensors` and on `beside`, and on nothing else."""
        # While a graph is traced, tensors have no memory, and what is made of them belongs to that graph.
        if torch.compiler.is_compiling():
            return make()
        state = (beside, *map(version, tensors))
        if self._last is None or self._last[0] != state:
            self._last = (state, make())
        return self._last[1]


def version(tensor: Tensor) -> tuple[object, ...]:
    """Changes with any write to it."""
    return (tensor._version, tensor.data_ptr(), tensor.device, tensor.dtype)
