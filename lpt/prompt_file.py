"""Prompt files: one safetensors file with what was learned, a JSON header, and never the frozen backbone.

Format 2; format 1 has no SHA-256 and is still read. Tensors: `shared.tokens` [L n D], `pool.tokens` [K L' n D],
`pool.keys` [K D'], `pool.centre` [D'], `head.weight` [C D'], `head.bias` [C] where the head is linear and not cosine,
or `head.bank` [N D'] where it is nearest neighbours, `query_head.weight` [C D'] where the query has a head of its own,
`calibration.scale` and `.offset` [C], with a fused head `head.scales` [2], `.prototypes`, `.texts` and `.visual` [C J],
`.seen` and `.frequency` [C], and `backbone.*`, what was learned inside a copy of the backbone as the header's `inside`
says. A shallow prompt has L = 1. The header stands under `lpt` in the file's metadata.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from lpt.data.image_hashes import hashes_to_store, unpacked
from lpt.data.longtail import GroupRule, training_counts
from lpt.data.preprocess import MAX_VIEW, Preprocess
from lpt.errors import PromptFileError, check_kind, quoted
from lpt.files import is_intact, read_tensors, to_bytes, write_atomic
from lpt.model.adapters import Kind, with_adapter
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.head_spec import HEAD_RANKS, Fused, HeadSpec, Space, head_fields, head_problem, head_spec
from lpt.model.heads import Calibration, CosineHead
from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt
from lpt.settings import MAX_ADAPTER_WIDTH

FORMAT = 2
LARGEST_NUMBER = 1e6
"""Nothing that was learned is larger; what is, is no model, and makes answers that are not finite."""
LARGEST_MEAN, STD_RANGE = 10.0, (1e-3, 1e3)
"""Of pixels in 0..1. Every published mean and deviation is within 0..1; what is far outside makes views of no image."""
MOST_ENTRIES = 100
"""Of `metrics` and `versions`: every entry that is wrong would become an error of a kilobyte."""

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
RANKS = {
    "shared.tokens": 3,
    "pool.tokens": 4,
    "pool.keys": 2,
    "pool.centre": 1,
    "query_head.weight": 2,
    "calibration.scale": 1,
    "calibration.offset": 1,
    **HEAD_RANKS,
}
"""Number of axes of every tensor that a file can hold, but for `backbone.*`."""


class BackboneFacts(BaseModel):
    name: str
    fingerprint: str
    image_size: int = Field(gt=0, le=MAX_VIEW)


class Inside(BaseModel):
    """What is learned inside the backbone: arguments of `lpt.model.adapters.with_adapter`."""

    kind: Kind
    bottleneck: int = Field(ge=1, le=MAX_ADAPTER_WIDTH)
    rank: int = Field(ge=1, le=MAX_ADAPTER_WIDTH)


class Header(BaseModel):
    """What a prompt file says about itself; fields that this version does not know are kept.

    Names, order and defaults of the fields are the file format.
    """

    model_config = ConfigDict(extra="allow", serialize_by_alias=True, allow_inf_nan=False)

    format: int
    method: str
    settings: dict[str, Any] = {}
    backbone: BackboneFacts
    preprocess: Preprocess
    classes: Annotated[list[str], FailFast()] = Field(min_length=2)
    counts: Annotated[list[Annotated[int, Field(ge=0, le=10**12)]], FailFast()]
    scale: float = Field(ge=1 / LARGEST_NUMBER, le=LARGEST_NUMBER)
    """Of the head: what logits are multiplied with before the softmax."""
    topk: int = Field(default=0, ge=0)
    prefix_blocks: int = Field(default=0, ge=0, alias="first")  # the first block with group prompts
    inside: Inside | None = None
    fused: Fused | None = None
    space: Space = "features"
    neighbours: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.07, ge=1 / LARGEST_NUMBER, le=LARGEST_NUMBER)
    """Of the votes of nearest neighbours."""
    precision: Literal["fp32", "bf16"] = "fp32"
    data: dict[str, Any] = {}
    """Of the training data; may hold anything that a run has said of it."""
    trained_on: str | None = None
    """Short hashes of the training images (`lpt.data.image_hashes`), where the test part is not an official one: the
    folder or the split may be another when the file is evaluated. Absent where it is None."""
    metrics: dict[str, float | None] = {}
    versions: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _views_of_before(cls, fields: Any) -> Any:
        """A file that does not say whose code cuts its views is of before that was a choice: it is Pillow's."""
        pixels = fields.get("preprocess") if isinstance(fields, dict) else None
        return {**fields, "preprocess": {"cutter": "pillow", **pixels}} if isinstance(pixels, dict) else fields

    @model_validator(mode="after")
    def _one_count_a_class(self) -> Self:
        if len(self.counts) != len(self.classes):
            raise ValueError(f"{len(self.counts)} counts for {len(self.classes)} classes")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have one name")
        return self

    @field_validator("trained_on")
    @classmethod
    def _are_hashes(cls, text: str | None) -> str | None:
        if text is not None:
            unpacked(text)  # raises ValueError
        return text

    @model_validator(mode="after")
    def _pixels_make_sense(self) -> Self:
        pixels, (smallest, largest) = self.preprocess, STD_RANGE
        if not (len(pixels.mean) == 3 and all(abs(mean) <= LARGEST_MEAN for mean in pixels.mean)):
            raise ValueError(f"preprocess.mean is {list(pixels.mean)}, three numbers up to {LARGEST_MEAN:g} are read")
        if not (len(pixels.std) == 3 and all(smallest <= deviation <= largest for deviation in pixels.std)):
            raise ValueError(
                f"preprocess.std is {list(pixels.std)}, three numbers from {smallest:g} to {largest:g} are read"
            )
        sensible = (
            pixels.size == self.backbone.image_size
            and pixels.interpolation in ("bilinear", "bicubic")
            and 0.1 <= pixels.crop_ratio <= 1
            and 0 < pixels.min_area <= 1
        )
        if not sensible:
            raise ValueError("the preprocessing makes no sense")
        return self

    @property
    def group_rule(self) -> GroupRule | None:
        """How many, medium and few are told apart; None where the file does not say, or says anything else."""
        rule = self.data.get("group_rule")
        return next((known for known in get_args(GroupRule) if known == rule), None)

    def head_spec(self, tensors: Mapping[str, Tensor]) -> HeadSpec:
        return head_spec({**dict(self), "num_classes": len(self.classes)}, tensors)


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
    """Writes what `model` has learned, whole or not at all. `facts` are further header fields. Raises PromptFileError
    for numbers that are not finite or too large, DiskError where it cannot be written.

    In fp16 the file reloads to the same bits only after `model.round_to(torch.float16)`.
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
        facts["data"] = {"name": model.trained_on.name, "labelled_sha256": labeled_sha256, **facts.get("data", {})}
    try:
        header = Header(
            format=FORMAT,
            method=method,
            backbone=BackboneFacts(
                name=backbone.name, fingerprint=backbone.fingerprint, image_size=backbone.preprocess.size
            ),
            preprocess=backbone.preprocess,
            classes=list(model.classes),
            counts=counts.tolist(),
            scale=model.head.scale,
            topk=pool.topk if pool else 0,
            first=pool.prefix_blocks if pool else 0,
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
    try:
        content = json.loads(header.model_dump_json())
    except ValueError as error:
        raise PromptFileError(f"prompt file {path} is not written: its facts are no JSON: {quoted(error)}") from None
    if header.trained_on is None:
        del content["trained_on"]
    write_atomic(Path(path), to_bytes(tensors, lpt=content))
    return header


def beyond_fp16(model: PromptedClassifier) -> str | None:
    """The first of the model's tensors that would be infinite in fp16."""
    largest = torch.finfo(torch.float16).max
    for name, value in model.learned_state().items():
        if bool((value.abs() > largest).any()):
            return name
    return None


