"""Losses for long tails, in one call shape: `loss(logits [B C], labels [B], noise [B C] or None) -> scalar`.

Constants of a loss (class counts, scale, gammas) are fields of a small frozen object; randomness is an argument, which
GCL alone reads. Everything is computed in fp32 whatever the logits' precision. In formulas z are logits, y labels, n_j
the training images of class j of C.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.errors import LptError


def log_prior(counts: Tensor) -> Tensor:
    """log π_j = log(n_j / N) [C]; an absent class counts as one image, so that its prior is finite."""
    n = counts.float().clamp(min=1)
    return (n / n.sum()).log()


def tail_margins(counts: Tensor) -> Tensor:
    """M̂_j = (log n_max - log n_j) / max_c(log n_max - log n_c), in [0, 1] [C]; all zero for balanced counts.

    0 for the largest class and 1 for the rarest (Li 2022, GCL). An absent class counts as one image.
    """
    log_n = counts.double().clamp(min=1).log()
    gap = log_n.max() - log_n
    return gap / gap.max() if gap.max() > 0 else torch.zeros_like(gap)


@dataclass(frozen=True)
class CrossEntropy:
    """CE(scale · z, y), with label smoothing."""

    scale: float = 1.0
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        return F.cross_entropy(self.scale * logits.float(), labels, label_smoothing=self.label_smoothing)


Mean = Callable[[Tensor], Tensor]
"""The mean of a number over processes: a weighted loss is divided by the weights of the global batch."""


def identity(number: Tensor) -> Tensor:
    """Single process: the local value is already the mean."""
    return number


@dataclass(frozen=True)
class Weighted:
    """Σ_b c_y CE(scale · z, y) / Σ_b c_y with class weights c [C], which need not sum to anything."""

    weights: Tensor
    scale: float = 1.0
    mean: Mean = identity

    def __call__(self, logits: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        return _weighted(self.scale * logits.float(), labels, self.weights.to(logits.device), self.mean)


def _weighted(logits: Tensor, labels: Tensor, weights: Tensor, mean: Mean) -> Tensor:
    """This process's share of Σ_b c_y CE / Σ_b c_y over the global batch: the mean of all shares is that loss."""
    local_weight = weights[labels].sum()
    # cross_entropy divides by the weights of the local batch alone; undo that, and divide by the global mean.
    return F.cross_entropy(logits, labels, weight=weights) * (local_weight / mean(local_weight))


