"""CUE: classes that are easily confused, as targets beside any loss (CVPR 2026, arXiv 2605.01309), and its controls.

L = L_0(z, y) + λ_zs BLA(z, t_zs) + λ_nb BLA(z, t_nb); theirs is L_0 logit-adjusted, and λ = ½. BLA is binary
cross-entropy on adjusted logits (`lpt.losses.BinaryAdjusted`). t_zs marks y and the classes that the frozen zero-shot
model likes best for this very view; t_nb marks y and its neighbors. Theirs come by name from a language model; ours
are the nearest class prototypes: our deviation.

Hazards. BLA is a mean over classes too, so the terms shrink as 1/C: λ of 100 classes is not λ of 1,000. And a gain may
be plain distillation, or plain softness of targets: three controls say so, `cue_random`, `distill`, `smooth_targets`.

Shapes: views [B 3 H W], features [B D'], logits and targets [B C], labels [B].
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.session import Session
from lpt.errors import BackboneError
from lpt.losses import BinaryAdjusted, distillation
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, class_means, cosines
from lpt.settings import FractionBelowOne, Positive, Scale, Weight


@dataclass(frozen=True, kw_only=True)
class CueSettings:
    """Settings that stand beside a method's loss; 0 leaves a term out."""

    cue_zero_shot: Weight = 0.0
    """λ_zs; theirs is 0.5."""
    cue_neighbors: Weight = 0.0
    """λ_nb; theirs is 0.5."""
    cue_top: Positive = 5
    """Classes that t_zs marks beside y, of C - 1 at most."""
    cue_near: Positive = 4
    """Classes that t_nb marks beside y (theirs: about 4)."""
    cue_random: bool = False
    """Control: as many neighbors, by chance."""
    cue_tau: float = 1.0
    cue_from: Literal["prototypes", "class_mean"] = "prototypes"
    """What the zero-shot model compares with: class prototypes, or the class means of the training features where there
    are none (ours; a model that has seen the labels)."""
    distill: Weight = 0.0
    """Control: times KL(zero-shot ‖ ours) on balanced logits, z without its prior."""
    distill_scale: Scale = 100.0
    """What the zero-shot cosines are multiplied with there (CLIP's own is 100)."""
    smooth_targets: FractionBelowOne = 0.0
    """Control: of L_0, where that is ce, la or bs."""

    @property
    def is_on(self) -> bool:
        return any((self.cue_zero_shot, self.cue_neighbors, self.distill))


class CueTerms:
    """The terms beside the loss, for a task: what is frozen of them is here."""

    def __init__(
        self, settings: CueSettings, task: Task, backbone: Backbone, session: Session, *, scale: float
    ) -> None:
        """`scale` multiplies the logits of the model that is trained. Raises BackboneError without prototypes."""
        self.settings, self.scale = settings, scale
        device = next(backbone.parameters()).device
        head = _zero_shot_head(settings, task, backbone, session)
        self.frozen = PromptedClassifier(backbone, head, classes=task.classes).to(device)
        self.binary = BinaryAdjusted(task.counts.to(device), settings.cue_tau, scale)
        generator = torch.Generator().manual_seed(session.seed) if settings.cue_random else None
        self.neighbors = neighbors(head.weight.detach(), settings.cue_near, generator).to(device)

    @torch.no_grad()
    def zero_shot(self, views: Tensor, *, are_features: bool) -> Tensor:
        """Cosines of views or cached features with the prototypes [B C]: one frozen forward, or none."""
        return self.frozen.classify(views) if are_features else self.frozen(views).logits

    def __call__(self, logits: Tensor, labels: Tensor, views: Tensor, *, are_features: bool) -> dict[str, Tensor]:
        """The terms by name, each times its λ."""
        settings, terms = self.settings, {}
        if settings.cue_neighbors:
            terms["neighbors"] = settings.cue_neighbors * self.binary(logits, self.neighbors[labels])
        if settings.cue_zero_shot or settings.distill:
            cosine = self.zero_shot(views, are_features=are_features)
            if settings.cue_zero_shot:
                targets = zero_shot_targets(cosine, labels, settings.cue_top)
                terms["zero_shot"] = settings.cue_zero_shot * self.binary(logits, targets)
            if settings.distill:
                terms["distilled"] = settings.distill * distillation(
                    self.scale * logits, settings.distill_scale * cosine
                )
        return terms


def zero_shot_targets(cosine: Tensor, labels: Tensor, top: int) -> Tensor:
    """t_zs [B C] of 0 and 1: the label, and the `top` other classes of the largest `cosine` [B C]."""
    others = cosine.float().scatter(1, labels[:, None], -torch.inf)
    liked = others.topk(min(top, cosine.shape[1] - 1), dim=1).indices
    return torch.zeros_like(others).scatter(1, liked, 1.0).scatter(1, labels[:, None], 1.0)


def neighbors(prototypes: Tensor, near: int, generator: torch.Generator | None = None) -> Tensor:
    """t_nb of every class [C C] of 0 and 1: itself, and the `near` others of the largest cosine between prototypes
    [C J]; with a `generator` as many others by chance."""
    number = len(prototypes)
    if generator is None:
        similarity = cosines(prototypes, prototypes)
    else:
        similarity = torch.rand(number, number, generator=generator).to(prototypes.device)
    return zero_shot_targets(similarity, torch.arange(number, device=prototypes.device), near)


def _zero_shot_head(settings: CueSettings, task: Task, backbone: Backbone, session: Session) -> CosineHead:
    num_classes = len(task.classes)
    if settings.cue_from == "prototypes":
        try:
            rows = backbone.class_prototypes(task.classes)
        except BackboneError as error:
            raise BackboneError(f"{error}; or set method.cue_from=class_mean, which needs none") from None
        project = backbone.project
        head = CosineHead(num_classes=num_classes, width=backbone.joint_width, scale=1.0, project=project)
        head.weight.data.copy_(F.normalize(rows, dim=1))
        return head
    head = CosineHead(num_classes=num_classes, width=backbone.feature_width, scale=1.0)
    untuned = PromptedClassifier(backbone, head, classes=task.classes).to(next(backbone.parameters()).device)
    features = session.features("features", untuned, task.train)
    head.weight.data.copy_(class_means(features, task.train.labels, num_classes))
    return head
