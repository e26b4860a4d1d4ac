"""FixMatch on light tuning (Sohn 2020): the study that ULFine opens with, and what it is compared with.

Shapes: feature [B D'], logits and probabilities [B C], labels [B].
"""

import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.phase import Recipe
from lpt.engine.session import Session
from lpt.losses import log_prior
from lpt.methods.semi_supervised import Objective, PseudoLabels, SemiSchedule, consistency_loss, semi_phases
from lpt.methods.supervised import HeadStart, Tuning, build_model
from lpt.model.backbones.base import Backbone
from lpt.settings import AdapterWidth, Positive, Rank, Scale, Threshold, Weight


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    tuning: Tuning = "adaptformer",
    bottleneck: AdapterWidth = 0,
    prompt_length: Positive = 10,
    rank: Rank = 8,
    head_init: HeadStart = "prototypes",
    scale: Scale = 25.0,
    la_tau: float = 1.0,
    tau: Threshold = 0.7,
    soft_from: Threshold | None = None,
    lambda_u: Weight = 1.0,
    schedule: SemiSchedule = SemiSchedule(),
) -> Recipe:
    """The study that ULFine opens with: `tuning` is `head` (LP), adapters or prompts (LFT), or `full` (FFT); with
    FixMatch (Sohn 2020) on the unlabeled images, or at `lambda_u=0` on labels alone.

    A pseudo-label is the cosine head's on a weak view, kept from confidence `tau` on. Between `soft_from` and `tau` all
    probabilities are the target (LoFT's way, arXiv 2509.09926). Labeled images have logit adjustment of strength
    `la_tau` (0 is cross-entropy). SGD's `lr` is taken as it is.
    """
    schedule.check(session, task, tuning, unlabeled=lambda_u > 0)
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
        rank=rank,
    )
    prior = la_tau * log_prior(task.counts).to(next(backbone.parameters()).device)

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scale * model.head(feature) + prior, labels)

    def pseudo_label(feature: Tensor) -> PseudoLabels:
        probability = (scale * model.head(feature)).softmax(1)
        confident = probability.amax(1) >= tau
        return PseudoLabels(probability, confident, confident.float(), {"linear": probability})

    def consistency(feature: Tensor, pseudo: PseudoLabels) -> Tensor:
        logits = scale * model.head(feature)
        value = consistency_loss(logits, pseudo)
        if soft_from is not None:
            soft = (pseudo.probability.amax(1) >= soft_from) & ~pseudo.mask
            value = value + (soft * F.cross_entropy(logits, pseudo.probability, reduction="none")).mean()
        return lambda_u * value

    if lambda_u:
        objective = Objective(supervised=supervised, pseudo_label=pseudo_label, consistency=consistency)
    else:
        objective = Objective(supervised=supervised)
    return Recipe(model, semi_phases(session, model, task, schedule, objective))
