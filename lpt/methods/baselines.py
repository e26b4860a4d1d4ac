"""What the field compares with: so far the linear probe.

Shapes: features [N D'], logits [B C].
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lpt.backbones.base import Backbone
from lpt.classifier import PromptedClassifier
from lpt.data.task import Task
from lpt.engine.loop import Batch, Fit, Progress
from lpt.engine.optim import Optimizer, Warmup, scaled_lr
from lpt.evaluate import features
from lpt.heads import CosineHead, LinearHead, class_means
from lpt.losses import CrossEntropy, LogitAdjusted
from lpt.samplers import InstanceBalanced


def linear_probe(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    epochs: Annotated[int, Field(ge=1)] = 20,
    head: Literal["linear", "cosine"] = "linear",
    loss: Literal["ce", "la"] = "ce",
    tau: float = 1.0,
    scale: Annotated[float, Field(gt=0)] = 25.0,
    optimizer: Optimizer = "adamw",
    lr: Annotated[float, Field(ge=0, lt=1)] = 1e-3,
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.01,
    warmup: Warmup = "linear",
) -> PromptedClassifier:
    """A classifier on the frozen features of the test views: computed once, no augmentation, natural sampling.

    `linear` starts at zero and has scale 1; `cosine`, times `scale`, starts at the class means. `la` is logit
    adjustment by `tau` (Menon 2021).
    """
    num_classes, width = len(task.classes), backbone.feature_width
    chosen = (
        LinearHead(num_classes=num_classes, width=width)
        if head == "linear"
        else CosineHead(num_classes=num_classes, width=width, scale=scale)
    )
    device = next(backbone.parameters()).device
    model = PromptedClassifier(backbone, chosen, classes=task.classes).to(device).only_train("head.")
    found = fit.once("features", lambda: features(model, task.train, folder=fit.feature_cache))
    if isinstance(chosen, CosineHead):
        with torch.no_grad():
            chosen.weight.copy_(class_means(found, task.train.labels, num_classes))
    loss_of = LogitAdjusted(task.counts.to(device), tau, chosen.scale) if loss == "la" else CrossEntropy(chosen.scale)

    def step(model: PromptedClassifier, batches: dict[str, Batch], progress: Progress) -> Mapping[str, Tensor]:
        batch = batches["instance"]
        return {"loss": loss_of(model.head(batch.views), batch.labels)}

    per_epoch = max(1, len(task.train) // fit.batch_size)
    fit(
        "head",
        model,
        step,
        {"instance": InstanceBalanced(task.train.labels, batch_size=fit.batch_size, seed=fit.seed)},
        steps=epochs * per_epoch,
        steps_per_epoch=per_epoch,
        optimizer=optimizer,
        lr=scaled_lr(optimizer, lr, fit.batch_size),
        weight_decay=weight_decay,
        warmup=warmup,
        features=found,
    )
    return model
