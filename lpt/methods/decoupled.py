"""Classifiers adjusted after training: cRT, LWS, MARC, τ-normalisation, and post-hoc logit adjustment and temperature.

The first method runs as it is; what follows touches its classifier alone. Shapes: logits [N C], labels [N].
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.evaluate import predict
from lpt.engine.loop import Fit
from lpt.engine.processes import averaged
from lpt.errors import LptError
from lpt.losses import Weighted, log_prior
from lpt.methods.supervised import Second, chain, head_features, train_stage
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import Calibration, CosineHead, LinearHead
from lpt.settings import FractionBelowOne, Positive

Adjustment = Literal["crt", "lws", "marc", "tau_norm", "posthoc_la", "temperature"]


def tune(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    second: Second,
    *,
    adjust: Adjustment = "crt",
    first: Mapping[str, Any] = {"name": "fine_tune", "loss": "ce"},
    tau: float = 1.0,
    rho: float = 1.2,
    epochs: Positive = 10,
    lr: FractionBelowOne = 1e-2,
    weight_decay: FractionBelowOne = 5e-4,
) -> PromptedClassifier:
    """`first`, a method's name and settings, then one of

    - `crt`: a fresh head under class-balanced sampling (Kang 2020); `lws`: a scale for each class, likewise;
    - `marc`: z' = a z + b ‖w‖ with a cross-entropy weighted by π^-`rho` (Wang 2022);
    - `tau_norm`: rows w / ‖w‖^`tau`, no bias (Kang 2020); a cosine head has τ = 1 already and is refused;
    - `posthoc_la`: z - `tau` log π (Menon 2021);
    - `temperature`: the one of the held-out images (Guo 2017): needs data.val_per_class.

    Heads train with AdamW on cached features (ours; the papers use SGD on images). Raises LptError where an adjustment
    makes no sense for the head.
    """
    *_, innermost = inside = list(chain(first))
    default = "linear" if innermost.get("name") == "linear_probe" else "cosine"
    if adjust == "tau_norm" and innermost.get("head", default) != "linear":
        raise LptError("method.adjust=tau_norm: a cosine head has unit rows already, use method.first.head=linear")
    if adjust == "temperature" and task.val is None:
        raise LptError("method.adjust=temperature is fitted on held-out images: set data.val_per_class")
    if adjust in ("crt", "lws", "marc") and innermost.get("name") == "lpt" and innermost.get("epochs", (1, 1))[1]:
        raise LptError(f"method.adjust={adjust} cannot train a head behind a prompt pool: use posthoc_la")
    if adjust in ("crt", "lws", "marc", "tau_norm") and innermost.get("name") == "knn":
        raise LptError(f"method.adjust={adjust} needs a head with weights: neighbours have none")
    if adjust in ("crt", "marc") and innermost.get("name") in ("ulfine", "daso"):
        raise LptError(f"method.adjust={adjust} needs one head, this one is fused of two: use lws or posthoc_la")
    earlier = {of.get("adjust", "crt") for of in inside if of.get("name") == "decoupled"}
    if adjust not in ("crt", "tau_norm") and earlier - {"crt", "tau_norm"}:
        raise LptError(f"method.adjust={adjust}: the classifier of method.first is adjusted already")
    model = second(first, fit)
    device, num_classes = next(model.parameters()).device, len(task.classes)
    head, prior = model.head, log_prior(task.counts).to(device)

    def train(names: list[str], **stage: Any) -> None:
        cached = head_features(fit, "features-second", model, task)
        rest = {"epochs": epochs, "lr": lr, "weight_decay": weight_decay, "cached": cached}
        train_stage(fit, f"adjust-{adjust}", model, task, train=names, **rest, **stage)

    if adjust == "tau_norm":
        assert isinstance(head, LinearHead)
        head.weight.data.div_(head.weight.data.norm(dim=1, keepdim=True).clamp(min=1e-12) ** tau)
        head.bias.data.zero_()
        return model
    if adjust == "crt":
        assert isinstance(head, CosineHead | LinearHead)
        generator = torch.Generator().manual_seed(fit.seed + 1)
        fresh = F.normalize(torch.empty(head.weight.shape).uniform_(-1, 1, generator=generator), dim=1)
        head.weight.data.copy_(fresh if isinstance(head, CosineHead) else torch.zeros_like(fresh))
        if isinstance(head, LinearHead):
            head.bias.data.zero_()
        train(["head."], loss="ce", sampler="class")
        return model
    model.calibration = calibration = Calibration(num_classes).to(device)
    if adjust == "lws":
        train(["calibration.scale"], loss="ce", sampler="class")
    elif adjust == "marc":
        assert isinstance(head, CosineHead | LinearHead)
        if isinstance(head, LinearHead):
            calibration.unit.copy_(head.weight.detach().float().norm(dim=1))
        weights = (-rho * prior).exp()
        train(["calibration."], loss=Weighted(weights / weights.mean(), head.scale, averaged))
        calibration.fold()
    elif adjust == "posthoc_la":
        calibration.offset.data.copy_(-tau * prior / head.scale)
    else:
        assert task.val is not None
        found = predict(model, task.val)
        calibration.scale.data.fill_(1 / temperature(head.scale * found.logits.double(), found.labels))
    return model


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
