"""Prompt files: one safetensors file with what was learned, a JSON header, and never the frozen backbone.

Format 2; format 1 has no SHA-256 and is still read. Tensors: `shared.tokens` [L n D], `pool.tokens` [K L' n D],
`pool.keys` [K D'], `pool.centre` [D'], `head.weight` [C D'], `head.bias` [C] where the head is linear and not cosine,
or `head.bank` [N D'] where it is nearest neighbours, `query_head.weight` [C D'] where the query has a head of its own,
`calibration.scale` and `.offset` [C], with a fused head `head.scales` [2], `.prototypes`, `.texts` and `.visual` [C J],
`.seen` and `.frequency` [C], and `backbone.*`, what was learned inside a copy of the backbone as the header's `inside`
says. A shallow prompt has L = 1. The header stands under `lpt` in the file's metadata.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from torch import Tensor

from lpt.data.preprocess import MAX_VIEW, Preprocess
from lpt.errors import PromptFileError, quoted
from lpt.files import is_intact, read_tensors, to_bytes, write_atomic
from lpt.model.adapters import Kind, adapted
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import Calibration, CosineHead, FusedHead, Fusion, Head, LinearHead, NeighbourHead
from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt

FORMAT = 2
LARGEST_NUMBER = 1e6
"""Nothing that was learned is larger; what is, is no model, and makes answers that are not finite."""

FUSED = {"head.scales": 1, "head.prototypes": 2, "head.texts": 2, "head.visual": 2, "head.seen": 1, "head.frequency": 1}
"""Ranks of what a fused head has besides its weight."""
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class BackboneFacts(BaseModel):
    name: str
    fingerprint: str
    image_size: int = Field(gt=0, le=MAX_VIEW)


class Inside(BaseModel):
    """What is learned inside the backbone: arguments of `lpt.model.adapters.adapted`."""

    kind: Kind
    bottleneck: int = Field(ge=1, le=4096)
    rank: int = Field(ge=1, le=4096)


class Fused(BaseModel):
    """How a fused head makes one answer of two: arguments of `FusedHead`."""

    fusion: Fusion
    eta: float = Field(ge=0, le=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    fuse: bool


class Header(BaseModel):
    """What a prompt file says about itself; fields that this version does not know are kept."""

    model_config = ConfigDict(extra="allow")

    format: int
    method: str
    settings: dict[str, Any] = {}
    backbone: BackboneFacts
    preprocess: Preprocess
    classes: Annotated[list[str], FailFast()] = Field(min_length=2)
    counts: Annotated[list[Annotated[int, Field(ge=0, le=10**12)]], FailFast()]
    scale: float = Field(gt=0, le=LARGEST_NUMBER)
    topk: int = Field(default=0, ge=0)
    first: int = Field(default=0, ge=0)
    inside: Inside | None = None
    fused: Fused | None = None
    space: Literal["features", "joint"] = "features"
    """Where a head of class prototypes compares: in the space of the features, or of images and texts."""
    neighbours: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.07, ge=1 / LARGEST_NUMBER, le=LARGEST_NUMBER)
    precision: Literal["fp32", "bf16"] = "fp32"
    data: dict[str, Any] = {}
    metrics: dict[str, float | None] = {}
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_count_a_class(self) -> Self:
        if len(self.counts) != len(self.classes):
            raise ValueError(f"{len(self.counts)} counts for {len(self.classes)} classes")
        pixels = self.preprocess
        three = len(pixels.mean) == len(pixels.std) == 3 and all(0 < s < 1e3 for s in pixels.std)
        known = pixels.interpolation in ("bilinear", "bicubic") and 0.1 <= pixels.crop_ratio <= 1
        if pixels.size != self.backbone.image_size or not (three and known and 0 < pixels.min_area <= 1):
            raise ValueError("the preprocessing makes no sense")
        return self


class PromptFile(NamedTuple):
    header: Header
    tensors: dict[str, Tensor]


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
    backbone, pool, head = model.backbone, model.pool, model.head
    if isinstance(head, NeighbourHead):
        facts |= {"neighbours": head.k, "temperature": head.temperature}
    if isinstance(head, FusedHead):
        facts["fused"] = Fused.model_validate(head, from_attributes=True)
    if isinstance(head, FusedHead | CosineHead) and head.project:
        facts["space"] = "joint"
    facts.setdefault("precision", "bf16" if backbone.dtype == torch.bfloat16 else "fp32")
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
        first=pool.first if pool else 0,
        inside=Inside.model_validate(backbone.recipe) if backbone.recipe else None,
        **facts,
    )
    tensors = {k: v.detach().to("cpu", DTYPES[storage]).contiguous() for k, v in model.adapted().items()}
    if bad := [k for k, v in tensors.items() if not bool((v.float().abs() <= LARGEST_NUMBER).all())]:
        raise PromptFileError(
            f"prompt file {path} is not written: in {storage} {bad[0]} holds numbers that are not finite or above "
            f"{LARGEST_NUMBER:g}: lower method.lr, or use train.storage=fp32"
        )
    write_atomic(Path(path), to_bytes(tensors, lpt=json.loads(header.model_dump_json())))
    return header


def beyond_fp16(model: PromptedClassifier) -> str | None:
    """The first of the model's tensors that would be infinite in fp16."""
    most = torch.finfo(torch.float16).max
    return next((name for name, value in model.adapted().items() if bool((value.abs() > most).any())), None)


