"""Pixels: uint8 images in, normalised float views out, a whole batch at a time on the compute device.

Shapes: images [B 3 h w] uint8, views [B 3 S S] float.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """What a backbone expects of its pixels, and the views that training draws.

    Training view: random resized crop (area in [`min_area`, 1], aspect ratio in [3/4, 4/3]) and horizontal flip;
    every image has its own crop. Test view: resize so that the shorter side is S / `crop_ratio`, then centre crop.
    Both go from the stored pixels to S × S in one antialiased resampling, the one of PIL and of torchvision's
    `Resize`: a product with one matrix for the rows and one for the columns of each image.
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

    @property
    def test_view(self) -> tuple[Any, ...]:
        """All that a test view depends on, besides the image."""
        return self.size, self.mean, self.std, self.interpolation, self.crop_ratio

    def test(self, images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The fixed view of each image. [B 3 h w] uint8 → [B 3 S S]."""
        sides = []
        short, least = math.floor(self.size / self.crop_ratio), min(images.shape[-2:])
        for side in images.shape[-2:]:
            # Roundings as in torchvision's Resize and CenterCrop, which every published test transform uses.
            resized = int(short * side / least)
            first = round((resized - self.size) / 2)
            zero, whole = images.new_zeros(1, dtype=torch.float32), images.new_full((1,), side, dtype=torch.float32)
            sides.append(self._resampling(zero, whole, side, resized, first))
        return self._resampled(images, *sides).to(dtype)

    def train(self, images: Tensor, chance: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """A random view of each image from `chance` [B 5], uniform numbers in [0, 1).

        The numbers are an argument, so a view is a pure function of them and of the image.
        """
        h, w = images.shape[-2:]
        area = self.min_area + (1 - self.min_area) * chance[:, 0]
        ratio = torch.exp((2 * chance[:, 1] - 1) * math.log(4 / 3) / 2)
        width, height = w * (area.sqrt() * ratio).clamp(max=1), h * (area.sqrt() / ratio).clamp(max=1)
        rows = self._resampling(chance[:, 3] * (h - height), height, h, self.size)
        columns = self._resampling(chance[:, 2] * (w - width), width, w, self.size)
        if self.flip:
            columns = torch.where((chance[:, 4] < 0.5)[:, None, None], columns.flip(1), columns)
        return self._resampled(images, rows, columns).to(dtype)

    def _resampling(self, start: Tensor, length: Tensor, old: int, new: int, first: int = 0) -> Tensor:
        """The matrices [B S old] that resample pixels [start, start + length) of `old` ones to `new` ones, of which
        only `first`..`first` + S - 1 are wanted."""
        scale = (length / new)[:, None, None]
        centre = start[:, None, None] + (first + torch.arange(self.size, device=start.device)[:, None] + 0.5) * scale
        distance = (torch.arange(old, device=start.device) + 0.5 - centre).abs() / scale.clamp(min=1)
        if self.interpolation == "bilinear":
            weight = (1 - distance).clamp(min=0)
        else:  # Keys' cubic with a = -1/2
            near = (1.5 * distance - 2.5) * distance**2 + 1
            far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
            weight = torch.where(distance < 1, near, far * (distance < 2))
        return weight / weight.sum(-1, keepdim=True)

    def _resampled(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """rows · image · columnsᵀ, then (x/255 - mean)/std as one multiply-add. → [B 3 S S]."""
        views = (rows[:, None] @ (images.float() @ columns[:, None].mT)).clamp_(0, 255)
        mean = views.new_tensor(self.mean).view(1, 3, 1, 1)
        std = views.new_tensor(self.std).view(1, 3, 1, 1)
        return views.mul_(1 / (255 * std)).sub_(mean / std)
