"""Prompt files: one safetensors file with the trained parameters, a JSON header, and never the frozen backbone.

Format 3 where images can be routed to it or its query is early, else 2; format 1 has no SHA-256; all are read. Tensors:
`shared.tokens` [L n D], `pool.tokens` [K L' n D], `pool.keys` [K D'], `pool.centre` [D'], `pool.query_map` [D' S+1]
where the query is early, `head.weight` [C D'], `head.bias` [C] where the head is linear and not cosine, or `head.bank`
[N D'] where it is nearest neighbours, `query_head.weight` [C D'] where the query has a head of its own,
`calibration.scale` and `.offset` [C], with a fused head `head.scales` [2], `.prototypes`, `.texts` and `.visual` [C J],
`.seen` and `.frequency` [C], and `backbone.*`, the trained parameters inside a copy of the backbone as the header's
`inside` says. `task.means` [C D'] in fp16 and `task.scores` [101] in fp32 are no part of the model. A shallow prompt
has L = 1. The header stands under `lpt` in the file's metadata.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from lpt.data.image_hashes import hashes_to_store
from lpt.data.longtail import training_counts
from lpt.data.preprocess import Preprocess
from lpt.errors import PromptFileError, check_kind, quoted
from lpt.files import to_bytes, write_atomic
from lpt.model.adapters import with_adapter
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.head_spec import HeadSpec, head_fields
from lpt.model.heads import Calibration, CosineHead
from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt, summary_width
from lpt.model.task_means import TaskMeans
from lpt.prompt_header import LARGEST_NUMBER, BackboneFacts, Header, Inside, format_of, read_header

TASK = "task."
"""How names of tensors begin that are no part of the model."""
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class PromptFile(NamedTuple):
    header: Header
    tensors: dict[str, Tensor]


# Writing.


def save_prompt(
    path: str | Path,
    model: PromptedClassifier,
    *,
    method: str,
    counts: Tensor,
    storage: str = "fp16",
    **facts: Any,
) -> Header:
    """Writes the trained parameters of `model`, whole or not at all. `facts` are further header fields. Raises
    PromptFileError for numbers that are not finite or too large, DiskError where it cannot be written.

    In fp16 the file reloads to the same bits only after `model.round_to(torch.float16)`. `counts` [C] are training
    images of each class; returned is the header that was written.

    >>> import lpt, tempfile
    >>> task = lpt.load_task("digits-lt")
    >>> path = f"{tempfile.mkdtemp()}/digits.safetensors"
    >>> model = lpt.model(task, lpt.load_backbone("nano"))
    >>> lpt.save_prompt(path, model, method="lpt", counts=task.counts).method
    'lpt'
    """
    check_kind("save_prompt: model", model, PromptedClassifier, "give what lpt.tune returns")
    if storage not in tuple(DTYPES):
        raise PromptFileError(f"storage {quoted(repr(storage), 80)} is none of {', '.join(DTYPES)}")
    counts = training_counts(counts, len(model.classes))
    backbone, pool = model.backbone, model.pool
    facts.setdefault("precision", "bf16" if backbone.dtype == torch.bfloat16 else "fp32")
    if model.group_rule and "group_rule" not in facts.get("data", {}):
        facts["data"] = {**facts.get("data", {}), "group_rule": model.group_rule}
    if model.trained_on and "trained_on" not in facts:
        facts["trained_on"] = hashes_to_store(model.trained_on)
        labeled_sha256 = replace(model.trained_on, unlabeled=None).manifest()["sha256"]
        facts["data"] = {"name": model.trained_on.name, "labeled_sha256": labeled_sha256, **facts.get("data", {})}
    try:
        header = Header(
            format=format_of({*model.learned_state(), *_task_tensors(model)}),
            method=method,
            backbone=BackboneFacts(
                name=backbone.name,
                fingerprint=backbone.fingerprint,
                image_size=backbone.preprocess.size,
                norm_eps=backbone.norm_eps,
            ),
            preprocess=backbone.preprocess,
            classes=list(model.classes),
            counts=counts.tolist(),
            scale=model.head.scale,
            topk=pool.topk if pool else 0,
            first=pool.prefix_blocks if pool else 0,
            query=pool.query if pool else "full",
            inside=Inside.model_validate(backbone.recipe) if backbone.recipe else None,
            **(facts | head_fields(model.head)),
        )
    except ValidationError as error:
        where, reason = ".".join(str(part) for part in error.errors()[0]["loc"]), error.errors()[0]["msg"]
        raise PromptFileError(f"prompt file {path} is not written: {quoted(where)}: {quoted(reason)}") from None
    tensors = {}
    for name, value in model.learned_state().items():
        tensors[name] = value.detach().to("cpu", DTYPES[storage]).contiguous()
        if not bool((tensors[name].float().abs() <= LARGEST_NUMBER).all()):  # false for NaN as well
            raise PromptFileError(
                f"prompt file {path} is not written: in {storage} {name} holds numbers that are not finite or above "
                f"{LARGEST_NUMBER:g}: lower method.lr, or use train.storage=fp32"
            )
    write_prompt(path, header, tensors | _task_tensors(model))
    return header


def _task_tensors(model: PromptedClassifier) -> dict[str, Tensor]:
    """Scores stay in fp32: cosines near 1, where fp16 has steps of a thousandth, would be taken for one another."""
    if model.task_means is None:
        return {}
    return {f"{TASK}means": model.task_means.means.half(), f"{TASK}scores": model.task_means.scores.float()}


def write_prompt(path: str | Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Writes a prompt file, whole or not at all. Raises PromptFileError for facts that are no JSON, and DiskError."""
    write_atomic(Path(path), to_bytes(tensors, lpt=stored_header(path, header)))