@dataclass(frozen=True)
class LogitAdjusted:
    """CE(scale · z + τ log π, y); predict with z (Menon 2021, eq. 10). τ = 1 is Balanced Softmax (Ren 2020)."""

    counts: Tensor
    tau: float = 1.0
    scale: float = 1.0
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        shifted = self.scale * logits.float() + self.tau * log_prior(self.counts).to(logits.device)
        return F.cross_entropy(shifted, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class BinaryAdjusted:
    """Mean over B × C of BCE(sigmoid(scale · z + τ log π), t), with targets t [B C] in place of labels: BLA of CUE
    (2026). It is a mean over classes too, so that it shrinks as 1/C where few of them are marked."""

    counts: Tensor
    tau: float = 1.0
    scale: float = 1.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        shifted = self.scale * logits.float() + self.tau * log_prior(self.counts).to(logits.device)
        return F.binary_cross_entropy_with_logits(shifted, targets.float())


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of KL(softmax(teacher) ‖ softmax(z)) (Hinton 2015, at temperature 1); both [B C], scaled."""
    expected = teacher.float().log_softmax(dim=1)
    return F.kl_div(logits.float().log_softmax(dim=1), expected, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Focal:
    """mean (1 - p_y)^γ CE(scale · z, y) (Lin 2017); γ = 0 is cross-entropy."""

    gamma: float = 2.0
    scale: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        log_p = (self.scale * logits.float()).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
        if self.gamma == 0:
            return -log_p.mean()
        weight = (1 - log_p.exp()).clamp(min=0) ** self.gamma  # rounding may bring p above 1
        return -(weight * log_p).mean()


def effective_weights(counts: Tensor, beta: float) -> Tensor:
    """c_j ∝ (1 - β)/(1 - β^n_j), Σ c = C (Cui 2019); β = 0 gives ones. An absent class counts as one image. [C]"""
    n = counts.double().clamp(min=1)
    # expm1, since 1 - β^n is a difference of almost equal numbers for β near 1.
    weights = torch.ones_like(n) if beta == 0 else (1 - beta) / -torch.expm1(n * math.log(beta))
    return (weights * len(n) / weights.sum()).float()


def ldam_margins(counts: Tensor, max_margin: float) -> Tensor:
    """Δ_j = m (n_min / n_j)^¼, m = `max_margin` for the rarest class (Cao 2019). An absent class counts as one image.
    [C]"""
    n = counts.float().clamp(min=1)
    return max_margin * (n.min() / n) ** 0.25


@dataclass(frozen=True)
class LDAM:
    """Σ_b c_y CE(s (z - Δ_y e_y), y) / Σ_b c_y: margins (Cao 2019) and class-balanced weights (Cui 2019).

    `margin=0` has no margins, `beta=0` has equal weights. Margins are in units of the unscaled logits.
    """

    counts: Tensor
    margin: float = 0.5
    beta: float = 0.0
    scale: float = 30.0
    mean: Mean = identity

    @cached_property
    def _weights(self) -> Tensor:
        return effective_weights(self.counts, self.beta)

    @cached_property
    def _margins(self) -> Tensor:
        return ldam_margins(self.counts, self.margin)

    def __call__(self, logits: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        margins = self._margins.to(logits.device)
        lowered = logits.float() - F.one_hot(labels, logits.shape[1]) * margins
        return _weighted(self.scale * lowered, labels, self._weights.to(logits.device), self.mean)


@dataclass(frozen=True)
class GCL:
    """Asymmetric Gaussian-clouded logit loss (Dong 2023, LPT; GCL: Li 2022).

    Clouded logits: l_j = s (z_j - a |e_j| M̂_j - m [j = y]), with e ~ clamp(N(0, 1/3²), -1, 1) in `noise`
    [B C]. Then with p = softmax(l), weights w_y = (1 - p_y)^γ+ and w_j = p_j^γ- for j ≠ y:

    - form `code` (LPT's code, default): -Σ_j t_j w_j log p_j with smoothed targets t;
    - form `paper`: -w_y log p_y - Σ_{j≠y} w_j log(1 - p_j), no smoothing.

    γ+ = γ- = 0 with `asymmetric=False` is GCL itself: cross-entropy on the clouded logits. Without noise it
    gives the margin alone; with m = 0 too it is plain cross-entropy. Balanced counts give M̂ = 0.
    """

    counts: Tensor
    scale: float = 20.0
    margin: float = 0.1
    cloud: float = 0.5
    gamma_pos: float = 0.0
    gamma_neg: float = 4.0
    label_smoothing: float = 0.1
    form: Literal["code", "paper"] = "code"
    asymmetric: bool = True

    def __post_init__(self) -> None:
        if len(self.counts) < 2:
            raise LptError("a task with one class has nothing to tell apart: a GCL loss needs at least 2 classes")

    @cached_property
    def _push(self) -> Tensor:
        """a M̂_j, how far noise of size 1 pushes each logit down [C]."""
        return self.cloud * tail_margins(self.counts)

    def __call__(self, logits: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        is_target = F.one_hot(labels, logits.shape[1]).bool()
        clouded = self._clouded(logits, is_target, noise)
        log_p = clouded.log_softmax(dim=1)
        targets = self._smoothed(is_target.to(clouded))
        if not self.asymmetric:
            return -(targets * log_p).sum(1).mean()

        # log(1 - p_y) without a difference of almost equal numbers: where p_y rounds to 1, the naive power
        # of γ+ = 0.5 has derivative 0.5 · 0^-0.5, NaN in every gradient.
        others = clouded.masked_fill(is_target, -torch.inf)
        log_rest = others.logsumexp(1) - clouded.logsumexp(1)
        weight_pos = (self.gamma_pos * log_rest).exp() if self.gamma_pos else torch.ones_like(log_rest)
        weight_neg = (self.gamma_neg * log_p).exp()
        if self.form == "code":
            weight = torch.where(is_target, weight_pos[:, None], weight_neg)
            return -(targets * weight * log_p).sum(1).mean()
        positive = weight_pos * log_p.masked_fill(~is_target, 0).sum(1)
        negative = (weight_neg * _log_not(clouded, log_p)).masked_fill(is_target, 0).sum(1)
        return -(positive + negative).mean()

    def _clouded(self, logits: Tensor, is_target: Tensor, noise: Tensor | None) -> Tensor:
        """l [B C]: logits pushed down by the noise, the target's by the margin too, and scaled."""
        clouded = logits if logits.dtype == torch.float64 else logits.float()
        if noise is not None and self.cloud:
            clouded = clouded - self._push.to(clouded) * noise.to(clouded).clamp(-1, 1).abs()
        return self.scale * (clouded - self.margin * is_target.to(clouded))

    def _smoothed(self, onehot: Tensor) -> Tensor:
        """t [B C], the targets of the form `code`."""
        smoothing = self.label_smoothing if self.form == "code" else 0.0
        return onehot * (1 - smoothing) + smoothing / onehot.shape[1]


def _log_not(logits: Tensor, log_p: Tensor) -> Tensor:
    """log(1 - p_j) [B C]: exact also where the largest p rounds to 1, by LSE_{i≠j}(l) - LSE_i(l) for that one."""
    is_largest = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    log_rest = logits.masked_fill(is_largest, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    log_not_others = torch.log1p(-log_p.exp().masked_fill(is_largest, 0))  # each p of these is at most 1/2
    return torch.where(is_largest, log_rest[:, None], log_not_others)


def cloud_noise(standard_normal: Tensor) -> Tensor:
    """Standard normal numbers [B C] → e ~ clamp(N(0, (1/3)²), -1, 1)."""
    return (standard_normal / 3).clamp(-1, 1)


LossName = Literal["ce", "focal", "cb", "ldam", "ldam_cb", "ldam_drw", "bs", "la"]
"""Those of `LOSSES` that any supervised method may take."""
SMOOTHED = ("ce", "la", "bs")
"""Those of them that know label smoothing."""


def loss_by_name(
    name: LossName,
    counts: Tensor,
    *,
    scale: float,
    tau: float = 1.0,
    gamma: float = 2.0,
    beta: float = 0.9999,
    margin: float = 0.5,
    label_smoothing: float = 0.0,
    mean: Mean = identity,
) -> Any:
    """The loss `name` for training `counts` [C], on logits that `scale` multiplies.

    `ldam_drw` is LDAM here: its weights come with the schedule, as `ldam_cb`, in the last fifth of training (Cao 2019).
    Raises LptError for `label_smoothing` of a loss that has none.
    """
    if label_smoothing and name not in SMOOTHED:
        raise LptError(f"method.smooth_targets {label_smoothing:g} is of {', '.join(SMOOTHED)}, and not of loss {name}")
    if name == "ce":
        return CrossEntropy(scale, label_smoothing)
    if name == "focal":
        return Focal(gamma, scale)
    if name == "bs":
        return LogitAdjusted(counts, tau=1.0, scale=scale, label_smoothing=label_smoothing)
    if name == "la":
        return LogitAdjusted(counts, tau=tau, scale=scale, label_smoothing=label_smoothing)
    if name == "cb":
        return LDAM(counts, margin=0.0, beta=beta, scale=scale, mean=mean)
    if name == "ldam_cb":
        return LDAM(counts, margin=margin, beta=beta, scale=scale, mean=mean)
    return LDAM(counts, margin=margin, beta=0.0, scale=scale, mean=mean)


# What `lpt list` says of each. Of gcl and agcl there is no `loss_by_name`: they need noise, which LPT alone draws.
LOSSES = {
    "ce": "cross-entropy",
    "focal": "focal loss (Lin 2017)",
    "cb": "class-balanced weights by effective numbers (Cui 2019)",
    "ldam": "label-distribution-aware margins (Cao 2019)",
    "ldam_cb": "LDAM with class-balanced weights, two-stage fine-tuning's first loss (Taha Aslani 2022)",
    "ldam_drw": "LDAM, with class-balanced weights in the last fifth of training (Cao 2019)",
    "bs": "Balanced Softmax (Ren 2020): la at τ = 1",
    "la": "logit-adjusted cross-entropy (Menon 2021)",
    "gcl": "Gaussian-clouded logits (Li 2022)",
    "agcl": "asymmetric GCL (Dong 2023, LPT)",
}
