"""The header of a prompt file, and everything that can be checked of a file without torch: `lpt inspect` needs no more.

The format is described in `lpt.prompt_file`, which writes it and makes models of it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from lpt.errors import PromptFileError, check_kind, quoted
from lpt.files import dtype_name, is_intact, local_file, read_arrays, read_names
from lpt.model.head_spec import HEAD_RANKS, Fused, HeadSpec, Space, head_problem, head_spec
from lpt.settings import MAX_ADAPTER_WIDTH
from lpt.terms import MAX_VIEW, NUM_SCORES, AdapterKind, GroupRule, Pixels, QueryMode, unpacked

Arrays = Mapping[str, np.ndarray]
"""The tensors of a file by name."""

FORMAT = 3
SINCE_FORMAT_3 = ("pool.query_map", "task.means", "task.scores")
"""Tensors that format 2 did not have: files without them are still of format 2, which older versions read."""
LARGEST_NUMBER = 1e6
"""Nothing that was learned is larger; what is, is no model, and makes predictions that are not finite."""
LARGEST_MEAN, STD_RANGE = 10.0, (1e-3, 1e3)
"""Of pixels in 0..1. Every published mean and deviation is within 0..1; what is far outside makes views of no image."""
MOST_ENTRIES = 100
"""Of `metrics` and `versions`: every entry that is wrong would become an error of a kilobyte."""

RANKS = {
    "shared.tokens": 3,
    "pool.tokens": 4,
    "pool.keys": 2,
    "pool.centre": 1,
    "pool.query_map": 2,
    "query_head.weight": 2,
    "calibration.scale": 1,
    "calibration.offset": 1,
    "task.means": 2,
    "task.scores": 1,
    **HEAD_RANKS,
}
"""Number of axes of every tensor that a file can hold, but for `backbone.*`."""


class BackboneFacts(BaseModel):
    name: str
    fingerprint: str
    image_size: int = Field(gt=0, le=MAX_VIEW)
    norm_eps: float | None = Field(default=None, ge=1e-12, le=0.1)
    """ε of its LayerNorms where it is not the model's own. Absent where it is None."""


class Inside(BaseModel):
    """Trainable parameters inside the backbone: arguments of `lpt.model.adapters.with_adapter`."""

    kind: AdapterKind
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
    preprocess: Pixels
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
    query: QueryMode = "full"
    """How group prompts are chosen. Absent where it is full."""
    trained_on: str | None = None
    """Short hashes of the training images (`lpt.data.image_hashes`), where the test part is not an official one: the
    folder or the split may be another when the file is evaluated. Absent where it is None."""
    metrics: dict[str, float | None] = {}
    versions: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _spelling_of_before(cls, fields: Any) -> Any:
        """Files of lpt 0.1 spell `labelled` where later ones spell `labeled`."""
        if not isinstance(fields, dict):
            return fields
        data, settings = fields.get("data"), fields.get("settings")
        if isinstance(data, dict) and "labelled_sha256" in data:
            fields = {**fields, "data": {key.replace("labelled_", "labeled_"): value for key, value in data.items()}}
        return {**fields, "settings": _in_new_spelling(settings)} if isinstance(settings, dict) else fields

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

    def head_spec(self, tensors: Mapping[str, Any]) -> HeadSpec:
        return head_spec({**dict(self), "num_classes": len(self.classes)}, tensors)


