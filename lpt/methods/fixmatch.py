"""FixMatch on light tuning: the study that ULFine opens with."""

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
from lpt.settings import Count, FractionBelowOne, Positive, Scale, Threshold, Weight

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
    weight_ema: FractionBelowOne = 0.0,
    optimizer: Optimizer = "sgd",
    lr: FractionBelowOne = 0.01,
    weight_decay: FractionBelowOne = 5e-4,
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
