"""Several processes: who this one is, and what all of them have together."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lpt.errors import TrainingError


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What happens inside needs all processes. Raises TrainingError where another one is gone, in place of what the
    connection to it says."""
    try:
        yield
    except RuntimeError as error:
        _, world = rank_and_world()
        if world == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(
            f"another of the {world} processes has ended: look for what it said, and start all of them again with "
            "--resume"
        ) from error


def everywhere(here: bool) -> bool:
    """Whether all processes say so: each asks its own disk, where another may just be writing, and they must agree on
    what to do next."""
    _, world = rank_and_world()
    if world == 1:
        return here
    said: list[Any] = [None] * world
    torch.distributed.all_gather_object(said, here)
    return all(said)


def summed(mine: Tensor) -> Tensor:
    """The sum over all processes."""
    if rank_and_world()[1] == 1:
        return mine
    total = mine.clone()
    torch.distributed.all_reduce(total)
    return total


def averaged(mine: Tensor) -> Tensor:
    """The mean over all processes."""
    return summed(mine) / rank_and_world()[1]


def gathered(mine: Tensor, total: int) -> Tensor:
    """Interleaves the rows of all processes again: row i of `total` is with process i mod w."""
    _, world = rank_and_world()
    if world == 1:
        return mine
    rows = -(-total // world)
    padded = mine.new_zeros(rows, *mine.shape[1:])
    padded[: len(mine)] = mine
    shares = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(shares, padded)  # on the device: nccl knows no other memory
    return torch.stack(shares, dim=1).flatten(0, 1)[:total]
