"""Soups: prompt files from one start averaged into one, which answers at the cost of a single one.

Σ_i w_i θ_i with w_1 for the file that is given first (after LT-Soups, NeurIPS 2025, arXiv 2511.10683, which averages
whole models: θ ← (1 - λ) θ + λ θ_i is w = (1 - λ, λ)). That prompts, adapters and heads can be averaged is ours to find
out: they lie in one valley only if they started from one place, and files that did not are refused.

- Prompts, pools, adapters, biases, norms, calibrations, linear heads: number by number.
- Rows of cosine heads: their directions, since their lengths say nothing; the mean length is kept.
- LoRA: its product, Σ_i w_i B_i A_i and not (Σ w B)(Σ w A), as a LoRA of the sum of ranks: exact, and as much larger.

Shapes: A [r D], B [D' r], rows [C D'].
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.image_hashes import packed, unpacked
from lpt.errors import PromptFileError, quoted
from lpt.prompt_file import write_prompt
from lpt.prompt_header import FORMAT, Header, read_header

LORA = ("lora", "lora_qv")
COSINE_ROWS = ("head.weight", "query_head.weight")
MOST_FILES = 100


class Ingredient:
    """A prompt file that goes into a soup: its header, tensors in fp32, and whether they are stored so."""

    def __init__(self, path: Path, weight: float) -> None:
        self.path, self.weight = path, weight
        self.header, arrays = read_header(path)
        self.in_fp32 = any(value.dtype == np.float32 for value in arrays.values())
        self.tensors = {name: torch.from_numpy(value).float() for name, value in arrays.items()}

    @property
    def start_seed(self) -> int | None:
        """What its start was drawn from, where the file says so: those of lpt 0.1 do not."""
        seed = (self.header.model_extra or {}).get("start_seed")
        return seed if isinstance(seed, int) else None

    @property
    def kind(self) -> str | None:
        """Trainable parameters inside the backbone."""
        return self.header.inside.kind if self.header.inside else None

    def facts(self) -> dict[str, Any]:
        """What the header of the soup says of it."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"file": self.path.name, "sha256": digest, "weight": self.weight, "images": sum(self.header.counts)}


def soup(paths: Sequence[Path], out: Path, *, weights: Sequence[float] | None = None) -> Header:
    """Writes the soup of the prompt files `paths` to `out`; returns its header. `weights` are in their order, positive,
    and divided by their sum; equal by default.

    Counts are those of the file with most training images. What was measured of the parts says nothing of the soup and
    is left out. Raises PromptFileError for files that cannot be averaged, with what they differ in.
    """
    shares = _shares(paths, weights)
    if any(out.resolve() == path.resolve() for path in paths):
        raise PromptFileError(f"--out {out} is one of the files that the soup is made of: give another name")
    parts = [Ingredient(path, share) for path, share in zip(paths, shares, strict=True)]
    for part in parts[1:]:
        _check_same(parts[0], part)
    tensors = _averaged(parts)
    header = _header(parts, tensors)
    dtype = torch.float32 if any(part.in_fp32 for part in parts) else torch.float16
    write_prompt(out, header, {name: value.to(dtype).contiguous() for name, value in tensors.items()})
    read_header(out)  # what nobody could open again is an error now
    return header


def _shares(paths: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if not 2 <= len(paths) <= MOST_FILES:
        raise PromptFileError(f"a soup is made of 2 to {MOST_FILES} prompt files: {len(paths)} given")
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths):
        raise PromptFileError(f"--weights: {len(weights)} numbers for {len(paths)} files: give one for each, in order")
    if not all(0 < weight <= 1e6 for weight in weights):  # false for NaN as well
        raise PromptFileError(f"--weights {', '.join(f'{w:g}' for w in weights)}: give positive numbers, in order")
    return [weight / sum(weights) for weight in weights]


# What must be the same. Each fact has a name for people.

SAME: dict[str, Callable[[Ingredient], Any]] = {
    "method": lambda part: part.header.method,
    "weights of the backbone": lambda part: part.header.backbone.fingerprint,
    "backbone": lambda part: part.header.backbone.name.partition(":")[2].partition(".")[0],
    "image size": lambda part: part.header.backbone.image_size,
    "classes, or their order": lambda part: part.header.classes,
    "seed of the start": lambda part: part.start_seed,
    "kind of trainable parameters inside the backbone": lambda part: part.kind,
    "scale of the head": lambda part: part.header.scale,
    "topk": lambda part: part.header.topk,
    "first block with group prompts": lambda part: part.header.prefix_blocks,
    "space of the head": lambda part: part.header.space,
    "precision": lambda part: part.header.precision,
    "pixels": lambda part: _pixels(part.header),
}


def _pixels(header: Header) -> tuple[Any, ...]:
    """All that test views depend on: how training crops were drawn may differ."""
    seen = header.preprocess
    return tuple(seen.mean), tuple(seen.std), seen.interpolation, seen.crop_ratio, seen.square, seen.cutter


