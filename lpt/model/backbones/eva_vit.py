"""Rotary ViTs of timm as backbones: DINOv3, EVA-02, Perception Encoder, RoPE-ViT.

Shapes: tokens [B P+N D], queries, keys and values [B heads n d], angles as timm has them, their sines and cosines
[N 2d], or [heads N 2d] where each head has its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.data.preprocess import Preprocess
from lpt.model.backbones.base import KeyValue, Prompt, with_memory
from lpt.model.backbones.timm_vit import TimmViT, attend, project, split_heads
from lpt.model.kept import Kept


class Rotation(NamedTuple):
    """How queries and keys of the tokens are turned: x cos + swapped(x) sin, with the sign of the swap in `sin`.

    Pairs that turn together are the two halves of a head where `half`, or else neighbours (Su 2021, RoPE, in the two
    layouts of timm). `sin` and `cos` are [P+N d] or [heads P+N d]; the prefix is turned by nothing, exactly.
    """

    sin: Tensor
    cos: Tensor
    half: bool


class EvaViT(TimmViT):
    """A frozen `timm.models.eva.Eva`. Without prompts it is timm's own forward, bit for bit.

    A prompt has no place in the image: its keys are not turned, as those of CLS and registers are not. So it makes no
    difference whether it stands behind the prefix, or behind the patches, where a shallow prompt is.
    """

    def __init__(self, vit: Any, *, name: str, preprocess: Preprocess, fingerprint: str) -> None:
        super().__init__(vit, name=name, preprocess=preprocess, fingerprint=fingerprint)
        self._block_with_prompts = _block_with_prompts
        # Angles of each block as timm gives them, and the same as rotations.
        self._turns = Kept[tuple[list[Tensor], list[Rotation]]]()

    @property
    def projections(self) -> tuple[str, ...]:
        return ("qkv",) if self.vit.blocks[0].attn.qkv is not None else ("q_proj", "k_proj", "v_proj")

    def take_mlp(self, i: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        block: Any = self.vit.blocks[i]
        scale = nn.Identity() if block.gamma_2 is None else LayerScale(block.gamma_2)
        taken = (block.norm2, block.mlp, scale)
        block.norm2, block.mlp, block.gamma_2 = nn.Identity(), nn.Identity(), None
        return taken

    def embed(self, images: Tensor) -> Tensor:
        vit = self.vit
        assert tuple(images.shape[-2:]) == vit.patch_embed.img_size, (images.shape, vit.patch_embed.img_size)
        tokens, _ = vit._pos_embed(vit.patch_embed(images.to(self.dtype)))
        return vit.norm_pre(tokens)

    def keys_values(self, i: int, prompt: Tensor) -> KeyValue:
        block: Any = self.vit.blocks[i]
        normed = block.norm1(prompt.to(self.dtype))
        key, value = _keys_values(block.attn, normed if normed.dim() == 3 else normed[None])
        return KeyValue(block.attn.k_norm(key), value)

    def block(
        self, i: int, tokens: Tensor, prompt: Prompt | Sequence[Prompt] = (), *, keep: int | None = None
    ) -> Tensor:
        block: Any = self.vit.blocks[i]
        prompts = [prompt] if isinstance(prompt, Tensor | KeyValue) else list(prompt)
        angles, rotation = self._turn(i)
        bare = tokens.shape[1] == self.prefix + self.vit.patch_embed.num_patches  # no shallow prompt behind them
        if not prompts and keep is None and bare and not _loses_update(block.attn):
            return block(tokens, rope=angles)
        answers = [p if isinstance(p, KeyValue) else self.keys_values(i, p) for p in prompts]
        return self._block_with_prompts(block, tokens, rotation, answers, keep)

    def _turn(self, i: int) -> tuple[Tensor | None, Rotation | None]:
        """Block `i`'s angles as timm has them, and as a rotation; computed once, unless their frequencies are
        trainable."""
        rope, mixed = self.vit.rope, self.vit.rope_mixed
        if rope is None:
            return None, None
        half: bool = self.vit.blocks[0].attn.rotate_half
        trains = mixed and rope.freqs.requires_grad and torch.is_grad_enabled()
        if trains or (mixed and torch.compiler.is_compiling()):
            angles = _mixed(rope, i, self.vit.patch_embed.grid_size)
            return angles, _rotation(angles, self.prefix, half=half)

        @torch.no_grad()
        def turns() -> tuple[list[Tensor], list[Rotation]]:
            made = self._angles()
            return made, [_rotation(angles, self.prefix, half=half) for angles in made]

        angles, rotations = self._turns.of((*rope.parameters(), *rope.buffers()), turns)
        return angles[i if mixed else 0], rotations[i if mixed else 0]

    def _angles(self) -> list[Tensor]:
        """As in timm's `Eva._pos_embed`: one for all blocks, or one for each."""
        vit = self.vit
        made = vit.rope.get_embed(shape=vit.patch_embed.grid_size) if vit.dynamic_img_size else vit.rope.get_embed()
        return list(made.unbind(0)) if vit.rope_mixed else [made]


