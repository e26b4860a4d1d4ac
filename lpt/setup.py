"""What a run stands on, before anything is written: device, data and backbone of a config, found and checked."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpt.config import Config
from lpt.data import load_task
from lpt.data.task import Task
from lpt.device import PRECISIONS, allow_tf32, pick_device, pick_precision
from lpt.engine.processes import rank_and_world
from lpt.errors import BackboneError, LptError
from lpt.memory import check_run
from lpt.methods import nested_methods, nested_settings
from lpt.model.backbones import load_backbone, random_backbone
from lpt.model.backbones.base import Backbone, fingerprint_of, read_prototypes
from lpt.model.backbones.classifier_rows import ClassifierRows
from lpt.model.backbones.clip_text import read_templates
from lpt.model.backbones.labels_seen import labels_seen
from lpt.model.backbones.published import forbids_commercial_use, licence


class Setup:
    """Everything that a config names, found and checked: the one place that takes a config apart.

    `precision` is fp32 or bf16; `manifest` is of the split, and its hash says whether a resumed run is on the same
    images; `run_hash` is of every setting that moves a number, the split and the weights, which checkpoints must agree
    with; `labels_seen` are those of the classes that the backbone has been trained to tell apart, by label set.
    """

    def __init__(self, config: Config, *, read_weights: bool = True) -> None:
        """Without `read_weights` the backbone and the class prototypes are random, and nothing is downloaded. Raises
        LptError for what cannot be run."""
        from accelerate import Accelerator

        self.config = config
        self.device = pick_device(config.train.device)
        allow_tf32(self.device, config.train.tf32)
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        _check_shares(config.train.batch_size, rank_and_world()[1])
        self.task: Task = load_task(**config.data)
        _check_selection(config, self.task)
        self.precision = pick_precision(config.train.precision, self.device)
        backbone, dtype = open_backbone(config, read_weights=read_weights), PRECISIONS[self.precision]
        check_memory(config.method, self.task, backbone, config.train.batch_size, dtype=dtype, device=self.device)
        self.backbone = backbone.to(self.device, dtype)
        if not read_weights:
            self.backbone.prototypes = random_prototypes(self.task.classes, self.backbone)
        if config.train.compile:
            self.backbone.compile_blocks()
        self.manifest = self.task.manifest()
        # Once: class names that a text tower encodes on the way become prototypes of the backbone.
        self.weights_identity = _weights_identity(self.backbone, self.precision)
        self.run_hash = self.identity_of(config)
        self.labels_seen = labels_seen(self.task.classes, self.backbone.name)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def identity_of(self, config: Config) -> str:
        """The run hash of another config on this split and these weights."""
        return config.run_hash(self.manifest["sha256"], self.weights_identity)

    def remarks(self) -> Iterator[str]:
        """What a run reports about its data and its backbone before it trains."""
        yield from self.task.summary_lines()
        for name, shared in self.labels_seen.items():
            yield (
                f"warning: {self.backbone.name} has seen {len(shared)} of these {len(self.task.classes)} classes as "
                f"labels of {name}"
            )
        if isinstance(self.backbone.texts, ClassifierRows):
            yield self.backbone.texts.remark(self.task.classes)
        terms = licence(self.backbone.name)
        if terms and forbids_commercial_use(terms):
            yield f"warning: the weights of {self.backbone.name} are under {terms}, which forbids commercial use"


def check_memory(
    method: Mapping[str, Any],
    task: Task,
    backbone: Backbone,
    batch_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises LptError where a step of `method`, or of one inside it, needs more memory than there is."""
    check_run(
        backbone,
        list(nested_settings(method)),
        batch_size=batch_size,
        classes=len(task.classes),
        dtype=dtype,
        device=device,
        world=rank_and_world()[1],
    )


def _check_shares(batch_size: int, world: int) -> None:
    if batch_size % world:
        raise LptError(f"train.batch_size {batch_size} cannot be shared by {world} processes: use a multiple")


def _check_selection(config: Config, task: Task) -> None:
    """Raises LptError where the best epoch cannot be chosen."""
    if config.train.select != "best_val":
        return
    if task.val is None:
        raise LptError(
            "train.select=best_val needs held-out images: set data.val_per_class, or give the data a val part"
        )
    without = [name for name, method in nested_methods(config.method) if not method.ends_in_epochs]
    if without:
        raise LptError(f"train.select=best_val: {min(without)} does not end with epochs to choose from, use last")


def open_backbone(config: Config, *, read_weights: bool = True) -> Backbone:
    """The backbone of a config, in fp32 on the CPU, with its pixels and class prototypes. Raises BackboneError."""
    settings = config.backbone
    if read_weights:
        backbone = load_backbone(
            settings.name, weights=settings.weights, image_size=settings.image_size, norm_eps=settings.norm_eps
        )
    else:
        backbone = random_backbone(settings.name, image_size=settings.image_size, norm_eps=settings.norm_eps)
    preprocess = backbone.preprocess.as_published(settings.transform).with_(flip=settings.flip)
    if settings.interpolation is not None:
        preprocess = preprocess.with_(interpolation=settings.interpolation)
    if settings.crop_schedule == "mda":
        preprocess = preprocess.with_(crops="mda", min_area=0.08)
    if settings.min_area is not None:
        preprocess = preprocess.with_(min_area=settings.min_area)
    backbone.preprocess = preprocess
    if config.prototypes.source == "classifier" and read_weights:
        backbone.texts = _classifier_rows(config, backbone)
    elif config.prototypes.weights and read_weights:
        backbone.prototypes = read_prototypes(Path(config.prototypes.weights))
    elif backbone.texts is not None:
        backbone.templates = read_templates(config.prototypes.template)
    return backbone


def _classifier_rows(config: Config, backbone: Backbone) -> ClassifierRows:
    """What reads prototypes from the classifier of a config's backbone. Raises BackboneError where it has none."""
    if not backbone.name.startswith("timm:"):
        raise BackboneError(
            f"prototypes.from=classifier: {backbone.name} has no classifier, only models of timm have: leave it out"
        )
    weights, otherwise = config.backbone.weights, config.prototypes.weights
    return ClassifierRows(backbone.name, Path(weights) if weights else None, Path(otherwise) if otherwise else None)


def random_prototypes(classes: Sequence[str], backbone: Backbone) -> dict[str, Tensor]:
    """Class prototypes [J] by chance, where real ones are not read."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(backbone.joint_width, generator=generator) for name in classes}


def _weights_identity(backbone: Backbone, precision: str) -> str:
    """What of the backbone moves a run's numbers, as a text."""
    identity = f"{backbone.fingerprint} in {precision}"
    if backbone.prototypes:
        return f"{identity} with prototypes {fingerprint_of(backbone.prototypes.items())}"
    if isinstance(backbone.texts, ClassifierRows):
        return f"{identity} with {backbone.texts.identity()}"
    if backbone.texts is not None:
        return f"{identity} with texts {backbone.templates}"
    return identity
