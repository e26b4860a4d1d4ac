"""Optimisers by name, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from lpt.errors import TrainingError

Optimizer = Literal["sgd", "adamw"]
Warmup = Literal["linear", "first_epoch_1e-6", "none"]


def make_optimizer(
    name: Optimizer, parameters: Iterable[nn.Parameter], *, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW with torch's betas; the learning rate is set at every step."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=weight_decay)
    if name != "adamw":
        raise TrainingError(f"optimizer {name!r} is unknown: use sgd or adamw")
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay)


def scaled_lr(name: Optimizer, lr: float, batch_size: int) -> float:
    """SGD's rate is per 256 images of a stream, lr · B/256 (LPT's code); AdamW's is taken as it is."""
    return lr * batch_size / 256 if name == "sgd" else lr


def lr_at(step: int, *, steps: int, steps_per_epoch: int, lr: float, warmup: Warmup = "linear") -> float:
    """Learning rate of step 0..steps-1.

    `linear` (ours): a ramp over the first epoch, or over the first tenth of a shorter run, then a cosine
    that reaches 0 after the last step.
    `first_epoch_1e-6` (LPT's code): cosine per epoch, the whole first epoch at 1e-6.
    `none` (LIFT): cosine per epoch, from the first on.

    >>> [round(lr_at(90 * e, steps=8100, steps_per_epoch=90, lr=0.02, warmup="first_epoch_1e-6"), 6)
    ...  for e in (0, 1, 45, 80, 89)]
    [1e-06, 0.019994, 0.01, 0.000603, 6e-06]
    """
    if warmup != "linear":
        epoch, epochs = step // steps_per_epoch, max(steps // steps_per_epoch, 1)
        return (
            1e-6 if epoch == 0 and warmup == "first_epoch_1e-6" else lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        )
    ramp = max(1, min(steps_per_epoch, steps // 10))
    if step < ramp:
        return lr * (step + 1) / ramp
    return lr * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(steps - ramp, 1)))
