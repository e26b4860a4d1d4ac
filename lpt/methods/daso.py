"""DASO on light tuning: pseudo-labels blend the linear head with class prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup
from lpt.engine.processes import gathered, rank_and_world
from lpt.losses import log_prior
from lpt.methods.semi_supervised import Fitted, Opinion, Plan, agreement, train_semi
from lpt.methods.supervised import HeadStart, Tuning, around, starting_rows
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import FusedHead
from lpt.settings import Count, FractionBelowOne, Positive, Scale, Threshold, Weight

QUEUE = 256
"""Features of each class that DASO's prototypes are means of."""


def daso(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    tuning: Tuning = "adaptformer",
    bottleneck: Count = 0,
    prompt_length: Positive = 10,
    head_init: HeadStart = "prototypes",
    scale: Scale = 25.0,
    scale_sim: Scale = 20.0,
    temperature: Scale = 0.3,
    histogram_ema: FractionBelowOne = 0.99,
    la_tau: float = 1.0,
    tau: Threshold = 0.7,
    lambda_u: Weight = 1.0,
    lambda_align: Weight = 1.0,
    steps: Positive = 10_000,
    rounds: Positive = 20,
    ratio: Positive = 1,
    strong_views: Positive = 1,
    optimizer: Optimizer = "sgd",
    lr: FractionBelowOne = 0.01,
    weight_decay: FractionBelowOne = 5e-4,
    warmup: Warmup = "linear",
) -> PromptedClassifier:
    """DASO (Oh 2022) on light tuning: pseudo-labels blend the linear head with the similarity to class prototypes, the
    more of it the more often the head's class is predicted (`FusedHead`, fusion `daso`).

    Prototypes are means of the last 256 labelled features of a class, texts while there are none. The semantic
    alignment loss, times `lambda_align`, asks strong views for the weak view's similarities. Predictions are the linear
    head's. Not as published: features are the model's and not those of its running mean, the histogram has a momentum,
    and labelled images are logit-adjusted.
    """
    plan = Plan(
        steps=steps,
        rounds=rounds,
        ratio=ratio,
        strong_views=strong_views,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
    )
    plan.check(fit, task, tuning)
    device, num_classes = next(backbone.parameters()).device, len(task.classes)
    generator = torch.Generator().manual_seed(fit.seed)
    head = FusedHead(
        num_classes=num_classes,
        width=backbone.feature_width,
        joint_width=backbone.joint_width,
        scales=(scale, scale_sim),
        fusion="daso",
        temperature=temperature,
        fuse=False,
    )
    with torch.no_grad():
        head.weight.copy_(starting_rows(task, backbone, fit, head_init, generator))
        head.texts.copy_(F.normalize(backbone.class_prototypes(task.classes), dim=1))
        head.prototypes.copy_(head.texts)
    inside = {"prompt_length": prompt_length, "bottleneck": bottleneck}
    model = around(head, task, backbone, generator, tuning=tuning, **inside)
    head.project = model.backbone.project
    prior = la_tau * log_prior(task.counts).to(device)

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head.both(feature)[0] + prior, labels)

    def opinion(feature: Tensor) -> Opinion:
        linear, similarity = head.both(feature)
        probability = head.fused(linear, similarity).softmax(1)
        kept = probability.amax(1) >= tau
        heads = {"linear": linear.softmax(1), "similarity": similarity.softmax(1)}
        return Opinion(probability, kept, kept.float(), heads)

    def consistency(feature: Tensor, found: Opinion) -> Tensor:
        linear, similarity = head.both(feature)
        aligned = F.cross_entropy(similarity, found.heads["similarity"])
        return lambda_u * agreement(linear, found) + lambda_align * aligned

    def fitting(feature: Tensor, labels: Tensor, found: Opinion) -> Fitted:
        def commit() -> None:
            _, world = rank_and_world()
            unit = gathered(F.normalize(head.joint(feature).float(), dim=1), len(feature) * world)
            _enqueue(fit, head, unit, gathered(labels, len(labels) * world))
            # Of everything predicted; what is kept alone would forget the classes that are not.
            label = gathered(found.label, len(found.label) * world)
            share = torch.bincount(label, minlength=num_classes).float() / len(label)
            head.frequency.lerp_(share, 1 - histogram_ema)

        return Fitted(feature.new_zeros(()), None, torch.no_grad()(commit))

    train_semi(fit, model, task, plan, supervised=supervised, opinion=opinion, consistency=consistency, fitting=fitting)
    return model


def _enqueue(fit: Fit, head: FusedHead, unit: Tensor, labels: Tensor) -> None:
    """Puts unit features [B J] into their classes' queues, and their means into the prototypes."""
    state, (num_classes, width) = fit.memory.state, head.prototypes.shape
    queue = state.setdefault("queue", unit.new_zeros(num_classes, QUEUE, width))
    number = state.setdefault("queued", labels.new_zeros(num_classes))
    for row, k in zip(unit, labels.tolist(), strict=True):
        queue[k, number[k] % QUEUE] = row
        number[k] += 1
    filled = number > 0
    head.prototypes[filled] = F.normalize(queue[filled].sum(1), dim=1)
