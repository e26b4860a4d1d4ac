"""ULFine: light tuning, textual prototypes fitted by confidence, and fused logits (Zhang 2025, arXiv 2505.05062).

**A re-implementation from the published description, never a reproduction of its numbers**: neither code nor the body
of the paper was at hand. Established are the two modules and the form of α; every other choice is a setting of `tune`,
and its default is ours.

A step: pseudo-labels from the fused logits of weak views; cross-entropy of the linear head, logit-adjusted on labelled
images, with the pseudo-labels on strong views where confidence is at least `tau`; then each class prototype moves from
its text towards the mean of its labelled features, the further the more often the class is predicted.

Shapes: feature [B D'], joint [B J], prototypes [C J], logits [B C].
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup
from lpt.engine.processes import rank_and_world, summed
from lpt.errors import LptError
from lpt.losses import log_prior
from lpt.methods.semi_supervised import Fitted, Opinion, Plan, agreement, train_semi
from lpt.methods.supervised import HeadStart, Tuning, around, starting_rows
from lpt.model.adapters import auto_bottleneck
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import FusedHead, Fusion
from lpt.settings import Count, Fraction, FractionBelowOne, Positive, Scale, Threshold, Weight

RECURSIVE = 1e-3
"""The largest `mu` with which recursive prototypes have helped."""


def tune(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    tuning: Tuning = "adaptformer",
    adapter_dim: Literal["auto", "auto_lift"] | Positive = "auto",
    prompt_length: Positive = 10,
    rank: Positive = 8,
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
    la_on: Literal["labelled", "both"] = "labelled",
    lambda_sim: Weight = 0.0,
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
    """The light tuning and where it starts:

    - `tuning`: AdaptFormer of width `adapter_dim` (`auto` is LIFT's rule but at least 4, which `auto_lift` is not),
      prompts of `prompt_length`, LoRA of `rank`, `full`, or `head` alone; `head_init` and scales of both cosine heads.

    Prototype adaptive fitting, c_k = normalize((1 - α_k) base_k + α_k v_k) with α_k = `mu` P_k / max P:

    - `proto_mode`: base_k is the text (`anchored`), or the prototype of the step before (`recursive`: `mu` ≤ 0.001);
    - v_k: a running mean of the class's labelled features, with `visual_ema` at each step that has the class; P: of the
      weak views' probabilities (`soft`), of those kept (`masked`), or their counts (`histogram`), with `pu_ema`;
    - `proto_space`: where images and texts meet, or the features, to which texts are taken by the projection;
    - `proto_center`: both mixed after their means over classes are taken off, and the texts' mean added again;
    - `orth_weight` times the mean squared cosine between the prototypes or the visual means; with `learnable_text`
      between the prototypes, and their texts learn from it.

    Dual-logit fusion: `fusion`, `eta` and `daso_temperature` (`FusedHead`), and where it is used. Losses: `tau`,
    `lambda_u`, the strength `la_tau` of logit adjustment (0 is cross-entropy) and where it applies, `lambda_sim` for
    the same losses on the similarities. `ratio` unlabelled images come with each labelled one. SGD's `lr` is taken as
    it is. `weight_ema` is of what trains by gradient. Raises LptError.
    """
    if orth_on == "learnable_text" and proto_mode == "recursive":
        raise LptError(
            "method.orth_on=learnable_text needs proto_mode=anchored: recursive prototypes leave texts behind"
        )
    if proto_mode == "recursive" and mu > RECURSIVE:
        fit.say(
            f"warning: recursive prototypes move in every step: method.mu {mu:g} undoes their gain, use {RECURSIVE:g}"
        )
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
    plan.check(fit, task, tuning)
    num_classes, device = len(task.classes), next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(fit.seed)
    texts = F.normalize(backbone.class_prototypes(task.classes), dim=1)
    if proto_space == "features":
        texts = F.normalize(backbone.unproject(texts), dim=1)
    learned = ["scales"] * learn_scales + ["texts"] * (orth_on == "learnable_text")
    head = FusedHead(
        num_classes=num_classes,
        width=backbone.feature_width,
        joint_width=texts.shape[1],
        scales=(scale_lin, scale_sim),
        fusion=fusion,
        eta=eta,
        temperature=daso_temperature,
        fuse=fuse_inference,
        learned=learned,
    )
    with torch.no_grad():
        head.weight.copy_(starting_rows(task, backbone, fit, head_init, generator))
        head.texts.copy_(texts)
        head.prototypes.copy_(texts)
    width = adapter_dim if isinstance(adapter_dim, int) else auto_bottleneck(num_classes, backbone.depth)
    width = max(4, width) if adapter_dim == "auto" else width
    inside = {"prompt_length": prompt_length, "bottleneck": width, "rank": rank}
    model = around(head, task, backbone, generator, tuning=tuning, **inside)
    if proto_space == "joint":
        head.project = model.backbone.project

    prior = la_tau * log_prior(task.counts).to(device)

    def supervised(feature: Tensor, labels: Tensor) -> Tensor:
        linear, similarity = head.both(feature)
        value = F.cross_entropy((head.fused(linear, similarity) if fuse_train else linear) + prior, labels)
        return value + lambda_sim * F.cross_entropy(similarity + prior, labels) if lambda_sim else value

    def opinion(feature: Tensor) -> Opinion:
        linear, similarity = head.both(feature)
        probability = (head.fused(linear, similarity) if fuse_pseudo_labels else linear).softmax(1)
        kept = probability.amax(1) >= tau
        return Opinion(
            probability, kept, kept.float(), {"linear": linear.softmax(1), "similarity": similarity.softmax(1)}
        )

    def consistency(feature: Tensor, found: Opinion) -> Tensor:
        linear, similarity = head.both(feature)
        shift = prior if la_on == "both" else torch.zeros_like(prior)
        value = agreement((head.fused(linear, similarity) if fuse_train else linear) + shift, found)
        return lambda_u * (value + lambda_sim * agreement(similarity + shift, found) if lambda_sim else value)

    fitting = Fitting(proto_mode, mu, visual_ema, pu_estimator, pu_ema, proto_center, orth_weight, orth_on)
    train_semi(
        fit,
        model,
        task,
        plan,
        supervised=supervised,
        opinion=opinion,
        consistency=consistency,
        fitting=lambda feature, labels, found: fitting(head, feature, labels, found),
    )
    return model


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

    def __call__(self, head: FusedHead, feature: Tensor, labels: Tensor, found: Opinion) -> Fitted:
        """`feature` [B D'] without a graph, of the labelled images of this process; sums are taken over all."""
        num_classes, world = len(head.weight), rank_and_world()[1]
        feature = feature.detach().requires_grad_(self.orth_weight > 0)
        with torch.enable_grad():
            mine = F.one_hot(labels, num_classes).float().T @ F.normalize(head.joint(feature).float(), dim=1)
            sums = summed(mine.detach()) + (mine - mine.detach())  # the same bits everywhere, and a gradient in `mine`
            counts = summed(torch.bincount(labels, minlength=num_classes).float())
            following = self.following(head, sums, counts, *self._predicted(found, num_classes))
            if not self.orth_weight:
                return Fitted(sums.new_zeros(()), None, lambda: self._commit(head, following))
            rows = following.visual if self.orth_on == "visual_prototypes" else following.prototypes
            loss = self.orth_weight * orthogonality(rows)
            learns = self.orth_on == "learnable_text"
            (gradient,) = torch.autograd.grad(loss, feature, retain_graph=learns)
        # Gradients are averaged over processes, and each holds the part of its own images.
        return Fitted(loss if learns else loss.detach(), world * gradient, lambda: self._commit(head, following))

    def following(self, head: FusedHead, sums: Tensor, counts: Tensor, predicted: Tensor, number: Tensor) -> State:
        """The state after a step: `sums` [C J] of the classes' unit features in the batch and their `counts` [C],
        `predicted` [C], a sum over `number` unlabelled images. With a gradient in `sums`, and in texts that learn."""
        momentum = self.pu_ema if number > 0 else 1.0
        frequency = momentum * head.frequency + (1 - momentum) * predicted / number.clamp(min=1)
        present = counts > 0
        mean = F.normalize(sums, dim=1)
        first = torch.where(head.seen[:, None] > 0, head.visual.lerp(mean, 1 - self.visual_ema), mean)
        visual = torch.where(present[:, None], first, head.visual)
        seen = torch.where(present, torch.ones_like(head.seen), head.seen)
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

    def _predicted(self, found: Opinion, num_classes: int) -> tuple[Tensor, Tensor]:
        """(sum over the unlabelled images of what P estimates [C], how many they are), over all processes."""
        said, kept = found.probability, found.kept
        if self.pu_estimator == "histogram":
            said = F.one_hot(found.label, num_classes).to(said)
        if self.pu_estimator == "soft":
            kept = torch.ones_like(kept)
        whole = summed(torch.cat([said[kept].sum(0), kept.sum()[None].to(said)]))
        return whole[:-1], whole[-1]

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
