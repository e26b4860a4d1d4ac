"""Settings for people who do not want to write a config: from class counts and hardware, each with its reason."""

from typing import Any

import torch

from lpt.data.task import Task

STEPS = {"cpu": 2000, "cuda": 10_000}
"""What a first run should take, some ten minutes on two cores; large sets take more, since 3 epochs are the least."""
BACKBONES = {
    "cpu": "timm:deit_tiny_patch16_224.fb_in1k",  # 5.7 million parameters, ImageNet-1k
    "cuda": "timm:vit_base_patch16_224.augreg_in21k",  # LPT's own
}
SIZES = {"cpu": 112, "cuda": 224}


def suggest(task: Task, device: torch.device, *, backbone: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """(the sections backbone, method and train of a config, the reasons by setting), from the training part alone.
    `backbone` is another one than the default."""
    images, classes, kind = len(task.train), len(task.classes), device.type
    batch = min(128 if kind == "cuda" else 32, max(4, images // 4))
    per_epoch = max(1, images // batch)
    epochs = min(max(round(STEPS[kind] / per_epoch), 3), 60)
    first, second = epochs - max(1, epochs // 3), max(1, epochs // 3)
    keys = max(2, min(20, classes, images // 10))
    config = {
        "backbone": {"name": backbone or BACKBONES[kind], "image_size": None if backbone == "nano" else SIZES[kind]},
        "method": {
            "name": "lpt",
            "epochs": [first, second],
            "optimizer": "adamw",
            "lr": [5e-3, 5e-3],
            "pool_size": keys,
            "topk": 2,
            "head_init": "class_mean",
            "query_centering": "mean",
            "key_init": "kmeans",
            "query_head": True,
        },
        "train": {"batch_size": batch},
    }
    small = "the smallest good one, for a processor without a GPU"
    return config, {
        "backbone.name": "LPT's own, for a GPU" if kind == "cuda" else small,
        "backbone.image_size": "what it was made for"
        if kind == "cuda"
        else "a quarter of the time of 224, less accurate",
        "method.epochs": f"{epochs * per_epoch} steps of 2 x {batch} images",
        "method.pool_size": f"for {classes} classes and {images} images",
    }
