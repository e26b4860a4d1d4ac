"""Where a phase is: its optimizer, what its steps remember, and what it has cost; loads and saves itself."""

from pathlib import Path

import torch

from lpt.engine.batches import Progress
from lpt.engine.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_moments,
    restore_moments,
    save_checkpoint,
    unreadable,
)
from lpt.engine.clock import Clock
from lpt.engine.optim import make_optimizer
from lpt.engine.phase import Phase, TunableModel
from lpt.engine.processes import all_reduce_sum, rank_and_world
from lpt.errors import TrainingError


class PhaseState:
    """All of a phase that changes while it runs, but for the model's own tensors.

    `step` steps are done. `seconds_before` were spent by earlier, killed processes on what this one need not do again,
    `spent_before` says what on, `flops` is what one step costs all processes together (0: not counted yet), `sums` are
    of what the steps of this epoch have logged, `lr` is the rate of the last step.
    """

    def __init__(self, phase: Phase, model: TunableModel, *, file: Path | None, run_hash: str) -> None:
        self.phase, self.model, self.file, self.run_hash = phase, model, file, run_hash
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.trained.values())).device
        self.optimizer = make_optimizer(phase.optimizer, self.trained.values(), weight_decay=phase.weight_decay)
        self.memory = phase.memory
        self.step, self.flops, self.seconds_before, self.lr = 0, 0, 0.0, 0.0
        self.sums: dict[str, float] = {}
        self.spent_before: dict[str, float] = {}

    @property
    def finished(self) -> bool:
        return self.step == self.phase.steps

    def load(self) -> bool:
        """Takes over the phase's checkpoint; False where there is none.

        Raises TrainingError where it is another run's, does not fit, or is not what the other processes see.
        """
        if self.file is None:
            return False
        checkpoint = load_checkpoint(self.file, run_hash=self.run_hash)
        self._check_same_everywhere(checkpoint)
        if checkpoint is None:
            return False
        try:
            if not 0 <= checkpoint.step <= self.phase.steps:
                raise ValueError(f"step {checkpoint.step} of {self.phase.steps}")
            if checkpoint.finished != (checkpoint.step == self.phase.steps):
                raise ValueError(f"step {checkpoint.step} of {self.phase.steps}")
            self.model.load_learned_state(checkpoint.tensors)
            self.memory.restore(checkpoint.memory, self.device)
            self.sums = _numbers(checkpoint, "sum/")
            self.spent_before = _numbers(checkpoint, "spent/")
            restore_moments(self.optimizer, checkpoint.moments, self.trained)
        except (AssertionError, KeyError, ValueError, RuntimeError) as error:
            raise unreadable(self.file, f"it does not fit this model: {error}") from None
        self.step, self.seconds_before, self.flops = checkpoint.step, checkpoint.seconds, checkpoint.flops
        return True

    def _check_same_everywhere(self, checkpoint: Checkpoint | None) -> None:
        step = -1 if checkpoint is None else checkpoint.step
        total = all_reduce_sum(torch.tensor(step, device=self.device)).item()
        if total != step * rank_and_world()[1]:
            raise TrainingError(f"the processes see different files {self.file}: --out must be on a disk that all see")

    def save(self, progress: Progress, clock: Clock) -> None:
        """Writes the checkpoint (process 0; all must call), with the seconds of `clock`. Raises TrainingError where
        what was learned is not finite any more: the file keeps the last state that was."""
        learned = self.model.learned_state()
        # The gradients were finite, but a step far too long may have left the range of numbers.
        for name, value in learned.items():
            if not bool(torch.isfinite(value).all()):
                raise self.not_finite(f"{name} of {self.phase.name}", "not finite after", progress)
        memory = self.memory.stored()  # of all processes
        for kind, numbers in (("sum", self.sums), ("spent", clock.spent)):
            memory |= {f"{kind}/{name}": torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        if self.file is None or rank_and_world()[0] != 0:
            return
        names = {parameter: name for name, parameter in self.trained.items()}
        checkpoint = Checkpoint(
            step=self.step,
            finished=self.finished,
            seconds=clock.whole(),
            tensors=learned,
            moments=optimizer_moments(self.optimizer, names),
            memory=memory,
            flops=self.flops,
        )
        save_checkpoint(self.file, checkpoint, run_hash=self.run_hash)

    def not_finite(self, what: str, how: str, progress: Progress) -> TrainingError:
        """The error that says which number left the range, in which step, and what to try."""
        safe = f"; {self.file} keeps the last finite state" if self.file and self.file.exists() else ""
        return TrainingError(
            f"{what} is {how} step {progress.step} (epoch {progress.epoch + 1}, batch "
            f"{progress.step % progress.steps_per_epoch}, learning rate {self.lr:.3g}): lower method.lr, or try "
            f"train.precision=fp32{safe}"
        )


def _numbers(checkpoint: Checkpoint, kind: str) -> dict[str, float]:
    """The numbers of a checkpoint whose names begin with `kind`, without it."""
    named = {key: value for key, value in checkpoint.memory.items() if key.startswith(kind)}
    return {key.removeprefix(kind): value.item() for key, value in named.items()}
