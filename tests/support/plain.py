"""LPT as published, slowly: prompts are concatenated to the tokens, whole timm blocks run, prompt outputs are dropped.

The oracle of the fast path. Shapes: tokens [B N D], prompt [n D] or [B n D], images [B 3 H W].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.model.backbones.eva_vit import EvaViT
from lpt.model.backbones.timm_vit import TimmViT
from lpt.model.classifier import Output, PromptedClassifier


def plain_block(
    backbone: TimmViT, i: int, tokens: Tensor, prompt: Tensor | None = None, *, angles: Tensor | None = None
) -> Tensor:
    """Block `i` of timm over [tokens ; prompt], without the prompt's own outputs.

    In a rotary ViT, whose `angles` are those of `angles_of`, the prompt is inserted behind the prefix, and the prefix
    of the block, which is not turned, is longer by it.
    """
    block = backbone.vit.blocks[i]
    if not isinstance(backbone, EvaViT):
        if prompt is None:
            return block(tokens)
        appended = torch.cat([tokens, prompt.expand(len(tokens), -1, -1)], dim=1)
        return block(appended)[:, : tokens.shape[1]]
    angles = angles_of(backbone) if angles is None else angles
    angles = angles[i] if backbone.vit.rope_mixed and angles is not None else angles
    if prompt is None:
        return block(tokens, rope=angles)
    prefix, length = backbone.prefix, prompt.shape[-2]
    inserted = torch.cat([tokens[:, :prefix], prompt.expand(len(tokens), -1, -1), tokens[:, prefix:]], dim=1)
    block.attn.num_prefix_tokens = prefix + length
    try:
        output = block(inserted, rope=angles)
    finally:
        block.attn.num_prefix_tokens = prefix
    return torch.cat([output[:, :prefix], output[:, prefix + length :]], dim=1)


def angles_of(backbone: TimmViT) -> Tensor | None:
    """What timm gives to the blocks of a rotary ViT; None for a plain one."""
    if not isinstance(backbone, EvaViT):
        return None
    vit, side = backbone.vit, backbone.preprocess.size
    patches = vit.patch_embed(
        torch.zeros(1, 3, side, side, dtype=backbone.dtype, device=vit.patch_embed.proj.weight.device)
    )
    return vit._pos_embed(patches)[1]


def plain_feature(model: PromptedClassifier, images: Tensor, group: Tensor | None = None) -> Tensor:
    """One full pass; `group` [B L n D] joins the shared prompt in the last L blocks."""
    backbone = model.backbone
    tokens, angles = backbone.embed(images), angles_of(backbone)
    first = backbone.depth if group is None else backbone.depth - group.shape[1]
    for i in range(backbone.depth):
        parts = [] if model.shared is None else [model.shared.tokens[i].expand(len(tokens), -1, -1)]
        if group is not None and i >= first:
            parts.append(group[:, i - first])
        tokens = plain_block(backbone, i, tokens, torch.cat(parts, dim=1) if parts else None, angles=angles)
    return backbone.pool(tokens)


def plain_forward(model: PromptedClassifier, images: Tensor) -> Output:
    """Two full passes as published: the query's with the shared prompt alone, then the one with group prompts."""
    if model.pool is None:
        feature = plain_feature(model, images)
        return Output(model.head(feature), feature)

    pool = model.pool
    with torch.no_grad():
        query = plain_feature(model, images) - pool.centre
    cosine = F.cosine_similarity(query[:, None], pool.keys[None], dim=2, eps=1e-12)
    ids = cosine.detach().sort(dim=1, descending=True, stable=True).indices[:, : pool.topk]
    group = torch.stack([torch.stack([pool.tokens[j] for j in row]).mean(0) for row in ids.tolist()])
    feature = plain_feature(model, images, group)
    return Output(model.head(feature), feature, cosine.gather(1, ids), ids)