def _in_new_spelling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a method, and of those inside it, with `la_on` as it is spelled now."""
    renamed = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            renamed[key] = _in_new_spelling(value)
        else:
            renamed[key] = "labeled" if (key, value) == ("la_on", "labelled") else value
    return renamed


def format_of(tensors: Iterable[str]) -> int:
    """The first format that has all of these tensors."""
    return FORMAT if any(name in SINCE_FORMAT_3 for name in tensors) else 2


# A file may come from anybody: nothing in it is used before it is checked.


def read_header(path: str | Path) -> tuple[Header, dict[str, np.ndarray]]:
    """(header, tensors as they are stored) of a path or `hf://owner/name/file`, checked against each other. Raises
    PromptFileError."""
    check_kind("prompt file", path, (str, Path), "give the path of a file")
    path = Path(path)
    fields, arrays = _opened(path, read_arrays)
    header = _header(path, fields)
    for problem_with in CHECKS:
        if problem := problem_with(header, arrays):
            raise PromptFileError(f"prompt file {path} is damaged: {quoted(problem)}")
    must_be_sealed = header.format > 1 or "sha256" in fields
    if must_be_sealed and not is_intact(fields, arrays):
        raise PromptFileError(f"prompt file {path} is damaged: it does not hold what was written (SHA-256)")
    return header, arrays


def read_fields(path: Path) -> tuple[Header, list[str]]:
    """(header, names of tensors), which a table needs; what they hold is not looked at. Raises PromptFileError."""
    fields, names = _opened(path, read_names)
    return _header(path, fields), names


Read = TypeVar("Read")


def _opened(path: Path, read: Callable[[Path], tuple[dict[str, str], Read]]) -> tuple[dict[str, Any], Read]:
    """(fields of the header, what else `read` has read)."""
    local = local_file(path)
    if not local.is_file():
        raise PromptFileError(f"prompt file {path} does not exist")
    try:
        metadata, content = read(local)
    except ValueError as error:
        raise PromptFileError(f"prompt file {path} is damaged or no safetensors file ({error})") from None
    if "lpt" not in metadata:
        raise PromptFileError(
            f"{path} is a safetensors file but not a prompt file of lpt: its metadata has no lpt header"
        )
    return _header_fields(path, metadata["lpt"]), content


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


def _names_problem(header: Header, arrays: Arrays) -> str | None:
    unknown = [name for name in arrays if name not in RANKS and not name.startswith("backbone.")]
    return f"unknown tensors {', '.join(sorted(unknown))}" if unknown else None


def _shapes_problem(header: Header, arrays: Arrays) -> str | None:
    for name, value in arrays.items():
        rank = RANKS.get(name, value.ndim)  # what is inside a backbone is compared with it when it is there
        if value.ndim != rank or value.size == 0:
            return f"{name} has shape {list(value.shape)}"
    return None


def _inside_problem(header: Header, arrays: Arrays) -> str | None:
    inside = sorted(name for name in arrays if name.startswith("backbone."))
    return f"the header does not say what {inside[0]} is" if inside and header.inside is None else None


def _head_problem(header: Header, arrays: Arrays) -> str | None:
    return head_problem(header.head_spec(arrays), arrays)


def _calibration_problem(header: Header, arrays: Arrays) -> str | None:
    if ("calibration.scale" in arrays) != ("calibration.offset" in arrays):
        return "a calibration needs scale and offset"
    return None


def _pool_problem(header: Header, arrays: Arrays) -> str | None:
    parts = [name for name in ("pool.tokens", "pool.keys", "pool.centre") if name in arrays]
    if not parts:
        if "query_head.weight" in arrays:
            return "a query head needs a pool"
        return "a query needs a pool" if "pool.query_map" in arrays or header.query != "full" else None
    if len(parts) != 3:
        return f"a pool needs tokens, keys and centre, there is {', '.join(parts)}"
    prompts, keys = len(arrays["pool.tokens"]), len(arrays["pool.keys"])
    if prompts != keys:
        return f"{keys} keys for {prompts} group prompts"
    if not 1 <= header.topk <= keys:
        return f"topk {header.topk} does not fit a pool of {keys}"
    if ("pool.query_map" in arrays) != (header.query == "early"):
        return f"a query map belongs to query early, its query is {header.query}"
    if header.query == "none" and keys != header.topk:
        return f"{keys} group prompts for every image, topk is {header.topk}"
    return "a query head needs a full query" if "query_head.weight" in arrays and header.query != "full" else None


def _means_problem(header: Header, arrays: Arrays) -> str | None:
    parts = [name for name in ("task.means", "task.scores") if name in arrays]
    if not parts:
        return None
    if len(parts) != 2:
        return f"{parts[0]} stands alone"
    means, scores = arrays["task.means"], arrays["task.scores"]
    if len(means) != len(header.classes):
        return f"{len(means)} class means for {len(header.classes)} classes"
    if len(scores) != NUM_SCORES or not (np.diff(scores) >= 0).all():
        return f"task.scores are no {NUM_SCORES} quantiles"
    return None


def _numbers_problem(header: Header, arrays: Arrays) -> str | None:
    for name, value in arrays.items():
        if value.dtype not in (np.float16, np.float32):
            return f"{name} is stored as {dtype_name(value)}, not fp16 or fp32"
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            return f"{name} holds numbers that are not finite"
    for name, value in arrays.items():
        if float(np.abs(value).max()) > LARGEST_NUMBER:
            return f"{name} holds numbers above {LARGEST_NUMBER:g}"
    return None


CHECKS: tuple[Callable[[Header, Arrays], str | None], ...] = (
    _names_problem,
    _shapes_problem,
    _inside_problem,
    _head_problem,
    _calibration_problem,
    _pool_problem,
    _numbers_problem,
    _means_problem,
)
