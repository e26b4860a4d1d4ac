"""Pixels: images in, normalized float views out.

Small images lie in memory as uint8 and become views a whole batch at a time on the compute device. Files are decoded
and cut to bytes of the view's size on the host (`lpt.data.loader`), and only normalized there. Both cut the same way.

Shapes: images [B 3 h w] uint8, views [B 3 S S] float.
"""

import contextlib
import io
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lpt.errors import DataError, UndecodableImage, quoted
from lpt.terms import MAX_VIEW as MAX_VIEW
from lpt.terms import Ensemble, Pixels

Transform = Literal["timm", "lift", "lpt"]
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM", "JPEG2000", "HEIF")
"""What is read where this Pillow can, HEIF with pillow-heif. It would read more, PostScript by running a program."""
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# In a few bytes of a file there is room for an image that would fill the memory, or take hours.
MAX_PIXELS = 2**25
"""Pixels of an image, of a JPEG once it is decoded smaller; a fourth of them with 32 bits each."""
PIXELS_VARIABLE = "LPT_MAX_PIXELS"
"""An environment variable in place of MAX_PIXELS. How much may be decoded is a matter of the machine and of trust in
the files, as the device is: in a config it would change the hash of every run, and a prompt file could bring it."""
MAX_SIDE = 2**16
"""Pixels of its longer side."""
MAX_SCANS = 100
"""Scans of a progressive JPEG, each of which goes over the whole image."""
USUAL_MIN_SIDE = 540
"""`min_side` of views of 224 pixels: what a check decodes an image to that is too large as it is."""
MOST_IN_BUFFER = 2**24
"""Bytes of a decoded JPEG up to which a thread keeps memory for the next one."""
DECODE_ALONE_ABOVE = 2**24
"""Pixels above which one image is decoded at a time, whatever the number of workers: memory for one is enough."""


class _Alone:
    """The lock of images that are decoded one at a time: of this process's threads, or of all workers of a pool."""

    lock: Any = threading.Lock()


_alone = _Alone()


class _DecodingMemory(threading.local):
    """Memory of a thread that it decodes JPEGs into, one after the other: fresh memory costs a fifth of the time."""

    memory: np.ndarray | None = None

    def buffer(self, size: int) -> np.ndarray | None:
        """Of at least so many bytes; None above `MOST_IN_BUFFER`."""
        if size > MOST_IN_BUFFER:
            return None
        if self.memory is None or len(self.memory) < size:
            self.memory = np.empty(size, dtype=np.uint8)
        return self.memory


