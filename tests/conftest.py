"""What tests share: the real data beside the checkout, and a small frozen backbone with random weights."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # both before anything imports `datasets`
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lpt-tests-")

import pytest
import torch

from lpt.config import load_config
from lpt.data.task import Images, Task
from lpt.model.backbones import timm_vit
from lpt.model.backbones.timm_vit import TimmViT
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.model.prompts import DeepPrompt, PromptPool
from lpt.run import train

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def real(path: str) -> Path:
    """A file of the real data and weights, or a skip that says which one is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is not at hand")
    return found


@pytest.fixture
def cifar100_root() -> Path:
    return real("data/cifar100/train.parquet").parent


@pytest.fixture
def deit_tiny_weights() -> Path:
    return real("weights/deit_tiny_patch16_224.fp16.safetensors")


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


def images(backbone, n: int = 6, seed: int = 0):
    size = backbone.preprocess.size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """(open_clip's own small model, the same behind the seam, its name and its weights); its texts are made once."""
    from test_clip_vit import stored

    from lpt.model.backbones import load_backbone

    model, name, path = stored(tmp_path_factory.mktemp("tower"), name="tower")
    backbone = load_backbone(f"open_clip:{name}", weights=path)
    backbone.class_prototypes([f"class {k}" for k in range(4)])
    return model, backbone, f"open_clip:{name}", path


@pytest.fixture
def clip(tower):
    return tower[1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a short finished run on digits; to be copied where a test changes it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    small = ["method.epochs=[2, 1]", "method.pool_size=5", "data.val_per_class=2", "train.precision=fp32"]
    train(load_config(ROOT / "configs/digits_lt/lpt.yaml", small), out)
    return out
