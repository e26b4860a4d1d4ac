"""DASO on light tuning (Oh 2022): pseudo-labels blend the linear head with the similarity to class prototypes.

Shapes: feature [B D'], joint [B J], prototypes [C J], logits and probabilities [B C], labels [B].
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.phase import Recipe
from lpt.engine.processes import all_gather_rows, rank_and_world
from lpt.engine.session import Session
from lpt.engine.step_memory import StepMemory
from lpt.losses import log_prior
from lpt.methods.semi_supervised import (
    BatchTerm,
    Objective,
    PseudoLabels,
    SemiSchedule,
    consistency_loss,
    semi_phases,
)
from lpt.methods.supervised import HeadStart, Tuning, starting_rows, with_tuning
from lpt.model.backbones.base import Backbone
from lpt.model.heads import FusedHead
from lpt.settings import AdapterWidth, FractionBelowOne, Positive, Scale, Threshold, Weight, Without

QUEUE = 256
"""Features of each class that DASO's prototypes are means of."""


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    tuning: Tuning = "adaptformer",
    bottleneck: AdapterWidth = 0,
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
    schedule: Annotated[SemiSchedule, Without(("cached_views", "micro_batches", "weight_ema"))] = SemiSchedule(),
) -> Recipe:
    """DASO (Oh 2022) on light tuning: pseudo-labels blend the linear head with the similarity to class prototypes, the
    more of it the more often the head's class is predicted (`FusedHead`, fusion `daso`).

    Prototypes are means of the last 256 labeled features of a class, texts while there are none. The semantic
    alignment loss, times `lambda_align`, asks strong views for the weak view's similarities. Predictions are the linear
    head's. Not as published: features are the model's and not those of its running mean, the histogram has a momentum,
    and labeled images are logit-adjusted.
    """
    schedule.check(session, task, tuning)
    device, num_classes = next(backbone.parameters()).device, len(task.classes)
    generator = torch.Generator().manual_seed(session.start)
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
        head.weight.copy_(starting_rows(task, backbone, session, head_init, generator))
        head.texts.copy_(F.normalize(backbone.class_prototypes(task.classes), dim=1))
        head.prototypes.copy_(head.texts)
    widths: dict[str, Any] = {"prompt_length": prompt_length, "bottleneck": bottleneck}
    model = with_tuning(head, task, backbone, generator, tuning=tuning, **widths)
    head.project = model.backbone.project
    prior = la_tau * log_prior(task.counts).to(device)

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head.both(feature)[0] + prior, labels)

    def pseudo_label(feature: Tensor) -> PseudoLabels:
        linear, similarity = head.both(feature)
        probability = head.fused(linear, similarity).softmax(1)
        confident = probability.amax(1) >= tau
        heads = {"linear": linear.softmax(1), "similarity": similarity.softmax(1)}
        return PseudoLabels(probability, confident, confident.float(), heads)

    def consistency(feature: Tensor, pseudo: PseudoLabels) -> Tensor:
        linear, similarity = head.both(feature)
        alignment = F.cross_entropy(similarity, pseudo.heads["similarity"])
        return lambda_u * consistency_loss(linear, pseudo) + lambda_align * alignment

    def batch_term(feature: Tensor, labels: Tensor, pseudo: PseudoLabels, memory: StepMemory) -> BatchTerm:
        @torch.no_grad()
        def commit() -> None:
            _, world = rank_and_world()
            unit = all_gather_rows(F.normalize(head.joint(feature).float(), dim=1), len(feature) * world)
            enqueue(memory, head, unit, all_gather_rows(labels, len(labels) * world))
            # Of everything predicted; kept ones alone would forget the classes that are not.
            label = all_gather_rows(pseudo.label, len(pseudo.label) * world)
            share = torch.bincount(label, minlength=num_classes).float() / len(label)
            head.frequency.lerp_(share, 1 - histogram_ema)

        return BatchTerm(feature.new_zeros(()), None, commit)

    objective = Objective(
        supervised=supervised, pseudo_label=pseudo_label, consistency=consistency, batch_term=batch_term
    )
    return Recipe(model, semi_phases(session, model, task, schedule, objective))


def enqueue(memory: StepMemory, head: FusedHead, unit: Tensor, labels: Tensor) -> None:
    """Puts unit features [B J] into their classes' queues, and the queues' means into the prototypes."""
    num_classes, width = head.prototypes.shape
    queue = memory.tensors.setdefault("queue", unit.new_zeros(num_classes, QUEUE, width))
    queued = memory.tensors.setdefault("queued", labels.new_zeros(num_classes))
    for row, k in zip(unit, labels.tolist(), strict=True):
        queue[k, queued[k] % QUEUE] = row  # the oldest goes
        queued[k] += 1
    filled = queued > 0
    head.prototypes[filled] = F.normalize(queue[filled].sum(1), dim=1)
