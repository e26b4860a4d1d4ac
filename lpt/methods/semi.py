"""What ULFine is compared with: FixMatch on light tuning, and two neighbours of it in our words.

All see the same streams for as many steps (`lpt.unlabelled`). Shapes: feature [B D'], joint [B J], logits [B C].
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.backbones.base import Backbone
from lpt.classifier import PromptedClassifier
from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup
from lpt.engine.processes import gathered, rank_and_world
from lpt.heads import CosineHead, FusedHead
from lpt.losses import log_prior
from lpt.settings import Count, Positive, Scale, Share, Threshold, Weight
from lpt.stage import HeadStart, Tuning, around, learner, starting_rows
from lpt.unlabelled import Fitted, Opinion, Plan, agreement, train_semi

QUEUE = 256
"""Features of each class that DASO's prototypes are means of."""


def fixmatch(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    tuning: Tuning = "adaptformer",
    bottleneck: Count = 0,
    prompt_length: Positive = 10,
    rank: Positive = 8,
    head_init: HeadStart = "prototypes",
    scale: Scale = 25.0,
    la_tau: float = 1.0,
    tau: Threshold = 0.7,
    soft_from: Threshold | None = None,
    lambda_u: Weight = 1.0,
    steps: Positive = 10_000,
    rounds: Positive = 20,
    ratio: Positive = 1,
    strong_views: Positive = 1,
    cached_views: Count = 0,
    micro_batches: Positive = 1,
    weight_ema: Share = 0.0,
    optimizer: Optimizer = "sgd",
    lr: Share = 0.01,
    weight_decay: Share = 5e-4,
    warmup: Warmup = "linear",
) -> PromptedClassifier:
    """The study that ULFine opens with: `tuning` is `head` (LP), adapters or prompts (LFT), or `full` (FFT); with
    FixMatch (Sohn 2020) on the unlabelled images, or at `lambda_u=0` on labels alone.

    A pseudo-label is the cosine head's on a weak view, kept from confidence `tau` on. Between `soft_from` and `tau` all
    probabilities are the target (LoFT's way, arXiv 2509.09926). Labelled images have logit adjustment of strength
    `la_tau` (0 is cross-entropy). SGD's `lr` is taken as it is.
    """
    plan = Plan(
        steps=steps,
        rounds=rounds,
        ratio=ratio,
        strong_views=strong_views,
        cached_views=cached_views,
        micro_batches=micro_batches,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        weight_ema=weight_ema,
    )
    plan.check(fit, task, tuning, unlabelled=lambda_u > 0)
    model = learner(
        task,
        backbone,
        fit,
        tuning=tuning,
        head="cosine",
        scale=scale,
        head_init=head_init,
        prompt_length=prompt_length,
        bottleneck=bottleneck,
        rank=rank,
    )
    prior = la_tau * log_prior(task.counts).to(next(backbone.parameters()).device)

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scale * model.head(feature) + prior, labels)

    def opinion(feature: Tensor) -> Opinion:
        probability = (scale * model.head(feature)).softmax(1)
        kept = probability.amax(1) >= tau
        return Opinion(probability, kept, kept.float(), {"linear": probability})

    def consistency(feature: Tensor, found: Opinion) -> Tensor:
        logits = scale * model.head(feature)
        value = agreement(logits, found)
        if soft_from is not None:
            soft = (found.probability.amax(1) >= soft_from) & ~found.kept
            value = value + (soft * F.cross_entropy(logits, found.probability, reduction="none")).mean()
        return lambda_u * value

    unlabelled = {"opinion": opinion, "consistency": consistency} if lambda_u else {}
    train_semi(fit, model, task, plan, supervised=supervised, **unlabelled)
    return model


def finessl(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    tuning: Tuning = "vpt_deep",
    prompt_length: Positive = 50,
    bottleneck: Count = 0,
    head_init: HeadStart = "prototypes",
    scale: Scale = 1 / 0.07,
    la_tau: float = 1.0,
    tau: Threshold = 0.7,
    smoothing: Share = 0.5,
    lambda_u: Weight = 3.0,
    steps: Positive = 15_000,
    rounds: Positive = 20,
    ratio: Positive = 1,
    strong_views: Positive = 2,
    optimizer: Optimizer = "sgd",
    lr: Share = 0.03,
    weight_decay: Share = 5e-4,
    warmup: Warmup = "linear",
) -> PromptedClassifier:
    """Like FineSSL (Gan 2024, ICML): a second head on detached features says how much each pseudo-label weighs.

    Every unlabelled image trains the main head, weighted by the second head's confidence in its weak view, times
    `lambda_u`. The second head learns from labels, and from the main head's pseudo-labels with `smoothing` where that
    one is sure from `tau` on. Not as published: the imbalance is met by logit adjustment instead of a margin that
    follows the learning status, and the scale does not learn.
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
    model = learner(
        task,
        backbone,
        fit,
        tuning=tuning,
        head="cosine",
        scale=scale,
        head_init=head_init,
        prompt_length=prompt_length,
        bottleneck=bottleneck,
    )
    # The place of a head that only LPT's pool reads: it trains, is in the checkpoints, and goes when training ends.
    second = model.query_head = copy.deepcopy(model.head) if isinstance(model.head, CosineHead) else None
    assert second is not None
    prior = la_tau * log_prior(task.counts).to(next(backbone.parameters()).device)

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        other = scale * second(feature.detach()) + prior
        return F.cross_entropy(scale * model.head(feature) + prior, labels) + F.cross_entropy(other, labels)

    def opinion(feature: Tensor) -> Opinion:
        probability, confidence = ((scale * head(feature)).softmax(1) for head in (model.head, second))
        kept = probability.amax(1) >= tau
        return Opinion(probability, kept, confidence.amax(1), {"linear": probability, "second": confidence})

    def consistency(feature: Tensor, found: Opinion) -> Tensor:
        other = scale * second(feature.detach())
        smooth = F.cross_entropy(other, found.label, label_smoothing=smoothing, reduction="none")
        return lambda_u * agreement(scale * model.head(feature), found) + (found.kept * smooth).mean()

    train_semi(
        fit, model, task, plan, supervised=supervised, opinion=opinion, consistency=consistency, also=("query_head.",)
    )
    model.query_head = None
    return model


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
    histogram_ema: Share = 0.99,
    la_tau: float = 1.0,
    tau: Threshold = 0.7,
    lambda_u: Weight = 1.0,
    lambda_align: Weight = 1.0,
    steps: Positive = 10_000,
    rounds: Positive = 20,
    ratio: Positive = 1,
    strong_views: Positive = 1,
    optimizer: Optimizer = "sgd",
    lr: Share = 0.01,
    weight_decay: Share = 5e-4,
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
