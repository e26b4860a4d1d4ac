"""Which weights of a run are reported: the last, or the best on held-out images; and what others would have said.

The test set may be watched after epochs, for the numbers that semi-supervised papers report; nothing is chosen by it.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lpt.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, unreadable
from lpt.model.classifier import PromptedClassifier

LAST = 20
"""Evaluations that a mean or median is taken over (ACR and DARP report the mean of the last 20, DASO their median)."""


class Best:
    """The best epoch of every phase by class accuracy on held-out images, in `checkpoints/best-PHASE.safetensors`."""

    def __init__(self, folder: Path, run_hash: str, *, writes: bool):
        self.folder, self.run_hash, self.writes = folder, run_hash, writes
        self.phase, self.best = "", Checkpoint(0, True, 0.0, {})

    def offer(self, model: PromptedClassifier, phase: str, step: int, score: float) -> None:
        file = self.folder / f"best-{phase}.safetensors"
        if phase != self.phase:  # another phase begins, or continues in another process
            self.phase = phase
            self.best = load_checkpoint(file, run_hash=self.run_hash) or Checkpoint(0, True, 0.0, {})
        if score > self.best.moments.get("score", torch.tensor(-1.0)):
            tensors = {name: value.detach().cpu().clone() for name, value in model.learned_state().items()}
            self.best = Checkpoint(step, True, 0.0, tensors, {"score": torch.tensor(score, dtype=torch.float64)})
            if self.writes:
                save_checkpoint(file, self.best, run_hash=self.run_hash)

    def restore(self, model: PromptedClassifier, phase: str) -> str:
        """Puts the best of the last `phase` into `model`; returns the name of the selection."""
        file = self.folder / f"best-{phase}.safetensors"
        if self.phase != phase:  # it was finished before this process
            self.phase, self.best = phase, load_checkpoint(file, run_hash=self.run_hash) or self.best
        # Not all need be in `model` still: a head may have gone when its training ended.
        try:
            model.load_learned_state({name: self.best.tensors[name] for name in model.learned_state()})
        except (KeyError, RuntimeError) as error:
            raise unreadable(file, f"it does not fit this model: {error}") from None
        return f"best on held-out images: step {self.best.step} of {self.phase}"


def watched(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Class accuracies on the test set after epochs of the last phase, as papers report them, from a run's history;
    None where it was not watched. `best_on_test` is what a choice by the test set would have given, and no result."""
    last_phase = [line for line in history if line["phase"] == history[-1]["phase"]]
    accuracies = [line["test"]["class_accuracy"] for line in last_phase if "test" in line]
    if not accuracies:
        return None
    latest = accuracies[-LAST:]
    return {
        "evaluations": len(accuracies),
        "last": accuracies[-1],
        "mean20": statistics.fmean(latest),
        "median20": statistics.median(latest),
        "best_on_test": max(accuracies),
    }
