"""Trainable parameters inside a backbone: a copy of it with adapters put in, or with some of its own tensors thawed.

The copy is a backbone as any other; `learned` names what is not frozen in it, all of it in fp32. Everything else keeps
its bits. Shapes: tokens [B N D].
"""

import copy
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.errors import require
from lpt.model.backbones.base import Backbone
from lpt.terms import AdapterKind as Kind

KINDS = {
    "bias": "every bias of the backbone (Zaken 2022, BitFit)",
    "norm": "every LayerNorm's weight and bias",
    "adaptformer": "a bottleneck beside every MLP (Chen 2022, in the form of LIFT, Shi 2024)",
    "lora": "a low-rank update of what makes queries, keys and values (Hu 2022), through peft",
    "lora_qv": "a low-rank update of q and one of v in every block (Hu 2022, in the form of LIFT, Shi 2024)",
    "full": "the whole backbone: its prompt file is as large as a model",
}


def with_adapter(backbone: Backbone, kind: Kind, *, bottleneck: int = 4, rank: int = 8, seed: int = 0) -> Backbone:
    """A copy of a timm backbone in which `kind` is trainable; it still gives the same features.

    `bottleneck` is AdaptFormer's width, `rank` LoRA's: of `lora` with α = 2 `rank` as is usual, of `lora_qv` scaled by
    1 / `rank`. `seed` draws the start.
    """
    compute_dtype = backbone.dtype  # before learned parameters become fp32
    adapted = copy.deepcopy(backbone)
    if kind == "adaptformer":
        _add_adaptformers(adapted, bottleneck, seed)
    elif kind == "lora":
        _add_lora(adapted, rank, seed)
    elif kind == "lora_qv":
        generator = torch.Generator().manual_seed(seed)
        for block in adapted.vit.blocks:  # type: ignore[union-attr]
            _add_query_value_lora(block.attn, rank, generator)
    learned = _learned_names(adapted, kind)
    _freeze_all_but(adapted, learned)
    adapted.learned, adapted.compute = frozenset(learned), compute_dtype
    adapted.recipe = {"kind": kind, "bottleneck": bottleneck, "rank": rank}
    return adapted.train().to(next(backbone.parameters()).device)


def _add_adaptformers(backbone: Any, bottleneck: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, block in enumerate(backbone.vit.blocks):
        adapter = AdaptFormer(backbone.width, bottleneck, generator)
        norm, mlp, scale = backbone.take_mlp(i)
        block.mlp = Parallel(norm, mlp, scale, adapter)


def _add_lora(backbone: Any, rank: int, seed: int) -> None:
    require("peft", extra="lora", gives="LoRA (method.tuning=lora)")
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # peft draws from the global state
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*backbone.projections]), backbone.vit
        )


def _add_query_value_lora(attn: Any, rank: int, generator: torch.Generator) -> None:
    if attn.qkv is not None:
        attn.qkv = QueryValueLora(attn.qkv, rank, generator)
    else:  # projections apart, of some rotary ViTs
        attn.q_proj, attn.v_proj = (LowRank(one, rank, generator) for one in (attn.q_proj, attn.v_proj))


def _learned_names(backbone: Backbone, kind: Kind) -> set[str]:
    names = {name for name, _ in backbone.named_parameters()}
    if kind == "adaptformer":
        return {name for name in names if ".adapter." in name}
    if kind in ("lora", "lora_qv"):
        return {name for name in names if ".lora_" in name}
    if kind == "bias":
        return {name for name in names if name.endswith("bias")}  # also q_bias and v_bias beside a projection
    if kind == "norm":
        norms = {name for name, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)}
        return {name for name in names if name.rpartition(".")[0] in norms}
    return names


def _freeze_all_but(backbone: Backbone, learned: Collection[str]) -> None:
    """Takes the gradient from everything, and brings trainable parameters to fp32; `only_train` thaws it later."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(False)
        if name in learned:
            parameter.data = parameter.data.float()
    for name, module in backbone.named_modules():  # torch wants weight and bias of a norm in one precision
        if isinstance(module, nn.LayerNorm) and (f"{name}.weight" in learned or f"{name}.bias" in learned):
            module.float()


def auto_bottleneck(num_classes: int, depth: int) -> int:
    """LIFT's width for C classes and L blocks: 2^max(0, ⌊log2(C / 2L)⌋) (Shi 2024).

    >>> [auto_bottleneck(c, 12) for c in (10, 100, 365, 1000, 8142)]
    [1, 4, 8, 32, 256]
    """
    width = 1
    while 2 * width * 2 * depth <= num_classes:
        width *= 2
    return width


QUERY_VALUE = ("q", "v")
"""What `lora_qv` updates."""


class AdaptFormer(nn.Module):
    """s · Up(ReLU(Down(LN(x)))), which is zero at the start because Up is.

    LIFT's form (Shi 2024): a LayerNorm of its own, and a scale s that is learned from 1.
    """

    def __init__(self, width: int, bottleneck: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_normal_(self.down.weight, a=5**0.5, generator=generator)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        update = self.up(F.relu(self.down(self.norm(tokens))))
        return self.scale.to(update.dtype) * update


class QueryValueLora(nn.Module):
    """A packed projection to q, k and v, with W_q + B_q A_q / r and W_v + B_v A_v / r; B is zero at the start.

    LIFT's form (Shi 2024): q and v apart, α = 1, nothing in k. A starts as a linear layer does.
    """

    def __init__(self, qkv: nn.Linear, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        width = qkv.in_features
        self.qkv, self.scale, self.out_features = qkv, 1 / rank, qkv.out_features
        self.lora_A = nn.ParameterDict({part: nn.Parameter(torch.empty(rank, width)) for part in QUERY_VALUE})
        self.lora_B = nn.ParameterDict(
            {part: nn.Parameter(torch.zeros(qkv.out_features // 3, rank)) for part in QUERY_VALUE}
        )
        for part in QUERY_VALUE:
            nn.init.kaiming_uniform_(self.lora_A[part], a=5**0.5, generator=generator)

    @property
    def weight(self) -> Tensor:
        """Of the frozen projection [3D D]."""
        return self.qkv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.qkv.bias

    def forward(self, tokens: Tensor) -> Tensor:
        return self.qkv(tokens) + self.update(tokens, 0, 3)

    def update(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """What is added to the parts `first`..`last`-1 of (q, k, v). [B N D] → [B N (last-first)·D]."""
        parts = ("q", "k", "v")[first:last]
        added = {
            part: self.scale * F.linear(F.linear(tokens, self.lora_A[part]), self.lora_B[part])
            for part in parts
            if part in QUERY_VALUE
        }
        if not added:
            return tokens.new_zeros(*tokens.shape[:-1], self.out_features // 3)
        nothing = torch.zeros_like(next(iter(added.values())))
        return torch.cat([added.get(part, nothing) for part in parts], dim=-1)


class LowRank(nn.Module):
    """A projection with W + B A / r: `QueryValueLora` where q and v have projections of their own."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.linear, self.scale = linear, 1 / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens) + self.scale * F.linear(F.linear(tokens, self.lora_A), self.lora_B)


class Parallel(nn.Module):
    """A block's MLP branch, norm and layer scale included, with an adapter beside it: both see the residual stream."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, scale: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp, self.scale, self.adapter = norm, mlp, scale, adapter

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale(self.mlp(self.norm(tokens))) + self.adapter(tokens)
