"""Four small long-tailed tasks to serve: digits, and shapes, textures and colours that are drawn here.

    python -m benchmarks.serving.demo DIR

DIR/data has a folder of images for each task, DIR/images some that no task was trained on.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COUNTS = (60, 30, 15, 8, 4)
"""Training images of a task's classes; a fifth of them is split off as test set."""
SIDE = 48
COLOURS = {"red": 0, "orange": 30, "green": 120, "blue": 225, "violet": 280}
"""Hues in degrees."""


def main(folder: Path) -> None:
    for task, classes in tasks(np.random.default_rng(0)).items():
        for (name, make), number in zip(classes.items(), COUNTS, strict=True):
            for i in range(number + 1):
                place = (
                    folder / "data" / task / name / f"{i:03d}.png" if i else folder / "images" / f"{task} {name}.png"
                )
                place.parent.mkdir(parents=True, exist_ok=True)
                make().save(place)


def tasks(draw: np.random.Generator) -> dict[str, dict[str, Callable[[], Image.Image]]]:
    """By task and class what makes the next image, which is always another one."""
    digits = digits_by_class()
    return {
        "digits": {f"digit {k}": digits[k].pop for k in range(5)},
        "shapes": {name: partial(shape, name, draw) for name in ("disc", "square", "triangle", "cross", "ring")},
        "textures": {name: partial(texture, name, draw) for name in ("stripes", "checks", "dots", "noise", "fade")},
        "colours": {name: partial(colour, hue, draw) for name, hue in COLOURS.items()},
    }


def digits_by_class() -> list[list[Image.Image]]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images: list[list[Image.Image]] = [[] for _ in range(10)]
    for row, label in zip(np.asarray(pixels), np.asarray(labels), strict=True):
        grey = Image.fromarray((row.reshape(8, 8) * (255 / 16)).round().astype(np.uint8))
        images[int(label)].append(grey.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB"))
    return images


def any_colour(draw: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in draw.integers(low, high, 3))
    return red, green, blue


def shape(name: str, draw: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), any_colour(draw, 0, 90))
    pen, ink = ImageDraw.Draw(image), any_colour(draw, 150, 256)
    r = int(draw.integers(9, 17))
    x, y = (int(value) for value in draw.integers(r, SIDE - r, 2))
    box = (x - r, y - r, x + r, y + r)
    if name == "disc":
        pen.ellipse(box, fill=ink)
    elif name == "ring":
        pen.ellipse(box, outline=ink, width=4)
    elif name == "square":
        pen.rectangle(box, fill=ink)
    elif name == "triangle":
        pen.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for a in (0, 2.1, 4.2)], fill=ink)
    else:
        pen.line((x - r, y, x + r, y), fill=ink, width=6)
        pen.line((x, y - r, x, y + r), fill=ink, width=6)
    return image


def texture(name: str, draw: np.random.Generator) -> Image.Image:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    period, shift = int(draw.integers(5, 11)), int(draw.integers(0, 10))
    if name == "stripes":
        level = ((rows + shift) // (period // 2)) % 2
    elif name == "checks":
        level = ((rows + shift) // period + (columns + shift) // period) % 2
    elif name == "dots":
        level = ((rows + shift) % period - period / 2) ** 2 + ((columns + shift) % period - period / 2) ** 2 < 5
    elif name == "noise":
        level = draw.random((SIDE, SIDE))
    else:
        level = (columns if shift % 2 else columns[:, ::-1]) / SIDE
    dark, light = np.array(any_colour(draw, 0, 100)), np.array(any_colour(draw, 150, 256))
    mixed = dark + np.asarray(level, dtype=float)[..., None] * (light - dark)
    return Image.fromarray(mixed.astype(np.uint8))


def colour(hue: int, draw: np.random.Generator) -> Image.Image:
    """A soft cloud of about one hue."""
    small = draw.random((6, 6, 3)) * (12, 70, 110)
    hsv = np.stack([(hue + small[..., 0] - 6) % 360 / 360 * 255, 185 + small[..., 1], 140 + small[..., 2]], axis=-1)
    cloud = Image.fromarray(hsv.clip(0, 255).astype(np.uint8), "HSV").convert("RGB")
    return cloud.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
