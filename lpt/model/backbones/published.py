"""What is published: full names, sizes and licences of weights, and the nearest to a wrong name."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any

SERVED = ("vision_transformer", "deit", "eva")
"""timm's modules with supported models."""
SIZES = Path(__file__).parent / "sizes.tsv"
"""Millions of parameters by architecture, 0 of those that are refused, as `python -m benchmarks.speed.sizes` counts
them: building all of them takes a minute."""
MEGABYTES = 4
"""Of a million parameters, in fp32."""
FORBIDDING = ("-nc", "noncommercial", "apple-amlr")
"""In the names of licences that forbid commercial use; the last is Apple's for research."""


def module_of(architecture: str) -> str:
    """The module of timm that builds it, without its package."""
    from timm.models import model_entrypoint

    return model_entrypoint(architecture).__module__.rpartition(".")[2]


def is_served(architecture: str) -> bool:
    """Whether an architecture is supported, as far as its name says."""
    if module_of(architecture) not in SERVED or "_distilled_" in architecture:
        return False
    return _sizes().get(architecture, 1.0) > 0


@cache
def full_names() -> tuple[str, ...]:
    """All full names, `<architecture>.<tag>`, with weights that are supported."""
    import timm

    return tuple(name for name in timm.list_pretrained() if is_served(name.partition(".")[0]))


def nearest(name: str, number: int = 3) -> str:
    """The end of an error message about `name`: the full names that come nearest to it, or nothing."""
    found = difflib.get_close_matches(name, full_names(), n=number, cutoff=0.6)
    return f"; nearest supported tags: {', '.join(f'timm:{full}' for full in found)}" if found else ""


def megabytes(architecture: str) -> int | None:
    """Of weights in fp32; None where the table has no such architecture."""
    millions = _sizes().get(architecture)
    return None if millions is None else round(MEGABYTES * millions)


def licence(backbone: str) -> str | None:
    """The licence of a backbone's weights by its name, for example `timm:vit_base_patch16_dinov3.lvd1689m`, as timm has
    it; None where it is not known."""
    family, _, model = backbone.partition(":")
    if family == "open_clip":
        return _licence_in_open_clip(*model.split("/", 1))
    return _licence_in_timm(model) if family == "timm" else None


def hub_name(backbone: str) -> str | None:
    """`owner/name` of a backbone's weights on the Hugging Face Hub; None where they are of no tag, or not there."""
    family, _, model = backbone.partition(":")
    if family == "open_clip":
        import open_clip

        published: Any = open_clip.get_pretrained_cfg(*model.split("/", 1)) if "/" in model else {}
        return published.get("hf_hub", "").rstrip("/") or None
    if family != "timm" or "." not in model:
        return None
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(model)
    except RuntimeError:  # timm knows the architecture, but no such tag
        return None
    return config.hf_hub_id if config else None


def forbids_commercial_use(name: str) -> bool:
    """Whether a licence of this name does."""
    return any(part in name for part in FORBIDDING)


def _licence_in_timm(model: str) -> str | None:
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(model)
    except RuntimeError:  # timm knows the architecture, but no such tag
        return None
    return config.license if config else None


def _licence_in_open_clip(model: str, tag: str = "") -> str | None:
    """Of the same weights in timm; or else of all weights there of the tower's architecture, or of all CLIP's with a
    tag that this one begins with, if they have one licence."""
    import open_clip

    published: Any = open_clip.get_pretrained_cfg(model, tag)
    in_timm = published.get("hf_hub", "").removeprefix("timm/").rstrip("/")
    if found := _licence_in_timm(in_timm):
        return found
    config = open_clip.get_model_config(model) or {"vision_cfg": {}}
    architecture = config["vision_cfg"].get("timm_model_name")
    if architecture:
        names = [name for name in full_names() if name.partition(".")[0] == architecture]
    else:
        names = [
            name for name in full_names() if "_clip_" in name and f"{tag}_".startswith(name.partition(".")[2] + "_")
        ]
    licences = {_licence_in_timm(name) for name in names}
    return licences.pop() if len(licences) == 1 else None


@cache
def _sizes() -> dict[str, float]:
    lines = SIZES.read_text().splitlines()
    return {architecture: float(millions) for architecture, millions in (line.split("\t") for line in lines)}
