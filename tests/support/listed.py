"""ImageNet-LT, Places-LT and iNaturalist 2018 in small: their paths and list files, and a tail of the same shape."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lpt.data.lists import PUBLISHED, Published
from lpt.data.longtail import count_fingerprint, long_tail


class Layout(NamedTuple):
    """Where an image of class k lies, by its part and number, and which lists there are."""

    train: str
    val: str
    test: str
    lists: tuple[str, ...]


LAYOUTS = {
    "imagenet-lt": Layout(
        "train/n{k:08}/n{k:08}_{i}.JPEG", "train/n{k:08}/n{k:08}_9{i}.JPEG",
        "val/n{k:08}/ILSVRC2012_val_{k:04}{i:04}.JPEG", ("train", "val", "test"),
    ),
    "places-lt": Layout(
        "train/place_{k}/{i:08}.jpg", "val/place_{k}/Places365_val_{k:04}{i:04}.jpg",
        "val/place_{k}/Places365_val_{k:04}9{i:03}.jpg", ("train", "val", "test"),
    ),
    "inat2018": Layout(
        "train_val2018/Plantae/{k}/{i:032x}.jpg", "", "train_val2018/Plantae/{k}/f{i:031x}.jpg", ("train", "val"),
    ),
}  # fmt: skip
CLASSES = 6


def miniature(name: str, root: Path) -> Published:
    """Writes `CLASSES` classes of the set, 24 to 1 images a class by its own imbalance, below `root`, and says what the
    lists hold."""
    published, layout = PUBLISHED[name], LAYOUTS[name]
    counts = [max(1, n) for n in long_tail(CLASSES, 24, published.largest / published.smallest)]
    held_out = 2 if published.val else 0
    parts = {
        "train": (layout.train, counts),
        "val": (layout.val, [held_out] * CLASSES),
        "test": (layout.test, [2] * CLASSES),
    }
    rng = np.random.default_rng(0)
    lists = {}
    for part, (pattern, sizes) in parts.items():
        lines = []
        for k, n in enumerate(sizes):
            for i in range(n):
                file = root / pattern.format(k=k, i=i)
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 60, (24, 30, 3)) + 30 * k
                Image.fromarray(pixels.astype(np.uint8)).save(file, quality=60)
                lines.append(f"{file.relative_to(root)} {k}\n")
        lists[part] = "".join(lines)
    if not held_out:  # iNaturalist's val list is its test set
        lists["val"] = lists.pop("test")
    for part, text in lists.items():
        (root / f"{published.lists}_{part}.txt").write_text(text)
    assert tuple(lists) == layout.lists
    return published._replace(
        classes=CLASSES,
        train=sum(counts),
        largest=counts[0],
        smallest=counts[-1],
        fingerprint=count_fingerprint(counts),
        val=CLASSES * held_out,
        test=2 * CLASSES,
    )