_decoding = _DecodingMemory()
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@dataclass(frozen=True)
class Preprocess(Pixels):
    """What a backbone expects of its pixels, and the views that training draws.

    Training view: random resized crop (area in [`min_area`, 1], aspect ratio in [3/4, 4/3] of the image's own, then
    either side cut to the image's, so that an area a may become sqrt(3/4 a)) and horizontal flip; every image has its
    own crop. With `crops="mda"` (LIFT+) it is a square of pixels, whose least area grows with the epochs (`in_epoch`).
    Test view: resize so that the shorter side is S / `crop_ratio`, then center crop.
    Both go from the stored pixels to S × S in one antialiased resampling, the one of PIL and of torchvision's
    `Resize`: a product with one matrix for the rows and one for the columns of each image.
    """

    five_crops: bool = False
    """Whether the test view is five: the corners and the center of an image resized to 248/224 of the view (test-time
    ensemble, Shi 2024). Then test views are [B 5 3 S S]. Of a use of a model, and in no prompt file."""

    @property
    def test_shape(self) -> tuple[int, ...]:
        """Of an image's test view, or of all five of them."""
        return (*((5,) if self.five_crops else ()), 3, self.size, self.size)

    def with_(self, **changes: Any) -> "Preprocess":
        return replace(self, **changes)

    @property
    def test_view(self) -> tuple[Any, ...]:
        """All that a test view depends on, besides the image."""
        return self.size, self.mean, self.std, self.interpolation, self.crop_ratio, self.square

    def seen_as(self, tta: Ensemble) -> "Preprocess":
        """The same, with the test views of an ensemble."""
        return self.with_(five_crops=tta == "five_crop")

    def as_published(self, name: "Transform") -> "Preprocess":
        """The pipeline `name` at this size: `timm` is the backbone's own. LIFT's and LPT's code crop down to 8 % of the
        area, resize bilinearly, and show the center 224 of 256 pixels in tests, `lpt` of a square."""
        if name == "timm":
            return self
        is_clip = self.mean[0] == CLIP_MEAN[0]
        pipeline = self
        if not (name == "lift" and is_clip):  # LIFT keeps CLIP's statistics for CLIP, and 0.5 for the others
            pipeline = self.with_(mean=(0.5,) * 3, std=(0.5,) * 3)
        return pipeline.with_(interpolation="bilinear", min_area=0.08, crop_ratio=224 / 256, square=name == "lpt")

    def in_epoch(self, epoch: int, epochs: int) -> "Preprocess":
        """What cuts training views in epoch 0..`epochs`-1. With `crops="mda"` the least area is
        a + (1 - a)(1 - √(1 - t²)) with t = epoch/(epochs - 1), from a = `min_area` to the whole image (LIFT+, Shi 2025:
        minimalist data augmentation); a single epoch has t = 0 (LIFT+ divides by zero there). A pure function of the
        epoch: a resumed run and every worker cut the same."""
        if self.crops == "fixed":
            return self
        t = epoch / (epochs - 1) if epochs > 1 else 0.0
        return self.with_(min_area=self.min_area + (1 - self.min_area) * (1 - math.sqrt(1 - t * t)))

    # Images in memory.

    def test(self, images: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The fixed view of each image. [B 3 h w] uint8 → [B 3 S S], or [B 5 3 S S] with `five_crops`, normalized."""
        height, width = images.shape[-2:]
        places = self._places(self._resized(height, min(height, width)), self._resized(width, min(height, width)))
        rows = {top: self._test_resampling(height, min(height, width), top, images.device) for top, _ in places}
        columns = {left: self._test_resampling(width, min(height, width), left, images.device) for _, left in places}
        views = [self._resampled(images, rows[top], columns[left]).to(dtype) for top, left in places]
        return torch.stack(views, dim=1) if self.five_crops else views[0]

    def _places(self, height: int, width: int) -> list[tuple[int, int]]:
        """(first row, first column) of each crop of a resized image: the center, or with `five_crops` the corners and
        it."""
        middle = self._first_of_center(height), self._first_of_center(width)
        if not self.five_crops:
            return [middle]
        low, right = height - self.size, width - self.size
        return [(0, 0), (0, right), (low, 0), (low, right), middle]

    def _test_resampling(self, side: int, shorter: int, first: int, device: torch.device) -> Tensor:
        """The matrix [1 S side] of a test view that begins at pixel `first` of the resized image, for one axis of
        images whose shorter side has `shorter` pixels."""
        resized = self._resized(side, shorter)
        start = torch.zeros(1, dtype=torch.float32, device=device)
        length = torch.full((1,), side, dtype=torch.float32, device=device)
        return self._resampling(start, length, side, resized, first)

    # Roundings as in torchvision's Resize and CenterCrop, which every published test transform uses.

    def _resized(self, side: int, shorter: int) -> int:
        """Pixels that `side` has in the resized image, from which the test view is cropped."""
        target = self._shorter_resized
        return target if self.square else int(target * side / shorter)

    @property
    def _shorter_resized(self) -> int:
        return self.size * 248 // 224 if self.five_crops else math.floor(self.size / self.crop_ratio)

    def _first_of_center(self, resized: int) -> int:
        """Where a center crop of S pixels begins; below 0 where the image has fewer."""
        return round((resized - self.size) / 2)

    def train(self, images: Tensor, chance: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """A random view of each image from `chance` [B 5], uniform numbers in [0, 1). [B 3 h w] uint8 → [B 3 S S],
        normalized.

        The numbers are an argument, so a view is a pure function of them and of the image.
        """
        height, width = images.shape[-2:]
        crop = self._crop(chance, width, height)
        rows = self._resampling(crop.top, crop.height, height, self.size)
        columns = self._resampling(crop.left, crop.width, width, self.size)
        columns = torch.where(crop.flipped[:, None, None], columns.flip(1), columns)
        return self._resampled(images, rows, columns).to(dtype)

    def _crop(self, chance: Tensor, width: int, height: int) -> "Crop":
        """Training views of images with width × height pixels, from `chance` [B 5]."""
        area = self.min_area + (1 - self.min_area) * chance[:, 0]
        if self.crops == "mda":
            # Where the square does not fit, the largest one anywhere along the image (LIFT+: in its middle).
            crop_width = crop_height = (area * (width * height)).sqrt().clamp(max=min(width, height))
            return self._placed(chance, crop_width, crop_height, width, height)
        ratio = torch.exp((2 * chance[:, 1] - 1) * math.log(4 / 3) / 2)
        crop_width = width * (area.sqrt() * ratio).clamp(max=1)
        crop_height = height * (area.sqrt() / ratio).clamp(max=1)
        return self._placed(chance, crop_width, crop_height, width, height)

    def _placed(self, chance: Tensor, crop_width: Tensor, crop_height: Tensor, width: int, height: int) -> "Crop":
        """Crops of these sizes [B] at random places, mirrored or not, from `chance` [B 5]."""
        return Crop(
            left=chance[:, 2] * (width - crop_width),
            top=chance[:, 3] * (height - crop_height),
            width=crop_width,
            height=crop_height,
            flipped=chance[:, 4] < (0.5 if self.flip else 0.0),
        )

    # Files: the same two views, cut on the host.

    def cut(self, files: Sequence["File"], chance: Tensor | None = None) -> Tensor:
        """Views of B image files as bytes: test views, or training views from `chance` [B 5]. → [B 3 S S] uint8, or
        [B 5 3 S S], for `normalized`.

        JPEGs much larger than the view are decoded at the smallest of their scales that is still twice as large, as
        Pillow's thumbnails are. Raises DataError, with its name, for an image that cannot be decoded.
        """
        chances = [None] * len(files) if chance is None else list(chance.split(1))
        return torch.stack(list(made_in_threads(self.cut_one, files, chances)))

    def cut_one(self, file: "File", chance: Tensor | None) -> Tensor:
        """One view of a file [3 S S], or with `five_crops` its test views [5 3 S S]: it is decoded once. `chance` is
        [1 5]."""
        # Of an image that large the smallest crop of training is still as large as the view.
        least = self._shorter_resized if chance is None else math.ceil(self.size / math.sqrt(self.min_area))
        min_side = 2 * least
        if self.cutter == "pillow":
            return self._by_pillow(decoded(file, min_side=min_side), chance)
        image = pixels(file, min_side=min_side)
        height, width = image.shape[-2:]
        # Whole pixels of the crop are coarse where there are few; all of a long test view would fill the memory.
        if min(height, width) < self.size or (chance is None and max(height, width) > 4 * min(height, width)):
            return self._by_pillow(Image.fromarray(image.permute(1, 2, 0).numpy()), chance)
        return self._by_torch(image, chance)

    def _by_torch(self, image: Tensor, chance: Tensor | None) -> Tensor:
        """A view [3 S S] as torchvision's transforms cut it: whole pixels of the image [3 h w] resized, or a crop of
        the resized image."""
        height, width = image.shape[-2:]
        if chance is None:
            shorter = min(height, width)
            resized = self._resized_bytes(image, self._resized(height, shorter), self._resized(width, shorter))
            places = self._places(*resized.shape[-2:])
            views = [resized[:, top : top + self.size, left : left + self.size] for top, left in places]
            return torch.stack(views) if self.five_crops else views[0]
        (left, top, right, bottom), flipped = self._train_box(chance, width, height)
        crop = image[:, round(top) : round(bottom), round(left) : round(right)]
        view = self._resized_bytes(crop, self.size, self.size)
        return view.flip(2) if flipped else view

    def _resized_bytes(self, image: Tensor, height: int, width: int) -> Tensor:
        """[3 h w] uint8 → [3 height width] uint8, in memory of its own."""
        if image.shape[-2:] == (height, width):
            return image.clone()
        mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
        return F.interpolate(image[None], size=(height, width), mode=mode, antialias=True)[0]

    def _by_pillow(self, image: Image.Image, chance: Tensor | None) -> Tensor:
        """A view [3 S S] as Pillow cuts it, or five, each in one resampling, down to fractions of a pixel."""
        if chance is None:
            views = [self._resampled_by_pillow(image, box) for box in self._test_boxes(*image.size)]
            return torch.stack(views) if self.five_crops else views[0]
        box, flipped = self._train_box(chance, *image.size)
        view = self._resampled_by_pillow(image, box)
        return view.flip(2) if flipped else view

    def _resampled_by_pillow(self, image: Image.Image, box: "Box") -> Tensor:
        """The pixels within `box` as [3 S S]."""
        resample = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        view = image.resize((self.size, self.size), resample, box=box)
        return torch.from_numpy(np.array(view)).permute(2, 0, 1)

    def _train_box(self, chance: Tensor, width: int, height: int) -> tuple["Box", bool]:
        """(what a training view shows of an image, whether it is mirrored)."""
        left, top, crop_width, crop_height, flipped = (value.item() for value in self._crop(chance, width, height))
        return (left, top, min(left + crop_width, width), min(top + crop_height, height)), bool(flipped)

    def _test_boxes(self, width: int, height: int) -> list["Box"]:
        """What each test view shows of an image, so that one resampling does both the resize and the crop: the whole
        resized image of a long one may not fit into memory."""
        shorter = min(width, height)
        resized_width, resized_height = self._resized(width, shorter), self._resized(height, shorter)
        x, y = width / resized_width, height / resized_height  # pixels of the image for one of the resized image
        return [
            (left * x, top * y, min((left + self.size) * x, width), min((top + self.size) * y, height))
            for top, left in self._places(resized_height, resized_width)
        ]

    def normalized(self, views: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(x/255 - mean)/std of what `cut` returns. [B ... 3 S S] uint8 → [B ... 3 S S]."""
        return self._normalized(views.float()).to(dtype)

    # Arithmetic of both.

    def _resampling(self, start: Tensor, length: Tensor, old: int, new: int, first: int = 0) -> Tensor:
        """The matrices [B S old] that resample pixels [start, start + length) of `old` ones to `new` ones, of which
        only `first`..`first` + S - 1 are wanted; `start` and `length` are [B]."""
        scale = (length / new)[:, None, None]
        wanted = first + torch.arange(self.size, device=start.device)[:, None]
        center = start[:, None, None] + (wanted + 0.5) * scale
        # Antialiasing: where pixels become fewer, the kernel is as many times wider.
        distance = (torch.arange(old, device=start.device) + 0.5 - center).abs() / scale.clamp(min=1)
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
        scale, shift = _scale_and_shift(self.mean, self.std, views.device)
        return views.mul_(scale).sub_(shift)


@cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """1/(255 std) and mean/std, [1 3 1 1], on the device: to send them there in every step is to wait for it."""
    means, deviations = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return 1 / (255 * deviations), means / deviations


class Crop(NamedTuple):
    """Training views of B images: where each lies, in pixels of the image, and whether it is mirrored. All are [B]."""

    left: Tensor
    top: Tensor
    width: Tensor
    height: Tensor
    flipped: Tensor


Box = tuple[float, float, float, float]
"""(left, upper, right, lower) in pixels, as Pillow has it."""


Content = str | Path | bytes | Image.Image
"""Where an image is, its encoded bytes, or what Pillow has made of it."""


class File(NamedTuple):
    """An image that is not decoded yet: its name, for errors, and where it is, its bytes, one of Pillow's, or a
    function that gives one of these, which is called where views are made. `change` is the augmentation of its views
    (`lpt.data.augment`) and its seed, for sets of images that are augmented once and for all."""

    name: str
    content: Content | Callable[[], Content]
    change: tuple[str, int] | None = None


def encoded(file: File) -> bytes:
    """The bytes of its file; of what has none, those of a PNG. Raises DataError."""
    with _naming(file):
        content = _given(file)
        if isinstance(content, Image.Image):
            written = io.BytesIO()
            upright_rgb(content.copy()).save(written, "PNG")
            return written.getvalue()
        return content if isinstance(content, bytes) else Path(content).read_bytes()


def _given(file: File) -> Content:
    content = file.content
    return content if isinstance(content, str | Path | bytes | Image.Image) else content()


def decoded(file: File, *, min_side: int = 0) -> Image.Image:
    """The whole image, upright as its EXIF data says, as 8-bit RGB; a large JPEG may come smaller, with its shorter
    side still at least `min_side`. Raises DataError."""
    with _naming(file), _checked(file, min_side) as image, _at_a_time(image):
        return upright_rgb(image)


def pixels(file: File, *, min_side: int = 0) -> Tensor:
    """As `decoded`, uint8 [3 h w]. JPEGs are decoded by simplejpeg, to the same bytes in less time, and stay what they
    are until this thread decodes the next one."""
    with _naming(file), _checked(file, min_side) as image, _at_a_time(image):
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and not _is_draft(image):
            with contextlib.suppress(ValueError, RuntimeError):  # what it does not read is Pillow's matter
                return _by_libjpeg(image)
        return torch.from_numpy(np.array(upright_rgb(image))).permute(2, 0, 1)


@contextlib.contextmanager
def _naming(file: File) -> Iterator[None]:
    """Raises DataError, with the name of the file, for whatever happens to it inside."""
    try:
        yield
    except Exception as error:  # a decoder's error on a damaged file can be of any class
        reason = quoted(error).partition(" <_io.")[0] or type(error).__name__  # Pillow tells where in memory bytes are
        content = file.content
        if isinstance(content, str | Path | bytes) and "HEIF" not in _formats() and is_heic(content):
            reason = "it is HEIC, whatever its name: install pillow-heif to read it"
        raise UndecodableImage(f"image {file.name} cannot be decoded ({reason})") from None


@contextlib.contextmanager
def _checked(file: File, min_side: int) -> Iterator[Image.Image]:
    """The image before its pixels are decoded, held to the limits; a large JPEG will be decoded smaller."""
    content = _given(file)
    if isinstance(content, Image.Image):
        _check_limits(content, scans=1)
        yield content.copy()  # the caller's own stays what it is
        return
    if not isinstance(content, bytes) and not os.path.isfile(content):
        raise FileNotFoundError(f"there is no such file as {content}")  # a pipe would be waited for
    with _open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        is_progressive = bool(image.info.get("progressive"))
        scans = _scans(content) if is_progressive else 1
        # A draft is Pillow's word for a JPEG decoded at a half, fourth or eighth. It saves a progressive one no
        # time, as each scan goes over the whole image: such a one is held to the limits before its draft.
        if min_side and not is_progressive:
            image.draft("RGB", (min_side, min_side))
        _check_limits(image, scans)
        if min_side and scans > 1:
            image.draft("RGB", (min_side, min_side))
        yield image


def _at_a_time(image: Image.Image) -> contextlib.AbstractContextManager[Any]:
    return _alone.lock if image.width * image.height > DECODE_ALONE_ABOVE else contextlib.nullcontext()


def upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright as its EXIF data says; `image` itself is changed."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # pixels wider than a byte
        image = _eight_bits(image)
    return image.convert("RGB")


def _is_draft(image: Image.Image) -> bool:
    """Whether it will be decoded smaller than it is; `decoderconfig` is what Pillow's own draft leaves."""
    return (getattr(image, "decoderconfig", ()) or (1,))[0] > 1


def _by_libjpeg(image: Image.Image) -> Tensor:
    """The pixels [3 h w] of a JPEG that Pillow has opened. Raises ValueError for what is no whole JPEG."""
    import simplejpeg

    file: Any = getattr(image, "fp", None)
    file.seek(0)
    says = "exif" in image.info or "xmp" in image.info
    upright = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1)) if says else None
    buffer = _decoding.buffer(3 * image.width * image.height)
    rgb = torch.from_numpy(simplejpeg.decode_jpeg(file.read(), colorspace="RGB", buffer=buffer)).permute(2, 0, 1)
    return upright(rgb).contiguous() if upright else rgb


UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda image: image.flip(2),
    3: lambda image: image.flip(1, 2),
    4: lambda image: image.flip(1),
    5: lambda image: image.mT,
    6: lambda image: image.mT.flip(2),
    7: lambda image: image.mT.flip(1, 2),
    8: lambda image: image.mT.flip(1),
}
"""How an image [3 h w] is turned that has a number of EXIF's orientation."""


def readable(file: File) -> Image.Image:
    """The whole image, or where it is too large for that, smaller, as a view of usual size would have it: what can be
    trained on is readable. Raises DataError."""
    try:
        return decoded(file)
    except DataError:
        return decoded(file, min_side=USUAL_MIN_SIDE)


def is_image(path: str) -> bool:
    """Whether a file is an image by its first bytes, which says nothing of the rest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its size, which is looked at when it is decoded
        try:
            with Image.open(path, formats=_formats()):
                return True
        except Image.DecompressionBombError:
            return True
        except Exception:  # a parser's error can be of any class
            return False


def is_common_image(path: str) -> bool:
    """Whether a file is a JPEG, PNG, GIF or WebP by its first bytes, whatever its suffix: a raw photo is none, though
    its thumbnail may be one."""
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8")) or (start[:4], start[8:]) == (b"RIFF", b"WEBP")


def is_heic(content: str | Path | bytes) -> bool:
    """Whether a file, or its bytes, are HEIC by its first bytes; AVIF is none."""
    if not isinstance(content, bytes):
        if not os.path.isfile(content):  # a pipe would be waited for
            return False
        try:
            with open(content, "rb") as file:
                content = file.read(12)
        except OSError:
            return False
    return content[4:8] == b"ftyp" and content[8:12] in HEIC_BRANDS


def _scans(content: str | Path | bytes) -> int:
    """How many scans a JPEG has, by their markers; bytes of its pixels never look like one."""
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    return data.count(b"\xff\xda")


def max_pixels() -> int:
    """Pixels that an image may have. Raises ValueError where the environment says what is no number of them."""
    text = os.environ.get(PIXELS_VARIABLE, "")
    if not text:
        return MAX_PIXELS
    if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) <= MAX_SIDE**2):
        raise ValueError(f"{PIXELS_VARIABLE} is {quoted(repr(text), 40)}: give a number, for example 100000000")
    return int(text)


def _open(content: str | Path | io.BytesIO) -> Image.Image:
    """The image before it is decoded. Pillow warns of large ones, and refuses larger ones, by a limit of its own."""
    if os.environ.get(PIXELS_VARIABLE) and (Image.MAX_IMAGE_PIXELS or MAX_SIDE**2) < 2 * max_pixels():
        Image.MAX_IMAGE_PIXELS = 2 * max_pixels()
    try:
        return Image.open(content, formats=_formats())
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d{1,20}) pixels", str(error))
        if pixels is None or int(pixels[1]) > MAX_SIDE**2:
            raise
        raise ValueError(f"{pixels[1]} pixels, {max_pixels()} are the most: {_way_out(int(pixels[1]))}") from None


def _way_out(pixels: int) -> str:
    return f"make it smaller, or set the environment variable {PIXELS_VARIABLE}={pixels} if you trust it"


def _check_limits(image: Image.Image, scans: int) -> None:
    """Raises ValueError for an image that would take too much memory or time to decode."""
    share = 4 if image.mode in ("I", "F") else 1
    limit, pixels = max_pixels() // share, image.width * image.height
    if pixels > limit:
        size = f"{image.width} x {image.height} pixels"
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"{size}, {limit} are the most, and {MAX_SIDE} a side: make it smaller")
        raise ValueError(f"{size}, {limit} are the most: {_way_out(share * pixels)}")
    if max(image.size) > MAX_SIDE or scans > MAX_SCANS:
        size = f"{image.width} x {image.height} pixels, {MAX_SIDE} a side are the most: make it smaller"
        raise ValueError(f"{scans} scans, {MAX_SCANS} are the most: save it anew" if scans > MAX_SCANS else size)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grays of 16 or 32 bits, or floats, in 8 bits. White is 65535 in a 16-bit file; else the smallest of 1 (floats
    alone), 255, 65535 and the image's own maximum that is no less than this maximum."""
    gray = np.asarray(image).astype(np.float64)
    if image.mode == "F" and not np.isfinite(gray).all():
        bad = int(np.count_nonzero(~np.isfinite(gray)))
        raise ValueError(f"{bad} of its {gray.size} pixels are NaN or infinite: replace them by numbers")
    gray.clip(min=0, out=gray)
    whites = [255.0, 65535.0]
    if image.mode.startswith("I;16"):
        whites = [65535.0]
    elif image.mode == "F":
        whites = [1.0, *whites]
    maximum = gray.max()
    white = next((value for value in whites if maximum <= value), maximum)
    gray *= 255 / white
    return Image.fromarray(gray.round(out=gray).clip(0, 255, out=gray).astype(np.uint8))


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_together(lock: Any) -> None:
    """Has this process decode large images under `lock`, which others hold too."""
    _alone.lock = lock


def available_cores() -> int:
    """Cores that this process may use, by its affinity mask and by its container's share of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError):  # as containers of before had it; -1 is no limit
        quota, period = (int(Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        count = min(count, math.ceil(quota / period)) if quota > 0 else count
    return max(1, count)


def made_in_threads(make: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
    """`map(make, *arguments)`, several at a time."""
    return _threads().map(make, *arguments)


@cache
def _threads() -> ThreadPoolExecutor:
    """Decoders release the interpreter while they work, so that threads suffice for a few images."""
    return ThreadPoolExecutor(available_cores(), thread_name_prefix="images")
