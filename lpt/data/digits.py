"""scikit-learn's handwritten digits, made long-tailed: real images with no download (8 × 8 pixels)."""

import numpy as np
import torch

from lpt.data.longtail import long_tail
from lpt.data.task import Images, Task, hold_out
from lpt.errors import require
from lpt.settings import Count, Seed

TEST_PER_CLASS = 60
LARGEST_CLASS = 110  # and 60 for the test: every digit has at least 174 images


def digits_lt(*, imbalance_factor: float = 50, seed: Seed = 0, val_per_class: Count = 0) -> Task:
    """110 images of the largest class, 110/IF of the smallest; 60 test images of each. Groups by rank thirds.

    The class order of the tail is drawn by `seed`, so that the rarest digit is not always the nine.
    """
    require("sklearn", extra="digits", gives="data.name=digits-lt, the digits of scikit-learn,")
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    rng = np.random.default_rng((seed, 11))
    class_of_rank = rng.permutation(10).tolist()
    counts = long_tail(10, LARGEST_CLASS, imbalance_factor)
    train_rows: list[int] = []
    test_rows: list[int] = []
    for k in range(10):
        rows = rng.permutation(np.where(labels == k)[0])
        count = max(counts[class_of_rank.index(k)], 1)
        test_rows += rows[:TEST_PER_CLASS].tolist()
        train_rows += rows[TEST_PER_CLASS : TEST_PER_CLASS + count].tolist()
    train, held_out = np.array(sorted(train_rows)), np.array([], dtype=int)
    if val_per_class:
        candidates = np.setdiff1d(np.arange(len(labels)), test_rows)
        train, held_out = hold_out(candidates, train, labels, val_per_class, seed)
    everything = _digits(pixels, labels)
    return Task(
        name="digits-lt",
        classes=tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]),
        train=everything.subset(train),
        val=everything.subset(held_out) if len(held_out) else None,
        test=everything.subset(sorted(test_rows)),
        group_rule="thirds",
        facts={"variant": "digits", "profile": "exponential", "seed": seed, "val_per_class": val_per_class},
    )


def _digits(pixels: np.ndarray, labels: np.ndarray) -> Images:
    """All digits as RGB images, from their 64 gray values of 0 to 16 [N 64]."""
    gray = torch.from_numpy((pixels.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8))
    return Images(
        gray.expand(-1, 3, -1, -1).contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        ids=tuple(f"digits/{row:04d}" for row in range(len(labels))),
    )
