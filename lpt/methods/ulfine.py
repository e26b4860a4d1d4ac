"""ULFine: light tuning, textual prototypes fitted by confidence, and fused logits (Zhang 2025, arXiv 2505.05062).

**A re-implementation from the published description, never a reproduction of its numbers**: neither code nor the body
of the paper was at hand. Established are the two modules and the form of α; every other choice is a setting of `tune`,
and its default is ours.

A step: pseudo-labels from the fused logits of weak views; cross-entropy of the linear head, logit-adjusted on labeled
images, with the pseudo-labels on strong views where confidence is at least `tau`; then each class prototype moves from
its text towards the mean of its labeled features, the further the more often the class is predicted.

Shapes: feature [B D'], joint [B J], prototypes [C J], logits [B C].
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.phase import Recipe
from lpt.engine.processes import all_reduce_sum, rank_and_world
from lpt.engine.session import Session
from lpt.errors import LptError
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
from lpt.model.adapters import auto_bottleneck
from lpt.model.backbones.base import Backbone
from lpt.model.heads import FusedHead, Fusion
from lpt.settings import Fraction, FractionBelowOne, Positive, Rank, Scale, Threshold, Weight, renamed

RECURSIVE = 1e-3
"""The largest `mu` with which recursive prototypes have helped."""


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    tuning: Tuning = "adaptformer",
    adapter_dim: Literal["auto", "auto_lift"] | Rank = "auto",
    prompt_length: Positive = 10,
    rank: Rank = 8,
    proto_space: Literal["joint", "features"] = "joint",
    proto_mode: Literal["anchored", "recursive"] = "anchored",
    mu: Fraction = 0.1,
    visual_ema: FractionBelowOne = 0.9,
    pu_estimator: Literal["soft", "masked", "histogram"] = "soft",
    pu_ema: FractionBelowOne = 0.99,
    proto_center: bool = False,
    orth_weight: Weight = 0.1,
    orth_on: Literal["updated_prototypes", "visual_prototypes", "learnable_text"] = "updated_prototypes",
    scale_lin: Scale = 25.0,
    scale_sim: Scale = 25.0,
    learn_scales: bool = False,
    head_init: HeadStart = "prototypes",
    fusion: Fusion = "scale",
    eta: Fraction = 0.5,
    daso_temperature: Scale = 0.3,
    fuse_pseudo_labels: bool = True,
    fuse_train: bool = False,
    fuse_inference: bool = True,
    tau: Threshold = 0.7,
    lambda_u: Weight = 1.0,
    la_tau: float = 1.0,
    la_on: Annotated[Literal["labeled", "both"], renamed("labelled", "labeled")] = "labeled",
    lambda_sim: Weight = 0.0,
    schedule: SemiSchedule = SemiSchedule(),
) -> Recipe:
    """The light tuning and where it starts:

    - `tuning`: AdaptFormer of width `adapter_dim` (`auto` is LIFT's rule but at least 4, which `auto_lift` is not),
      prompts of `prompt_length`, LoRA of `rank`, `full`, or `head` alone; `head_init` and scales of both cosine heads.

    Prototype adaptive fitting, c_k = normalize((1 - α_k) base_k + α_k v_k) with α_k = `mu` P_k / max P:

    - `proto_mode`: base_k is the text (`anchored`), or the prototype of the step before (`recursive`: `mu` ≤ 0.001);
    - v_k: a running mean of the class's labeled features, with `visual_ema` at each step that has the class; P: of the
      weak views' probabilities (`soft`), of those kept (`masked`), or their counts (`histogram`), with `pu_ema`;
    - `proto_space`: where images and texts meet, or the features, to which texts are taken by the projection;
    - `proto_center`: both mixed after their means over classes are taken off, and the texts' mean added again;
    - `orth_weight` times the mean squared cosine between the prototypes or the visual means; with `learnable_text`
      between the prototypes, and their texts learn from it.

    Dual-logit fusion: `fusion`, `eta` and `daso_temperature` (`FusedHead`), and where it is used. Losses: `tau`,
    `lambda_u`, the strength `la_tau` of logit adjustment (0 is cross-entropy) and where it applies, `lambda_sim` for
    the same losses on the similarities. `ratio` unlabeled images come with each labeled one. SGD's `lr` is taken as
    it is. `weight_ema` is of what trains by gradient. Raises LptError.
    """
    if orth_on == "learnable_text" and proto_mode == "recursive":
        raise LptError(
            "method.orth_on=learnable_text needs proto_mode=anchored: recursive prototypes leave texts behind"
        )
    if proto_mode == "recursive" and mu > RECURSIVE:
        session.log(
            f"warning: recursive prototypes move in every step: method.mu {mu:g} undoes their gain, use {RECURSIVE:g}"
        )
    schedule.check(session, task, tuning)
    generator = torch.Generator().manual_seed(session.start)
    texts = class_texts(task, backbone, proto_space)
    head = FusedHead(
        num_classes=len(task.classes),
        width=backbone.feature_width,
        joint_width=texts.shape[1],
        scales=(scale_lin, scale_sim),
        fusion=fusion,
        eta=eta,
        temperature=daso_temperature,
        fuse=fuse_inference,
        learned=["scales"] * learn_scales + ["texts"] * (orth_on == "learnable_text"),
    )
    with torch.no_grad():
        head.weight.copy_(starting_rows(task, backbone, session, head_init, generator))
        head.texts.copy_(texts)
        head.prototypes.copy_(texts)
    model = with_tuning(
        head,
        task,
        backbone,
        generator,
        tuning=tuning,
        prompt_length=prompt_length,
        bottleneck=adapter_width(adapter_dim, len(task.classes), backbone.depth),
        rank=rank,
    )
    if proto_space == "joint":
        head.project = model.backbone.project
    prior = la_tau * log_prior(task.counts).to(next(backbone.parameters()).device)
    unlabeled_prior = prior if la_on == "both" else torch.zeros_like(prior)

    def trained_logits(linear: Tensor, similarity: Tensor) -> Tensor:
        return head.fused(linear, similarity) if fuse_train else linear

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        linear, similarity = head.both(feature)
        value = F.cross_entropy(trained_logits(linear, similarity) + prior, labels)
        return value + lambda_sim * F.cross_entropy(similarity + prior, labels) if lambda_sim else value

    def pseudo_label(feature: Tensor) -> PseudoLabels:
        linear, similarity = head.both(feature)
        logits = head.fused(linear, similarity) if fuse_pseudo_labels else linear
        probability = logits.softmax(1)
        confident = probability.amax(1) >= tau
        heads = {"linear": linear.softmax(1), "similarity": similarity.softmax(1)}
        return PseudoLabels(probability, confident, confident.float(), heads)

    def consistency(feature: Tensor, pseudo: PseudoLabels) -> Tensor:
        linear, similarity = head.both(feature)
        value = consistency_loss(trained_logits(linear, similarity) + unlabeled_prior, pseudo)
        if lambda_sim:
            value = value + lambda_sim * consistency_loss(similarity + unlabeled_prior, pseudo)
        return lambda_u * value

    fitting = Fitting(proto_mode, mu, visual_ema, pu_estimator, pu_ema, proto_center, orth_weight, orth_on)
    objective = Objective(
        supervised=supervised,
        pseudo_label=pseudo_label,
        consistency=consistency,
        batch_term=lambda feature, labels, pseudo, memory: fitting(head, feature, labels, pseudo),
    )
    return Recipe(model, semi_phases(session, model, task, schedule, objective))


def class_texts(task: Task, backbone: Backbone, proto_space: Literal["joint", "features"]) -> Tensor:
    """Unit class prototypes of the texts [C J], where images are compared with them."""
    texts = F.normalize(backbone.class_prototypes(task.classes), dim=1)
    return F.normalize(backbone.unproject(texts), dim=1) if proto_space == "features" else texts


def adapter_width(adapter_dim: Literal["auto", "auto_lift"] | int, num_classes: int, depth: int) -> int:
    """AdaptFormer's width: `auto_lift` is LIFT's rule, `auto` the same but at least 4 (ours)."""
    if isinstance(adapter_dim, int):
        return adapter_dim
    width = auto_bottleneck(num_classes, depth)
    return max(4, width) if adapter_dim == "auto" else width


class State(NamedTuple):
    """What prototype fitting moves: prototypes and visual means [C J], seen and frequency [C]."""

    prototypes: Tensor
    visual: Tensor
    seen: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class Fitting:
    """Prototype adaptive fitting (Zhang 2025): a step's update of a `FusedHead`'s state, and its orthogonality term."""

    mode: Literal["anchored", "recursive"] = "anchored"
    mu: float = 0.1
    visual_ema: float = 0.9
    pu_estimator: Literal["soft", "masked", "histogram"] = "soft"
    pu_ema: float = 0.99
    center: bool = False
    orth_weight: float = 0.1
    orth_on: Literal["updated_prototypes", "visual_prototypes", "learnable_text"] = "updated_prototypes"

    def __call__(self, head: FusedHead, feature: Tensor, labels: Tensor, pseudo: PseudoLabels) -> BatchTerm:
        """`feature` [B D'] without a graph, of the labeled images of this process; sums are taken over all."""
        num_classes, world = len(head.weight), rank_and_world()[1]
        feature = feature.detach().requires_grad_(self.orth_weight > 0)
        with torch.enable_grad():
            unit = F.normalize(head.joint(feature).float(), dim=1)
            local = F.one_hot(labels, num_classes).float().T @ unit
            # The same bits on every process, and a gradient in the local part.
            sums = all_reduce_sum(local.detach()) + (local - local.detach())
            counts = all_reduce_sum(torch.bincount(labels, minlength=num_classes).float())
            following = self.following(head, sums, counts, *self._predicted(pseudo, num_classes))
            if not self.orth_weight:
                return BatchTerm(sums.new_zeros(()), None, lambda: self._commit(head, following))
            rows = following.visual if self.orth_on == "visual_prototypes" else following.prototypes
            loss = self.orth_weight * orthogonality(rows)
            texts_learn = self.orth_on == "learnable_text"
            (gradient,) = torch.autograd.grad(loss, feature, retain_graph=texts_learn)
        # Gradients are averaged over processes, and each holds the part of its own images.
        value = loss if texts_learn else loss.detach()
        return BatchTerm(value, world * gradient, lambda: self._commit(head, following))

    def following(self, head: FusedHead, sums: Tensor, counts: Tensor, predicted: Tensor, number: Tensor) -> State:
        """The state after a step: `sums` [C J] of the classes' unit features in the batch and their `counts` [C],
        `predicted` [C], a sum over `number` unlabeled images. With a gradient in `sums`, and in texts that learn."""
        momentum = self.pu_ema if number > 0 else 1.0
        frequency = momentum * head.frequency + (1 - momentum) * predicted / number.clamp(min=1)

        # Running class means; a class that is seen for the first time starts at its mean.
        present = counts > 0
        mean = F.normalize(sums, dim=1)
        moved = torch.where(head.seen[:, None] > 0, head.visual.lerp(mean, 1 - self.visual_ema), mean)
        visual = torch.where(present[:, None], moved, head.visual)
        seen = torch.where(present, torch.ones_like(head.seen), head.seen)

        # Prototypes: from their texts towards the class means, the further the more often the class is predicted.
        alpha = (self.mu * seen * frequency / frequency.max().clamp(min=1e-12))[:, None]
        if self.mode == "recursive":
            base = head.prototypes
        else:
            base = F.normalize(head.texts, dim=1) if head.texts.requires_grad else head.texts
        target = F.normalize(visual, dim=1)
        mixed = (1 - alpha) * base + alpha * target
        if self.center:  # what is mixed are differences from the mean: no class gains on every image
            middle = (seen[:, None] * target).sum(0) / seen.sum().clamp(min=1)
            mixed = mixed + alpha * (base.mean(0) - middle)
        return State(torch.where(alpha > 0, F.normalize(mixed, dim=1), base), visual, seen, frequency)

    def _predicted(self, pseudo: PseudoLabels, num_classes: int) -> tuple[Tensor, Tensor]:
        """(sum over the unlabeled images of what P estimates [C], how many they are), over all processes."""
        predicted, counted = pseudo.probability, pseudo.mask
        if self.pu_estimator == "histogram":
            predicted = F.one_hot(pseudo.label, num_classes).to(predicted)
        if self.pu_estimator == "soft":
            counted = torch.ones_like(counted)
        local = torch.cat([predicted[counted].sum(0), counted.sum()[None].to(predicted)])
        total = all_reduce_sum(local)
        return total[:-1], total[-1]

    @staticmethod
    @torch.no_grad()
    def _commit(head: FusedHead, following: State) -> None:
        for name, value in following._asdict().items():
            getattr(head, name).copy_(value)


def orthogonality(rows: Tensor) -> Tensor:
    """The mean squared cosine between two different `rows` [C J]."""
    unit = F.normalize(rows, dim=1)
    squares = (unit @ unit.T) ** 2
    return (squares.sum() - squares.diagonal().sum()) / (len(rows) * (len(rows) - 1))
