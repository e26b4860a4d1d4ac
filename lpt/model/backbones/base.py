"""The seam: what a frozen backbone must offer so that prompts can be put into it.

Shapes: images [B 3 H W], tokens [B P+N D] (P prefix tokens, N patches), prompt [n D] or [B n D],
feature [B D'], joint [B J], the space that image and text share.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lpt.data.preprocess import Preprocess
from lpt.errors import BackboneError, did_you_mean, quoted
from lpt.files import read_tensors


class KeyValue(NamedTuple):
    """What a prompt is to a block: keys and values [1|B heads n D/heads]. Its queries are never needed."""

    key: Tensor
    value: Tensor


Prompt = Tensor | KeyValue


class Backbone(nn.Module, ABC):
    """A frozen transformer in three steps: `embed`, `block` by `block`, `pool`.

    Frozen means no gradient, and eval mode whatever `train()` is called with: no dropout, no drop path.
    """

    name: str
    depth: int
    width: int
    feature_width: int
    prefix: int
    preprocess: Preprocess
    fingerprint: str
    reads: int | None
    """How many leading tokens `pool` reads: 1 where it reads CLS alone, None where it reads all."""
    learned: frozenset[str] = frozenset()
    """Names of the parameters in it that are not frozen: none, unless `lpt.model.adapters` made this copy."""
    recipe: Mapping[str, Any] | None = None
    """The arguments that `lpt.model.adapters.with_adapter` made this copy with, to make it again."""
    compute: torch.dtype | None = None
    """Its precision where that is not the one of all its parameters, since learned ones are kept in fp32."""
    projection: Tensor | None
    """What takes a feature to the joint space [D' J], a buffer; None where that is the space of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", None)

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Patches, prefix tokens and positions. [B 3 H W] → [B P+N D]."""

    @abstractmethod
    def block(
        self, i: int, tokens: Tensor, prompt: Prompt | Sequence[Prompt] = (), *, keep: int | None = None
    ) -> Tensor:
        """Block `i` over `tokens`, which also attend to `prompt`; [B P+N D] → [B P+N D].

        A prompt's own output is never computed: VPT-deep drops it after every block, so a prompt is only
        keys and values there. Several prompts may be given at once; their order makes no difference.
        `keep` computes (and returns) the first `keep` tokens only; the others still serve as keys and values.
        """

    @abstractmethod
    def keys_values(self, i: int, prompt: Tensor) -> KeyValue:
        """What `block` makes of a prompt [n D] or [B n D]; a constant that may be kept while the prompt is."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm and pooling. [B P+N D] (or only its first `reads` tokens) → feature [B D'] in fp32."""

    @property
    def joint_width(self) -> int:
        return self.feature_width if self.projection is None else self.projection.shape[1]

    def project(self, feature: Tensor) -> Tensor:
        """[B D'] → joint [B J], in fp32."""
        return feature if self.projection is None else feature.float() @ self.projection.float()

    def unproject(self, joint: Tensor) -> Tensor:
        """Joint [C J] → [C D']: rows whose product with a feature is that of `joint` with the projected feature."""
        if self.projection is None:
            return joint
        return joint.to(self.projection.device, torch.float32) @ self.projection.float().T

    prototypes: Mapping[str, Tensor] | None = None
    """A vector [J] for every class name that is known in the joint space, for example of texts."""

    def class_prototypes(self, classes: Sequence[str]) -> Tensor:
        """[C J], matched by name (spaces and underscores are the same). Raises BackboneError."""
        if self.prototypes is None:
            raise BackboneError(f"{self.name} has no class prototypes: set prototypes.weights to a safetensors file")
        known = {name.replace("_", " ").lower(): row for name, row in self.prototypes.items()}
        names = [name.replace("_", " ").lower() for name in classes]
        if absent := [quoted(name, 60) for name, key in zip(classes, names, strict=True) if key not in known]:
            raise BackboneError(
                f"the prototypes lack {len(absent)} of {len(classes)} classes: {', '.join(absent[:5])}"
                + quoted(did_you_mean(absent[0], self.prototypes), 99)
            )
        found = torch.stack([known[key] for key in names])
        if found.shape[1] != self.joint_width:
            wide = self.joint_width
            raise BackboneError(f"prototypes of width {found.shape[1]} do not fit features of {self.name}, {wide} wide")
        return found

    def compile_blocks(self) -> None:
        """From now on `block` may run through torch.compile; a backbone that cannot stays as it is."""

    @property
    def dtype(self) -> torch.dtype:
        return self.compute or next(self.parameters()).dtype

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: frozen is frozen."""
        return super().train(False)

    def freeze(self) -> Self:
        return self.requires_grad_(False).train()


def read_prototypes(path: Path) -> dict[str, Tensor]:
    """Class name → vector [J], from a safetensors file with `prototypes` [C J] and the names as a JSON list under
    `classes` in its metadata. Raises BackboneError."""
    if not path.is_file():
        raise BackboneError(f"prototypes.weights {path} does not exist")
    try:
        metadata, tensors = read_tensors(path)
        names, rows = json.loads(metadata["classes"]), tensors["prototypes"].float()
    except (KeyError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"prototypes.weights {path} is no file of prototypes ({quoted(error)}): it needs a tensor `prototypes` and "
            "the class names as a JSON list under `classes` in its metadata"
        ) from None
    if not isinstance(names, list) or rows.dim() != 2 or len(names) != len(rows):
        number = len(names) if isinstance(names, list) else "no"
        raise BackboneError(f"prototypes.weights {path}: {number} names for prototypes of shape {list(rows.shape)}")
    if not bool(torch.isfinite(rows).all()):
        raise BackboneError(f"prototypes.weights {path}: its prototypes hold numbers that are not finite")
    return {str(name): row for name, row in zip(names, rows, strict=True)}


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and fp32 values in order of name; 16 hex digits.

    The same weights give the same fingerprint whatever file, precision of storage ≤ fp32 or device they
    came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
