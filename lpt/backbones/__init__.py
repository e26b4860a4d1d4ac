"""Frozen backbones by name: `timm:<full tagged name>`."""

from pathlib import Path

from lpt.backbones.base import Backbone
from lpt.errors import BackboneError, did_you_mean

FAMILIES = {
    "timm": "a plain ViT of timm by its full tagged name, for example timm:deit_tiny_patch16_224.fb_in1k",
    "untrained": "a timm architecture with random weights, for smoke runs, for example untrained:vit_tiny_patch16_224",
}


def load_backbone(name: str, *, weights: str | Path | None = None, image_size: int | None = None) -> Backbone:
    """A frozen backbone in fp32 on the CPU, in eval mode.

    `weights` is a local safetensors file that is used instead of a download; `image_size` interpolates the
    position embedding. Raises BackboneError.
    """
    family, colon, model = name.partition(":")
    if not colon or family not in FAMILIES:
        hint = did_you_mean(family, FAMILIES) or f"; a timm model would be timm:{name}"
        raise BackboneError(f"backbone.name {name!r} has no known family ({', '.join(FAMILIES)}){hint}")
    from lpt.backbones import timm_vit

    if family == "untrained":
        if weights:
            raise BackboneError(
                f"backbone.name {name} has random weights by name: with backbone.weights use timm:{model}"
            )
        return timm_vit.untrained(model, image_size=image_size)
    return timm_vit.load(model, weights=Path(weights) if weights else None, image_size=image_size)
