"""Pixels: images in, normalized float views out.

Small images lie in memory as uint8 and become views a whole batch at a time on the compute device. Files are decoded
and cut by Pillow in threads, to bytes of the view's size, and only normalized there. Both cut the same way.

Shapes: images [B 3 h w] uint8, views [B 3 S S] float.
"""

import contextlib
import io
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lpt.errors import DataError, quoted

Transform = Literal["timm", "lift", "lpt"]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000")
"""What is read where this Pillow can. It would read more, PostScript by running a program."""
MAX_PIXELS, MAX_SIDE, MAX_SCANS = 2**25, 2**16, 100
"""Pixels of an image (of a JPEG once it is smaller; a fourth with 32 bits each), those of its longer side, and scans of
a progressive JPEG: in a few bytes of a file there is room for far more."""
MAX_VIEW = 1024
"""Pixels of a view's side: attention over many more patches than that has would never end."""
DECODE_ALONE_ABOVE, _alone = 2**24, threading.Lock()
"""Pixels above which images are decoded one at a time, whatever the number of workers."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@dataclass(frozen=True)
class Preprocess:
    """What a backbone expects of its pixels, and the views that training draws.

    Training view: random resized crop (area in [`min_area`, 1], aspect ratio in [3/4, 4/3] of the image's own, then
    either side cut to the image's, so that an area a may become sqrt(3/4 a)) and horizontal flip; every image has its
    own crop. Test view: resize so that the shorter side is S / `crop_ratio`, then centre crop.
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
    square: bool = False
    """Whether the test view is resized to a square whatever the image's shape, as LPT's code does."""

    def with_(self, **changes: Any) -> "Preprocess":
        return replace(self, **changes)

    @property
    def test_view(self) -> tuple[Any, ...]:
        """All that a test view depends on, besides the image."""
        return self.size, self.mean, self.std, self.interpolation, self.crop_ratio, self.square

    def as_published(self, name: "Transform") -> "Preprocess":
        """The pipeline `name` at this size: `timm` is the backbone's own. LIFT's and LPT's code crop down to 8 % of the
        area, resize bilinearly, and show the centre 224 of 256 pixels in tests, `lpt` of a square."""
        if name == "timm":
            return self
        clip = self.mean[0] == CLIP_MEAN[0]  # LIFT keeps CLIP's statistics for CLIP, and 0.5 for the others
        half = self if name == "lift" and clip else self.with_(mean=(0.5,) * 3, std=(0.5,) * 3)
        return half.with_(interpolation="bilinear", min_area=0.08, crop_ratio=224 / 256, square=name == "lpt")

    def test(self, images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The fixed view of each image. [B 3 h w] uint8 → [B 3 S S]."""
        sides = []
        short, least = math.floor(self.size / self.crop_ratio), min(images.shape[-2:])
        for side in images.shape[-2:]:
            # Roundings as in torchvision's Resize and CenterCrop, which every published test transform uses.
            resized = short if self.square else int(short * side / least)
            first = round((resized - self.size) / 2)
            zero, whole = images.new_zeros(1, dtype=torch.float32), images.new_full((1,), side, dtype=torch.float32)
            sides.append(self._resampling(zero, whole, side, resized, first))
        return self._resampled(images, *sides).to(dtype)

    def train(self, images: Tensor, chance: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """A random view of each image from `chance` [B 5], uniform numbers in [0, 1).

        The numbers are an argument, so a view is a pure function of them and of the image.
        """
        h, w = images.shape[-2:]
        left, top, width, height, flipped = self._crop(chance, w, h)
        rows = self._resampling(top, height, h, self.size)
        columns = self._resampling(left, width, w, self.size)
        columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
        return self._resampled(images, rows, columns).to(dtype)

    def _crop(self, chance: Tensor, w: int, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(left, top, width, height, flipped) [B] of training views of w × h images."""
        area = self.min_area + (1 - self.min_area) * chance[:, 0]
        ratio = torch.exp((2 * chance[:, 1] - 1) * math.log(4 / 3) / 2)
        width, height = w * (area.sqrt() * ratio).clamp(max=1), h * (area.sqrt() / ratio).clamp(max=1)
        flipped = chance[:, 4] < (0.5 if self.flip else 0.0)
        return chance[:, 2] * (w - width), chance[:, 3] * (h - height), width, height, flipped

    # Files: the same two views, cut by Pillow.

    def cut(self, files: Sequence["File"], chance: Tensor | None = None) -> Tensor:
        """Image files as bytes of a view's size: test views, or training views from `chance` [B 5]. → uint8
        [B 3 S S].

        JPEGs much larger than the view are decoded at the smallest of their scales that is still twice as large, as
        Pillow's thumbnails are. Raises DataError, with its name, for an image that cannot be decoded.
        """
        rows = [None] * len(files) if chance is None else list(chance.split(1))
        return torch.stack(list(_workers().map(self._cut, files, rows)))

    def _cut(self, file: "File", chance: Tensor | None) -> Tensor:
        resample = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        short = math.floor(self.size / self.crop_ratio)
        least = short if chance is None else math.ceil(self.size / math.sqrt(self.min_area))
        image = decoded(file, min_side=2 * least)
        w, h = image.size
        if chance is not None:
            left, top, width, height, flipped = (value.item() for value in self._crop(chance, w, h))
            box = (left, top, min(left + width, w), min(top + height, h))
            view = image.resize((self.size, self.size), resample, box=box)
            view = ImageOps.mirror(view) if flipped else view
        else:
            # Resize and centre crop in one: the whole resized image of a long one may not fit into memory.
            wide, high = (short, short) if self.square else (int(short * w / min(w, h)), int(short * h / min(w, h)))
            left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
            x, y = w / wide, h / high
            box = (left * x, top * y, min((left + self.size) * x, w), min((top + self.size) * y, h))
            view = image.resize((self.size, self.size), resample, box=box)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1)

    def normalized(self, views: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(x/255 - mean)/std of what `cut` returns."""
        return self._normalized(views.float()).to(dtype)

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
        """rows · image · columnsᵀ, normalized. → [B 3 S S]."""
        return self._normalized((rows[:, None] @ (images.float() @ columns[:, None].mT)).clamp_(0, 255))

    def _normalized(self, views: Tensor) -> Tensor:
        """(x/255 - mean)/std as one multiply-add, in place."""
        mean = views.new_tensor(self.mean).view(1, 3, 1, 1)
        std = views.new_tensor(self.std).view(1, 3, 1, 1)
        return views.mul_(1 / (255 * std)).sub_(mean / std)


class File(NamedTuple):
    """An encoded image: its name, for errors, and where it is, or its bytes."""

    name: str
    content: str | Path | bytes


def decoded(file: File, *, min_side: int = 0) -> Image.Image:
    """The whole image, upright as its EXIF data says, as 8-bit RGB; a large JPEG may come smaller, with its shorter
    side still at least `min_side`. Raises DataError."""
    content = io.BytesIO(file.content) if isinstance(file.content, bytes) else file.content
    try:
        if not isinstance(file.content, bytes) and not os.path.isfile(file.content):
            raise FileNotFoundError(f"there is no such file as {file.content}")  # a pipe would be waited for
        with Image.open(content, formats=_formats()) as image:
            scans = 1
            if image.info.get("progressive"):  # each scan goes over the whole image, whatever the draft
                whole = file.content if isinstance(file.content, bytes) else Path(file.content).read_bytes()
                scans = whole.count(b"\xff\xda")
            elif min_side:
                image.draft("RGB", (min_side, min_side))
            pixels, most = image.width * image.height, MAX_PIXELS // (4 if image.mode in ("I", "F") else 1)
            if pixels > most:
                raise ValueError(f"{image.width} x {image.height} pixels, {most} are the most: make it smaller")
            if max(image.size) > MAX_SIDE or scans > MAX_SCANS:
                raise ValueError(f"{image.width} x {image.height} pixels in {scans} scans: save it in another way")
            if min_side and scans > 1:
                image.draft("RGB", (min_side, min_side))
            with _alone if pixels > DECODE_ALONE_ABOVE else contextlib.nullcontext():
                ImageOps.exif_transpose(image, in_place=True)
                return (_eight_bits(image) if image.mode[0] in "IF" else image).convert("RGB")
    except Exception as error:  # a decoder's error on a damaged file can be of any class
        raise DataError(f"image {file.name} cannot be decoded ({quoted(error) or type(error).__name__})") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bits, or floats: scaled by the smallest of 1 (floats), 255, 65535 and the maximum that holds
    them all. 16-bit files by 65535."""
    grey = np.asarray(image).astype(np.float64)
    grey.clip(min=0, out=grey)
    tops = [65535.0] if image.mode.startswith("I;16") else [1.0] * (image.mode == "F") + [255.0, 65535.0]
    top = next((t for t in tops if grey.max() <= t), grey.max())
    grey *= 255 / top
    return Image.fromarray(grey.round(out=grey).clip(0, 255, out=grey).astype(np.uint8))


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _workers() -> ThreadPoolExecutor:
    """Pillow releases the interpreter while it decodes and resizes, so threads suffice."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="images")
