"""Short hashes of images: by them a prompt file knows what it was trained on, whatever the files are called now, and
an image of a folder is split off for tests or not, whatever lies beside it.

Shapes: hashes [N] int64.
"""

import base64
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images, Task
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


READ_AT_EACH_END = 2**17
"""Bytes of a file's beginning and end that its draw is made of: a camera's photos are read no slower for their size."""


def image_draws(files: Files, seed: int) -> np.ndarray:
    """A number for each image, uniform in [0, 1), drawn from `seed` and the file itself [N]: neither from its name nor
    from the files beside it. Copies have the same. Files are read in threads, and not decoded."""

    def draw_of(row: int) -> float:
        digest = hashlib.sha256(f"{seed}".encode())
        source = files.source(row)
        try:
            digest.update(source if isinstance(source, bytes) else _ends_of(source))
        except OSError:  # who needs its pixels says what is wrong with it
            digest.update(files.ids[row].encode(errors="surrogateescape"))
        return int.from_bytes(digest.digest()[:6], "big") / 2**48  # exact in a float64

    with ThreadPoolExecutor() as pool:
        return np.fromiter(pool.map(draw_of, range(len(files))), dtype=np.float64, count=len(files))


def _ends_of(path: str) -> bytes:
    """The size of a file, its beginning and its end."""
    if not os.path.isfile(path):
        raise FileNotFoundError(path)  # a pipe would be waited for
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= 2 * READ_AT_EACH_END:
            return file.read()
        begins = file.read(READ_AT_EACH_END)
        file.seek(-READ_AT_EACH_END, os.SEEK_END)
        return f"{size}".encode() + begins + file.read()


def can_be_hashed(images: Images | Files) -> bool:
    """Not those in list files: a million of them are named in a second, and read in an hour."""
    return isinstance(images, Images) or callable(images.fingerprints) or any(images.fingerprints)


def hashes_to_store(task: Task) -> str | None:
    """What a prompt file knows of its training images, `packed`; None where no settings can bring one into the test
    part, or where they cannot be hashed."""
    return packed(image_hashes(task.train)) if not task.test_is_official and can_be_hashed(task.train) else None


def packed(hashes: np.ndarray) -> str:
    """Hashes as text for a JSON header: each once, in order, base64."""
    known = np.unique(hashes[hashes != UNREADABLE])
    return base64.b64encode(b"".join(int(value).to_bytes(HASH_BYTES, "big") for value in known)).decode()
