"""Every backbone with published weights, by family: what `lpt list backbones --all` says."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lpt.errors import BackboneError
from lpt.model.backbones.published import MEGABYTES, forbids_commercial_use, full_names, licence, megabytes

FAMILIES = {
    "EUPE": r"_dinov3.*\.eupe_",
    "DINOv3": r"_dinov3",
    "Perception Encoder": r"^vit_pe_",
    "EVA-02": r"^eva02_",
    "EVA": r"^eva_",
    "RoPE-ViT": r"_rope_",
    "LingBot-Vision": r"_lingbot",
    "DINOv2": r"_dinov2",
    "DINO": r"\.dino$",
    "RADIO": r"_radio_v",
    "TIPSv2": r"_tipsv2",
    "SigLIP 2": r"_siglip_.*\.v2_",
    "SigLIP": r"_siglip_",
    "CLIP": r"_clip_",
    "DeiT-3": r"^deit3_",
    "DeiT": r"^deit_",
}
"""The first of these patterns that a full name of timm has says its family; the others are plain ViTs."""
PLAIN = "ViT"
WITH_TEXTS = "with a text tower"
"""What is behind the name of a family of open_clip."""


class Entry(NamedTuple):
    """Published weights. `megabytes` are of the image tower in fp32; None where nobody has counted."""

    name: str
    family: str
    image_size: int
    megabytes: int | None
    licence: str | None
    labels: str | None = None
    """Of timm's table of label sets, where there is a classifier with names that `prototypes.from=classifier` reads."""


def lines() -> Iterator[str]:
    """The list, a line at a time: each family with what it supports, and its weights."""
    families: dict[str, list[Entry]] = {}
    for entry in (*of_timm(), *of_open_clip()):
        families.setdefault(entry.family, []).append(entry)
    for family in sorted(families, key=str.casefold):
        entries = families[family]
        yield f"{family}: {supports(entries)}"
        for one in entries:
            size = "" if one.megabytes is None else f", {one.megabytes:,} MB"
            terms = one.licence or "licence unknown"
            terms += " (no commercial use)" if forbids_commercial_use(terms) else ""
            yield f"  {one.name}  {one.image_size} px{size}, {terms}"
    yield "refused by name: distilled DeiT, NaFlex, Sapiens2, EVA-02 enormous, hierarchical models, CNNs"


def supports(entries: list[Entry]) -> str:
    """What a family supports, in words. All that is listed can be prompted and tuned."""
    texts = WITH_TEXTS in entries[0].family
    prototypes = "texts" if texts else "prototypes.weights"
    if any(entry.labels for entry in entries):
        prototypes += " or prototypes.from=classifier"
    return f"prompts, every tuning, class prototypes by {prototypes}"


def of_timm() -> Iterator[Entry]:
    from timm.data.imagenet_info import infer_imagenet_subset
    from timm.models import get_pretrained_cfg

    for full in full_names():
        config: Any = get_pretrained_cfg(full)
        architecture = full.partition(".")[0]
        yield Entry(
            name=f"timm:{full}",
            family=family_of(full),
            image_size=config.input_size[-1],
            megabytes=megabytes(architecture),
            licence=config.license,
            labels=infer_imagenet_subset({"num_classes": config.num_classes}),
        )


def of_open_clip() -> Iterator[Entry]:
    import open_clip

    from lpt.model.backbones import clip_vit

    for model in open_clip.list_models():
        config: Any = open_clip.get_model_config(model)
        try:
            clip_vit.refuse_unserved_tower(f"open_clip:{model}", config)
        except BackboneError:
            continue
        if config["text_cfg"].get("hf_model_name"):
            continue
        for tag in open_clip.list_pretrained_tags_by_model(model):
            if not is_safe(open_clip.get_pretrained_cfg(model, tag)):
                continue
            name = f"open_clip:{model}/{tag}"
            yield Entry(
                name=name,
                family=f"{clip_family(model)} {WITH_TEXTS}",
                image_size=config["vision_cfg"]["image_size"],
                megabytes=megabytes(config["vision_cfg"].get("timm_model_name") or "") or own_tower(config),
                licence=licence(name),
            )


def own_tower(config: Mapping[str, Any]) -> int | None:
    """Megabytes of open_clip's own ViT in fp32; None for another tower."""
    vision = config["vision_cfg"]
    if vision.get("timm_model_name"):
        return None
    width, patch, hidden = vision["width"], vision["patch_size"], vision.get("mlp_ratio", 4.0) * vision["width"]
    block = 4 * width * (width + 1) + 2 * width * hidden + width + hidden + 4 * width
    tokens = (vision["image_size"] // patch) ** 2 + 1
    outside = 3 * patch**2 * width + (tokens + 1) * width + 4 * width + width * config["embed_dim"]
    return round(MEGABYTES * (vision["layers"] * block + outside) / 1e6)


def is_safe(published: Mapping[str, Any]) -> bool:
    """Whether weights of open_clip may be safetensors: a file's name says where they are not."""
    file = published.get("hf_hub", "").rpartition("/")[2]
    return bool(published.get("hf_hub")) and (not file or file.endswith(".safetensors"))


def family_of(full: str) -> str:
    """Of a full name of timm.

    >>> family_of("vit_base_patch16_siglip_224.v2_webli"), family_of("vit_tiny_patch16_224.augreg_in21k")
    ('SigLIP 2', 'ViT')
    """
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, full)), PLAIN)


def clip_family(model: str) -> str:
    """Of a model of open_clip.

    >>> clip_family("PE-Core-B-16"), clip_family("ViT-B-16-SigLIP2"), clip_family("ViT-B-16-quickgelu")
    ('Perception Encoder', 'SigLIP 2', 'CLIP')
    """
    starts = {"PE-": "Perception Encoder", "EVA02": "EVA-02", "EVA01": "EVA"}
    for start, family in starts.items():
        if model.startswith(start):
            return family
    return "SigLIP 2" if "SigLIP2" in model else "SigLIP" if "SigLIP" in model else "CLIP"
