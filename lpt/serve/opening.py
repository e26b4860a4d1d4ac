"""A prompt file opened on its backbone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpt.device import PRECISIONS, pick_device, pick_precision
from lpt.errors import ConfigError, PromptFileError, did_you_mean, quoted
from lpt.model.backbones import load_backbone
from lpt.model.classifier import PromptedClassifier
from lpt.prompt_file import Header, load_prompt, read_prompt


def open_prompt(
    path: str | Path,
    *,
    weights: str | None = None,
    name: str | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> tuple[PromptedClassifier, Header]:
    """The model of a prompt file, its backbone loaded by the name in the file (or from `weights`)."""
    header, _ = read_prompt(path)
    where = pick_device(device)
    wanted = name or header.backbone.name
    if not name and wanted.startswith("untrained:"):  # any architecture, of any size, for the asking
        raise PromptFileError(f"prompt file {path} is for {quoted(wanted)}: give backbone.name if you want that made")
    backbone = load_backbone(wanted, weights=weights, image_size=header.backbone.image_size)
    backbone.preprocess = header.preprocess
    chosen = pick_precision(precision or header.precision, where)
    return load_prompt(path, backbone.to(PRECISIONS[chosen])).to(where), header


def check_loading(settings: Mapping[str, Mapping[str, Any]], *, sections: Sequence[str]) -> None:
    """What evaluate and predict understand: where the backbone is, and how to compute. Raises ConfigError."""
    known = {"backbone": ("name", "weights"), "train": ("precision", "device")}
    mistakes = [
        f"{k}: there is no such section here ({', '.join(sections)})" for k in sorted(settings.keys() - set(sections))
    ]
    for section, keys in known.items():
        for key, value in settings.get(section, {}).items():
            if key not in keys:
                mistakes.append(f"{section}.{key}: not a setting here ({', '.join(keys)}){did_you_mean(key, keys)}")
            elif not isinstance(value, str) or (key == "precision" and value not in ("auto", *PRECISIONS)):
                mistakes.append(f"{section}.{key}: got {value!r}")
    if mistakes:
        raise ConfigError(mistakes)
