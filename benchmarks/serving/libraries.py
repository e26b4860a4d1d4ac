"""Folders of prompt files as they are measured: random numbers of the sizes that training leaves."""

from pathlib import Path
from typing import Any, Literal

import torch

from lpt.model.adapters import with_adapter
from lpt.model.backbones import timm_vit
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.model.prompts import DeepPrompt, PromptPool
from lpt.model.task_means import TaskMeans
from lpt.prompt_file import save_prompt

Kind = Literal["deep", "pool", "lora", "adaptformer", "head"]
ARCHITECTURES = {"deit_tiny": "deit_tiny_patch16_224", "vit_base": "vit_base_patch16_224"}


def backbone_of(model: str, precision: str, *, image_size: int = 224) -> Backbone:
    """Random weights: they take as long as others."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return timm_vit.untrained(ARCHITECTURES[model], image_size=image_size).to(dtype)


def model_of(backbone: Backbone, kind: Kind, number: int, *, classes: int) -> PromptedClassifier:
    """The `number`-th task: a prompt of 10 tokens in each block, LPT's pool of 20 with it, or an adapter; a cosine
    head."""
    generator = torch.Generator().manual_seed(number)
    head = CosineHead(num_classes=classes, width=backbone.feature_width, scale=20, generator=generator)
    parts: dict[str, Any] = {}
    sizes: dict[str, Any] = {"length": 10, "width": backbone.width, "generator": generator}
    if kind in ("deep", "pool"):
        parts["shared"] = DeepPrompt(layers=backbone.depth, **sizes)
    if kind == "pool":
        keys = {"size": 20, "topk": 2, "key_width": backbone.feature_width}
        parts["pool"] = PromptPool(prefix_blocks=backbone.depth // 2, depth=backbone.depth, **keys, **sizes)
    if kind in ("lora", "adaptformer"):
        backbone = with_adapter(backbone, kind, rank=8, bottleneck=8, seed=number)
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                if name in backbone.learned:
                    parameter.normal_(std=0.02, generator=generator)
    model = PromptedClassifier(backbone, head, classes=tuple(f"class {k}" for k in range(classes)), **parts)
    means = torch.nn.functional.normalize(torch.randn(classes, backbone.feature_width, generator=generator), dim=1)
    model.task_means = TaskMeans(means, torch.linspace(0, 1, 101))
    model.round_to(torch.float16)
    return model.only_train().eval()


def fill(folder: Path, backbone: Backbone, kind: Kind, number: int, *, first: int = 0) -> list[str]:
    """Writes `number` tasks of 10 to 100 classes; returns their names."""
    names = []
    for task in range(first, first + number):
        classes = 10 + 90 * (task * 37 % 101) // 100
        model = model_of(backbone, kind, task, classes=classes)
        name = f"{kind}-{task:04d}"
        save_prompt(folder / f"{name}.safetensors", model, method="random", counts=torch.full((classes,), 5))
        names.append(name)
    return names