def _check_same(first: Ingredient, other: Ingredient) -> None:
    """Raises PromptFileError where two files cannot be averaged."""
    for what, fact in SAME.items():
        one, two = fact(first), fact(other)
        if one != two:
            shown = "" if isinstance(one, list | tuple) else f" ({quoted(one, 60)} and {quoted(two, 60)})"
            raise PromptFileError(
                f"{first.path} and {other.path} differ in {what}{shown}: a soup is of files from one start"
            )
    for part in (first, other):
        if "head.bank" in part.tensors or part.header.fused:
            raise PromptFileError(f"{part.path} has a head that cannot be averaged: only cosine and linear ones can")
    shapes = [{name: _shape(part, name) for name in part.tensors} for part in (first, other)]
    if shapes[0] != shapes[1]:
        names = shapes[0].keys() | shapes[1].keys()
        different = min(name for name in names if shapes[0].get(name) != shapes[1].get(name))
        raise PromptFileError(f"{first.path} and {other.path} differ in the shape of {quoted(different, 100)}")


def _shape(part: Ingredient, name: str) -> tuple[int, ...]:
    """Of a tensor; LoRA's rank may differ."""
    shape, inside = tuple(part.tensors[name].shape), part.header.inside
    if inside is None or not _is_lora(part, name):
        return shape
    return tuple(-1 if size == inside.rank else size for size in shape)


def _is_lora(part: Ingredient, name: str) -> bool:
    return part.kind in LORA and ".lora_" in name


# The averages.


def _averaged(parts: Sequence[Ingredient]) -> dict[str, Tensor]:
    tensors = {}
    for name in parts[0].tensors:
        each = [(part.weight, part.tensors[name]) for part in parts]
        if _is_lora(parts[0], name):
            tensors[name] = _joined(name, parts)
        elif name in COSINE_ROWS and "head.bias" not in parts[0].tensors:
            tensors[name] = mean_of_rows(each)
        else:
            tensors[name] = sum((weight * value.double() for weight, value in each), torch.zeros(())).float()
    return tensors


def mean_of_rows(each: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The direction of Σ w_i row_i/|row_i|, with the length Σ w_i |row_i|. [C D'] → [C D']."""
    direction = sum((w * F.normalize(rows.double(), dim=1) for w, rows in each), torch.zeros(()))
    length = sum((w * rows.double().norm(dim=1, keepdim=True) for w, rows in each), torch.zeros(()))
    return (F.normalize(direction, dim=1) * length).float()


def _joined(name: str, parts: Sequence[Ingredient]) -> Tensor:
    """A [Σr D] of all A_i, one below the other, or B [D' Σr] of all w_i B_i side by side: the product is Σ w_i B_i A_i.

    peft's factor α/r is 2 at any rank; that of lora_qv is 1/r, so that B_i is Σr/r_i times as large there. Raises
    PromptFileError where the sum of ranks is no low rank any more.
    """
    ranks = [part.header.inside.rank for part in parts if part.header.inside]
    total = sum(ranks)
    if ".lora_A" in name:
        width = parts[0].tensors[name].shape[1]
        if total > width // 2:
            raise PromptFileError(
                f"the soup's LoRA would be of rank {total}, the sum of {', '.join(map(str, ranks))}, and {width // 2} "
                "is the most for this backbone: average fewer files, or files of a lower method.rank"
            )
        return torch.cat([part.tensors[name] for part in parts])
    grown = [total / rank if parts[0].kind == "lora_qv" else 1.0 for rank in ranks]
    return torch.cat([part.weight * g * part.tensors[name] for part, g in zip(parts, grown, strict=True)], dim=1)


# What the soup says of itself.


def _header(parts: Sequence[Ingredient], tensors: Mapping[str, Tensor]) -> Header:
    largest = max(parts, key=lambda part: sum(part.header.counts)).header
    inside = largest.inside
    if inside and parts[0].kind in LORA:
        ranks = [part.header.inside.rank for part in parts if part.header.inside]
        inside = inside.model_copy(update={"rank": sum(ranks)})
    known = [part.header.trained_on for part in parts if part.header.trained_on]
    seen = np.unique(np.concatenate([unpacked(text) for text in known])) if known else None
    return largest.model_copy(
        update={
            "format": FORMAT,
            "settings": _common([part.header.settings for part in parts]),
            "data": _common([part.header.data for part in parts]),
            "inside": inside,
            "metrics": {},
            "trained_on": None if seen is None else packed(seen),
            "soup": {"is": "sum of weight x file, in this order", "of": [part.facts() for part in parts]},
        }
    )


def _common(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all say alike."""
    first, *others = mappings
    return {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}


def lines(header: Header) -> list[str]:
    """What `lpt soup` prints."""
    made: Any = (header.model_extra or {}).get("soup", {})
    told = [f"{one['weight']:.3f} x {quoted(one['file'], 100)}" for one in made.get("of", [])]
    rank = f"; LoRA of rank {header.inside.rank}" if header.inside and header.inside.kind in LORA else ""
    return [*told, f"metrics of the parts are left out: lpt evaluate measures the soup{rank}"]
