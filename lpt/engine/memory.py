"""What a phase keeps between its steps besides the model: in its checkpoints, so that a resumed run has it whole.

Shapes: notes [R ...], a row for each image of the steps since the epoch began.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lpt.engine.processes import gathered, rank_and_world


class Memory:
    """`state` is the method's own, by name. `note` keeps rows until the end of the epoch, those of all processes in
    the order of the global batch. `sums` are the loop's, of what steps log."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.sums: dict[str, float] = {}
        self._notes: dict[str, list[Tensor]] = {}

    def note(self, **rows: Tensor) -> None:
        for name, mine in rows.items():
            whole = gathered(mine.detach(), len(mine) * rank_and_world()[1])
            self._notes.setdefault(name, []).append(whole)

    def take(self) -> dict[str, Tensor]:
        """All rows since the last time, on the CPU; they are forgotten then."""
        found = {name: torch.cat(parts).cpu() for name, parts in self._notes.items()}
        self._notes.clear()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by names that `restore` understands."""
        out = {f"state/{name}": value for name, value in self.state.items()}
        out |= {f"note/{name}": torch.cat(parts) for name, parts in self._notes.items()}
        return out | {f"sum/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.sums.items()}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """In place of all that was kept: what `tensors` gave, nothing where there is nothing."""
        self.state, self.sums, self._notes = {}, {}, {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "state":
                self.state[name] = value.to(device)
            elif kind == "note":
                self._notes[name] = [value.to(device)]
            else:
                self.sums[name] = value.item()