def read_prompt(path: str | Path) -> PromptFile:
    """Header and tensors, checked against each other; no backbone is needed. Raises PromptFileError."""
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
    header = _header(path, metadata["lpt"])
    _check_tensors(path, header, tensors)
    raw = json.loads(metadata["lpt"])
    if (header.format > 1 or "sha256" in raw) and not is_intact(raw, tensors):
        raise PromptFileError(f"prompt file {path} is damaged: it does not hold what was written (SHA-256)")
    return PromptFile(header, {k: v.float() for k, v in tensors.items()})


def load_prompt(path: str | Path, backbone: Backbone) -> PromptedClassifier:
    """The model of a prompt file on `backbone`, which must be the one it was made with. Raises PromptFileError."""
    header, tensors = read_prompt(path)
    _check_backbone(Path(path), header, tensors, backbone)
    if header.inside:
        backbone = adapted(backbone, **header.inside.model_dump())
    shared = pool = None
    if (tokens := tensors.get("shared.tokens")) is not None and len(tokens) == 1 < backbone.depth:
        shared = ShallowPrompt(length=tokens.shape[1], width=tokens.shape[2])
    elif tokens is not None:
        shared = DeepPrompt(layers=backbone.depth, length=tokens.shape[1], width=tokens.shape[2])
    if (tokens := tensors.get("pool.tokens")) is not None:
        pool = PromptPool(
            size=tokens.shape[0],
            topk=header.topk,
            first=header.first,
            depth=backbone.depth,
            length=tokens.shape[2],
            width=tokens.shape[3],
            key_width=backbone.feature_width,
        )
    query_head = None
    if "query_head.weight" in tensors:
        query_head = CosineHead(num_classes=len(header.classes), width=backbone.feature_width, scale=header.scale)
    model = PromptedClassifier(
        backbone,
        _head(header, tensors, backbone),
        classes=tuple(header.classes),
        shared=shared,
        pool=pool,
        query_head=query_head,
        calibration=Calibration(len(header.classes)) if "calibration.scale" in tensors else None,
    )
    if other := sorted(model.adapted().keys() ^ tensors.keys()):
        raise PromptFileError(f"prompt file {path} and the model it describes differ in {quoted(', '.join(other[:5]))}")
    for name, value in model.adapted().items():
        if tensors[name].shape != value.shape:
            raise PromptFileError(
                f"prompt file {path}: {name} is {list(tensors[name].shape)}, the backbone needs {list(value.shape)}"
            )
    model.load_adapted(tensors)
    model.only_train()
    return model.to(next(backbone.parameters()).device).eval()


