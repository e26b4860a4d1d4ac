"""Plain ViTs of timm as backbones: ViT, DeiT, DeiT-3, DINOv2, CLIP and SigLIP image towers.

Shapes: tokens [B P+N D], prompt [n D] or [B n D], keys and values [B heads n D/heads].
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.data.preprocess import Preprocess
from lpt.errors import BackboneError, did_you_mean, quoted
from lpt.files import read_tensors, why_not_downloaded
from lpt.model.backbones.base import Backbone, KeyValue, Prompt, fill, fingerprint_of, with_memory, without_numbers
from lpt.model.backbones.published import SERVED, module_of, nearest

SUPPORTED = (
    "plain and rotary ViTs of timm: vit_*, deit_*, deit3_*, vit_*_dinov2, vit_*_clip_*, vit_*_siglip_*, "
    "vit_*_radio_v3, vit_*_tipsv2, vit_*_dinov3, eva02_*, vit_pe_*, vit_*_rope_*"
)


class TimmViT(Backbone):
    """A frozen `timm.models.VisionTransformer`. Without prompts it is timm's own forward, bit for bit."""

    def __init__(self, vit: Any, *, name: str, preprocess: Preprocess, fingerprint: str):
        super().__init__()
        self.vit: Any = vit
        self.name, self.preprocess, self.fingerprint = name, preprocess, fingerprint
        self.depth, self.width, self.prefix = len(vit.blocks), vit.embed_dim, vit.num_prefix_tokens
        self.feature_width = vit.num_features
        self.reads = 1 if vit.global_pool == "token" else None
        self._block_with_prompts: Callable[..., Tensor] = _block_with_prompts
        self.freeze()

    @property
    def projections(self) -> tuple[str, ...]:
        """What makes queries, keys and values is called in each block's `attn`."""
        return ("qkv",)

    def take_mlp(self, i: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """(norm, MLP, layer scale) of block `i`, taken out: identities stand in their places."""
        block: Any = self.vit.blocks[i]
        taken = (block.norm2, block.mlp, block.ls2)
        block.norm2, block.mlp, block.ls2 = nn.Identity(), nn.Identity(), nn.Identity()
        return taken

    def embed(self, images: Tensor) -> Tensor:
        vit = self.vit
        tokens = vit._pos_embed(vit.patch_embed(images.to(self.dtype)))
        return vit.norm_pre(vit.patch_drop(tokens))

    def pool(self, tokens: Tensor) -> Tensor:
        vit = self.vit
        return vit.forward_head(vit.norm(tokens), pre_logits=True).float()

    def keys_values(self, i: int, prompt: Tensor) -> KeyValue:
        block: Any = self.vit.blocks[i]
        normed = block.norm1(prompt.to(self.dtype))
        normed = normed if normed.dim() == 3 else normed[None]
        key, value = _keys_values(block.attn, normed)
        return KeyValue(block.attn.k_norm(key), value)

    def block(
        self, i: int, tokens: Tensor, prompt: Prompt | Sequence[Prompt] = (), *, keep: int | None = None
    ) -> Tensor:
        block = self.vit.blocks[i]
        prompts = [prompt] if isinstance(prompt, Tensor | KeyValue) else list(prompt)
        if not prompts and keep is None:
            return block(tokens)
        # A prompt only answers: what its own queries, projection and MLP give would be thrown away.
        answers = [p if isinstance(p, KeyValue) else self.keys_values(i, p) for p in prompts]
        return self._block_with_prompts(block, tokens, answers, keep)

    def compile_blocks(self) -> None:
        """The same numbers up to rounding; the first steps wait for the compiler.

        Raises BackboneError on a CPU without a C++ compiler.
        """
        on_cpu = next(self.parameters()).device.type == "cpu"
        if on_cpu and not (os.environ.get("CXX") or shutil.which("g++")):
            raise BackboneError("train.compile needs a C++ compiler on a CPU: install g++, or set train.compile=false")
        # A function outside the class: all blocks of a model share its one compiled graph.
        self._block_with_prompts = torch.compile(self._block_with_prompts)


def _block_with_prompts(block: Any, tokens: Tensor, prompts: list[KeyValue], keep: int | None) -> Tensor:
    """A block of timm over `tokens`, which also attend to `prompts`. [B N D] → [B keep D].

    Every token gives a key and a value; only the first `keep` ask (all where it is None).
    """
    attn = block.attn
    normed, tokens = block.norm1(tokens), tokens[:, :keep]
    # Queries are projected alone: as a part of one tensor with keys and values they would keep those in memory, beside
    # the copies that `cat` makes.
    (query,) = split_heads(project(attn.qkv, normed[:, :keep], 0, 1), 1, attn)
    key, value = _keys_values(attn, normed)
    query, key = attn.q_norm(query), attn.k_norm(key)
    if prompts:
        batch = tokens.shape[0]  # not `len`, which would be a constant of an exported graph
        key = torch.cat([key, *(prompt.key.expand(batch, -1, -1, -1) for prompt in prompts)], dim=2)
        value = torch.cat([value, *(prompt.value.expand(batch, -1, -1, -1) for prompt in prompts)], dim=2)
    mixed = attend(query, key, value).transpose(1, 2).reshape(*tokens.shape[:2], attn.attn_dim)
    tokens = tokens + block.ls1(attn.proj(attn.norm(mixed)))
    return tokens + block.ls2(block.mlp(block.norm2(tokens)))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)V [B heads n d], by whichever exact form is faster where the tensors are."""
    # On CPUs torch's fused kernel loses to two matrix products in bf16 (6× at 60 tokens, 2× at 217, forward and
    # backward) and in fp32 at few tokens; the matrix that it avoids is small there.
    few = query.shape[2] * key.shape[2] <= 100 * 100
    if query.device.type == "cpu" and (query.dtype == torch.bfloat16 or few):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return torch.softmax(scores, dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def _keys_values(attn: Any, normed: Tensor) -> tuple[Tensor, ...]:
    """(key, value) [B heads n D/heads] of normed tokens [B n D], before timm's norm of keys."""
    return split_heads(project(attn.qkv, normed, 1, 3), 2, attn)


