"""Classifiers adjusted after training: cRT, LWS, MARC, τ-normalisation, and post-hoc logit adjustment and temperature.

The first method runs as it is; what follows touches its classifier alone. Shapes: logits [N C], labels [N].
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.evaluate import predict
from lpt.engine.phase import Phase, Recipe
from lpt.engine.processes import all_reduce_mean
from lpt.engine.session import Session
from lpt.errors import LptError
from lpt.losses import LossName, Weighted, log_prior
from lpt.methods.method import InnerMethod, Resolve
from lpt.methods.supervised import LogitLoss, head_features, stage
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import Calibration, CosineHead, LinearHead
from lpt.settings import FractionBelowOne, Positive

Adjustment = Literal["crt", "lws", "marc", "posthoc_la", "tau_norm", "temperature"]
CALIBRATING = ("lws", "marc", "posthoc_la", "temperature")
"""Adjustments that scale and shift the logits; a classifier can be given one of them."""


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    resolve: Resolve,
    *,
    adjust: Adjustment = "crt",
    first: Mapping[str, Any] = {"name": "fine_tune", "loss": "ce"},
    tau: float = 1.0,
    rho: float = 1.2,
    epochs: Positive = 10,
    lr: FractionBelowOne = 1e-2,
    weight_decay: FractionBelowOne = 5e-4,
) -> Recipe:
    """`first`, a method's name and settings, then one of

    - `crt`: a fresh head under class-balanced sampling (Kang 2020); `lws`: a scale for each class, likewise;
    - `marc`: z' = a z + b ‖w‖ with a cross-entropy weighted by π^-`rho` (Wang 2022);
    - `tau_norm`: rows w / ‖w‖^`tau`, no bias (Kang 2020); a cosine head has τ = 1 already and is refused;
    - `posthoc_la`: z - `tau` log π (Menon 2021);
    - `temperature`: the one of the held-out images (Guo 2017): needs data.val_per_class.

    Heads train with AdamW on cached features (ours; the papers use SGD on images). Raises LptError where an adjustment
    makes no sense for the head.
    """
    inner = resolve(first)
    _check(adjust, inner, task)
    recipe = inner.build()
    model, num_classes = recipe.model, len(task.classes)
    device = next(model.parameters()).device

    def head_stage(*train: str, loss: LossName | LogitLoss, sampler: Literal["instance", "class"]) -> Phase:
        return stage(
            session,
            f"adjust-{adjust}",
            model,
            task,
            train=train,
            loss=loss,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            sampler=sampler,
            cached=head_features(session, "features-second", model, task),
        )

    def phases() -> Iterator[Phase]:
        yield from recipe.phases or ()
        prior = log_prior(task.counts).to(device)
        if adjust == "tau_norm":
            normalize_rows(model, tau)
            return
        if adjust == "crt":
            start_head_again(model, seed=session.seed + 1)
            yield head_stage("head.", loss="ce", sampler="class")
            return
        model.calibration = calibration = Calibration(num_classes).to(device)
        if adjust == "lws":
            yield head_stage("calibration.scale", loss="ce", sampler="class")
        elif adjust == "marc":
            if isinstance(model.head, LinearHead):
                calibration.unit.copy_(model.head.weight.detach().float().norm(dim=1))
            weights = (-rho * prior).exp()
            loss = Weighted(weights / weights.mean(), model.head.scale, all_reduce_mean)
            yield head_stage("calibration.", loss=loss, sampler="instance")
            calibration.fold()
        elif adjust == "posthoc_la":
            calibration.offset.data.copy_(-tau * prior / model.head.scale)
        else:
            assert task.val is not None
            predictions = predict(model, task.val)
            logits = model.head.scale * predictions.logits.double()
            calibration.scale.data.fill_(1 / temperature(logits, predictions.labels))

    return Recipe(model, phases())


def _check(adjust: Adjustment, inner: InnerMethod, task: Task) -> None:
    """Raises LptError where the adjustment makes no sense for the head that `inner` leaves, or for the task."""
    if adjust == "tau_norm" and inner.head not in ("linear", "neighbors"):
        raise LptError("method.adjust=tau_norm: a cosine head has unit rows already, use method.first.head=linear")
    if adjust == "temperature" and task.val is None:
        raise LptError("method.adjust=temperature is fitted on held-out images: set data.val_per_class")
    if adjust in ("crt", "lws", "marc") and inner.head == "pool":
        raise LptError(f"method.adjust={adjust} cannot train a head behind a prompt pool: use posthoc_la")
    if adjust in ("crt", "lws", "marc", "tau_norm") and inner.head == "neighbors":
        raise LptError(f"method.adjust={adjust} needs a head with weights: neighbours have none")
    if adjust in ("crt", "marc") and inner.head == "fused":
        raise LptError(f"method.adjust={adjust} needs one head, this one is fused of two: use lws or posthoc_la")
    earlier = {step.settings["adjust"] for step in inner.chain if step.name == "decoupled"}
    if adjust in CALIBRATING and earlier & set(CALIBRATING):
        raise LptError(f"method.adjust={adjust}: the classifier of method.first is adjusted already")


def normalize_rows(model: PromptedClassifier, tau: float) -> None:
    """τ-normalisation (Kang 2020): rows w / ‖w‖^τ, no bias."""
    head = model.head
    assert isinstance(head, LinearHead)
    head.weight.data.div_(head.weight.data.norm(dim=1, keepdim=True).clamp(min=1e-12) ** tau)
    head.bias.data.zero_()


def start_head_again(model: PromptedClassifier, *, seed: int) -> None:
    """A fresh head, for cRT: random unit rows where it is a cosine one, zeros where it is linear."""
    head = model.head
    assert isinstance(head, CosineHead | LinearHead)
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.empty(head.weight.shape).uniform_(-1, 1, generator=generator), dim=1)
    if isinstance(head, LinearHead):
        head.weight.data.zero_()
        head.bias.data.zero_()
    else:
        head.weight.data.copy_(rows)


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the mean NLL of softmax(logits / T); by bisection, since the NLL is convex in 1/T.

    logits [N C], labels [N]. Between 1e-3 and 1e3.
    """
    low, high = 1e-3, 1e3  # of 1/T
    right = logits.gather(1, labels[:, None])[:, 0]
    for _ in range(60):
        middle = (low * high) ** 0.5
        slope = ((middle * logits).softmax(1) * logits).sum(1) - right
        low, high = (low, middle) if slope.mean() > 0 else (middle, high)
    return 1 / (low * high) ** 0.5
