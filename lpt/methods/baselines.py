"""What the field compares with: training-free classifiers, the linear probe, and fine-tuning in one of eight ways.

Shapes: features [N D'], logits [B C].
"""

from typing import Literal

import torch.nn.functional as F

from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup
from lpt.errors import LptError
from lpt.losses import LossName
from lpt.methods.supervised import HeadStart, Tuning, everything, head_features, learner, train_stage
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, NeighbourHead, class_means
from lpt.settings import Count, FractionBelowOne, Positive, Scale


def zero_shot(task: Task, backbone: Backbone, fit: Fit, *, scale: Scale = 100.0) -> PromptedClassifier:
    """The nearest class prototype by cosine, of texts for example: no training image is looked at. Raises BackboneError
    where the backbone knows none, or not all."""
    width, project = backbone.joint_width, backbone.project
    head = CosineHead(num_classes=len(task.classes), width=width, scale=scale, project=project)
    head.weight.data.copy_(F.normalize(backbone.class_prototypes(task.classes), dim=1))
    return PromptedClassifier(backbone, head, classes=task.classes).to(next(backbone.parameters()).device)


def class_mean(task: Task, backbone: Backbone, fit: Fit, *, scale: Scale = 25.0) -> PromptedClassifier:
    """The nearest mean of a class's unit features by cosine (Kang 2020, NCM)."""
    model, head = _frozen(task, backbone, scale)
    found = head_features(fit, "features", model, task)
    head.weight.data.copy_(class_means(found, task.train.labels, len(task.classes)))
    return model


def knn(task: Task, backbone: Backbone, fit: Fit, *, k: Positive = 20, temperature: Scale = 0.07) -> PromptedClassifier:
    """k nearest neighbours by cosine with softmax votes (Wu 2018). Its prompt file holds all training features."""
    model, _ = _frozen(task, backbone, 1.0)
    found = F.normalize(head_features(fit, "features", model, task), dim=1)
    order = task.train.labels.argsort(stable=True)
    head = NeighbourHead(bank=found[order], counts=task.counts, k=min(k, len(found)), temperature=temperature)
    model.head = head.to(next(backbone.parameters()).device)
    return model


def _frozen(task: Task, backbone: Backbone, scale: float) -> tuple[PromptedClassifier, CosineHead]:
    head = CosineHead(num_classes=len(task.classes), width=backbone.feature_width, scale=scale)
    return PromptedClassifier(backbone, head, classes=task.classes).to(next(backbone.parameters()).device), head


def linear_probe(
    task: Task,
    backbone: Backbone,
    fit: Fit,
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
) -> PromptedClassifier:
    """A classifier on the frozen features of the test views: computed once, no augmentation, natural sampling.

    `linear` starts at zero and has scale 1; `cosine`, times `scale`, starts at the class means.
    """
    model = learner(task, backbone, fit, tuning="head", head=head, scale=scale)
    train_stage(
        fit,
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
        cached=head_features(fit, "features", model, task),
        tau=tau,
    )
    return model


def fine_tune(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    tuning: Tuning = "adaptformer",
    epochs: Positive = 10,
    loss: LossName = "la",
    sampler: Literal["instance", "class"] = "instance",
    head: Literal["linear", "cosine"] = "cosine",
    head_init: HeadStart = "class_mean",
    scale: Scale = 25.0,
    prompt_length: Positive = 10,
    bottleneck: Count = 0,
    rank: Positive = 8,
    tau: float = 1.0,
    gamma: float = 2.0,
    beta: FractionBelowOne = 0.9999,
    margin: float = 0.5,
    optimizer: Optimizer = "sgd",
    lr: FractionBelowOne = 0.01,
    weight_decay: FractionBelowOne = 5e-4,
    warmup: Warmup = "linear",
) -> PromptedClassifier:
    """The head and one of eight things together: prompts, biases, norms, adapters, LoRA, everything, nothing else.

    - `head`: nothing else, on augmented views (`linear_probe` uses cached features);
    - `vpt_shallow`, `vpt_deep`: `prompt_length` tokens in the first or in every block (Jia 2022);
    - `bias`, `norm`: the backbone's biases (BitFit, Zaken 2022), or its LayerNorms;
    - `adaptformer`: a `bottleneck` beside every MLP (Chen 2022); 0 is LIFT's width for the number of classes;
    - `lora`: an update of `rank` in every qkv projection (Hu 2022), through peft;
    - `full`: the whole backbone, which is then in the prompt file.

    The defaults are LIFT's recipe (Shi 2024) but for SGD's `lr`, which is per 256 images: half of LIFT's at its 128. A
    linear head starts at zero, whatever `head_init`. `tau` is of la, `gamma` of focal, `beta` of the class-balanced
    losses, `margin` of the LDAM ones.
    """
    if sampler == "class" and loss in ("la", "bs"):
        raise LptError(f"method.sampler=class balances the classes already, and loss {loss} would do so twice: use ce")
    model = learner(
        task,
        backbone,
        fit,
        tuning=tuning,
        head=head,
        head_init=head_init,
        scale=scale,
        prompt_length=prompt_length,
        bottleneck=bottleneck,
        rank=rank,
    )
    train_stage(
        fit,
        "tune",
        model,
        task,
        train=everything(model),
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
    )
    return model