def project(qkv: Any, tokens: Tensor, first: int, last: int, *, bias: Tensor | None = None) -> Tensor:
    """The parts `first`..`last`-1 of (q, k, v) of a packed projection, with its low-rank update if it has one, of peft
    or of `lpt.model.adapters`.

    `bias` [3D] is one that stands beside the projection."""
    width = qkv.out_features // 3
    rows = slice(first * width, last * width)
    bias = qkv.bias if bias is None else bias
    packed = F.linear(tokens, qkv.weight[rows], None if bias is None else bias[rows])
    if hasattr(qkv, "update"):
        packed = packed + qkv.update(tokens, first, last)
    elif hasattr(qkv, "lora_A"):
        low_rank, weight = qkv.lora_A["default"](tokens), qkv.lora_B["default"].weight[..., rows, :]
        update = F.linear(low_rank, weight) if weight.dim() == 2 else low_rank @ weight.mT  # 3: each image has its own
        packed = packed + qkv.scaling["default"] * update
    return packed


def split_heads(packed: Tensor, parts: int, attn: Any) -> tuple[Tensor, ...]:
    """[B n parts·D] → `parts` tensors [B heads n D/heads]."""
    batch, n = packed.shape[:2]
    return packed.reshape(batch, n, parts, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def load(name: str, *, weights: Path | None = None, image_size: int | None = None) -> TimmViT:
    """The timm model `name`, its weights from a local safetensors file or from timm's hub by full tagged name.

    Raises BackboneError for unknown names, for families that are not supported, for a bare name that would be
    downloaded, and for weights of another architecture (every missing, unexpected and misshapen key named).
    """
    import timm

    architecture = name.partition(".")[0]
    _refuse_unknown(f"timm:{name}", architecture)
    refuse_unserved(f"timm:{name}", architecture)
    words: dict[str, Any] = {"weight_init": "skip"}
    if is_rotary(architecture):
        words = {}  # timm's Eva takes no such word
        with quiet("timm"), torch.device("meta"):  # of these the name does not say enough
            refuse_unserved_module(f"timm:{name}", timm.create_model(architecture, num_classes=0))
    if weights is None:
        _refuse_unpublished(name)
        with quiet("timm"), download_errors(f"timm:{name}", "timm"), torch.random.fork_rng(devices=[]):
            vit = timm.create_model(name, pretrained=True, num_classes=0, **words)
    else:
        with quiet("timm"):
            vit = empty(architecture, lambda: timm.create_model(architecture, num_classes=0, **words))
    refuse_unserved_module(f"timm:{name}", vit)
    if weights is not None:
        _load_weights(vit, weights, architecture)
    return _wrap(vit, f"timm:{name}", image_size)


def is_rotary(architecture: str) -> bool:
    """Whether it is one of timm's `Eva` models."""
    return module_of(architecture) == "eva"


def empty(architecture: str, build: Callable[[], Any]) -> Any:
    """The model that `build` makes of an architecture, with memory for what `fill` copies into it."""
    from lpt.model.backbones import eva_vit

    return eva_vit.without_numbers(build) if is_rotary(architecture) else with_memory(without_numbers(build))


def untrained(
    architecture: str, *, image_size: int | None = None, seed: int = 0, name: str | None = None, **changes: Any
) -> TimmViT:
    """Random weights from `seed`, for tests, plans and smoke runs; `changes` go to timm's constructor. It is called
    `untrained:ARCHITECTURE` unless `name` says otherwise.

    Raises BackboneError for unknown names, and for families that are not supported.
    """
    import timm

    name = name or f"untrained:{architecture}"
    _refuse_unknown(name, architecture)
    refuse_unserved(name, architecture.partition(".")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = timm.create_model(architecture, pretrained=False, num_classes=0, **changes)
    refuse_unserved_module(name, vit)
    return _wrap(vit, name, image_size)


def _wrap(vit: Any, name: str, image_size: int | None) -> TimmViT:
    from timm.data.config import resolve_model_data_config

    from lpt.model.backbones.eva_vit import EvaViT, is_eva

    config = resolve_model_data_config(vit)
    native, rotary = config["input_size"][-1], is_eva(vit)
    size = image_size or native
    fingerprint = fingerprint_of(vit.named_parameters())  # before positions are resampled to another size
    set_size(vit, size, name)
    preprocess = Preprocess(
        size=size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        crop_ratio=config["crop_pct"] if size == native else 1.0,
        square=rotary and config["crop_mode"] == "squash",  # of plain ViTs prompt files say otherwise
    )
    return (EvaViT if rotary else TimmViT)(vit, name=name, preprocess=preprocess, fingerprint=fingerprint)


def set_size(vit: Any, size: int, name: str) -> None:
    """Resamples the position embedding to images of `size` pixels. Raises BackboneError between two patches."""
    patch = vit.patch_embed.patch_size[0]
    if size < patch or size % patch:
        near = max(patch, round(size / patch) * patch)
        raise BackboneError(
            f"backbone.image_size {size} is not a multiple of the patch size {patch} of {name}: use {near}"
        )
    if vit.patch_embed.img_size != (size, size):
        vit.set_input_size((size, size))


def _refuse_unknown(name: str, architecture: str) -> None:
    import timm

    if not timm.is_model(architecture):
        raise BackboneError(
            f"backbone {name} is not a model of timm {timm.__version__}"
            + did_you_mean(architecture, timm.list_models("*vit*") + timm.list_models(["deit*", "eva*"]))
            + nearest(name.partition(":")[2])
        )


def _refuse_unpublished(name: str) -> None:
    """Before a download: does `name` have a tag, and does timm know weights of this tag?"""
    import timm

    architecture, _, tag = name.partition(".")
    published = [full for full in timm.list_pretrained(f"{architecture}.*") if full.startswith(architecture + ".")]
    if not tag:
        raise BackboneError(
            f"backbone timm:{name} is a bare name, whose weights change between timm versions: "
            f"give backbone.weights a local file, or a full tag ({', '.join(published[:6]) or 'none published'})"
        )
    if name not in published:
        hint = did_you_mean(name, published) or nearest(name)
        raise BackboneError(f"backbone timm:{name} has no published weights{hint}")


def refuse_unserved(name: str, architecture: str, supported: str = SUPPORTED) -> None:
    """Before any download: is this one of timm's plain or rotary ViTs at all?"""
    module = module_of(architecture)
    if module not in SERVED or "_distilled_" in architecture:
        raise BackboneError(f"backbone {name} (timm's {module}) cannot take prompts; {_instead(name, supported)}")


def _instead(name: str, supported: str) -> str:
    """What there is instead of a refused model, for the end of a sentence."""
    return f"supported: {supported}{nearest(name.partition(':')[2])}"


def refuse_unserved_module(name: str, vit: Any, supported: str = SUPPORTED) -> None:
    """Once it is built: are all its blocks those that `TimmViT.block` or `EvaViT.block` runs?"""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    from lpt.model.backbones.eva_vit import is_eva, unserved_part

    if is_eva(vit):
        if part := unserved_part(vit):
            raise BackboneError(f"backbone {name} ({part}) cannot take prompts; {_instead(name, supported)}")
        return
    # Exact types: a subclass may compute something else in its forward.
    if type(vit) is not VisionTransformer:
        raise BackboneError(f"backbone {name} ({type(vit).__name__}) cannot take prompts; {_instead(name, supported)}")
    for block in vit.blocks:
        if type(block) is not Block or type(block.attn) is not Attention or block.attn.gate is not None:
            kind = type(vit.blocks[0]).__name__
            raise BackboneError(f"backbone {name} ({kind}) cannot take prompts; {_instead(name, supported)}")


def _load_weights(vit: nn.Module, path: Path, architecture: str) -> None:
    from lpt.model.backbones.eva_vit import of_file

    tensors = {}
    stored = read_weights(path)
    for name, value in (of_file(stored) if is_rotary(architecture) else stored).items():
        # The head of another label set is no part of a backbone; every other key must fit exactly.
        if not name.startswith(("head.", "head_dist.")):
            tensors[name] = value.float()
    check_fit(vit.state_dict(), tensors, path, architecture)
    fill(vit, tensors)


def check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path, architecture: str) -> None:
    """Raises BackboneError unless `given` has the names and shapes of `wanted`; every key that has not is named."""
    misshapen = []
    for name in sorted(wanted.keys() & given.keys()):
        in_file, in_model = tuple(given[name].shape), tuple(wanted[name].shape)
        if in_file != in_model:
            misshapen.append(f"{name} (file {in_file}, model {in_model})")
    complaints = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": misshapen,
    }
    parts = [f"{complaint}: {', '.join(names)}" for complaint, names in complaints.items() if names]
    if parts:
        raise BackboneError(f"backbone.weights {path} does not fit {architecture}: {quoted('; '.join(parts), 10_000)}")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """All tensors of a safetensors file. Raises BackboneError where there is none, for pickled checkpoints too, and
    for numbers that are not finite."""
    if not path.is_file():
        raise BackboneError(f"backbone.weights {path} does not exist: give a local .safetensors file")
    try:
        _, tensors = read_tensors(path)
    except ValueError as error:
        raise BackboneError(
            f"backbone.weights {path} is not a safetensors file ({error}): convert it first, a checkpoint of PyTorch "
            "for example with torch.load(FILE, weights_only=True) and safetensors.torch.save_file"
        ) from None
    for name, value in tensors.items():
        if not bool(torch.isfinite(value.float()).all()):
            raise BackboneError(f"backbone.weights {path}: {quoted(name)} holds numbers that are not finite")
    return tensors


@contextlib.contextmanager
def download_errors(name: str, library: str) -> Iterator[None]:
    """What goes wrong while `library`'s weights are downloaded becomes a BackboneError."""
    try:
        with quiet("huggingface_hub"):
            yield
    except (OSError, RuntimeError) as error:
        raise BackboneError(
            f"backbone {name} could not be downloaded ({why_not_downloaded(error)}): download it once where "
            f"there is a connection, give backbone.weights a local safetensors file with {library}'s key names, or use "
            "backbone.name=nano"
        ) from error


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Without what a library logs while it loads: the first lines of a run are to be ours."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
