"""The supervised stage that methods are made of: one loss, one sampler, and the parameters that it trains.

Shapes: views [B 3 H W] or features [B D'], logits [B C], labels [B].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.longtail import shot_groups
from lpt.data.samplers import ClassBalanced, InstanceBalanced
from lpt.data.task import Files, Images, Task
from lpt.engine.batches import Batch, Progress, Stream
from lpt.engine.optim import Optimizer, Warmup, scaled_lr
from lpt.engine.phase import Phase
from lpt.engine.processes import all_reduce_mean
from lpt.engine.session import Session
from lpt.engine.step_memory import StepMemory
from lpt.errors import BackboneError, LptError
from lpt.losses import LossName, loss_by_name
from lpt.memory import patch_of
from lpt.methods.cue import CueTerms
from lpt.model.adapters import Kind, auto_bottleneck, with_adapter
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, Head, LinearHead, class_means
from lpt.model.prompts import DeepPrompt, PromptInit, ShallowPrompt, start_uniform

Tuning = Literal["head", "vpt_shallow", "vpt_deep", "bias", "norm", "adaptformer", "lora", "lora_qv", "full"]
HeadStart = Literal["random", "class_mean", "prototypes"]
LogitLoss = Callable[[Tensor, Tensor], Tensor]
"""logits [B C], labels [B] → a scalar."""

DRW_START = 0.8
"""The share of training after which `ldam_drw` turns its weights on (Cao 2019: epoch 160 of 200)."""


def build_model(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    tuning: Tuning,
    head: Literal["cosine", "linear"],
    scale: float,
    head_init: HeadStart = "class_mean",
    prompt_length: int = 10,
    bottleneck: int = 0,
    rank: int = 8,
    prompt_init: PromptInit = "normal",
) -> PromptedClassifier:
    """A model at its start, in which `tuning` and the head may train. `bottleneck` and `rank` 0 are LIFT's rule."""
    num_classes, width = len(task.classes), backbone.feature_width
    generator = torch.Generator().manual_seed(session.start)
    classifier: CosineHead | LinearHead
    if head == "linear":
        classifier = LinearHead(num_classes=num_classes, width=width)
    else:
        classifier = CosineHead(num_classes=num_classes, width=width, scale=scale)
        try:
            classifier.weight.data.copy_(starting_rows(task, backbone, session, head_init, generator))
        except BackboneError as error:
            if head_init != "prototypes":
                raise
            raise BackboneError(f"{error}; or set method.head_init=class_mean, which needs none") from None
    return with_tuning(
        classifier,
        task,
        backbone,
        generator,
        tuning=tuning,
        prompt_length=prompt_length,
        bottleneck=bottleneck,
        rank=rank,
        prompt_init=prompt_init,
    )


def starting_rows(
    task: Task, backbone: Backbone, session: Session, head_init: HeadStart, generator: torch.Generator
) -> Tensor:
    """Where a cosine head starts [C D']: unit rows by chance, the class means of the features, or class prototypes."""
    num_classes, width = len(task.classes), backbone.feature_width
    # Drawn whatever the start is: what `generator` draws after it, prompts and adapters, must not depend on it.
    random_head = CosineHead(num_classes=num_classes, width=width, scale=1.0, generator=generator)
    if head_init == "random":
        return random_head.weight.data
    if head_init == "prototypes":
        return F.normalize(backbone.unproject(backbone.class_prototypes(task.classes)), dim=1)
    device = next(backbone.parameters()).device
    untuned = PromptedClassifier(backbone, random_head, classes=task.classes).to(device)
    return class_means(session.features("features", untuned, task.train), task.train.labels, num_classes)


def with_tuning(
    head: Head,
    task: Task,
    backbone: Backbone,
    generator: torch.Generator,
    *,
    tuning: Tuning,
    prompt_length: int = 10,
    bottleneck: int = 0,
    rank: int = 8,
    prompt_init: PromptInit = "normal",
) -> PromptedClassifier:
    """`head` on `backbone`, with what `tuning` may train put in or thawed."""
    shared, tuned = None, backbone
    if tuning == "vpt_deep":
        shared = DeepPrompt(layers=backbone.depth, length=prompt_length, width=backbone.width, generator=generator)
    elif tuning == "vpt_shallow":
        shared = ShallowPrompt(length=prompt_length, width=backbone.width, generator=generator)
    elif tuning != "head":
        kind: Kind = tuning
        width = auto_bottleneck(len(task.classes), backbone.depth)
        tuned = with_adapter(
            backbone, kind, bottleneck=bottleneck or width, rank=rank or width, seed=generator.initial_seed()
        )
    if shared is not None and prompt_init == "uniform":
        start_uniform(shared, patch_of(backbone), generator)
    model = PromptedClassifier(tuned, head, classes=task.classes, shared=shared)
    return model.to(next(backbone.parameters()).device)


