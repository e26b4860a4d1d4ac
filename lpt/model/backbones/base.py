"""What a frozen backbone must offer so that prompts can be put into it.

Shapes: images [B 3 H W], tokens [B P+N D] (P prefix tokens such as CLS, N patches), prompt [n D] or [B n D],
feature [B D'], joint [B J], the space that images and texts share.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from lpt.data.preprocess import Preprocess
from lpt.errors import BackboneError, did_you_mean, quoted
from lpt.files import read_tensors


class KeyValue(NamedTuple):
    """What a prompt is to a block: keys and values [1 heads n D/heads], or [B heads n D/heads] where it differs between
    images. Its queries are never needed."""

    key: Tensor
    value: Tensor


Prompt = Tensor | KeyValue


class Texts(Protocol):
    """What makes vectors of class names, in the joint space of images and texts."""

    def encode(
        self, classes: Sequence[str], templates: Sequence[str], device: torch.device
    ) -> Mapping[str, Tensor]: ...


class Backbone(nn.Module, ABC):
    """A frozen transformer in three steps: `embed`, `block` by `block`, `pool`.

    Frozen means no gradient, and eval mode whatever `train()` is called with: no dropout, no drop path.
    Subclasses set the attributes without a value in their constructor, and call `freeze` at its end.

    >>> import lpt, torch
    >>> backbone = lpt.load_backbone("nano")
    >>> tokens = backbone.embed(torch.zeros(2, 3, 32, 32))
    >>> for i in range(backbone.depth):
    ...     tokens = backbone.block(i, tokens)
    >>> tokens.shape, backbone.pool(tokens).shape
    (torch.Size([2, 65, 128]), torch.Size([2, 128]))
    """

    # What it is.
    name: str
    """As configs and prompt files call it: `nano`, or `<family>:<model>`."""
    fingerprint: str
    """Of its weights, by `fingerprint_of`, before position embeddings are resampled to another image size."""
    preprocess: Preprocess
    """From an image to the pixels that it was trained with; `preprocess.size` is the side of its images."""

    # Its sizes.
    depth: int
    """L, the number of blocks."""
    width: int
    """D, of tokens and prompts."""
    feature_width: int
    """D', of what `pool` returns."""
    prefix: int
    """P, the number of tokens before those of patches: CLS and registers."""
    reads: int | None
    """How many leading tokens `pool` reads: 1 where it reads CLS alone, None where it reads all."""
    norm_eps: float | None = None
    """The ε of its LayerNorms where `with_norm_eps` has given it another one than the model's own."""

    # The joint space of images and texts.
    projection: Tensor | None
    """From a feature to the joint space [D' J], a buffer; None where features are in it already."""
    prototypes: Mapping[str, Tensor] | None = None
    """Class name → vector [J] in the joint space, for example of a text; None until somebody gives or makes them."""
    texts: Texts | None = None
    """What makes prototypes when they are first asked for, unless somebody gives some; None without a text tower."""
    templates: tuple[str, ...] = ()
    """Of those texts."""
    encoded = False
    """Whether `prototypes` are of texts, and not given by somebody."""

    # Set by `lpt.model.adapters` in a copy of it.
    learned: frozenset[str] = frozenset()
    """Names of the parameters in it that are not frozen."""
    recipe: Mapping[str, Any] | None = None
    """The arguments that `with_adapter` made this copy with, to make it again; None where it is no copy."""
    compute: torch.dtype | None = None
    """The precision it computes in, where that of its parameters does not say so: learned ones are kept in fp32."""

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

        A prompt's own output is never computed: VPT-deep (Jia 2022) drops it after every block, so a prompt is only
        keys and values there. Several prompts may be given at once; their order makes no difference.
        Where `keep` is given, only the first `keep` tokens are computed and returned; the others still serve as keys
        and values.
        """

    @abstractmethod
    def keys_values(self, i: int, prompt: Tensor) -> KeyValue:
        """What block `i` makes of a prompt [n D] or [B n D]; it may be kept as long as the prompt does not change."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm and pooling. [B P+N D] (or only its first `reads` tokens) → feature [B D'] in fp32."""

    @property
    def joint_width(self) -> int:
        """J, of the joint space."""
        return self.feature_width if self.projection is None else self.projection.shape[1]

    def project(self, feature: Tensor) -> Tensor:
        """A feature in the joint space, in fp32. [B D'] → [B J]."""
        return feature if self.projection is None else feature.float() @ self.projection.float()

    def unproject(self, joint: Tensor) -> Tensor:
        """[C J] → [C D']: rows whose product with a feature is that of `joint` with the projected feature."""
        if self.projection is None:
            return joint
        return joint.to(self.projection.device, torch.float32) @ self.projection.float().T

    def class_prototypes(self, classes: Sequence[str]) -> Tensor:
        """The prototypes [C J] of `classes`, by name: case is ignored, and an underscore is a space. Those of texts are
        made where they are new.

        Raises BackboneError where there are none, where a class has none, and where they do not fit the joint space.
        """
        if self.texts is not None and (self.prototypes is None or self.encoded):
            known = dict(self.prototypes or {})
            new = [name for name in classes if name not in known]
            if new:
                known |= self.texts.encode(new, self.templates, next(self.parameters()).device)
            self.prototypes, self.encoded = known, True
        if self.prototypes is None:
            raise BackboneError(f"{self.name} has no class prototypes: set prototypes.weights to a safetensors file")
        known = {comparable(name): row for name, row in self.prototypes.items()}
        absent = [quoted(name, 60) for name in classes if comparable(name) not in known]
        if absent:
            raise BackboneError(
                f"the prototypes lack {len(absent)} of {len(classes)} classes: {', '.join(absent[:5])}"
                + quoted(did_you_mean(absent[0], self.prototypes), 99)
            )
        rows = torch.stack([known[comparable(name)] for name in classes])
        if rows.shape[1] != self.joint_width:
            raise BackboneError(
                f"prototypes of width {rows.shape[1]} do not fit features of {self.name}, {self.joint_width} wide"
            )
        return rows

    def compile_blocks(self) -> None:
        """From now on `block` may run through torch.compile; a backbone that cannot stays as it is."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision it computes in."""
        return self.compute or next(self.parameters()).dtype

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, whatever `mode` is."""
        return super().train(False)

    def freeze(self) -> Self:
        """No gradients, eval mode."""
        return self.requires_grad_(False).train()


def comparable(name: str) -> str:
    """A class name as it is compared: case is ignored, and an underscore is a space."""
    return name.replace("_", " ").lower()


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
        count = len(names) if isinstance(names, list) else "no"
        raise BackboneError(f"prototypes.weights {path}: {count} names for prototypes of shape {list(rows.shape)}")
    if not bool(torch.isfinite(rows).all()):
        raise BackboneError(f"prototypes.weights {path}: its prototypes hold numbers that are not finite")
    return {str(name): row for name, row in zip(names, rows, strict=True)}


Built = TypeVar("Built", bound=nn.Module)


def without_numbers(build: Callable[[], Built]) -> Built:
    """The module that `build` makes, for `fill`: nothing is drawn at random only to be overwritten."""
    with torch.device("meta"):
        module = build()
    stored = module.state_dict()
    tensors = (*module.named_parameters(), *module.named_buffers())
    # What is in no file is computed by the module itself, and lost on the meta device.
    return module if all(name in stored for name, _ in tensors) else build()


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies all of `tensors` into a module of `without_numbers`: the file that they are of may change later."""
    with_memory(module).load_state_dict(tensors)


