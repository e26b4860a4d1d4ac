"""scikit-learn's handwritten digits, made long-tailed: real images with no download (8 × 8 pixels)."""

import numpy as np
import torch

from lpt.data.longtail import long_tail
from lpt.data.task import Images, Task, hold_out
from lpt.settings import Count, Seed

TEST_PER_CLASS = 60
LARGEST = 110  # every digit has at least 174 images


def digits_lt(*, imbalance_factor: float = 50, seed: Seed = 0, val_per_class: Count = 0) -> Task:
    """110 images of the largest class, 110/IF of the smallest; 60 test images of each. Groups by rank thirds.

    The class order of the tail is drawn by `seed`, so that the rarest digit is not always the nine.
    """
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    rng = np.random.default_rng((seed, 11))
    rank = rng.permutation(10)
    counts = long_tail(10, LARGEST, imbalance_factor)
    train: list[int] = []
    test: list[int] = []
    for k in range(10):
        order = rng.permutation(np.where(labels == k)[0])
        test += order[:TEST_PER_CLASS].tolist()
        n = max(counts[int(np.where(rank == k)[0][0])], 1)
        train += order[TEST_PER_CLASS : TEST_PER_CLASS + n].tolist()
    chosen, held = np.array(sorted(train)), np.array([], dtype=int)
    if val_per_class:
        free = np.setdiff1d(np.arange(len(labels)), test)
        chosen, held = hold_out(free, chosen, labels, val_per_class, seed)
    grey = torch.from_numpy((images.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8))
    everything = Images(
        grey.expand(-1, 3, -1, -1).contiguous(),
        torch.from_numpy(labels.astype(np.int64)),
        tuple(f"digits/{i:04d}" for i in range(len(labels))),
    )
    return Task(
        name="digits-lt",
        classes=tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]),
        train=everything.subset(chosen),
        val=everything.subset(held) if len(held) else None,
        test=everything.subset(sorted(test)),
        group_rule="thirds",
        facts={"variant": "digits", "profile": "exponential", "seed": seed, "val_per_class": val_per_class},
    )
