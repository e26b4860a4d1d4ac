"""FineSSL in our words: a second head says how much each pseudo-label weighs."""

import copy

import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup
from lpt.losses import log_prior
from lpt.methods.semi_supervised import Opinion, Plan, agreement, train_semi
from lpt.methods.supervised import HeadStart, Tuning, learner
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.settings import Count, FractionBelowOne, Positive, Scale, Threshold, Weight

QUEUE = 256
"""Features of each class that DASO's prototypes are means of."""


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
    smoothing: FractionBelowOne = 0.5,
    lambda_u: Weight = 3.0,
    steps: Positive = 15_000,
    rounds: Positive = 20,
    ratio: Positive = 1,
    strong_views: Positive = 2,
    optimizer: Optimizer = "sgd",
    lr: FractionBelowOne = 0.03,
    weight_decay: FractionBelowOne = 5e-4,
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