def with_memory(module: Built) -> Built:
    """A module of `without_numbers` with memory for its tensors, whatever that holds."""
    for part in module.modules():
        # Not `to_empty`, which imports a library for symbols in the first place, for a third of a second.
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty(parameter.shape, dtype=parameter.dtype)
                part.register_parameter(name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                stored = name not in part._non_persistent_buffers_set
                part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=stored)
    return module


def with_norm_eps(backbone: Backbone, norm_eps: float | None) -> Backbone:
    """The same backbone with ε = `norm_eps` in all of its LayerNorms; None, or the one that they have, changes nothing.

    Another ε makes another function of the same weights, and so another fingerprint: LPT's code has 1e-5 where timm's
    ViTs have 1e-6. A text tower beside it keeps its own. Raises BackboneError where other norms than LayerNorms would
    keep theirs.
    """
    if norm_eps is None:
        return backbone
    norms = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)}
    others = [n for n, module in backbone.named_modules() if hasattr(module, "eps") and n not in norms]
    if others or not norms:
        what = f"{others[0]} is none" if others else "it has none"
        raise BackboneError(f"backbone.norm_eps is the ε of LayerNorms, {what} in {backbone.name}: leave it out")
    if all(norm.eps == norm_eps for norm in norms.values()):
        return backbone
    for norm in norms.values():
        norm.eps = norm_eps
    backbone.norm_eps = norm_eps
    digest = hashlib.sha256(f"{backbone.fingerprint} norm_eps {norm_eps!r}".encode())
    backbone.fingerprint = digest.hexdigest()[: len(backbone.fingerprint)]
    return backbone


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and fp32 values in order of name; 16 hex digits.

    The same weights give the same fingerprint, whichever file or device they come from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
