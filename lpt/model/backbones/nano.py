"""`nano`, the backbone inside the package: a small ViT at 32 px, so that a first run needs no download.

It has seen CIFAR-100's training images with their labels (`benchmarks/nano/pretrain.py`): never report it on CIFAR-100
as if those classes were new to it.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lpt.data.preprocess import Preprocess
from lpt.errors import BackboneError
from lpt.model.backbones.base import fill, fingerprint_of, without_numbers
from lpt.model.backbones.plain_vit import PlainViT
from lpt.model.backbones.timm_vit import TimmViT, read_weights

FILE = Path(__file__).parent / "nano.safetensors"
PATCH = 4
PREPROCESS = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def architecture() -> Any:
    """nano as timm builds it, untrained, for whoever trains it: 8 blocks of width 128 over 64 patches and CLS, 1.6
    million parameters."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=PATCH, embed_dim=128, depth=8, num_heads=4, num_classes=0, global_pool="token"
    )


def labels() -> set[str]:
    """The names of the classes it has been trained to tell apart, in lower case."""
    with safe_open(FILE, framework="pt") as file:
        return set(json.loads(file.metadata()["labels"]))


def load(*, image_size: int | None = None) -> TimmViT:
    """nano with its weights; other image sizes interpolate the position embedding. Raises BackboneError."""
    size = image_size or PREPROCESS.size  # in pixels
    if size % PATCH:
        raise BackboneError(f"backbone.image_size {size} is not a multiple of the patch size {PATCH} of nano")
    vit = without_numbers(lambda: PlainViT(image_size=PREPROCESS.size, patch_size=PATCH, width=128, depth=8, heads=4))
    fill(vit, {name: value.float() for name, value in read_weights(FILE).items()})
    fingerprint = fingerprint_of(vit.named_parameters())  # before positions are resampled to another size
    if size != PREPROCESS.size:
        vit.set_input_size((size, size))
    return TimmViT(vit, name="nano", preprocess=PREPROCESS.with_(size=size), fingerprint=fingerprint)
