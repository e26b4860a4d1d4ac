"""Settings for people who do not want to write a config: from class counts and hardware, each with its reason."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml

from lpt.config import Config, TrainSettings, check_data, merged, nested, resolve
from lpt.data import load_task
from lpt.data.task import Task
from lpt.device import pick_device
from lpt.errors import ConfigError
from lpt.settings import validated

STEPS = {"cpu": 2000, "cuda": 10_000}
"""Training steps of a first run by kind of device: about ten minutes on two cores. Large sets take more,
because a run has at least 3 epochs."""
BACKBONES = {
    "cpu": "timm:deit_tiny_patch16_224.fb_in1k",  # 5.7 million parameters, ImageNet-1k
    "cuda": "timm:vit_base_patch16_224.augreg_in21k",  # LPT's own
}
SIZES = {"cpu": 112, "cuda": 224}
"""Image side in pixels, by kind of device."""


def config_for_folder(root: str, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """(the resolved config for the images in `root`, its YAML text with the reasons as comments).

    `overrides` are `section.key=value` texts, and win over what is suggested. Raises ConfigError with every mistake in
    them, and DataError where `root` cannot be loaded.
    """
    given = nested(overrides)
    data = check_data({"name": "folder", "root": root, **given.get("data", {})})
    train = given.get("train", {})
    suggested, reasons = suggest(
        load_task(**data),
        _chosen_device(train),
        backbone=_chosen_backbone(given.get("backbone", {})),
        batch_size=_chosen_batch_size(train),
    )
    config = {"data": {key: value for key, value in data.items() if value is not None}, **suggested}
    resolved = resolve(config, overrides)
    final = merged(config, overrides)[0]
    return resolved, _text(final, reasons_that_hold(reasons, config, final))


def suggest(
    task: Task, device: torch.device, *, backbone: str | None = None, batch_size: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(the sections backbone, method and train of a config, the reasons by setting), from the training part alone.

    `backbone` is the name of another one than the default, `batch_size` another size of batches: there are as many
    epochs then that the steps stay about the same.
    """
    images, classes = len(task.train), len(task.classes)
    batch = min(128 if device.type == "cuda" else 32, max(4, images // 4))
    steps_per_epoch = max(1, images // batch)
    epochs = min(max(round(STEPS[device.type] / steps_per_epoch), 3), 60)
    if batch_size:
        steps = epochs * steps_per_epoch
        batch, steps_per_epoch = batch_size, max(1, images // batch_size)
        epochs = max(3, round(steps / steps_per_epoch))
    phase2_epochs = max(1, epochs // 3)
    pool_size = max(2, min(20, classes, images // 10))
    config = {
        "backbone": {
            "name": backbone or BACKBONES[device.type],
            "image_size": None if backbone == "nano" else SIZES[device.type],  # nano's own 32 pixels
        },
        "method": {
            "name": "lpt",
            "epochs": [epochs - phase2_epochs, phase2_epochs],
            "optimizer": "adamw",
            "lr": [5e-3, 5e-3],
            "pool_size": pool_size,
            "topk": 2,
            "head_init": "class_mean",
            "query_centering": "mean",
            "key_init": "kmeans",
            "query_head": True,
        },
        "train": {"batch_size": batch},
    }
    is_default = backbone in (None, BACKBONES[device.type])  # of another one nothing is known
    reasons: dict[str, str] = {}
    if device.type == "cuda" and is_default:
        reasons = {"backbone.name": "LPT's own, for a GPU", "backbone.image_size": "what it was made for"}
    elif device.type == "cpu":
        if is_default:
            reasons["backbone.name"] = "the smallest good one, for a processor without a GPU"
        reasons["backbone.image_size"] = "a quarter of the time of 224, less accurate"
    reasons["method.epochs"] = f"{epochs * steps_per_epoch} steps of 2 x {batch} images"  # LPT has two streams
    reasons["method.pool_size"] = f"for {classes} classes and {images} images"
    return config, reasons


def reasons_that_hold(
    reasons: Mapping[str, str], suggested: Mapping[str, Any], final: Mapping[str, Any]
) -> dict[str, str]:
    """`reasons` of the settings that have in `final` the value that was `suggested`."""

    def value(config: Mapping[str, Any], setting: str) -> Any:
        section, key = setting.split(".")
        return config.get(section, {}).get(key)

    holding = {}
    for setting, reason in reasons.items():
        if value(final, setting) is not None and value(final, setting) == value(suggested, setting):
            holding[setting] = reason
    return holding


def _chosen_device(train: Mapping[str, Any]) -> torch.device:
    """The device of the overrides, checked before the other settings because the suggestion depends on it."""
    settings, mistakes = validated("train", TrainSettings, {k: v for k, v in train.items() if k == "device"})
    if mistakes:
        raise ConfigError(mistakes)
    return pick_device(settings["device"])


def _chosen_backbone(backbone: Mapping[str, Any]) -> str | None:
    """The backbone of the overrides. What is no name is left to `resolve`, which reports all mistakes at once."""
    name = backbone.get("name")
    return name if isinstance(name, str) else None


def _chosen_batch_size(train: Mapping[str, Any]) -> int | None:
    """The batch size of the overrides. What is none is left to `resolve`, too."""
    _, mistakes = validated("train", TrainSettings, {k: v for k, v in train.items() if k == "batch_size"})
    return None if mistakes else train.get("batch_size")


def _text(config: dict[str, Any], reasons: Mapping[str, str]) -> str:
    comments = [f"# {setting}: {reason}\n" for setting, reason in reasons.items()]
    return "".join(comments) + yaml.safe_dump(config, sort_keys=False)
