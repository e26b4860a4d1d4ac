"""What may be learned inside a backbone: a copy of it with adapters put in, or with some of its own tensors thawed.

The copy is a backbone as any other; `learned` names what is not frozen in it, all of it in fp32. Everything else keeps
its bits. Shapes: tokens [B N D].
"""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.model.backbones.base import Backbone

Kind = Literal["bias", "norm", "adaptformer", "lora", "full"]

KINDS = {
    "bias": "every bias of the backbone (Zaken 2022, BitFit)",
    "norm": "every LayerNorm's weight and bias",
    "adaptformer": "a bottleneck beside every MLP (Chen 2022, in the form of LIFT, Shi 2024)",
    "lora": "a low-rank update of every packed qkv projection (Hu 2022), through peft",
    "full": "the whole backbone: its prompt file is as large as a model",
}


def with_adapter(backbone: Backbone, kind: Kind, *, bottleneck: int = 4, rank: int = 8, seed: int = 0) -> Backbone:
    """A copy of a timm ViT behind the seam, in which `kind` is learned; it still gives the same features.

    `bottleneck` is AdaptFormer's width, `rank` LoRA's, with α = 2 `rank` as is usual. `seed` draws the start.
    """
    compute = backbone.dtype
    inside = copy.deepcopy(backbone)
    vit: Any = inside.vit
    if kind == "adaptformer":
        generator = torch.Generator().manual_seed(seed)
        for block in vit.blocks:
            block.mlp = Parallel(block.norm2, block.mlp, block.ls2, AdaptFormer(inside.width, bottleneck, generator))
            block.norm2, block.ls2 = nn.Identity(), nn.Identity()
        chosen = {name for name, _ in inside.named_parameters() if ".adapter." in name}
    elif kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["qkv"]), vit)
        chosen = {name for name, _ in inside.named_parameters() if ".lora_" in name}
    elif kind == "bias":
        chosen = {name for name, _ in inside.named_parameters() if name.endswith(".bias")}
    elif kind == "norm":
        norms = [name for name, module in inside.named_modules() if isinstance(module, nn.LayerNorm)]
        chosen = {name for name, _ in inside.named_parameters() if name.rpartition(".")[0] in norms}
    else:
        chosen = {name for name, _ in inside.named_parameters()}
    for name, parameter in inside.named_parameters():
        parameter.requires_grad_(False)
        if name in chosen:
            parameter.data = parameter.data.float()
    for name, module in inside.named_modules():  # torch wants weight and bias of a norm in one precision
        if isinstance(module, nn.LayerNorm) and chosen & {f"{name}.weight", f"{name}.bias"}:
            module.float()
    inside.learned, inside.compute = frozenset(chosen), compute
    inside.recipe = {"kind": kind, "bottleneck": bottleneck, "rank": rank}
    return inside.train().to(next(backbone.parameters()).device)


def auto_bottleneck(num_classes: int, depth: int) -> int:
    """LIFT's width: 2^max(0, ⌊log2(C / 2L)⌋).

    >>> [auto_bottleneck(c, 12) for c in (10, 100, 365, 1000, 8142)]
    [1, 4, 8, 32, 256]
    """
    width = 1
    while 2 * width * 2 * depth <= num_classes:
        width *= 2
    return width


class AdaptFormer(nn.Module):
    """s · Up(ReLU(Down(LN(x)))), zero at the start, since Up is (LIFT's form: an LN of its own, s learned from 1)."""

    def __init__(self, width: int, bottleneck: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_normal_(self.down.weight, a=5**0.5, generator=generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.up(F.relu(self.down(self.norm(tokens))))
        return self.scale.to(found.dtype) * found


class Parallel(nn.Module):
    """A block's MLP branch, norm and layer scale included, with an adapter beside it: both see the residual stream."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, scale: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp, self.scale, self.adapter = norm, mlp, scale, adapter

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale(self.mlp(self.norm(tokens))) + self.adapter(tokens)
