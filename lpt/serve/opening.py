"""A prompt file opened on its backbone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from lpt.config import WorkerCount
from lpt.data.loader import Workers
from lpt.data.preprocess import Preprocess
from lpt.device import PRECISIONS, pick_device, pick_precision
from lpt.errors import ConfigError, LptError, PromptFileError, quoted
from lpt.memory import check_serving
from lpt.model.backbones import load_backbone
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.prompt_file import Header, load_prompt, read_prompt
from lpt.prompt_header import read_header
from lpt.serve.bank import TaskBank, named_files
from lpt.settings import validated


def open_prompt(
    path: str | Path,
    *,
    weights: str | None = None,
    name: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    at_once: int = 1,
) -> tuple[PromptedClassifier, Header]:
    """(the model of a prompt file, the file's header).

    `name`, `weights` and `precision` are by default what the file says. Raises PromptFileError where the file is
    damaged or for another backbone, BackboneError where the backbone cannot be had, LptError where the device cannot,
    or has no memory for answers to `at_once` images.
    """
    header, _ = read_prompt(path)
    torch_device = pick_device(device)
    backbone = open_backbone(path, header, weights=weights, name=name, precision=precision, device=torch_device)
    what = f"prompt file {path} on {backbone.name}"
    check_serving(backbone, classes=len(header.classes), batch_size=at_once, device=torch_device, what=what)
    return load_prompt(path, backbone).to(torch_device), header


def open_backbone(
    path: str | Path,
    header: Header,
    *,
    weights: str | None = None,
    name: str | None = None,
    precision: str | None = None,
    device: torch.device,
) -> Backbone:
    """The backbone that a prompt file is for, on the CPU, in the precision that it has on `device`. Raises what
    `open_prompt` does."""
    backbone_name = name or header.backbone.name
    if not name and backbone_name.startswith("untrained:"):  # a file from anyone could ask for a model of any size
        raise PromptFileError(
            f"prompt file {path} is for {quoted(backbone_name)}: give backbone.name if you want that made"
        )
    backbone = load_backbone(
        backbone_name, weights=weights, image_size=header.backbone.image_size, norm_eps=header.backbone.norm_eps
    )
    backbone.preprocess = Preprocess(**vars(header.preprocess))
    return backbone.to(PRECISIONS[pick_precision(precision or header.precision, device)])


def open_bank(
    folder: Path | Mapping[str, Path],
    *,
    weights: str | None = None,
    name: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    memory: int | None = None,
    batch_size: int = 64,
    accept: float = 0.95,
) -> TaskBank:
    """The tasks of a folder of prompt files, or of files by task, on the backbone that most of them are for; those for
    another one are in the bank's `refused`. Raises LptError where there is no file that can be opened, and what
    `open_prompt` does."""
    headers, problem = {}, "it holds no prompt file"
    for _, path in named_files(folder):
        try:
            headers[path] = read_header(path)[0]
        except PromptFileError as error:
            problem = str(error)
    if not headers:
        raise LptError(f"library {quoted(str(folder))}: {problem}")
    facts = {path: tuple(vars(header.backbone).values()) for path, header in headers.items()}
    (most, _), *_ = Counter(facts.values()).most_common()
    path = next(path for path in headers if facts[path] == most)
    torch_device = pick_device(device)
    backbone = open_backbone(path, headers[path], weights=weights, name=name, precision=precision, device=torch_device)
    what = f"library {quoted(str(folder))} on {backbone.name}"
    classes = max(len(header.classes) for header in headers.values())
    check_serving(backbone, classes=classes, batch_size=batch_size, device=torch_device, what=what)
    return TaskBank(backbone.to(torch_device), folder, memory=memory, batch_size=batch_size, accept=accept)


class BackboneSource(BaseModel):
    """The section `backbone` where a backbone is only opened; by default as the prompt file says."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    weights: str | None = None
    """A file, in place of the weights that come under `name`."""


class ComputeSettings(BaseModel):
    """The section `train` where nothing is trained; `precision` is by default that of the prompt file."""

    model_config = ConfigDict(extra="forbid")

    precision: Literal["auto", "fp32", "bf16"] | None = None
    device: str = "auto"
    workers: WorkerCount = "auto"


def check_loading(settings: Mapping[str, Any], *, sections: Sequence[str]) -> dict[str, Any]:
    """The arguments of `open_prompt` that the sections `backbone` and `train` give, of which `sections` are known here.

    Raises ConfigError with every mistake at once.
    """
    mistakes = [
        f"{name}: there is no such section here ({', '.join(sections)})"
        for name in sorted(settings.keys() - set(sections))
    ]
    arguments: dict[str, Any] = {}
    for section, model in (("backbone", BackboneSource), ("train", ComputeSettings)):
        if section in sections:
            values, wrong = validated(section, model, settings.get(section, {}))
            arguments |= values
            mistakes += wrong
    if mistakes:
        raise ConfigError(mistakes)
    arguments.pop("workers", None)  # `workers_in` has them: a model is the same whoever decodes its images
    return arguments


def workers_in(settings: Mapping[str, Any]) -> Workers:
    """The processes that decode files, of settings that `check_loading` has checked."""
    return ComputeSettings.model_validate(settings.get("train", {})).workers