def stored_header(path: str | Path, header: Header) -> dict[str, Any]:
    """The header as `path` is to hold it: what came later is left out where a file does not have it."""
    try:
        content = json.loads(header.model_dump_json())
    except ValueError as error:
        raise PromptFileError(f"prompt file {path} is not written: its facts are no JSON: {quoted(error)}") from None
    if header.trained_on is None:
        del content["trained_on"]
    if header.preprocess.crops == "fixed":
        del content["preprocess"]["crops"]
    if header.query == "full":
        del content["query"]
    if header.backbone.norm_eps is None:
        del content["backbone"]["norm_eps"]
    return content


def beyond_fp16(model: PromptedClassifier) -> str | None:
    """The first of the model's tensors that would be infinite in fp16."""
    largest = torch.finfo(torch.float16).max
    for name, value in model.learned_state().items():
        if bool((value.abs() > largest).any()):
            return name
    return None


# Reading.


def read_prompt(path: str | Path) -> PromptFile:
    """(header, tensors by name in fp32), checked against each other; no backbone is needed. Raises PromptFileError.

    >>> import lpt
    >>> lpt.read_prompt("absent.safetensors")
    Traceback (most recent call last):
    lpt.errors.PromptFileError: prompt file absent.safetensors does not exist
    """
    header, arrays = read_header(path)
    header.preprocess = Preprocess(**vars(header.preprocess))
    return PromptFile(header, {name: torch.from_numpy(value).float() for name, value in arrays.items()})


def load_prompt(path: str | Path, backbone: Backbone) -> PromptedClassifier:
    """The model of a prompt file, in eval mode, on `backbone`, which must be the one it was made with. Raises
    PromptFileError where it is another one, and for a file that is damaged.

    >>> import lpt, tempfile
    >>> backbone, path = lpt.load_backbone("nano"), f"{tempfile.mkdtemp()}/digits.safetensors"
    >>> task = lpt.load_task("digits-lt")
    >>> header = lpt.save_prompt(path, lpt.model(task, backbone), method="lpt", counts=task.counts)
    >>> lpt.load_prompt(path, backbone).classes == task.classes
    True
    """
    check_kind("load_prompt: backbone", backbone, Backbone, "give what lpt.load_backbone returns")
    check_kind("prompt file", path, (str, Path), "give the path of a file")
    return build_model(Path(path), read_prompt(path), backbone)


