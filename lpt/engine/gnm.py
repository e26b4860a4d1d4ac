"""Gaussian neighborhood minimization: the gradient is taken beside the weights, by chance, and applied to them.

θ ← θ - lr (∇L(θ + ε) + wd θ), ε = ρ · clamp(N(0, 1/3²), -1, 1) · ½^⌊(epoch - 1)/59⌋, on everything that trains
(Li 2024, NeurIPS, arXiv 2410.21042). Theirs is ρ = 0.05 · 0.1. A step costs what a step costs: one forward and one
backward.

The feature that their code reads, half CLS and half the last block's outputs at the prompts, is left out: it is in no
equation, and a prompt has no output here. Of several phases each counts its own epochs (ours).
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lpt.engine.batches import Progress
from lpt.losses import cloud_noise

EPOCHS_TO_A_HALF = 59
"""After so many epochs the neighborhood is half as wide (theirs: where deferred reweighting begins)."""


@contextlib.contextmanager
def in_neighborhood(parameters: Mapping[str, nn.Parameter], radius: float, progress: Progress) -> Iterator[None]:
    """Inside it `parameters` are θ + ε with ρ = `radius`; after it the very bits of before. 0 does nothing.

    The noise of a parameter is drawn from (seed, phase, step, its name), the same on every process.
    """
    if not radius:
        yield
        return
    width = radius * 0.5 ** (progress.epoch // EPOCHS_TO_A_HALF)
    before: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = cloud_noise(progress.shared_normal(f"gnm/{name}", *parameter.shape))
            parameter.add_(noise.to(parameter), alpha=width)
    try:
        yield
    finally:  # copied back and not subtracted, which would round
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
