"""A stage of fine-tuning: one loss, one sampler, and the parameters that it trains. Methods are made of these.

Shapes: views [B 3 H W] or features [B D'], logits [B C], labels [B].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.longtail import shot_groups
from lpt.data.samplers import ClassBalanced, InstanceBalanced
from lpt.data.task import Files, Images, Task
from lpt.engine.batches import Batch, Progress, Stream
from lpt.engine.evaluate import features
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup, scaled_lr
from lpt.engine.processes import averaged
from lpt.errors import LptError
from lpt.losses import LossName, loss_by_name
from lpt.model.adapters import Kind, auto_bottleneck, with_adapter
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, Head, LinearHead, class_means
from lpt.model.prompts import DeepPrompt, ShallowPrompt

Tuning = Literal["head", "vpt_shallow", "vpt_deep", "bias", "norm", "adaptformer", "lora", "full"]
HeadStart = Literal["random", "class_mean", "prototypes"]

Second = Callable[[Mapping[str, Any], Fit], PromptedClassifier]
"""Runs another method by its name and settings, for methods that come before or after one."""


def chain(method: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A method's name and settings, and those of the methods that it runs inside, the innermost last.

    Raises LptError where one of them has no name.
    """
    if "name" not in method:
        raise LptError(f"method: {dict(method)} has no name, which says what is to run")
    yield method
    for key in ("then", "first"):
        if key in method:
            yield from chain(method[key])


SWITCH = 0.8
"""The share of training after which `ldam_drw` turns its weights on (Cao 2019: epoch 160 of 200)."""


def learner(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    tuning: Tuning,
    head: Literal["cosine", "linear"],
    scale: float,
    head_init: HeadStart = "class_mean",
    prompt_length: int = 10,
    bottleneck: int = 0,
    rank: int = 8,
) -> PromptedClassifier:
    """A model in which `tuning` and the head may train, all of it at its start. `bottleneck` 0 is LIFT's rule."""
    num_classes, width = len(task.classes), backbone.feature_width
    generator = torch.Generator().manual_seed(fit.seed)
    start: CosineHead | LinearHead
    if head == "linear":
        start = LinearHead(num_classes=num_classes, width=width)
    else:
        start = CosineHead(num_classes=num_classes, width=width, scale=scale)
        start.weight.data.copy_(starting_rows(task, backbone, fit, head_init, generator))
    inside = {"prompt_length": prompt_length, "bottleneck": bottleneck, "rank": rank}
    return around(start, task, backbone, generator, tuning=tuning, **inside)


def starting_rows(task: Task, backbone: Backbone, fit: Fit, start: HeadStart, generator: torch.Generator) -> Tensor:
    """Where a cosine head starts [C D']: unit rows by chance, the class means of the features, or class prototypes."""
    num_classes, width = len(task.classes), backbone.feature_width
    plain = CosineHead(num_classes=num_classes, width=width, scale=1.0, generator=generator)
    if start == "random":
        return plain.weight.data
    if start == "prototypes":
        return F.normalize(backbone.unproject(backbone.class_prototypes(task.classes)), dim=1)
    device = next(backbone.parameters()).device
    model = PromptedClassifier(backbone, plain, classes=task.classes).to(device)
    found = fit.once("features", lambda: features(model, task.train, folder=fit.feature_cache))
    return class_means(found, task.train.labels, num_classes)


def around(
    head: Head,
    task: Task,
    backbone: Backbone,
    generator: torch.Generator,
    *,
    tuning: Tuning,
    prompt_length: int = 10,
    bottleneck: int = 0,
    rank: int = 8,
) -> PromptedClassifier:
    """`head` on `backbone`, with what `tuning` may train put in or thawed."""
    shared, inside = None, backbone
    if tuning == "vpt_deep":
        shared = DeepPrompt(layers=backbone.depth, length=prompt_length, width=backbone.width, generator=generator)
    elif tuning == "vpt_shallow":
        shared = ShallowPrompt(length=prompt_length, width=backbone.width, generator=generator)
    elif tuning != "head":
        kind: Kind = tuning
        chosen = bottleneck or auto_bottleneck(len(task.classes), backbone.depth)
        inside = with_adapter(backbone, kind, bottleneck=chosen, rank=rank, seed=generator.initial_seed())
    model = PromptedClassifier(inside, head, classes=task.classes, shared=shared)
    return model.to(next(backbone.parameters()).device)