def build_model(
    path: Path, prompt: PromptFile, backbone: Backbone, *, adapt: Callable[[Inside], Backbone] | None = None
) -> PromptedClassifier:
    """The model of a file that has been read, as `load_prompt` makes it. Trainable parameters inside a backbone go into
    the copy of it that `adapt` returns; by default a new one. Raises PromptFileError."""
    header, tensors = prompt
    head = header.head_spec(tensors)
    # All sizes are checked before anything is made that is much larger than the file.
    check_identity(path, header, backbone)
    _check_widths(path, tensors, head, backbone)
    _check_inside(path, header, tensors)
    _check_blocks(path, header, tensors, backbone)
    if header.inside:
        backbone = adapt(header.inside) if adapt else with_adapter(backbone, **header.inside.model_dump())
    model = _build(header, tensors, head, backbone)
    _fill(path, model, {name: value for name, value in tensors.items() if not name.startswith(TASK)})
    model.group_rule, model.task_means = header.group_rule, means_of(tensors)
    return model.to(next(backbone.parameters()).device).eval()


def means_of(tensors: Mapping[str, Tensor]) -> TaskMeans | None:
    """Of a file's tensors; None for files of before, and for tasks that were never trained on images."""
    if f"{TASK}means" not in tensors:
        return None
    return TaskMeans(tensors[f"{TASK}means"], tensors[f"{TASK}scores"])


# Checks against a backbone. Each raises PromptFileError.


def check_identity(path: Path, header: Header, backbone: Backbone) -> None:
    """Is `backbone` the one that the file was made with, at the same size of images?"""
    if header.backbone.norm_eps != backbone.norm_eps:
        theirs, ours = header.backbone.norm_eps, backbone.norm_eps
        raise PromptFileError(
            f"prompt file {path} was made with {_eps(theirs)} in the LayerNorms of {quoted(header.backbone.name)}, "
            f"here they have {_eps(ours)}: "
            + (f"set backbone.norm_eps={theirs}" if theirs else "leave out backbone.norm_eps")
        )
    if header.backbone.fingerprint != backbone.fingerprint:
        raise PromptFileError(
            f"prompt file {path} is for backbone {quoted(header.backbone.name)} "
            f"({quoted(header.backbone.fingerprint, 40)}), this is {backbone.name} "
            f"({backbone.fingerprint}): give backbone.name and backbone.weights of the first"
        )
    # Equal weights can still be another model, with another activation or norm: CLIP's quickgelu models are such twins.
    if _architecture(header.backbone.name) != _architecture(backbone.name):
        raise PromptFileError(
            f"prompt file {path} is for {quoted(header.backbone.name)}, this is {backbone.name}: set backbone.name"
        )
    if header.backbone.image_size != backbone.preprocess.size:
        raise PromptFileError(
            f"prompt file {path} was made at {header.backbone.image_size} pixels, this backbone is at "
            f"{backbone.preprocess.size}: set backbone.image_size={header.backbone.image_size}"
        )


def _eps(norm_eps: float | None) -> str:
    return "the model's own ε" if norm_eps is None else f"ε = {norm_eps}"


def _architecture(name: str) -> str:
    """A backbone's name without its family and tag.

    >>> _architecture("timm:deit_tiny_patch16_224.fb_in1k")
    'deit_tiny_patch16_224'
    """
    return name.partition(":")[2].partition(".")[0]


def _check_widths(path: Path, tensors: Mapping[str, Tensor], head: HeadSpec, backbone: Backbone) -> None:
    widths = {"shared.tokens": backbone.width, "pool.tokens": backbone.width}
    widths |= {"task.means": backbone.feature_width, "pool.keys": backbone.feature_width}
    widths |= {"query_head.weight": backbone.feature_width}
    widths |= {"pool.query_map": summary_width(backbone.width, backbone.prefix) + 1}
    for name, width in (widths | head.widths(backbone)).items():
        if name in tensors and tensors[name].shape[-1] != width:
            raise PromptFileError(
                f"prompt file {path}: {name} is {list(tensors[name].shape)}, the backbone needs a width of {width}"
            )


