"""A folder of JPEG photos as ImageNet has them, about 500 × 375, made of three that libraries bring along."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 375


def sources() -> list[Image.Image]:
    """Two photos of scikit-learn's and one of matplotlib's."""
    paths: list[Path] = []
    for package, names in (
        ("sklearn", ("datasets/images/flower.jpg", "datasets/images/china.jpg")),
        ("matplotlib", ("mpl-data/sample_data/grace_hopper.jpg",)),
    ):
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        paths += [Path(spec.origin).parent / name for name in names]
    return [Image.open(path).convert("RGB") for path in paths]


def photo(number: int, *, side: int = SIDE, quality: int = 92) -> bytes:
    """A part of one of the sources, `side` pixels at its shorter side, as a JPEG."""
    image = sources_once[number % len(sources_once)]
    chance = np.random.default_rng(number)
    share = chance.uniform(0.7, 1)
    left, top = (chance.uniform(0, (1 - share) * length) for length in image.size)
    box = (left, top, left + share * image.width, top + share * image.height)
    longer = side * max(image.size) // min(image.size)
    size = (longer, side) if image.width > image.height else (side, longer)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS, box=box).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def fill(folder: Path, number: int, *, classes: int = 4) -> None:
    """Writes `number` photos into folders of classes, as torchvision's ImageFolder reads them."""
    for i in range(number):
        path = folder / str(i % classes) / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i))


sources_once = sources()