def tunable_names(model: PromptedClassifier) -> list[str]:
    """Prefixes of the names of all that may train in `model`."""
    prefixes = ["head."]
    if model.shared is not None:
        prefixes.append("shared.")
    if model.backbone.learned:
        prefixes.append("backbone.")
    return prefixes


def stage(
    session: Session,
    name: str,
    model: PromptedClassifier,
    task: Task,
    *,
    train: Sequence[str],
    loss: LossName | LogitLoss,
    epochs: int,
    lr: float,
    optimizer: Optimizer = "adamw",
    weight_decay: float = 0.01,
    warmup: Warmup = "linear",
    clip: float | None = None,
    sampler: Literal["instance", "class"] = "instance",
    images: Images | Files | None = None,
    cached: Tensor | None = None,
    beside: CueTerms | None = None,
    **constants: Any,
) -> Phase:
    """The phase that trains the parameters whose names start with one of `train` on `images` (by default the training
    images), or on their `cached` features [N D'] where only the head trains. An epoch is N/B steps.

    `loss` is a name, or a function of logits and labels; `constants` are the loss's: tau, gamma, beta, margin,
    label_smoothing. Class counts are those of `images`; `beside` adds its terms. Nothing is trained here: yield what
    this returns.
    """
    trained_on = task.train if images is None else images
    counts = torch.bincount(trained_on.labels, minlength=len(task.classes))
    early, late = _losses(loss, counts, model, constants)
    few = _few_shot_mask(task).to(next(model.parameters()).device)
    memory = StepMemory()

    def step(model: PromptedClassifier, batches: dict[str, Batch], progress: Progress) -> Mapping[str, Tensor]:
        batch = batches[sampler]
        logits = model.classify(batch.views) if cached is not None else model(batch.views).logits
        memory.note(few=few[batch.labels], right=logits.argmax(1) == batch.labels)
        criterion = late if progress.step >= DRW_START * progress.steps else early
        value = criterion(logits, batch.labels)
        if beside is None:
            return {"loss": value}
        terms = beside(logits, batch.labels, batch.views, are_features=cached is not None)
        return {"loss": value + sum(terms.values()), **{name: term.detach() for name, term in terms.items()}}

    def few_shot_train_accuracy(model: PromptedClassifier, progress: Progress) -> Mapping[str, Any]:
        """Of the epoch's few-shot training images, as they were seen: it costs nothing, and shows a tail that is
        learned by heart."""
        notes = memory.take_notes()
        right = notes["right"][notes["few"]]
        return {"train_few": right.double().mean().item()} if len(right) else {}

    draws = {"labels": trained_on.labels, "batch_size": session.batch_size, "seed": session.seed}
    rows = InstanceBalanced(**draws) if sampler == "instance" else ClassBalanced(**draws)
    steps_per_epoch = max(1, len(trained_on) // session.batch_size)
    return Phase(
        name=name,
        trains=tuple(train),
        step=step,
        streams={sampler: Stream(rows, trained_on, features=cached)},
        steps=epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        optimizer=optimizer,
        lr=scaled_lr(optimizer, lr, session.batch_size),
        weight_decay=weight_decay,
        warmup=warmup,
        clip=clip,
        memory=memory,
        on_epoch=few_shot_train_accuracy,
    )


def _losses(
    loss: LossName | LogitLoss, counts: Tensor, model: PromptedClassifier, constants: Mapping[str, Any]
) -> tuple[LogitLoss, LogitLoss]:
    """(the loss of the first DRW_START of the steps, the loss of the rest); only `ldam_drw` has two."""
    if callable(loss):
        return loss, loss
    device = next(model.parameters()).device

    def by_name(name: LossName) -> LogitLoss:
        return loss_by_name(name, counts.to(device), scale=model.head.scale, mean=all_reduce_mean, **constants)

    early = by_name(loss)
    return early, by_name("ldam_cb") if loss == "ldam_drw" else early


def _few_shot_mask(task: Task) -> Tensor:
    """Which classes are few-shot by the training counts [C]."""
    mask = torch.zeros(len(task.classes), dtype=torch.bool)
    mask[shot_groups(task.counts, task.group_rule)["few"]] = True
    return mask


def head_features(session: Session, name: str, model: PromptedClassifier, task: Task) -> Tensor:
    """Features of the training images as `model` is now [N D'], for a stage that trains the head alone."""
    if model.pool is not None:
        raise LptError("a head cannot be trained alone on cached features behind a prompt pool: use posthoc_la")
    return session.features(name, model, task.train)