class LayerScale(nn.Module):
    """A scale for each channel of a block's update, as a module: timm's rotary blocks hold the bare vector [D]."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, update: Tensor) -> Tensor:
        return self.gamma * update


def _block_with_prompts(
    block: Any, tokens: Tensor, rotation: Rotation | None, prompts: list[KeyValue], keep: int | None
) -> Tensor:
    """A block of timm over `tokens`, which also attend to `prompts`. [B P+N D], and what else is behind → [B keep D].

    Every token gives a key and a value; only the first `keep` ask (all where it is None).
    """
    attn = block.attn
    normed, tokens = block.norm1(tokens), tokens[:, :keep]
    asking, batch = normed[:, :keep], tokens.shape[0]
    query = _turned(attn.q_norm(_queries(attn, asking)), rotation)
    key, value = _keys_values(attn, normed)
    key = _turned(attn.k_norm(key), rotation)
    if prompts:
        key = torch.cat([key, *(prompt.key.expand(batch, -1, -1, -1) for prompt in prompts)], dim=2)
        value = torch.cat([value, *(prompt.value.expand(batch, -1, -1, -1) for prompt in prompts)], dim=2)
    mixed = attend(query, key, value)
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        mixed = mixed * attn.gate(asking).sigmoid()
    tokens = tokens + _scaled(attn.proj(mixed), block.gamma_1)
    return tokens + _scaled(block.mlp(block.norm2(tokens)), block.gamma_2)


def _scaled(update: Tensor, gamma: Tensor | None) -> Tensor:
    return update if gamma is None else gamma * update


def _turned(heads: Tensor, rotation: Rotation | None) -> Tensor:
    """Queries or keys of tokens [B heads n d]. What is behind the patches has no place in the image, and stays."""
    if rotation is None:
        return heads
    rows = rotation.cos.shape[-2]
    if heads.shape[2] > rows:
        return torch.cat([_turned(heads[:, :, :rows], rotation), heads[:, :, rows:]], dim=2)
    sin, cos = (part[..., : heads.shape[2], :] for part in rotation[:2])
    if rotation.half:
        swapped = heads.roll(heads.shape[-1] // 2, -1)
    else:
        swapped = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    # In the rotation's precision, which may be a higher one, and back: as in timm.
    return torch.addcmul(heads * cos, swapped, sin).to(heads.dtype)


def _rotation(angles: Tensor, prefix: int, *, half: bool) -> Rotation:
    """timm's sines and cosines side by side [... N 2d] as a rotation of `prefix` + N tokens."""
    sin, cos = angles.chunk(2, -1)
    sign = torch.ones(sin.shape[-1], dtype=sin.dtype, device=sin.device)
    sign[slice(len(sign) // 2) if half else slice(0, None, 2)] = -1
    return Rotation(F.pad(sin * sign, (0, 0, prefix, 0)), F.pad(cos, (0, 0, prefix, 0), value=1.0), half)


def _mixed(rope: Any, i: int, grid: tuple[int, int]) -> Tensor:
    """Block `i`'s angles [heads N 2d] of trainable frequencies."""
    from timm.layers.pos_embed_sincos import get_mixed_freqs, get_mixed_grid

    x, y = rope.t_x, rope.t_y
    if x is None:
        x, y = get_mixed_grid(list(grid), grid_indexing=rope.grid_indexing, device=rope.freqs.device)
    return get_mixed_freqs(rope.freqs[:, i], x, y)


def _queries(attn: Any, normed: Tensor) -> Tensor:
    projected = attn.q_proj(normed) if attn.qkv is None else project(attn.qkv, normed, 0, 1, bias=_bias(attn))
    return split_heads(projected, 1, attn)[0]


def _keys_values(attn: Any, normed: Tensor) -> tuple[Tensor, ...]:
    """(key, value) [B heads n d] of normed tokens [B n D], before timm's norm of keys."""
    if attn.qkv is None:
        return (*split_heads(attn.k_proj(normed), 1, attn), *split_heads(attn.v_proj(normed), 1, attn))
    return split_heads(project(attn.qkv, normed, 1, 3, bias=_bias(attn)), 2, attn)


def _bias(attn: Any) -> Tensor | None:
    """[3D] of a packed projection, where it is in parts beside it: keys have none."""
    from timm.models.eva import EvaAttention

    has_parts = type(attn) is EvaAttention and attn.q_bias is not None
    parts: Any = attn
    return torch.cat((parts.q_bias, parts.k_bias, parts.v_bias)) if has_parts else None


def _loses_update(attn: Any) -> bool:
    """Whether timm's own forward would read the packed matrix past peft's low-rank update of it."""
    return attn.qkv is not None and hasattr(attn.qkv, "lora_A") and _bias(attn) is not None


def is_eva(vit: Any) -> bool:
    """Whether it is timm's class of rotary ViTs."""
    from timm.models.eva import Eva

    return type(vit) is Eva  # a subclass may compute something else in its forward


def unserved_part(vit: Any) -> str | None:
    """What of an `Eva` is not supported, in a few words; None where all of it is."""
    from timm.layers.attention import AttentionRope
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
    from timm.models.eva import EvaAttention, EvaBlock

    if len({*vit.patch_embed.img_size}) > 1:
        return "images that are not square"
    # Exact types: a subclass may compute something else in its forward.
    if type(vit.rope) not in (type(None), RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed):
        return type(vit.rope).__name__
    for block in vit.blocks:
        if type(block) is not EvaBlock:
            return type(block).__name__
        if type(block.attn) not in (EvaAttention, AttentionRope):
            return type(block.attn).__name__
        if type(block.attn) is AttentionRope and block.attn.num_kv_groups > 1:
            return "keys that several heads share"
    return None


def without_numbers(build: Callable[[], Any]) -> Any:
    """The `Eva` that `build` makes, for `fill`: nothing is drawn at random only to be overwritten, and what is in no
    file is computed."""
    with torch.device("meta"):
        vit = build()
    for part in with_memory(vit).modules():
        if hasattr(part, "init_non_persistent_buffers"):  # timm's, of biases that are zero, and of angles
            part.init_non_persistent_buffers()
    return vit


def of_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that are of the backbone, by their names in it: without angles, which are computed, and
    what was there for masked patches only, as timm's own filter has it.

    A final norm that was trained with masked patches is the one behind the average now.
    """
    kept = {}
    masked = "mask_token" in tensors
    for name, value in tensors.items():
        if name.startswith(("mask_token", "lm_head.")) or (name.startswith("rope.") and name != "rope.freqs"):
            continue
        kept[f"fc_{name}" if masked and name.startswith("norm.") else name] = value
    return kept
