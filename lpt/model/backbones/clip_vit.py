"""Image towers of open_clip as backbones, with texts: CLIP's own ViTs, SigLIP's, EVA-02's, Perception Encoder's.

Shapes: feature [B D'], projection [D' J] to the joint space of images and texts, prototypes [C J] there.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpt.data.preprocess import Preprocess
from lpt.errors import BackboneError, did_you_mean, require
from lpt.model.backbones.base import fingerprint_of, with_memory, without_numbers
from lpt.model.backbones.clip_text import TEMPLATE, TextTower
from lpt.model.backbones.eva_vit import EvaViT, is_eva
from lpt.model.backbones.timm_vit import (
    TimmViT,
    check_fit,
    download_errors,
    empty,
    read_weights,
    refuse_unserved,
    refuse_unserved_module,
    set_size,
)

SUPPORTED = (
    "open_clip's own ViTs that read the class token (ViT-B-16, ViT-L-14, ...), and plain and rotary timm ViTs with one "
    "matrix or nothing behind them (ViT-*-SigLIP, ViT-*-SigLIP2, PE-Core-*, EVA02-*)"
)
HUB_FILE = "open_clip_model.safetensors"
"""What open_clip calls the weights in a repository of its own."""
OPEN_CLIP_NAMES = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "blocks.": "transformer.resblocks.",
    ".norm": ".ln_",
    ".ls": ".ls_",
    "norm_pre.": "ln_pre.",
    "norm.": "ln_post.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""Parts of timm's names of tensors, and open_clip's, in the order of their replacement."""


def load(model: str, *, weights: Path | None = None, image_size: int | None = None) -> TimmViT:
    """`model` is `<model>/<tag>` of open_clip; the tag may be left out where `weights`, a local safetensors file in
    open_clip's key names, is given.

    A tag says whether QuickGELU was trained, and with which pixels. Without one the model's config says the first, and
    the first tag of the model the second. Raises BackboneError for unknown names, for towers that are not supported
    (before any download), for weights that are pickles only, and for weights that do not fit (every key named).
    """
    name = f"open_clip:{model}"
    model, _, tag = model.partition("/")
    config, published = _read_config(name, model, tag, needs_tag=weights is None)
    path = _download(name, published["hf_hub"]) if weights is None else weights
    return _open(name, model, config, published, path, image_size)


def untrained(model: str, *, image_size: int | None = None) -> TimmViT:
    """The architecture of `load` with random weights: nothing is read or downloaded, and it has no texts."""
    name = f"open_clip:{model}"
    model, _, tag = model.partition("/")
    config, published = _read_config(name, model, tag, needs_tag=False)
    return _open(name, model, config, published, None, image_size)


def _open(
    name: str,
    model: str,
    config: Mapping[str, Any],
    published: Mapping[str, Any],
    path: Path | None,
    image_size: int | None,
) -> TimmViT:
    """The image tower with the weights at `path`, random ones where there is none."""
    is_timm_tower = bool(config["vision_cfg"].get("timm_model_name"))
    vit, projection = (_timm_tower if is_timm_tower else _own_tower)(name, config, path)
    # Before positions are resampled to another size.
    fingerprint = _fingerprint(vit, projection, quick_gelu=config["quick_gelu"] and not is_timm_tower)
    size = image_size or vit.patch_embed.img_size[0]
    set_size(vit, size, name)
    kind = EvaViT if is_eva(vit) else TimmViT
    backbone = kind(vit, name=name, preprocess=_preprocess(published, size), fingerprint=fingerprint)
    backbone.projection, backbone.templates = projection, (TEMPLATE,)
    backbone.texts = TextTower(name, model, config, path or Path())
    return backbone


