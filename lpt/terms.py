"""Terms that prompt files or configs share with the code that reads them; none of them needs torch.

Shapes: hashes [N] int64.
"""

import base64
from dataclasses import dataclass
from typing import Literal

import numpy as np

MAX_VIEW = 1024
"""Pixels of a view's side: attention over many more patches than that has would never end."""
GroupRule = Literal["lt20", "le20", "thirds"]
"""How many, medium and few are told apart."""
AdapterKind = Literal["bias", "norm", "adaptformer", "lora", "lora_qv", "full"]
"""Trainable parameters inside a backbone."""
QueryMode = Literal["full", "early", "none"]
"""How group prompts are chosen: by the feature under the shared prompt, as in LPT; by a linear map of the tokens that
the first block with group prompts gets; or not at all, since all images have the same."""
Cutter = Literal["pillow", "torch"]
"""Whose code decodes and resamples files: prompt files of before are Pillow's."""
Ensemble = Literal["none", "five_crop"]
"""Which views of an image an answer is the mean of: the test view alone, or five crops (TTE of LIFT)."""
Crops = Literal["fixed", "mda"]
"""How training crops go with the epochs: not at all, or from small ones to the whole image."""
Fusion = Literal["scale", "zscore", "prob", "daso"]
"""Of which numbers a fused head makes one answer."""
TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]
"""Experiment trackers that can log a run."""
NUM_SCORES = 101
"""Quantiles that a prompt file has of the scores of its own images."""
HASH_BYTES = 5
"""40 bits of SHA-256: beside 115,846 training images another is taken for one of them once in ten million times, and
they take 772 kB in a header."""


@dataclass(frozen=True)
class Pixels:
    """What a backbone expects of its pixels, and the views that training draws: the fields of
    `lpt.data.preprocess.Preprocess`, which is where they are explained."""

    size: int = 224
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_ratio: float = 1.0
    min_area: float = 0.7
    flip: bool = True
    square: bool = False
    """Whether the test view is resized to a square whatever the image's shape, as LPT's code does."""
    cutter: Cutter = "torch"
    """Whose code cuts views out of files. Images in memory do not depend on it."""
    crops: Crops = "fixed"
    """In a prompt file only where it is not `fixed`."""


def unpacked(text: str) -> np.ndarray:
    """Short hashes of images, from the text that `lpt.data.image_hashes.packed` makes. Raises ValueError for a text
    that is none."""
    content = base64.b64decode(text, validate=True)
    if len(content) % HASH_BYTES:
        raise ValueError(f"{len(content)} bytes are no hashes of {HASH_BYTES}")
    parts = (content[i : i + HASH_BYTES] for i in range(0, len(content), HASH_BYTES))
    return np.array([int.from_bytes(part, "big") for part in parts], dtype=np.int64)
