"""Short hashes of images: by them a prompt file knows what it was trained on, whatever the files are called now.

Shapes: hashes [N] int64.
"""

import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images
from lpt.errors import DataError
from lpt.terms import HASH_BYTES
from lpt.terms import unpacked as unpacked

UNREADABLE = -1


def image_hashes(images: Images | Files) -> np.ndarray:
    """The hash of each image's size and pixels [N]; -1 where a file cannot be decoded. Files are decoded in threads,
    several hundred a second on each core."""

    def hash_of(row: int) -> int:
        (image,) = images.take(torch.tensor([row]))
        if isinstance(image, torch.Tensor):
            size, pixels = tuple(image.shape[-2:]), image.numpy().tobytes()
        else:
            try:
                picture = decoded(image)
            except DataError:
                return UNREADABLE
            # As images in memory have them: [3 h w].
            size, pixels = picture.size[::-1], np.asarray(picture).transpose(2, 0, 1).tobytes()
        return int.from_bytes(hashlib.sha256(f"{size}".encode() + pixels).digest()[:HASH_BYTES], "big")

    with ThreadPoolExecutor() as pool:
        return np.fromiter(pool.map(hash_of, range(len(images))), dtype=np.int64, count=len(images))


def can_be_hashed(images: Images | Files) -> bool:
    """Not those in list files: a million of them are named in a second, and read in an hour."""
    return isinstance(images, Images) or any(images.fingerprints)


def packed(hashes: np.ndarray) -> str:
    """Hashes as text for a JSON header: each once, in order, base64."""
    known = np.unique(hashes[hashes != UNREADABLE])
    return base64.b64encode(b"".join(int(value).to_bytes(HASH_BYTES, "big") for value in known)).decode()
