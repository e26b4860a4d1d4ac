"""The heads that a prompt file can hold: a spec for each kind, with its tensors, its part of the header and its checks.

A new kind of head is a spec here, a member of `HeadSpec`, and a line in `head_spec` and `head_fields`. What it stores
beside its tensors is a field of `lpt.prompt_header.Header`; the fields of a spec are read from those of the same name
there.

Shapes: weight [C D'] or [C J], bias [C], bank [N D'], prototypes, texts and visual [C J], scales [2], seen and
frequency [C].
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lpt.terms import Fusion

if TYPE_CHECKING:  # what a file says of its head is checked without torch
    from torch import Tensor

    from lpt.model.backbones.base import Backbone
    from lpt.model.heads import CosineHead, FusedHead, Head, LinearHead, NeighbourHead

ByName = Mapping[str, Any]
"""Tensors or arrays by name, of which only lengths are looked at."""

Space = Literal["features", "joint"]
"""Where class prototypes are compared with an image: among features, or in the space of images and texts."""


class Fused(BaseModel):
    """How a fused head makes one prediction of two: arguments of `FusedHead`."""

    fusion: Fusion
    eta: float = Field(ge=0, le=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    fuse: bool


class _Spec(BaseModel, ABC):
    """What the specs share. `problem` and `widths` check a file before `build` believes it."""

    model_config = ConfigDict(frozen=True)

    ranks: ClassVar[Mapping[str, int]]
    """Number of axes of each of its tensors."""

    num_classes: int
    space: Space

    @staticmethod
    def header_fields(head: Any) -> dict[str, Any]:
        """What the header says of `head`, besides its `scale`."""
        return {}

    def problem(self, tensors: ByName) -> str | None:
        """What is wrong with the sizes of the head's tensors, without a backbone."""
        rows = {name: len(tensors[name]) for name in ("head.bias", "head.weight") if name in tensors}
        if rows.get("head.bias", self.num_classes) != self.num_classes:
            return f"the head has {rows['head.bias']} biases for {self.num_classes} classes"
        if rows.get("head.weight", self.num_classes) != self.num_classes:
            return f"the head has {rows['head.weight']} rows for {self.num_classes} classes"
        return None

    def widths(self, backbone: "Backbone") -> dict[str, int]:
        """The last axis of tensors that must fit the backbone."""
        return {"head.weight": _width(backbone, self.space)}

    @abstractmethod
    def build(self, backbone: "Backbone", tensors: "Mapping[str, Tensor]") -> "Head":
        """The head on `backbone`, with tensors of the right shapes; a bank of features comes with its values."""


class CosineSpec(_Spec):
    """Cosines with a row for each class, maybe behind a projection to the joint space."""

    ranks = {"head.weight": 2}

    kind: Literal["cosine"] = "cosine"
    scale: float

    @staticmethod
    def header_fields(head: "CosineHead") -> dict[str, Any]:
        return {"space": _space(head)}

    def build(self, backbone: "Backbone", tensors: "Mapping[str, Tensor]") -> "CosineHead":
        from lpt.model.heads import CosineHead

        width, project = _width(backbone, self.space), backbone.project if self.space == "joint" else None
        return CosineHead(num_classes=self.num_classes, width=width, scale=self.scale, project=project)


class LinearSpec(_Spec):
    """A weight and a bias for each class."""

    ranks = {"head.weight": 2, "head.bias": 1}

    kind: Literal["linear"] = "linear"

    def build(self, backbone: "Backbone", tensors: "Mapping[str, Tensor]") -> "LinearHead":
        from lpt.model.heads import LinearHead

        return LinearHead(num_classes=self.num_classes, width=backbone.feature_width)


