"""Several processes: who this one is, and what all of them have together."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lpt.errors import TrainingError

GATHERED_AT_ONCE = 1024
"""Rows of each process: the device holds no more of them at a time."""


def rank_and_world() -> tuple[int, int]:
    """(rank of this process, number of processes); (0, 1) where nobody has started several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def naming_lost_peers() -> Iterator[None]:
    """For code that needs all processes. Raises TrainingError where another process has ended, in place of the
    connection's own error, which names a socket and no cause."""
    try:
        yield
    except RuntimeError as error:
        _, world = rank_and_world()
        connection_lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if world == 1 or not connection_lost:
            raise
        raise TrainingError(
            f"another of the {world} processes has ended: look for its error message, and start all of them again with "
            "--resume"
        ) from error


def all_agree(here: bool) -> bool:
    """Whether every process says yes. Each asks its own disk, which another may just be writing to, and all must do
    the same next."""
    _, world = rank_and_world()
    if world == 1:
        return here
    answers: list[Any] = [None] * world
    torch.distributed.all_gather_object(answers, here)
    return all(answers)


def all_reduce_sum(local: Tensor) -> Tensor:
    """The sum over all processes. Single process: `local` itself."""
    if rank_and_world()[1] == 1:
        return local
    total = local.clone()
    torch.distributed.all_reduce(total)
    return total


def all_reduce_mean(local: Tensor) -> Tensor:
    """The mean over all processes. Single process: the local value is already the mean."""
    return all_reduce_sum(local) / rank_and_world()[1]


def all_gather_rows(local: Tensor, total: int) -> Tensor:
    """The rows of all processes in the order of the global batch: of w processes, process r holds rows r, r + w, ...

    `local` [ceil(total / w) or one less, ...] → [total, ...]. Single process: `local` itself.
    """
    _, world = rank_and_world()
    if world == 1:
        return local
    rows = -(-total // world)
    padded = local.new_zeros(rows, *local.shape[1:])
    padded[: len(local)] = local
    shares = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(shares, padded)  # on the device: nccl knows no other memory
    return torch.stack(shares, dim=1).flatten(0, 1)[:total]


class GatheredRows:
    """Rows of batches, by name, which leave the device with their batch and lie in main memory once; of several
    processes each adds its own, and all get the whole."""

    def __init__(self, total: int, device: torch.device) -> None:
        """`total` rows of all processes; `device` is where they are gathered."""
        self.total, self.device = total, device
        rank, world = rank_and_world()
        self._room = max(len(range(rank, total, world)), 1)  # a process without any adds one that nobody gathers
        self._rows: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """The next rows [B ...] of this process, by name."""
        for name, values in batch.items():
            start = self._filled.get(name, 0)
            if name not in self._rows:
                self._rows[name] = torch.empty(self._room, *values.shape[1:], dtype=values.dtype)
            self._rows[name][start : start + len(values)] = values
            self._filled[name] = start + len(values)

    def whole(self) -> dict[str, Tensor]:
        """All rows [N ...] in the order of the images, in main memory. Every process must ask."""
        return {name: self._gathered(rows) for name, rows in self._rows.items()}

    def _gathered(self, rows: Tensor) -> Tensor:
        _, world = rank_and_world()
        if world == 1:
            return rows
        whole = torch.empty(self.total, *rows.shape[1:], dtype=rows.dtype)
        for start in range(0, -(-self.total // world), GATHERED_AT_ONCE):
            first = start * world
            number = min(GATHERED_AT_ONCE * world, self.total - first)
            part = rows[start : start + GATHERED_AT_ONCE][: len(range(rank_and_world()[0], number, world))]
            whole[first : first + number] = all_gather_rows(part.to(self.device), number).cpu()
        return whole
