"""Toy images that can be learned, and a small frozen backbone with random weights.

Shapes: labels [N], images [B 3 S S].
"""

import torch

from lpt.data.task import Images, Task
from lpt.model.backbones import timm_vit
from lpt.model.backbones.timm_vit import TimmViT
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.model.prompts import DeepPrompt, PromptPool, summary_width


def small_backbone(*, depth: int = 4, width: int = 32, heads: int = 2, size: int = 32, seed: int = 0) -> TimmViT:
    """A plain ViT of timm with `depth` blocks, random weights, frozen."""
    return timm_vit.untrained(
        "vit_tiny_patch16_224", image_size=size, seed=seed, depth=depth, embed_dim=width, num_heads=heads
    )


def toy_images(labels: torch.Tensor, *, seed: int = 0) -> Images:
    """Images whose mean colour depends on the label, 16 × 16, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 80, (len(labels), 3, 16, 16), generator=generator)
    colour = torch.stack([(labels * 37 + 40 * c) % 170 for c in range(3)], dim=1)[:, :, None, None]
    return Images((noise + colour).to(torch.uint8), labels, tuple(f"toy/{seed}-{i:04d}" for i in range(len(labels))))


def toy_task(counts: tuple[int, ...] = (30, 12, 5, 2), *, test_per_class: int = 6) -> Task:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    test = torch.arange(len(counts)).repeat_interleave(test_per_class)
    return Task(
        name="toy",
        classes=tuple(f"class {k}" for k in range(len(counts))),
        train=toy_images(labels),
        test=toy_images(test, seed=1),
        group_rule="thirds",
    )


def prompted(backbone, *, num_classes: int = 7, pool: bool = True, length: int = 3, prefix_blocks: int | None = None):
    generator = torch.Generator().manual_seed(3)
    group = PromptPool(
        size=5,
        topk=2,
        prefix_blocks=backbone.depth // 2 if prefix_blocks is None else prefix_blocks,
        depth=backbone.depth,
        length=length,
        width=backbone.width,
        key_width=backbone.feature_width,
        generator=generator,
    )
    with torch.no_grad():  # stronger than the usual start, so that the images choose different keys
        group.keys.mul_(50)
    return PromptedClassifier(
        backbone,
        CosineHead(num_classes=num_classes, width=backbone.feature_width, scale=20, generator=generator),
        classes=tuple(str(k) for k in range(num_classes)),
        shared=DeepPrompt(layers=backbone.depth, length=length, width=backbone.width, generator=generator),
        pool=group if pool else None,
    )


def of_mode(model, mode, *, query_map=None, ids=None):
    """The same model with another `query`: with none it has the prompts `ids` alone."""
    old, backbone = model.pool, model.backbone
    kept = torch.arange(len(old.keys)) if mode != "none" else ids
    pool = PromptPool(
        size=len(kept),
        topk=old.topk,
        prefix_blocks=old.prefix_blocks,
        depth=backbone.depth,
        length=old.tokens.shape[2],
        width=backbone.width,
        key_width=backbone.feature_width,
        query=mode,
        summary_width=summary_width(backbone.width, backbone.prefix),
    )
    with torch.no_grad():
        pool.tokens.copy_(old.tokens[kept])
        pool.keys.copy_(old.keys[kept])
        pool.centre.copy_(old.centre)
        if query_map is not None:
            pool.query_map.copy_(query_map)
    model.pool = pool
    return model.only_train().eval()


def images(backbone, n: int = 6, seed: int = 0):
    size = backbone.preprocess.size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
