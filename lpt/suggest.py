"""Settings for people who do not want to write a config: from class counts and hardware, each with its reason."""

from typing import Any

import torch

from lpt.data.task import Task

STEPS = {"cpu": 2000, "cuda": 10_000}
"""What a first run may take: some ten minutes on two cores with DeiT-Tiny, or on one GPU with ViT-B."""
BACKBONES = {
    "cpu": "timm:deit_tiny_patch16_224.fb_in1k",  # 5.7 million parameters, ImageNet-1k
    "cuda": "timm:vit_base_patch16_224.augreg_in21k",  # LPT's own
}


def suggest(task: Task, device: torch.device, *, backbone: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """(the sections backbone, method and train of a config, the reasons), from the training part alone."""
    images, classes, kind = len(task.train), len(task.classes), device.type
    name = backbone or BACKBONES[kind]
    batch = min(128 if kind == "cuda" else 32, max(4, images // 4))
    per_epoch = max(1, images // batch)
    epochs = min(max(round(STEPS[kind] / per_epoch), 3), 60)
    first, second = epochs - max(1, epochs // 3), max(1, epochs // 3)
    keys = max(2, min(20, classes, images // 10))
    config = {
        "backbone": {"name": name},
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
    where = "a GPU is there" if kind == "cuda" else "the smallest good one, for a processor without a GPU"
    return config, [
        f"{name}: {'as given' if backbone else where}",
        f"{first} + {second} epochs of {per_epoch} steps of 2 x {batch} images: {epochs * per_epoch} steps in all",
        f"{keys} group prompts for {classes} classes and {images} images",
    ]
