"""What the field compares with: training-free classifiers, the linear probe, and fine-tuning in one of nine ways.

Shapes: features [N D'], logits [B C].
"""

from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F

from lpt.data.task import Task
from lpt.engine.optim import Optimizer, Warmup
from lpt.engine.phase import Phase, Recipe
from lpt.engine.session import Session
from lpt.errors import LptError
from lpt.losses import LossName
from lpt.methods.cue import CueSettings, CueTerms
from lpt.methods.supervised import HeadStart, Tuning, build_model, head_features, stage, tunable_names
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, NeighbourHead, class_means
from lpt.model.prompts import PromptInit
from lpt.settings import AdapterWidth, FractionBelowOne, Positive, Scale


def zero_shot(task: Task, backbone: Backbone, session: Session, *, scale: Scale = 100.0) -> Recipe:
    """The nearest class prototype by cosine, of texts for example: no training image is looked at. Raises BackboneError
    where the backbone knows none, or not all."""
    width, project = backbone.joint_width, backbone.project
    head = CosineHead(num_classes=len(task.classes), width=width, scale=scale, project=project)
    head.weight.data.copy_(F.normalize(backbone.class_prototypes(task.classes), dim=1))
    model = PromptedClassifier(backbone, head, classes=task.classes)
    return Recipe(model.to(next(backbone.parameters()).device))


def class_mean(task: Task, backbone: Backbone, session: Session, *, scale: Scale = 25.0) -> Recipe:
    """The nearest mean of a class's unit features by cosine (Kang 2020, NCM)."""
    model, head = _on_frozen_features(task, backbone, scale)
    features = head_features(session, "features", model, task)
    head.weight.data.copy_(class_means(features, task.train.labels, len(task.classes)))
    return Recipe(model)


def knn(task: Task, backbone: Backbone, session: Session, *, k: Positive = 20, temperature: Scale = 0.07) -> Recipe:
    """k nearest neighbours by cosine with softmax votes (Wu 2018). Its prompt file holds all training features."""
    model, _ = _on_frozen_features(task, backbone, 1.0)
    features = F.normalize(head_features(session, "features", model, task), dim=1)
    by_class = task.train.labels.argsort(stable=True)
    head = NeighbourHead(bank=features[by_class], counts=task.counts, k=min(k, len(features)), temperature=temperature)
    model.head = head.to(next(backbone.parameters()).device)
    return Recipe(model)


def _on_frozen_features(task: Task, backbone: Backbone, scale: float) -> tuple[PromptedClassifier, CosineHead]:
    head = CosineHead(num_classes=len(task.classes), width=backbone.feature_width, scale=scale)
    model = PromptedClassifier(backbone, head, classes=task.classes)
    return model.to(next(backbone.parameters()).device), head


def linear_probe(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    epochs: Positive = 20,
    head: Literal["linear", "cosine"] = "linear",
    loss: LossName = "ce",
    tau: float = 1.0,
    scale: Scale = 25.0,
    optimizer: Optimizer = "adamw",
    lr: FractionBelowOne = 1e-3,
    weight_decay: FractionBelowOne = 0.01,
    warmup: Warmup = "linear",
    cue: CueSettings = CueSettings(),
) -> Recipe:
    """A classifier on the frozen features of the test views: computed once, no augmentation, natural sampling.

    `linear` starts at zero and has scale 1; `cosine`, times `scale`, starts at the class means. `cue_*`, `distill` and
    `smooth_targets` stand beside the loss (`lpt.methods.cue`).
    """
    model = build_model(task, backbone, session, tuning="head", head=head, scale=scale)
    beside = CueTerms(cue, task, backbone, session, scale=model.head.scale) if cue.is_on else None

    def phases() -> Iterator[Phase]:
        yield stage(
            session,
            "head",
            model,
            task,
            train=["head."],
            loss=loss,
            epochs=epochs,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            warmup=warmup,
            cached=head_features(session, "features", model, task),
            beside=beside,
            tau=tau,
            label_smoothing=cue.smooth_targets,
        )

    return Recipe(model, phases())


def fine_tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    tuning: Tuning = "adaptformer",
    epochs: Positive = 10,
    loss: LossName = "la",
    sampler: Literal["instance", "class"] = "instance",
    head: Literal["linear", "cosine"] = "cosine",
    head_init: HeadStart = "class_mean",
    scale: Scale = 25.0,
    prompt_length: Positive = 10,
    bottleneck: AdapterWidth = 0,
    rank: AdapterWidth = 8,
    prompt_init: PromptInit = "normal",
    tau: float = 1.0,
    gamma: float = 2.0,
    beta: FractionBelowOne = 0.9999,
    margin: float = 0.5,
    optimizer: Optimizer = "sgd",
    lr: FractionBelowOne = 0.01,
    weight_decay: FractionBelowOne = 5e-4,
    warmup: Warmup = "linear",
    cue: CueSettings = CueSettings(),
) -> Recipe:
    """The head and one of nine things together: prompts, biases, norms, adapters, LoRA, everything, nothing else.

    - `head`: nothing else, on augmented views (`linear_probe` uses cached features);
    - `vpt_shallow`, `vpt_deep`: `prompt_length` tokens in the first or in every block (Jia 2022);
    - `bias`, `norm`: the backbone's biases (BitFit, Zaken 2022), or its LayerNorms;
    - `adaptformer`: a `bottleneck` beside every MLP (Chen 2022); 0 is LIFT's width for the number of classes;
    - `lora`: an update of `rank` in every qkv projection (Hu 2022), through peft: one A for q, k and v, times 2;
    - `lora_qv`: one of q and one of v, each with its own A, times 1/r, as LIFT has it; `rank` 0 is its width, too;
    - `full`: the whole backbone, which is then in the prompt file.

    The defaults are LIFT's recipe (Shi 2024) but for SGD's `lr`, which is per 256 images: half of LIFT's at its 128. A
    linear head starts at zero, whatever `head_init`. `tau` is of la, `gamma` of focal, `beta` of the class-balanced
    losses, `margin` of the LDAM ones; `cue_*`, `distill` and `smooth_targets` stand beside the loss
    (`lpt.methods.cue`).
    """
    if sampler == "class" and loss in ("la", "bs"):
        raise LptError(f"method.sampler=class balances the classes already, and loss {loss} would do so twice: use ce")
    model = build_model(
        task,
        backbone,
        session,
        tuning=tuning,
        head=head,
        head_init=head_init,
        scale=scale,
        prompt_length=prompt_length,
        bottleneck=bottleneck,
        rank=rank,
        prompt_init=prompt_init,
    )
    tuned = stage(
        session,
        "tune",
        model,
        task,
        train=tunable_names(model),
        loss=loss,
        epochs=epochs,
        lr=lr,
        optimizer=optimizer,
        weight_decay=weight_decay,
        warmup=warmup,
        sampler=sampler,
        tau=tau,
        gamma=gamma,
        beta=beta,
        margin=margin,
        beside=CueTerms(cue, task, backbone, session, scale=model.head.scale) if cue.is_on else None,
        label_smoothing=cue.smooth_targets,
    )
    return Recipe(model, [tuned])
