"""Learned tokens: the prompt that all images share, and the pool of group prompts that each image chooses from.

Shapes: tokens [B P+N D], deep prompt [L n D], shallow prompt [1 n D], pool [K L n D], keys [K D'].
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.errors import LptError
from lpt.terms import QueryMode


def _truncated_normal(*shape: int, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02, generator=generator))


PromptInit = Literal["normal", "uniform"]
"""Truncated normal with std 0.02, or uniform as VPT's and LIFT's code has it."""


@torch.no_grad()
def start_uniform(prompt: "DeepPrompt | ShallowPrompt", patch: int, generator: torch.Generator | None = None) -> None:
    """U(-b, b) with b = √(6 / (3 p² + D)), p the `patch` size (Jia 2022, as LIFT has it, Shi 2024)."""
    bound = math.sqrt(6 / (3 * patch**2 + prompt.tokens.shape[-1]))
    prompt.tokens.uniform_(-bound, bound, generator=generator)


class DeepPrompt(nn.Module):
    """`length` tokens for each of `layers` blocks (Jia 2022, VPT-deep). `.tokens` is [L n D].

    Block i sees `tokens[i]`, without position, projection or dropout. Start: truncated normal, std 0.02.
    """

    def __init__(self, *, layers: int, length: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.tokens = _truncated_normal(layers, length, width, generator=generator)


class ShallowPrompt(nn.Module):
    """`length` tokens that enter the first block and go through all of them (Jia 2022, VPT-shallow). `.tokens` is
    [1 n D]. Start: truncated normal, std 0.02."""

    def __init__(self, *, length: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.tokens = _truncated_normal(1, length, width, generator=generator)

    def appended(self, tokens: Tensor) -> Tensor:
        """[B N D] → [B N+n D]. The prompt comes last; attention has no order, so its place makes no difference."""
        return torch.cat([tokens, self.tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=1)

    def removed(self, tokens: Tensor) -> Tensor:
        """The inverse of `appended`. [B N+n D] → [B N D]."""
        length = self.tokens.shape[1]
        # The last block may have computed the leading tokens only: then the prompt is gone already.
        return tokens if tokens.shape[1] <= length else tokens[:, :-length]


class PromptPool(nn.Module):
    """`size` group prompts for the last blocks, each found by its key (Dong 2023, LPT).

    `.tokens` [K L n D] are for blocks `prefix_blocks`..depth-1; `.keys` [K D'] are in the space of queries;
    `.centre` [D'] is subtracted from every query (zero unless queries are centered). With `query` early `.query_map`
    [D' S+1] makes the query of `summarized` tokens, its last column being added (ours, not LPT's); with none the pool
    holds no more than the `topk` prompts that every image gets. Raises LptError for a `prefix_blocks` that leaves no
    block, and for a `topk` that the pool does not hold.
    """

    def __init__(
        self,
        *,
        size: int,
        topk: int,
        prefix_blocks: int,
        depth: int,
        length: int,
        width: int,
        key_width: int,
        generator: torch.Generator | None = None,
        query: QueryMode = "full",
        summary_width: int = 0,
    ) -> None:
        """`summary_width` is S, of `summarized` tokens; it matters where `query` is early."""
        super().__init__()
        assert query != "none" or size == topk, (size, topk)
        if not 0 <= prefix_blocks < depth:
            raise LptError(
                f"method.prefix_blocks {prefix_blocks} leaves no block for the group prompts: "
                f"this backbone has {depth} blocks, use 0 to {depth - 1}"
            )
        if not 1 <= topk <= size:
            raise LptError(f"method.topk {topk} does not fit a pool of {size} group prompts: use 1 to {size}")
        self.topk, self.prefix_blocks = topk, prefix_blocks
        self.query: QueryMode = query
        self.tokens = _truncated_normal(size, depth - prefix_blocks, length, width, generator=generator)
        self.keys = _truncated_normal(size, key_width, generator=generator)
        # Prompt files and checkpoints store `pool.centre`: the name of the tensor stays as it is spelled there.
        self.register_buffer("centre", torch.zeros(key_width))
        self.centre: Tensor
        self.query_map: Tensor | None
        self.register_buffer("query_map", torch.zeros(key_width, summary_width + 1) if query == "early" else None)

    def early_query(self, tokens: Tensor, prefix: int) -> Tensor:
        """The query [B D'] from the tokens that the first block with group prompts gets."""
        assert self.query_map is not None
        return mapped(tokens, self.query_map, prefix)

    def fixed(self) -> Tensor:
        """The mean of all prompts, which is every image's where there is no query. [1 L n D]"""
        return self.ensemble(torch.arange(len(self.tokens), device=self.tokens.device)[None])

    def ensemble(self, ids: Tensor) -> Tensor:
        """The unweighted mean of the chosen prompts. ids [B k] → [B L n D]."""
        # A product with a [B K] matrix of 1/k: on CPUs its backward is far cheaper than that of an index.
        shares = torch.zeros(ids.shape[0], len(self.tokens), dtype=self.tokens.dtype, device=ids.device)
        shares.scatter_(1, ids, 1 / ids.shape[1])
        return (shares @ self.tokens.flatten(1)).unflatten(1, self.tokens.shape[1:])


def summarized(tokens: Tensor, prefix: int) -> Tensor:
    """What an early query is made of, in fp32: CLS, if it is there before the patches (`prefix` counts the tokens that
    are), and the mean of the patches. [B P+N D] → [B 2D], or [B D] without CLS."""
    patches = tokens[:, prefix:].float().mean(1)
    return torch.cat([tokens[:, 0].float(), patches], dim=1) if prefix else patches


def mapped(tokens: Tensor, query_map: Tensor, prefix: int) -> Tensor:
    """The query [B D'] that `query_map` [D' S+1] makes of `summarized` tokens; its last column is added."""
    return F.linear(summarized(tokens, prefix), query_map[:, :-1], query_map[:, -1])


def summary_width(width: int, prefix: int) -> int:
    """Of `summarized` tokens of this width."""
    return 2 * width if prefix else width
