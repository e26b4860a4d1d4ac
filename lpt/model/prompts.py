"""Learned tokens: the prompt that all images share, and the pool of group prompts that each image chooses from.

Shapes: deep prompt [L n D], shallow prompt [1 n D], pool [K L n D], keys [K D'].
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lpt.errors import LptError


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
        return torch.cat([tokens, self.tokens.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)

    def removed(self, tokens: Tensor) -> Tensor:
        """The inverse of `appended`. [B N+n D] → [B N D]."""
        length = self.tokens.shape[1]
        # The last block may have computed the leading tokens only: then the prompt is gone already.
        return tokens if tokens.shape[1] <= length else tokens[:, :-length]


class PromptPool(nn.Module):
    """`size` group prompts for the last blocks, each found by its key (Dong 2023, LPT).

    `.tokens` [K L n D] are for blocks `prefix_blocks`..depth-1; `.keys` [K D'] are in the space of queries;
    `.centre` [D'] is subtracted from every query (zero unless queries are centered). Raises LptError for a
    `prefix_blocks` that leaves no block, and for a `topk` that the pool does not hold.
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
    ) -> None:
        super().__init__()
        if not 0 <= prefix_blocks < depth:
            raise LptError(
                f"method.prefix_blocks {prefix_blocks} leaves no block for the group prompts: "
                f"this backbone has {depth} blocks, use 0 to {depth - 1}"
            )
        if not 1 <= topk <= size:
            raise LptError(f"method.topk {topk} does not fit a pool of {size} group prompts: use 1 to {size}")
        self.topk, self.prefix_blocks = topk, prefix_blocks
        self.tokens = _truncated_normal(size, depth - prefix_blocks, length, width, generator=generator)
        self.keys = _truncated_normal(size, key_width, generator=generator)
        # Prompt files and checkpoints store `pool.centre`: the name of the tensor stays as it is spelled there.
        self.register_buffer("centre", torch.zeros(key_width))
        self.centre: Tensor

    def ensemble(self, ids: Tensor) -> Tensor:
        """The unweighted mean of the chosen prompts. ids [B k] → [B L n D]."""
        # A product with a [B K] matrix of 1/k: on CPUs its backward is far cheaper than that of an index.
        shares = torch.zeros(len(ids), len(self.tokens), dtype=self.tokens.dtype, device=ids.device)
        shares.scatter_(1, ids, 1 / ids.shape[1])
        return (shares @ self.tokens.flatten(1)).unflatten(1, self.tokens.shape[1:])
