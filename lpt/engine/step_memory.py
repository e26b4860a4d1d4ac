"""What the steps of a phase leave for later steps and for the end of the epoch; in its checkpoints, so that a resumed
run has it whole.

Shapes: noted rows [R ...], a row for each image of the steps since the epoch began.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lpt.engine.processes import all_gather_rows, rank_and_world

PARTS = 64


class StepMemory:
    """`tensors` are the method's own state by name, the same on every process. `note` keeps rows until the end of the
    epoch, each process its own."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._notes: dict[str, list[Tensor]] = {}

    def note(self, **rows: Tensor) -> None:
        """Keeps these rows [B ...] of this step, without their graph, until `take_notes`."""
        for name, values in rows.items():
            parts = self._notes.setdefault(name, [])
            parts.append(values.detach())
            if len(parts) >= PARTS:  # a tensor of few rows takes as much memory as a hundred rows
                self._notes[name] = _merged(parts)

    def take_notes(self) -> dict[str, Tensor]:
        """All rows since the last time on the CPU, of all processes in the order of the global batches, and forgets
        them. Every process must ask."""
        notes = {name: rows.cpu() for name, rows in self._gathered().items()}
        self._notes.clear()
        return notes

    def stored(self) -> dict[str, Tensor]:
        """Everything, by names that `restore` understands. Every process must ask."""
        state = {f"state/{name}": value for name, value in self.tensors.items()}
        return state | {f"note/{name}": rows for name, rows in self._gathered().items()}

    def restore(self, stored: Mapping[str, Tensor], device: torch.device) -> None:
        """Puts what `stored` gave in place of everything; each process takes its own rows of the notes."""
        self.tensors, self._notes = {}, {}
        rank, world = rank_and_world()
        for key, value in stored.items():
            kind, _, name = key.partition("/")
            if kind == "state":
                self.tensors[name] = value.to(device)
            elif kind == "note":
                self._notes[name] = [value[rank::world].to(device)]

    def _gathered(self) -> dict[str, Tensor]:
        local = {name: torch.cat(parts) for name, parts in self._notes.items()}
        _, world = rank_and_world()
        return {name: all_gather_rows(rows, len(rows) * world) for name, rows in local.items()}


def _merged(parts: list[Tensor]) -> list[Tensor]:
    """The same rows in few tensors: the last ones in one, with those before that are no longer than it. So each row is
    copied a few times, however many there are."""
    last = [parts.pop()]
    rows = len(last[0])
    while parts and (len(parts) >= PARTS // 2 or len(parts[-1]) <= rows):
        rows += len(parts[-1])
        last.append(parts.pop())
    return [*parts, torch.cat(last[::-1])]
