"""FineSSL in our words (Gan 2024, ICML): a second head on detached features says how much each pseudo-label weighs.

Shapes: feature [B D'], logits and probabilities [B C], labels [B].
"""

import copy
from collections.abc import Iterator
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.phase import Phase, Recipe
from lpt.engine.session import Session
from lpt.losses import log_prior
from lpt.methods.semi_supervised import Objective, PseudoLabels, SemiSchedule, consistency_loss, semi_phases
from lpt.methods.supervised import HeadStart, Tuning, build_model
from lpt.model.backbones.base import Backbone
from lpt.model.heads import CosineHead
from lpt.settings import AdapterWidth, FractionBelowOne, Positive, Scale, Threshold, Weight, Without


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    tuning: Tuning = "vpt_deep",
    prompt_length: Positive = 50,
    bottleneck: AdapterWidth = 0,
    head_init: HeadStart = "prototypes",
    scale: Scale = 1 / 0.07,
    la_tau: float = 1.0,
    tau: Threshold = 0.7,
    smoothing: FractionBelowOne = 0.5,
    lambda_u: Weight = 3.0,
    schedule: Annotated[SemiSchedule, Without(("cached_views", "micro_batches", "weight_ema"))] = SemiSchedule(
        steps=15_000, strong_views=2, lr=0.03
    ),
) -> Recipe:
    """Like FineSSL (Gan 2024, ICML): a second head on detached features says how much each pseudo-label weighs.

    Every unlabeled image trains the main head, weighted by the second head's confidence in its weak view, times
    `lambda_u`. The second head learns from labels, and from the main head's pseudo-labels with `smoothing` where that
    one is sure from `tau` on. Not as published: the imbalance is met by logit adjustment instead of a margin that
    follows the learning status, and the scale does not learn.
    """
    schedule.check(session, task, tuning)
    model = build_model(
        task,
        backbone,
        session,
        tuning=tuning,
        head="cosine",
        scale=scale,
        head_init=head_init,
        prompt_length=prompt_length,
        bottleneck=bottleneck,
    )
    assert isinstance(model.head, CosineHead)
    # The place of a head that only LPT's pool reads: it trains, is in the checkpoints, and goes when training ends.
    second = model.query_head = copy.deepcopy(model.head)
    prior = la_tau * log_prior(task.counts).to(next(backbone.parameters()).device)

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        second_logits = scale * second(feature.detach()) + prior
        return F.cross_entropy(scale * model.head(feature) + prior, labels) + F.cross_entropy(second_logits, labels)

    def pseudo_label(feature: Tensor) -> PseudoLabels:
        probability = (scale * model.head(feature)).softmax(1)
        second_probability = (scale * second(feature)).softmax(1)
        confident = probability.amax(1) >= tau
        heads = {"linear": probability, "second": second_probability}
        return PseudoLabels(probability, confident, second_probability.amax(1), heads)

    def consistency(feature: Tensor, pseudo: PseudoLabels) -> Tensor:
        second_logits = scale * second(feature.detach())
        smooth = F.cross_entropy(second_logits, pseudo.label, label_smoothing=smoothing, reduction="none")
        return lambda_u * consistency_loss(scale * model.head(feature), pseudo) + (pseudo.mask * smooth).mean()

    objective = Objective(supervised=supervised, pseudo_label=pseudo_label, consistency=consistency)

    def phases() -> Iterator[Phase]:
        yield from semi_phases(session, model, task, schedule, objective, also_trains=("query_head.",))
        model.query_head = None

    return Recipe(model, phases())
