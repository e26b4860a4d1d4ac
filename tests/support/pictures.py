"""Pictures with something in them, and folders and files of them. Shapes: pixels [3 H W]."""

import io

import numpy as np
from PIL import Image

from lpt.data.task import Files


def picture(seed, height=40, width=60):
    """A smooth one, always the same for a seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def fill(folder, counts, *, seed=0, kind="png"):
    """`counts` pictures of each class in a folder of its own; returns `folder`."""
    for k, (name, n) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture(1000 * seed + 100 * k + i).save(folder / name / f"{i}.{kind}")
    return folder


def as_files(images):
    """PNG files of what lies in memory."""
    return Files(lambda i: png(images.pixels[i]), images.labels, images.ids, images.ids)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