def _check_backbone(path: Path, header: Header, tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Whether `backbone` is the file's; and that what the file says and what it holds agree, before anything is made
    that is much larger than the file."""
    if header.backbone.fingerprint != backbone.fingerprint:
        raise PromptFileError(
            f"prompt file {path} is for backbone {quoted(header.backbone.name)} "
            f"({quoted(header.backbone.fingerprint, 40)}), this is {backbone.name} "
            f"({backbone.fingerprint}): give backbone.name and backbone.weights of the first"
        )
    ours, theirs = (name.partition(":")[2].partition(".")[0] for name in (backbone.name, header.backbone.name))
    if ours != theirs:  # equal weights, but another activation or norm: CLIP's quickgelu models are such twins
        raise PromptFileError(
            f"prompt file {path} is for {quoted(header.backbone.name)}, this is {backbone.name}: set backbone.name"
        )
    if header.backbone.image_size != backbone.preprocess.size:
        raise PromptFileError(
            f"prompt file {path} was made at {header.backbone.image_size} pixels, this backbone is at "
            f"{backbone.preprocess.size}: set backbone.image_size={header.backbone.image_size}"
        )
    joint = header.space == "joint" and not header.fused
    widths = {"shared.tokens": backbone.width, "pool.tokens": backbone.width}
    widths |= dict.fromkeys(("pool.keys", "query_head.weight", "head.bank"), backbone.feature_width)
    widths["head.weight"] = backbone.joint_width if joint else backbone.feature_width
    for name, wide in widths.items():
        if name in tensors and tensors[name].shape[-1] != wide:
            raise PromptFileError(
                f"prompt file {path}: {name} is {list(tensors[name].shape)}, the backbone needs a width of {wide}"
            )
    if inside := header.inside:
        part, size = {"lora": ("lora_A", inside.rank), "adaptformer": ("down.weight", inside.bottleneck)}.get(
            inside.kind, ("", 0)
        )
        if part and {tuple(value.shape[:1]) for name, value in tensors.items() if part in name} != {(size,)}:
            raise PromptFileError(f"prompt file {path}: its {inside.kind} is not of the size {size} that it says")
    if "pool.tokens" in tensors and header.first >= backbone.depth:
        raise PromptFileError(
            f"prompt file {path}: group prompts from block {header.first} on, the backbone has {backbone.depth}"
        )


def _head(header: Header, tensors: Mapping[str, Tensor], backbone: Backbone) -> Head:
    num_classes, width, joint = len(header.classes), backbone.feature_width, header.space == "joint"
    project = backbone.project if joint else None
    meets = backbone.joint_width if joint else width
    if header.fused:
        of = header.fused.model_dump()
        return FusedHead(num_classes=num_classes, width=width, joint_width=meets, project=project, **of)
    if "head.bank" in tensors:
        counts = torch.tensor(header.counts)
        bank = tensors["head.bank"]
        return NeighbourHead(bank=bank, counts=counts, k=header.neighbours, temperature=header.temperature)
    if "head.bias" in tensors:
        return LinearHead(num_classes=num_classes, width=width)
    return CosineHead(num_classes=num_classes, width=meets, scale=header.scale, project=project)


def _header(path: Path, text: str) -> Header:
    try:
        raw = json.loads(text)
        number = raw["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PromptFileError(f"prompt file {path} has a damaged header: it is not JSON with a format number") from None
    if not isinstance(number, int) or not 1 <= number <= FORMAT:
        raise PromptFileError(
            f"prompt file {path} has format {quoted(number, 40)}, this lpt reads up to {FORMAT}: install a newer lpt"
        )
    for key in ("metrics", "versions"):  # every entry that is wrong would become an error of a kilobyte
        if isinstance(raw.get(key), dict) and len(raw[key]) > 100:
            raise PromptFileError(f"prompt file {path} has a damaged header: {key} has {len(raw[key])} entries")
    try:
        return Header.model_validate({key: value for key, value in raw.items() if key != "sha256"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise PromptFileError(
            f"prompt file {path} has a damaged header: {quoted(where)}: {quoted(first['msg'])}"
        ) from None


def _check_tensors(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Names, ranks, agreement between them, and finite numbers: a file is refused before it is believed."""
    ranks = {
        "shared.tokens": 3,
        "pool.tokens": 4,
        "pool.keys": 2,
        "pool.centre": 1,
        "head.weight": 2,
        "head.bias": 1,
        "query_head.weight": 2,
        "head.bank": 2,
        "calibration.scale": 1,
        "calibration.offset": 1,
        **FUSED,
    }
    inside = {k for k in tensors if k.startswith("backbone.")}  # checked against the backbone when it is there
    wrong = sorted(set(tensors) - set(ranks) - inside)
    in_pool = [k for k in ranks if k.startswith("pool.") and k in tensors]
    say = None
    if wrong:
        say = f"unknown tensors {', '.join(wrong)}"
    elif bad := [k for k, v in tensors.items() if v.dim() != ranks.get(k, v.dim()) or v.numel() == 0]:
        say = f"{bad[0]} has shape {list(tensors[bad[0]].shape)}"
    elif inside and header.inside is None:
        say = f"the header does not say what {sorted(inside)[0]} is"
    elif ("head.weight" in tensors) == ("head.bank" in tensors):
        say = "the tensor head.weight is missing" if "head.weight" not in tensors else "it has two heads"
    elif "head.bank" in tensors and len(tensors["head.bank"]) != sum(header.counts):
        say = f"{len(tensors['head.bank'])} neighbours for {sum(header.counts)} training images"
    elif "head.bank" in tensors and not 1 <= header.neighbours <= sum(header.counts):
        say = f"{header.neighbours} nearest of {sum(header.counts)} training images"
    elif (header.fused is not None) != bool(FUSED.keys() & tensors):
        say = "the header and the tensors do not agree on whether its head is a fused one"
    elif ("calibration.scale" in tensors) != ("calibration.offset" in tensors):
        say = "a calibration needs scale and offset"
    elif "head.bias" in tensors and len(tensors["head.bias"]) != len(header.classes):
        say = f"the head has {len(tensors['head.bias'])} biases for {len(header.classes)} classes"
    elif "query_head.weight" in tensors and not in_pool:
        say = "a query head needs a pool"
    elif in_pool and len(in_pool) != 3:
        say = f"a pool needs tokens, keys and centre, there is {', '.join(in_pool)}"
    elif bad := [k for k, v in tensors.items() if v.dtype not in DTYPES.values()]:
        say = f"{bad[0]} is stored as {tensors[bad[0]].dtype}, not fp16 or fp32"
    elif bad := [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]:
        say = f"{bad[0]} holds numbers that are not finite"
    elif bad := [k for k, v in tensors.items() if v.float().abs().max() > LARGEST_NUMBER]:
        say = f"{bad[0]} holds numbers above {LARGEST_NUMBER:g}"
    elif in_pool and len(tensors["pool.tokens"]) != len(tensors["pool.keys"]):
        say = f"{len(tensors['pool.keys'])} keys for {len(tensors['pool.tokens'])} group prompts"
    elif "head.weight" in tensors and len(tensors["head.weight"]) != len(header.classes):
        say = f"the head has {len(tensors['head.weight'])} rows for {len(header.classes)} classes"
    elif in_pool and not 1 <= header.topk <= len(tensors["pool.keys"]):
        say = f"topk {header.topk} does not fit a pool of {len(tensors['pool.keys'])}"
    if say:
        raise PromptFileError(f"prompt file {path} is damaged: {quoted(say)}")
