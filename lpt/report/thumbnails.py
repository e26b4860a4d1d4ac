"""Images of a dataset as small pictures inside a page."""

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images
from lpt.errors import DataError
from lpt.report.quoting import for_html

SIDE = 72
"""Of a thumbnail, in CSS pixels; stored with twice as many for dense screens."""


def thumbnail(images: Images | Files, i: int, *, side: int = 2 * SIDE) -> str | None:
    """Image `i`, at most `side` pixels wide and high, as the base64 text of a PNG; None where its file cannot be
    decoded any more."""
    (picture,) = images.take(torch.tensor([i]))
    try:
        if isinstance(picture, Tensor):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        else:
            image = decoded(picture, min_side=side)
    except DataError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def figure(png: str | None, alt: str, caption: str) -> str:
    """A thumbnail with a caption, nothing where there is none; a small image shows its pixels."""
    if png is None:
        return ""
    width, height = Image.open(io.BytesIO(base64.b64decode(png))).size
    pixelated = ' class="pixels"' if max(width, height) < SIDE else ""
    return (
        f'<figure><img{pixelated} alt="{for_html(alt)}" src="data:image/png;base64,{for_html(png)}">'
        f"<figcaption>{for_html(caption)}</figcaption></figure>"
    )