# Reading. A file may come from anybody: nothing in it is believed before it is checked.


def read_prompt(path: str | Path) -> PromptFile:
    """Header and tensors, checked against each other; no backbone is needed. Raises PromptFileError."""
    check_kind("prompt file", path, (str, Path), "give the path of a file")
    path = Path(path)
    if not path.is_file():
        raise PromptFileError(f"prompt file {path} does not exist")
    try:
        metadata, tensors = read_tensors(path)
    except ValueError as error:
        raise PromptFileError(f"prompt file {path} is damaged or no safetensors file ({error})") from None
    if "lpt" not in metadata:
        raise PromptFileError(
            f"{path} is a safetensors file but not a prompt file of lpt: its metadata has no lpt header"
        )
    fields = _header_fields(path, metadata["lpt"])
    header = _header(path, fields)
    for problem_with in CHECKS:
        if problem := problem_with(header, tensors):
            raise PromptFileError(f"prompt file {path} is damaged: {quoted(problem)}")
    must_be_sealed = header.format > 1 or "sha256" in fields
    if must_be_sealed and not is_intact(fields, tensors):
        raise PromptFileError(f"prompt file {path} is damaged: it does not hold what was written (SHA-256)")
    return PromptFile(header, {name: value.float() for name, value in tensors.items()})


def load_prompt(path: str | Path, backbone: Backbone) -> PromptedClassifier:
    """The model of a prompt file on `backbone`, which must be the one it was made with. Raises PromptFileError."""
    check_kind("load_prompt: backbone", backbone, Backbone, "give what lpt.load_backbone returns")
    check_kind("prompt file", path, (str, Path), "give the path of a file")
    path = Path(path)
    header, tensors = read_prompt(path)
    head = header.head_spec(tensors)
    # All sizes are checked before anything is made that is much larger than the file.
    _check_identity(path, header, backbone)
    _check_widths(path, tensors, head, backbone)
    _check_inside(path, header, tensors)
    _check_blocks(path, header, tensors, backbone)
    if header.inside:
        backbone = with_adapter(backbone, **header.inside.model_dump())
    model = _build(header, tensors, head, backbone)
    _fill(path, model, tensors)
    model.group_rule = header.group_rule
    return model.to(next(backbone.parameters()).device).eval()


