"""Frozen backbones by name: `nano`, `timm:<full tagged name>`, or `open_clip:<model>/<tag>`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lpt.data.preprocess import MAX_VIEW
from lpt.errors import BackboneError, check_kind, did_you_mean
from lpt.model.backbones.base import Backbone, with_norm_eps
from lpt.settings import checked_arguments

ImageSize = Annotated[int, Field(ge=1, le=MAX_VIEW)]
NormEps = Annotated[float, Field(ge=1e-12, le=0.1)]
"""ε of a LayerNorm: (x - mean) / √(variance + ε)."""

FAMILIES = {
    "nano": "a small ViT at 32 px that comes with lpt, distilled from DeiT-Tiny on CIFAR-100: no download",
    "timm": "a plain ViT of timm by its full tagged name, for example timm:deit_tiny_patch16_224.fb_in1k",
    "open_clip": "an image tower of CLIP or SigLIP with texts for class names, for example open_clip:ViT-B-16/openai",
    "untrained": "a timm architecture with random weights, for smoke runs, for example untrained:vit_tiny_patch16_224",
}


def random_backbone(name: str, *, image_size: int | None = None, norm_eps: float | None = None) -> Backbone:
    """The architecture of `load_backbone` with random weights: nothing is read or downloaded. Raises BackboneError."""
    from lpt.model.backbones import clip_vit, timm_vit

    family, _, model = name.partition(":")
    if family == "timm":
        return with_norm_eps(timm_vit.untrained(model, image_size=image_size, name=name), norm_eps)
    if family == "open_clip":
        return with_norm_eps(clip_vit.untrained(model, image_size=image_size), norm_eps)
    # These come with the package, or are random anyway.
    return load_backbone(name, image_size=image_size, norm_eps=norm_eps)


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    image_size: ImageSize | None = None,
    norm_eps: NormEps | None = None,
) -> Backbone:
    """A frozen backbone in fp32 on the CPU, in eval mode.

    `weights` is a local safetensors file that is used instead of a download; `image_size` interpolates the
    position embedding; `norm_eps` is the ε of its LayerNorms, by default what the model has. Raises BackboneError, and
    ConfigError for arguments of another kind.

    >>> import lpt
    >>> backbone = lpt.load_backbone("nano", image_size=48)
    >>> backbone.depth, backbone.width, backbone.preprocess.size
    (8, 128, 48)
    """
    name, image_size, norm_eps = checked_arguments(load_backbone, name=name, image_size=image_size, norm_eps=norm_eps)
    check_kind("backbone.weights", weights or "", (str, Path), "give the path of a safetensors file")
    return with_norm_eps(_load(name, weights, image_size), norm_eps)


def _load(name: str, weights: str | Path | None, image_size: int | None) -> Backbone:
    from lpt.model.backbones import clip_vit, nano, timm_vit

    if name == "nano":
        if weights:
            raise BackboneError("backbone.name nano has its own weights: leave backbone.weights out, or use timm:NAME")
        return nano.load(image_size=image_size)
    local_file = Path(weights) if weights else None
    family, colon, model = name.partition(":")
    if not colon or family not in FAMILIES or family == "nano":
        hint = did_you_mean(family, FAMILIES) or f"; a timm model would be timm:{name}"
        raise BackboneError(f"backbone.name {name!r} has no known family ({', '.join(FAMILIES)}){hint}")
    if family == "untrained":
        if weights:
            raise BackboneError(
                f"backbone.name {name} has random weights by name: with backbone.weights use timm:{model}"
            )
        return timm_vit.untrained(model, image_size=image_size)
    if family == "open_clip":
        return clip_vit.load(model, weights=local_file, image_size=image_size)
    return timm_vit.load(model, weights=local_file, image_size=image_size)
