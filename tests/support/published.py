"""LPT as published, from its equations and the bare tensors of a ViT, in float64: no module of lpt or timm runs.

Its LayerNorms have the published ε, whatever our backbones have: `plain.py` runs our own blocks and cannot see theirs.
Shapes: images [B 3 S S], tokens [B N D], prompt [n D] or [B n D], logits [B C].
"""

import math

import torch
from torch import Tensor

EPS = 1e-5
"""ε of every LayerNorm of the published code (spec LPT, section 8); timm's ViTs have 1e-6."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def block(vit: dict[str, Tensor], i: int, x: Tensor, heads: int, eps: float) -> Tensor:
    def of(name: str) -> Tensor:
        return vit[f"blocks.{i}.{name}"]

    batch, n, width = x.shape
    normed = layer_norm(x, of("norm1.weight"), of("norm1.bias"), eps)
    q, k, v = (normed @ of("attn.qkv.weight").T + of("attn.qkv.bias")).chunk(3, dim=-1)
    q, k, v = (part.view(batch, n, heads, width // heads).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, n, width)
    x = x + mixed @ of("attn.proj.weight").T + of("attn.proj.bias")
    hidden = layer_norm(x, of("norm2.weight"), of("norm2.bias"), eps) @ of("mlp.fc1.weight").T + of("mlp.fc1.bias")
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + gelu @ of("mlp.fc2.weight").T + of("mlp.fc2.bias")


def feature(vit: dict[str, Tensor], images: Tensor, shared: Tensor, group: Tensor | None, heads: int, eps: float):
    """CLS after the last norm; `shared` [L n D], `group` [B L' n D] for the last L' blocks."""
    kernel = vit["patch_embed.proj.weight"]
    side = kernel.shape[-1]
    patches = images.unfold(2, side, side).unfold(3, side, side)  # [B 3 g g side side]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2) @ kernel.flatten(1).T
    cls = vit["cls_token"].expand(len(images), -1, -1)
    x = torch.cat([cls, patches + vit["patch_embed.proj.bias"]], dim=1) + vit["pos_embed"]
    first = len(shared) if group is None else len(shared) - group.shape[1]
    for i, prompt in enumerate(shared):
        tokens = [x, prompt.expand(len(x), -1, -1)]
        if group is not None and i >= first:
            tokens.append(group[:, i - first])
        x = block(vit, i, torch.cat(tokens, dim=1), heads, eps)[:, : x.shape[1]]
    return layer_norm(x, vit["norm.weight"], vit["norm.bias"], eps)[:, 0]


def published_logits(
    vit: dict[str, Tensor], learned: dict[str, Tensor], images: Tensor, *, heads: int, topk: int, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(cosine logits [B C], ids [B k]) of both passes; `learned` has the names of a prompt file's tensors."""
    vit, learned = ({k: v.double() for k, v in part.items()} for part in (vit, learned))
    images, shared = images.double(), learned["shared.tokens"]

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    query = feature(vit, images, shared, None, heads, eps) - learned["pool.centre"]
    ids = (unit(query) @ unit(learned["pool.keys"]).T).argsort(dim=1, descending=True, stable=True)[:, :topk]
    group = torch.stack([learned["pool.tokens"][row].mean(0) for row in ids])
    prompted = feature(vit, images, shared, group, heads, eps)
    return unit(prompted) @ unit(learned["head.weight"]).T, ids
