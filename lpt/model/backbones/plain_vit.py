"""A plain ViT with timm's names of modules and tensors, for `nano`: importing timm takes twice as long as torch.

Its numbers are those of timm's `VisionTransformer`, to the bit; a test holds it to that. What a block of timm may have
and a plain one has not (norms of keys, layer scales) is an identity here, which `TimmViT` and adapters go through.
Shapes: tokens [B 1+N D], CLS first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6
"""Of LayerNorms, as in timm."""


class PlainViT(nn.Module):
    """A ViT of square images whose feature is CLS after the last norm; it has no classifier."""

    global_pool = "token"
    num_prefix_tokens = 1

    def __init__(self, *, image_size: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed_dim = self.num_features = width
        self.patch_embed = PatchEmbed(image_size, patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, width))
        self.patch_drop, self.norm_pre = nn.Identity(), nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def _pos_embed(self, patches: Tensor) -> Tensor:
        """[B N D] → [B 1+N D], as timm calls it."""
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed

    def forward_features(self, images: Tensor) -> Tensor:
        """[B 3 H W] → tokens after the last norm."""
        return self.norm(self.blocks(self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))))

    def forward_head(self, tokens: Tensor, pre_logits: bool = True) -> Tensor:
        """[B 1+N D] → [B D]; there is nothing after the feature."""
        return tokens[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resamples positions to images of another size."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        before = self.patch_embed.grid_size
        self.patch_embed.set_image_size(img_size[0])
        size = list(self.patch_embed.grid_size)
        resampled = resample_abs_pos_embed(self.pos_embed, size, list(before), num_prefix_tokens=1)
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)


class PatchEmbed(nn.Module):
    """One vector for each patch of an image. [B 3 H W] → [B N D]."""

    def __init__(self, image_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.set_image_size(image_size)
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def set_image_size(self, side: int) -> None:
        self.img_size, patches = (side, side), side // self.patch_size[0]
        self.grid_size, self.num_patches = (patches, patches), patches**2

    def forward(self, images: Tensor) -> Tensor:
        assert tuple(images.shape[-2:]) == self.img_size, (tuple(images.shape), self.img_size)
        return self.proj(images).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPSILON), nn.LayerNorm(width, eps=EPSILON)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class Attention(nn.Module):
    """softmax(QKᵀ/√d)V in `heads` heads, with one projection for Q, K and V."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        batch, n, width = tokens.shape
        packed = self.qkv(tokens).reshape(batch, n, 3, self.num_heads, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(self.norm(mixed.transpose(1, 2).reshape(batch, n, width)))


class Mlp(nn.Module):
    """Two layers with a GELU between them, four times as wide there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))
