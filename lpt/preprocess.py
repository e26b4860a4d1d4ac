"""Pixels: uint8 images in, normalised float views out, a whole batch at a time on the compute device.

Shapes: images [B 3 h w] uint8, views [B 3 S S] float.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """What a backbone expects of its pixels, and the views that training draws.

    Training view: random resized crop (area in [`min_area`, 1], aspect ratio in [3/4, 4/3]) and horizontal
    flip, one bilinear resampling from the stored image straight to S × S; every image has its own crop.
    Test view: resize so that the shorter side is S / `crop_ratio`, then centre crop.
    """

    size: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_ratio: float = 1.0
    min_area: float = 0.7
    flip: bool = True

    def with_(self, **changes: Any) -> "Preprocess":
        return replace(self, **changes)

    def test(self, images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The fixed view of each image. [B 3 h w] uint8 → [B 3 S S]."""
        views = images.float()
        h, w = views.shape[-2:]
        short = math.floor(self.size / self.crop_ratio)
        # Roundings as in torchvision's Resize and CenterCrop, which every published test transform uses.
        if (new := (int(short * h / min(h, w)), int(short * w / min(h, w)))) != (h, w):
            # Antialiased, as PIL and so every published test transform resizes, also upwards.
            views = F.interpolate(views, size=new, mode=self.interpolation, align_corners=False, antialias=True)
        top, left = round((views.shape[-2] - self.size) / 2), round((views.shape[-1] - self.size) / 2)
        views = views[..., top : top + self.size, left : left + self.size]
        return self._normalise(views.clamp_(0, 255)).to(dtype)

    def train(self, images: Tensor, chance: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """A random view of each image from `chance` [B 5], uniform numbers in [0, 1).

        The numbers are an argument, so a view is a pure function of them and of the image.
        """
        area = self.min_area + (1 - self.min_area) * chance[:, 0]
        ratio = torch.exp((2 * chance[:, 1] - 1) * math.log(4 / 3) / 2)
        width, height = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
        mirror = torch.where(chance[:, 4] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(area)
        theta = images.new_zeros(len(images), 2, 3, dtype=torch.float32)
        theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
        theta[:, 0, 2] = (2 * chance[:, 2] - 1) * (1 - width)
        theta[:, 1, 2] = (2 * chance[:, 3] - 1) * (1 - height)
        grid = F.affine_grid(theta, [len(images), 3, self.size, self.size], align_corners=False)
        # Normalising commutes with resampling, and the stored images are the smaller ones.
        views = F.grid_sample(
            self._normalise(images.float()), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return views.to(dtype)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """0..255 → (x/255 - mean)/std, as one multiply-add."""
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return pixels * (1 / (255 * std)) - mean / std
