"""What a phase keeps between its steps besides the model: in its checkpoints, so that a resumed run has it whole.

Shapes: notes [R ...], a row for each image of the steps since the epoch began.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lpt.engine.processes import gathered, rank_and_world


class Memory:
    """`state` is the method's own, by name. `note` keeps rows until the end of the epoch: each process its own, and
    `take` and `tensors`, for which all must ask, give those of all in the order of the global batches. `sums` are the
    loop's, of what steps log."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.sums: dict[str, float] = {}
        self._notes: dict[str, list[Tensor]] = {}

    def note(self, **rows: Tensor) -> None:
        for name, mine in rows.items():
            self._notes.setdefault(name, []).append(mine.detach())

    def take(self) -> dict[str, Tensor]:
        """All rows since the last time, on the CPU; they are forgotten then."""
        found = {name: whole.cpu() for name, whole in self._whole().items()}
        self._notes.clear()
        return found

    def _whole(self) -> dict[str, Tensor]:
        mine = {name: torch.cat(parts) for name, parts in self._notes.items()}
        return {name: gathered(rows, len(rows) * rank_and_world()[1]) for name, rows in mine.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by names that `restore` understands."""
        out = {f"state/{name}": value for name, value in self.state.items()}
        out |= {f"note/{name}": whole for name, whole in self._whole().items()}
        return out | {f"sum/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.sums.items()}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """In place of all that was kept: what `tensors` gave, nothing where there is nothing."""
        self.state, self.sums, self._notes = {}, {}, {}
        rank, world = rank_and_world()
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "state":
                self.state[name] = value.to(device)
            elif kind == "note":
                self._notes[name] = [value[rank::world].to(device)]
            else:
                self.sums[name] = value.item()