class NeighbourSpec(_Spec):
    """Features of all training images, sorted by class."""

    ranks = {"head.bank": 2}

    kind: Literal["neighbour"] = "neighbour"
    counts: list[int]
    neighbours: int
    temperature: float

    @staticmethod
    def header_fields(head: "NeighbourHead") -> dict[str, Any]:
        return {"neighbours": head.k, "temperature": head.temperature}

    def problem(self, tensors: ByName) -> str | None:
        bank, images = tensors["head.bank"], sum(self.counts)
        if len(bank) != images:
            return f"{len(bank)} neighbours for {images} training images"
        if not 1 <= self.neighbours <= images:
            return f"{self.neighbours} nearest of {images} training images"
        return super().problem(tensors)

    def widths(self, backbone: "Backbone") -> dict[str, int]:
        return {"head.bank": backbone.feature_width}

    def build(self, backbone: "Backbone", tensors: "Mapping[str, Tensor]") -> "NeighbourHead":
        import torch

        from lpt.model.heads import NeighbourHead

        counts = torch.tensor(self.counts)
        return NeighbourHead(bank=tensors["head.bank"], counts=counts, k=self.neighbours, temperature=self.temperature)


class FusedSpec(_Spec):
    """Cosines with `head.weight` among features, fused with those of class prototypes in `space`."""

    state: ClassVar[Mapping[str, int]] = {
        "head.scales": 1,
        "head.prototypes": 2,
        "head.texts": 2,
        "head.visual": 2,
        "head.seen": 1,
        "head.frequency": 1,
    }
    """What no other head has, with its ranks."""
    ranks = {"head.weight": 2, **state}

    kind: Literal["fused"] = "fused"
    fused: Fused

    @staticmethod
    def header_fields(head: "FusedHead") -> dict[str, Any]:
        return {"fused": Fused.model_validate(head, from_attributes=True), "space": _space(head)}

    def widths(self, backbone: "Backbone") -> dict[str, int]:
        return {"head.weight": backbone.feature_width}

    def build(self, backbone: "Backbone", tensors: "Mapping[str, Tensor]") -> "FusedHead":
        from lpt.model.heads import FusedHead

        return FusedHead(
            num_classes=self.num_classes,
            width=backbone.feature_width,
            joint_width=_width(backbone, self.space),
            project=backbone.project if self.space == "joint" else None,
            **self.fused.model_dump(),
        )


HeadSpec = CosineSpec | LinearSpec | NeighbourSpec | FusedSpec

_SPECS: tuple[type[_Spec], ...] = get_args(HeadSpec)
HEAD_RANKS = {name: rank for spec in _SPECS for name, rank in spec.ranks.items()}
"""Number of axes of every tensor that a head can have."""

_BY_KIND: TypeAdapter[HeadSpec] = TypeAdapter(Annotated[HeadSpec, Field(discriminator="kind")])


def head_spec(fields: Mapping[str, Any], tensors: ByName) -> HeadSpec:
    """The spec of a file's head. The kind is not stored: the header's `fused` and the names of tensors give it away.

    `fields` are the header's and `num_classes`.
    """
    if fields["fused"] is not None:
        kind = "fused"
    elif "head.bank" in tensors:
        kind = "neighbour"
    elif "head.bias" in tensors:
        kind = "linear"
    else:
        kind = "cosine"
    return _BY_KIND.validate_python({**fields, "kind": kind})


def head_problem(spec: HeadSpec, tensors: ByName) -> str | None:
    """What is wrong with a file's head: none or two of them, tensors of another kind, or sizes that do not agree."""
    if "head.weight" not in tensors and "head.bank" not in tensors:
        return "the tensor head.weight is missing"
    if "head.weight" in tensors and "head.bank" in tensors:
        return "it has two heads"
    if (spec.kind == "fused") != bool(FusedSpec.state.keys() & tensors.keys()):
        return "the header and the tensors do not agree on whether its head is a fused one"
    return spec.problem(tensors)


def head_fields(head: "Head") -> dict[str, Any]:
    """What the header of a prompt file says of `head`, besides its `scale`."""
    from lpt.model.heads import CosineHead, FusedHead, LinearHead, NeighbourHead

    specs: dict[type, type[_Spec]] = {CosineHead: CosineSpec, LinearHead: LinearSpec, NeighbourHead: NeighbourSpec}
    specs[FusedHead] = FusedSpec
    return next((spec.header_fields(head) for kind, spec in specs.items() if isinstance(head, kind)), {})


def _space(head: "CosineHead | FusedHead") -> Space:
    return "joint" if head.project else "features"


def _width(backbone: "Backbone", space: Space) -> int:
    return backbone.joint_width if space == "joint" else backbone.feature_width
