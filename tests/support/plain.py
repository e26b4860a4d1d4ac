"""LPT as published, slowly: prompts are concatenated to the tokens, whole timm blocks run, prompt outputs are dropped.

The oracle of the fast path. Shapes: tokens [B N D], prompt [n D] or [B n D], images [B 3 H W].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.model.backbones.timm_vit import TimmViT
from lpt.model.classifier import Output, PromptedClassifier


def plain_block(backbone: TimmViT, i: int, tokens: Tensor, prompt: Tensor | None = None) -> Tensor:
    """Block `i` of timm over [tokens ; prompt], without the prompt's own outputs."""
    if prompt is None:
        return backbone.vit.blocks[i](tokens)
    appended = torch.cat([tokens, prompt.expand(len(tokens), -1, -1)], dim=1)
    return backbone.vit.blocks[i](appended)[:, : tokens.shape[1]]


def plain_feature(model: PromptedClassifier, images: Tensor, group: Tensor | None = None) -> Tensor:
    """One full pass; `group` [B L n D] joins the shared prompt in the last L blocks."""
    backbone = model.backbone
    tokens = backbone.embed(images)
    first = backbone.depth if group is None else backbone.depth - group.shape[1]
    for i in range(backbone.depth):
        parts = [] if model.shared is None else [model.shared.tokens[i].expand(len(tokens), -1, -1)]
        if group is not None and i >= first:
            parts.append(group[:, i - first])
        tokens = plain_block(backbone, i, tokens, torch.cat(parts, dim=1) if parts else None)
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