def _read_config(name: str, model: str, tag: str, *, needs_tag: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """open_clip's config of `model` with the activation that `tag` was trained with, and what is published of the tag.

    Raises BackboneError for unknown names, and for towers that are not supported.
    """
    require("open_clip", extra="clip", gives=f"backbone {name}")
    import open_clip

    if model not in open_clip.list_models():
        raise BackboneError(
            f"backbone {name} is not a model of open_clip {open_clip.__version__}"
            + (did_you_mean(model, open_clip.list_models()) or f"; supported: {SUPPORTED}")
        )
    config: Any = open_clip.get_model_config(model)
    refuse_unserved_tower(name, config)
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag and not open_clip.is_pretrained_cfg(model, tag):
        hint = did_you_mean(tag, tags) or f"; its tags are {', '.join(tags) or 'none'}"
        raise BackboneError(f"backbone {name}: open_clip has no weights {tag!r} of {model}{hint}")
    if needs_tag and not tag:
        raise BackboneError(
            f"backbone {name} does not say which weights: add a tag ({', '.join(tags) or 'none published'}), or give "
            "backbone.weights a local safetensors file"
        )
    first_tag = tags[0] if tags else ""
    published = open_clip.get_pretrained_cfg(model, tag or first_tag)
    config["quick_gelu"] = bool(config.get("quick_gelu") or (tag and published.get("quick_gelu")))
    return config, published


def _fingerprint(vit: nn.Module, projection: Tensor | None, *, quick_gelu: bool) -> str:
    parts: list[tuple[str, Tensor]] = [*vit.named_parameters()]
    if projection is not None:
        parts.append(("projection", projection))
    if quick_gelu:  # the same weights are another tower under another activation
        parts.append(("quick_gelu", torch.ones(())))
    return fingerprint_of(parts)


def _preprocess(published: Mapping[str, Any], size: int) -> Preprocess:
    """The pixels that a tag was trained with, or CLIP's where nothing is published, at `size`."""
    import open_clip

    pixels = published or {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return Preprocess(
        size=size,
        mean=tuple(pixels["mean"]),
        std=tuple(pixels["std"]),
        interpolation=pixels.get("interpolation", "bicubic"),
        square=pixels.get("resize_mode") == "squash",
    )


def refuse_unserved_tower(name: str, config: Mapping[str, Any]) -> None:
    """Before any download: raises BackboneError for a tower that is not one of `SUPPORTED`."""
    import timm
    from open_clip import CLIPVisionCfg

    vision = CLIPVisionCfg(**config["vision_cfg"])
    if "multimodal_cfg" in config:
        raise BackboneError(f"backbone {name} (CoCa) cannot take prompts; supported: {SUPPORTED}")
    if isinstance(vision.layers, list | tuple):
        raise BackboneError(f"backbone {name} (a ResNet) cannot take prompts; supported: {SUPPORTED}")
    if architecture := vision.timm_model_name:
        if not timm.is_model(architecture):
            raise BackboneError(f"backbone {name} needs {architecture}, no model of timm {timm.__version__}: update it")
        refuse_unserved(name, architecture, SUPPORTED)
        if vision.timm_proj == "mlp" or vision.timm_pool in ("abs_attn", "rot_attn"):
            raise BackboneError(f"backbone {name} ends in more than one matrix; supported: {SUPPORTED}")
        return
    served = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value"}
    served |= {"patch_dropout", "output_tokens", "timm_model_name"}  # of training, of CoCa, None
    unserved = []
    for field in fields(vision):
        value = getattr(vision, field.name)
        if field.name not in served and value != field.default:
            unserved.append(f"{field.name}={value}")
    if unserved:
        raise BackboneError(f"backbone {name} ({', '.join(unserved)}) cannot take prompts; supported: {SUPPORTED}")


def _own_tower(name: str, config: Mapping[str, Any], path: Path | None) -> tuple[Any, Tensor]:
    """open_clip's VisionTransformer as timm's, and its projection [D' J].

    The arguments are those of timm's `vit_base_patch16_clip_224`; a convolution without bias goes with `pre_norm`.
    """
    from open_clip import CLIPVisionCfg
    from timm.models.vision_transformer import VisionTransformer

    vision: Any = CLIPVisionCfg(**config["vision_cfg"])
    build = partial(
        VisionTransformer,
        img_size=vision.image_size,
        patch_size=vision.patch_size,
        num_classes=0,
        global_pool="token",
        embed_dim=vision.width,
        depth=vision.layers,
        num_heads=vision.width // vision.head_width,
        mlp_ratio=vision.mlp_ratio,
        init_values=vision.ls_init_value,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer="quick_gelu" if config["quick_gelu"] else "gelu",
        weight_init="" if path is None else "skip",
    )
    vit = build() if path is None else with_memory(without_numbers(build))
    projection = torch.randn(vision.width, config["embed_dim"]) * vision.width**-0.5
    wanted = {_open_clip_name(key): value for key, value in vit.state_dict().items()}
    # open_clip's have no axis for the batch (views: what is copied into them is copied into the tower).
    wanted["visual.class_embedding"] = wanted["visual.class_embedding"][0, 0]
    wanted["visual.positional_embedding"] = wanted["visual.positional_embedding"][0]
    _fill({**wanted, "visual.proj": projection}, path, name)
    return vit, projection


def _open_clip_name(key: str) -> str:
    """open_clip's name of a tensor of timm's VisionTransformer.

    >>> _open_clip_name("blocks.3.attn.qkv.weight"), _open_clip_name("norm.bias")
    ('visual.transformer.resblocks.3.attn.in_proj_weight', 'visual.ln_post.bias')
    """
    for timm_part, open_clip_part in OPEN_CLIP_NAMES.items():
        key = key.replace(timm_part, open_clip_part)
    return f"visual.{key}"


def _timm_tower(name: str, config: Mapping[str, Any], path: Path | None) -> tuple[Any, Tensor | None]:
    """A timm ViT inside open_clip, and the matrix [D' J] behind it if there is one."""
    from open_clip import CLIPVisionCfg
    from open_clip.timm_model import TimmModel

    vision: Any = CLIPVisionCfg(**config["vision_cfg"])
    build = partial(
        TimmModel,
        vision.timm_model_name,
        config["embed_dim"],
        image_size=vision.image_size,
        pool=vision.timm_pool,
        proj=vision.timm_proj,
        proj_bias=vision.timm_proj_bias,
    )
    tower: Any = build() if path is None else empty(vision.timm_model_name, build)
    refuse_unserved_module(name, tower.trunk, SUPPORTED)
    _fill({f"visual.{key}": value for key, value in tower.state_dict().items()}, path, name)
    # timm's own classifier may be the projection, or open_clip adds one behind the trunk.
    inside, behind = tower.trunk.get_classifier(), getattr(tower.head, "proj", None)
    if isinstance(inside, nn.Linear):
        matrix = inside
        tower.trunk.head = nn.Identity()
    elif isinstance(behind, nn.Linear):
        matrix = behind
    else:
        return tower.trunk, None
    if matrix.bias is not None and matrix.bias.any():
        raise BackboneError(f"backbone {name} ends in a matrix with a bias; supported: {SUPPORTED}")
    return tower.trunk, matrix.weight.detach().T.contiguous()


@torch.no_grad()
def _fill(wanted: Mapping[str, Tensor], path: Path | None, name: str) -> None:
    """Copies the image tower of a file into the tensors `wanted`, by open_clip's names; none: they stay random.

    Raises BackboneError unless the file has all of them and no others.
    """
    if path is None:
        return
    tower = {key: value for key, value in read_weights(path).items() if key.startswith("visual.")}
    check_fit(wanted, tower, path, name)
    for key, value in wanted.items():
        value.copy_(tower[key])


def _download(name: str, hf_hub: str) -> Path:
    """The safetensors file at open_clip's `hf_hub` entry, `<owner>/<repository>/` with or without a file's name.

    Raises BackboneError where it cannot be downloaded, and where there are pickles only.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, file = hf_hub.rpartition("/")
    file = file or HUB_FILE
    lack = file if file == HUB_FILE else f"weights but {file}"
    pickled = BackboneError(
        f"backbone {name}: {repository} has no {lack}, and pickles are not read: convert its weights to safetensors "
        "and give them as backbone.weights"
    )
    if not file.endswith(".safetensors"):
        raise pickled
    with download_errors(name, "open_clip"):
        try:
            return Path(hf_hub_download(repository, file))
        except LocalEntryNotFoundError:  # nothing is known of the repository: no connection
            raise
        except EntryNotFoundError:
            raise pickled from None