def everything(model: PromptedClassifier) -> list[str]:
    """All that may train in `model`, as names for `train`."""
    return ["head."] + ["shared."] * (model.shared is not None) + ["backbone."] * bool(model.backbone.learned)


def train_stage(
    fit: Fit,
    name: str,
    model: PromptedClassifier,
    task: Task,
    *,
    train: Sequence[str],
    loss: LossName | Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    lr: float,
    optimizer: Optimizer = "adamw",
    weight_decay: float = 0.01,
    warmup: Warmup = "linear",
    clip: float | None = None,
    sampler: Literal["instance", "class"] = "instance",
    images: Images | Files | None = None,
    cached: Tensor | None = None,
    **constants: Any,
) -> None:
    """Trains the parameters whose names start with one of `train` on `images` (by default the training images), or on
    their `cached` features where only the head trains. A fresh optimiser and schedule; an epoch is N/B steps.
    `loss` is a name, or a function of logits and labels.

    `constants` are the loss's: tau, gamma, beta, margin; class counts are those of `images`.
    """
    if not epochs:
        return
    on = task.train if images is None else images
    num_classes, device = len(task.classes), next(model.parameters()).device
    counts = torch.bincount(on.labels, minlength=num_classes)
    few = torch.zeros(num_classes, dtype=torch.bool)
    few[shot_groups(task.counts, task.group_rule)["few"]] = True
    few = few.to(device)

    def of(name: LossName) -> Callable[[Tensor, Tensor], Tensor]:
        return loss_by_name(name, counts.to(device), scale=model.head.scale, mean=averaged, **constants)

    early = loss if callable(loss) else of(loss)
    late = of("ldam_cb") if loss == "ldam_drw" else early

    def step(model: PromptedClassifier, batches: dict[str, Batch], progress: Progress) -> Mapping[str, Tensor]:
        batch = batches[sampler]
        logits = model.classify(batch.views) if cached is not None else model(batch.views).logits
        fit.memory.note(few=few[batch.labels], right=logits.argmax(1) == batch.labels)
        value = (late if progress.step >= SWITCH * progress.steps else early)(logits, batch.labels)
        return {"loss": value}

    def erosion(model: PromptedClassifier, progress: Progress) -> Mapping[str, Any]:
        """Accuracy on the few-shot training images of the epoch, as they were seen: the cost is nothing."""
        noted = fit.memory.take()
        right = noted["right"][noted["few"]]
        return {"train_few": right.double().mean().item()} if len(right) else {}

    per_epoch = max(1, len(on) // fit.batch_size)
    draw = {"labels": on.labels, "batch_size": fit.batch_size, "seed": fit.seed}
    drawn = InstanceBalanced(**draw) if sampler == "instance" else ClassBalanced(**draw)
    model.only_train(*train)
    fit(
        name,
        model,
        step,
        {sampler: Stream(drawn, on, features=cached)},
        steps=epochs * per_epoch,
        steps_per_epoch=per_epoch,
        optimizer=optimizer,
        lr=scaled_lr(optimizer, lr, fit.batch_size),
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        on_epoch=erosion,
    )


def head_features(fit: Fit, name: str, model: PromptedClassifier, task: Task) -> Tensor:
    """Features of the training images as `model` is now [N D'], for a stage that trains the head alone."""
    if model.pool is not None:
        raise LptError("a head cannot be trained alone on cached features behind a prompt pool: use posthoc_la")
    return fit.once(name, lambda: features(model, task.train, folder=fit.feature_cache))