def _header_fields(path: Path, text: str) -> dict[str, Any]:
    """The JSON of a header whose format this version reads."""
    try:
        fields = json.loads(text, parse_constant=_finite, parse_float=_finite)
        number = fields["format"]
    except _NotFinite as error:
        raise PromptFileError(
            f"prompt file {path} has a damaged header: it holds {error}, which is no number"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PromptFileError(f"prompt file {path} has a damaged header: it is not JSON with a format number") from None
    if not isinstance(number, int) or not 1 <= number <= FORMAT:
        raise PromptFileError(
            f"prompt file {path} has format {quoted(number, 40)}, this lpt reads up to {FORMAT}: install a newer lpt"
        )
    return fields


class _NotFinite(ValueError):
    pass


def _finite(text: str) -> float:
    """A number of a header: NaN and Infinity are no JSON, though Python reads and writes them; 1e999 is infinite."""
    number = float(text)
    if not math.isfinite(number):
        raise _NotFinite(quoted(text, 40))
    return number


def _header(path: Path, fields: Mapping[str, Any]) -> Header:
    for key in ("metrics", "versions"):
        if isinstance(fields.get(key), dict) and len(fields[key]) > MOST_ENTRIES:
            raise PromptFileError(f"prompt file {path} has a damaged header: {key} has {len(fields[key])} entries")
    try:
        return Header.model_validate({key: value for key, value in fields.items() if key != "sha256"})
    except ValidationError as error:
        first_error = error.errors()[0]
        where = ".".join(str(part) for part in first_error["loc"]) or "header"
        raise PromptFileError(
            f"prompt file {path} has a damaged header: {quoted(where)}: {quoted(first_error['msg'])}"
        ) from None


# Checks without a backbone. Each says what is wrong, if anything; later ones rely on earlier ones.


def _names_problem(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    unknown = [name for name in tensors if name not in RANKS and not name.startswith("backbone.")]
    return f"unknown tensors {', '.join(sorted(unknown))}" if unknown else None


def _shapes_problem(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    for name, value in tensors.items():
        rank = RANKS.get(name, value.dim())  # what is inside a backbone is compared with it when it is there
        if value.dim() != rank or value.numel() == 0:
            return f"{name} has shape {list(value.shape)}"
    return None


def _inside_problem(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    inside = sorted(name for name in tensors if name.startswith("backbone."))
    return f"the header does not say what {inside[0]} is" if inside and header.inside is None else None


def _head_problem(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    return head_problem(header.head_spec(tensors), tensors)


def _calibration_problem(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    if ("calibration.scale" in tensors) != ("calibration.offset" in tensors):
        return "a calibration needs scale and offset"
    return None


def _pool_problem(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    parts = [name for name in ("pool.tokens", "pool.keys", "pool.centre") if name in tensors]
    if not parts:
        return "a query head needs a pool" if "query_head.weight" in tensors else None
    if len(parts) != 3:
        return f"a pool needs tokens, keys and centre, there is {', '.join(parts)}"
    prompts, keys = len(tensors["pool.tokens"]), len(tensors["pool.keys"])
    if prompts != keys:
        return f"{keys} keys for {prompts} group prompts"
    return None if 1 <= header.topk <= keys else f"topk {header.topk} does not fit a pool of {keys}"


def _numbers_problem(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    for name, value in tensors.items():
        if value.dtype not in DTYPES.values():
            return f"{name} is stored as {value.dtype}, not fp16 or fp32"
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds numbers that are not finite"
    for name, value in tensors.items():
        if value.float().abs().max() > LARGEST_NUMBER:
            return f"{name} holds numbers above {LARGEST_NUMBER:g}"
    return None


CHECKS: tuple[Callable[[Header, Mapping[str, Tensor]], str | None], ...] = (
    _names_problem,
    _shapes_problem,
    _inside_problem,
    _head_problem,
    _calibration_problem,
    _pool_problem,
    _numbers_problem,
)


# Checks against a backbone. Each raises PromptFileError.


def _check_identity(path: Path, header: Header, backbone: Backbone) -> None:
    """Is `backbone` the one that the file was made with, at the same size of images?"""
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


def _architecture(name: str) -> str:
    """A backbone's name without its family and tag.

    >>> _architecture("timm:deit_tiny_patch16_224.fb_in1k")
    'deit_tiny_patch16_224'
    """
    return name.partition(":")[2].partition(".")[0]


def _check_widths(path: Path, tensors: Mapping[str, Tensor], head: HeadSpec, backbone: Backbone) -> None:
    widths = {"shared.tokens": backbone.width, "pool.tokens": backbone.width}
    widths |= {"pool.keys": backbone.feature_width, "query_head.weight": backbone.feature_width}
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
    """Are adapters as large as the header says? One that is told to be huge would be made huge."""
    if header.inside is None or header.inside.kind not in ("lora", "adaptformer"):
        return
    if header.inside.kind == "lora":
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