def _check_blocks(path: Path, header: Header, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Do prompts have as many blocks as the backbone has for them? Else they would be made for more than there are."""
    if "pool.tokens" in tensors:
        wanted, there = backbone.depth - header.prefix_blocks, tensors["pool.tokens"].shape[1]
        if wanted < 1 or there != wanted:
            raise PromptFileError(
                f"prompt file {path}: group prompts for {there} blocks from block {header.prefix_blocks} on, the "
                f"backbone has {backbone.depth}"
            )
    if "shared.tokens" in tensors and (there := len(tensors["shared.tokens"])) not in (1, backbone.depth):
        raise PromptFileError(
            f"prompt file {path}: a shared prompt for {there} blocks, the backbone has {backbone.depth}"
        )


def _check_inside(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Are adapters as large as the header says? A header that says they are huge would make them huge."""
    if header.inside is None or header.inside.kind not in ("lora", "lora_qv", "adaptformer"):
        return
    if header.inside.kind != "adaptformer":
        part, size = "lora_A", header.inside.rank
    else:
        part, size = "down.weight", header.inside.bottleneck
    rows = {tuple(value.shape[:1]) for name, value in tensors.items() if part in name}
    if rows != {(size,)}:
        raise PromptFileError(f"prompt file {path}: its {header.inside.kind} is not of the size {size} that it says")


# Making the model.


def _build(header: Header, tensors: Mapping[str, Tensor], head: HeadSpec, backbone: Backbone) -> PromptedClassifier:
    """The model that header and tensors describe, but for their numbers."""
    num_classes, query_head, calibration = len(header.classes), None, None
    built_head = head.build(backbone, tensors)
    if "query_head.weight" in tensors:
        query_head = CosineHead(num_classes=num_classes, width=backbone.feature_width, scale=header.scale)
    if "calibration.scale" in tensors:
        calibration = Calibration(num_classes)
    return PromptedClassifier(
        backbone,
        built_head,
        classes=tuple(header.classes),
        shared=_shared_prompt(tensors, backbone),
        pool=_pool(header, tensors, backbone),
        query_head=query_head,
        calibration=calibration,
    )


def _shared_prompt(tensors: Mapping[str, Tensor], backbone: Backbone) -> DeepPrompt | ShallowPrompt | None:
    if "shared.tokens" not in tensors:
        return None
    layers, length, width = tensors["shared.tokens"].shape
    if layers == 1 < backbone.depth:  # in a backbone of one block both kinds are the same
        return ShallowPrompt(length=length, width=width)
    return DeepPrompt(layers=backbone.depth, length=length, width=width)


def _pool(header: Header, tensors: Mapping[str, Tensor], backbone: Backbone) -> PromptPool | None:
    if "pool.tokens" not in tensors:
        return None
    size, _, length, width = tensors["pool.tokens"].shape
    return PromptPool(
        size=size,
        topk=header.topk,
        prefix_blocks=header.prefix_blocks,
        depth=backbone.depth,
        length=length,
        width=width,
        key_width=backbone.feature_width,
        query=header.query,
        summary_width=summary_width(backbone.width, backbone.prefix),
    )


def _fill(path: Path, model: PromptedClassifier, tensors: dict[str, Tensor]) -> None:
    """Copies the file's tensors into `model`, all of which are frozen then. Raises PromptFileError where names or
    shapes differ."""
    state = model.learned_state()
    if differing := sorted(state.keys() ^ tensors.keys()):
        names = quoted(", ".join(differing[:5]))
        raise PromptFileError(f"prompt file {path} and the model it describes differ in {names}")
    for name, value in state.items():
        if tensors[name].shape != value.shape:
            raise PromptFileError(
                f"prompt file {path}: {name} is {list(tensors[name].shape)}, the backbone needs {list(value.shape)}"
            )
    model.load_learned_state(tensors)
    model.only_train()
