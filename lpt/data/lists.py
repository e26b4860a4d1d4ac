"""Long-tailed sets by list files, a `relative/path label` a line: ImageNet-LT, Places-LT, iNaturalist 2018, yours.

The published lists are not shipped: their licence is unclear. What they hold is checked against known totals instead.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpt.data.longtail import GroupRule, count_fingerprint
from lpt.data.task import Files, Task, hold_out
from lpt.errors import DataError, quoted
from lpt.settings import Count, Seed


class Published(NamedTuple):
    """What a published split holds (protocols, section 2), and how its list files begin."""

    classes: int
    train: int
    largest: int
    smallest: int
    fingerprint: str
    val: int
    test: int
    lists: str


PUBLISHED = {
    "imagenet-lt": Published(1000, 115_846, 1280, 5, "2d32e9530b623fa9", 20_000, 50_000, "ImageNet_LT"),
    "places-lt": Published(365, 62_500, 4980, 5, "6219cdedd057d9e6", 7_300, 36_500, "Places_LT"),
    "inat2018": Published(8142, 437_513, 1000, 2, "1503e782c4e9b60e", 0, 24_426, "iNaturalist18"),
}


def imagenet_lt(root: str | None = None, *, lists: str | None = None, group_rule: GroupRule = "lt20") -> Task:
    """ImageNet-LT (Liu 2019, OLTR): `root` holds ImageNet's train/ and val/, `lists` (or root) ImageNet_LT_*.txt."""
    return _published("imagenet-lt", root, lists, group_rule)


def places_lt(root: str | None = None, *, lists: str | None = None, group_rule: GroupRule = "lt20") -> Task:
    """Places-LT (Liu 2019, OLTR): `root` holds Places365's images, `lists` (or root) Places_LT_*.txt."""
    return _published("places-lt", root, lists, group_rule)


def inat2018(root: str | None = None, *, lists: str | None = None, group_rule: GroupRule = "lt20") -> Task:
    """iNaturalist 2018: `root` holds train_val2018/, `lists` (or root) iNaturalist18_train.txt and _val.txt."""
    return _published("inat2018", root, lists, group_rule)


def own_lists(
    root: str | None = None,
    *,
    train: str,
    test: str,
    val: str | None = None,
    unlabeled: str | None = None,
    classes: str | None = None,
    group_rule: GroupRule = "lt20",
    seed: Seed = 0,
    val_per_class: Count = 0,
) -> Task:
    """Your own list files `train`, `test` and perhaps `val`; paths in them start at `root`, labels at 0.

    `classes` is a file with a name a line; without it a class is called as its folder, where each class has one folder
    of its own, else by its number. `unlabeled` is a list too, whose lines need no label: one that is there is known
    truth, for audits only.
    """
    place = _root("lists", root)
    found = {role: read_list(Path(path)) for role, path in (("train", train), ("val", val), ("test", test)) if path}
    if unlabeled:
        found["unlabeled"] = read_unlabeled(Path(unlabeled), 1 + max(int(of.max()) for _, of in found.values()))
    return _task("lists", place, found, classes, group_rule, seed, val_per_class)


def _published(name: str, root: str | None, folder: str | None, group_rule: GroupRule) -> Task:
    place, known = _root(name, root), PUBLISHED[name]
    where = Path(folder) if folder else place
    roles = {"train": "train", "val": "val", "test": "test"} if known.val else {"train": "train", "test": "val"}
    found = {role: read_list(where / f"{known.lists}_{word}.txt") for role, word in roles.items()}
    task = _task(name, place, found, None, group_rule, 0, 0)
    counts, sizes = task.counts, (len(task.train), len(task.val) if task.val else 0, len(task.test))
    wanted = (known.train, known.val, known.test)
    if sizes != wanted or len(counts) != known.classes or count_fingerprint(counts.tolist()) != known.fingerprint:
        raise DataError(
            f"the lists in {where} are not {name}: {len(counts)} classes and {sizes} images in train, val and test, "
            f"{int(counts.max())} to {int(counts.min())} a class; published are {known.classes} classes, {wanted}, "
            f"{known.largest} to {known.smallest}. For lists of your own use data.name=lists"
        )
    return task


def _root(name: str, root: str | None) -> Path:
    if root is None:
        raise DataError(f"data.root is missing: {name} needs the folder that the paths in its lists start at")
    if not Path(root).is_dir():
        raise DataError(f"data.root {root} is not a folder")
    return Path(root)


def read_list(path: Path) -> tuple[list[str], Tensor]:
    """Paths and labels [N] of a list file: a line is split at its *last* space, since names may hold some.

    Raises DataError with the number of a line that is none.
    """
    lines = _lines(path)
    paths: list[str] = []
    labels = np.empty(len(lines), dtype=np.int64)
    for row, (number, line) in enumerate(lines):
        name, space, label = line.rpartition(" ")
        if not space or not _is_label(label):
            raise DataError(f"list {path}, line {number}: {line[:80]!r} is not `relative/path label`")
        labels[row] = int(label)
        paths.append(name.rstrip())
    return paths, torch.from_numpy(labels)


def read_unlabeled(path: Path, num_classes: int) -> tuple[list[str], Tensor]:
    """Paths and labels [N] of a list that needs no labels: -1 where a line ends with none, or with -1.

    A line whose last word is no number is a path as a whole. Raises DataError for a label of no class.
    """
    lines = _lines(path)
    paths: list[str] = []
    labels = np.full(len(lines), -1, dtype=np.int64)
    for row, (number, line) in enumerate(lines):
        name, space, label = line.rpartition(" ")
        if not space or not (label == "-1" or _is_label(label)):
            paths.append(line)
            continue
        labels[row] = int(label)
        if labels[row] >= num_classes:
            raise DataError(
                f"list {path}, line {number}: label {label}, and classes are 0 to {num_classes - 1}: leave out the "
                "label of an image that is of none"
            )
        paths.append(name.rstrip())
    return paths, torch.from_numpy(labels)


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank. Raises DataError where there are none."""
    try:
        lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"list {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not any(lines):
        raise DataError(f"list {path} is empty")
    return [(number, line) for number, line in enumerate(lines, start=1) if line]


def _is_label(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 9


def _task(
    name: str,
    root: Path,
    found: dict[str, tuple[list[str], Tensor]],
    classes: str | None,
    group_rule: GroupRule,
    seed: int,
    val_per_class: int,
) -> Task:
    paths, labels = found["train"]
    largest = max(int(of.max()) for _, of in found.values())
    if largest > 10 * len(paths):
        raise DataError(
            f"{name}: a list has label {largest} with {len(paths)} training images: labels start at 0 and have no gaps"
        )
    names = _names(classes, paths, labels, largest + 1)
    for role, (some, _) in found.items():  # a wrong root shows at once, not after an hour
        if absent := [path for path in some[:: max(1, len(some) // 5)] if not os.path.isfile(root / path)]:
            raise DataError(f"data.root {root} has no {quoted(absent[0], 99)}, which the {role} list names")

    def part(role: str) -> Files | None:
        if role not in found:
            return None
        mine, of = found[role]
        # The list itself is the print: reading a million files to name them would take an hour.
        stamp = os.path.realpath(root)
        return Files(lambda i: str(root / mine[i]), of, tuple(mine), tuple([""] * len(mine)), stamp)

    train, val, test, unlabeled = part("train"), part("val"), part("test"), part("unlabeled")
    assert train is not None and test is not None
    if val is None and val_per_class:
        every = np.arange(len(train))
        kept, held = hold_out(every, every, train.labels.numpy(), val_per_class, seed)
        train, val = train.subset(kept.tolist()), train.subset(held.tolist())
    variant = "published" if name in PUBLISHED else "own lists"
    facts: dict[str, Any] = {"variant": variant, "profile": "natural", "seed": seed}
    if unlabeled:
        tested = {os.path.normpath(path) for path in test.ids}
        if leaked := [path for path in unlabeled.ids if os.path.normpath(path) in tested]:
            facts["leaked"] = leaked
    return Task(
        name=name,
        classes=names,
        train=train,
        val=val,
        test=test,
        unlabeled=unlabeled,
        group_rule=group_rule,
        facts=facts,
    )


def _names(file: str | None, paths: list[str], labels: Tensor, number: int) -> tuple[str, ...]:
    if file is not None:
        try:
            names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"data.classes {file} cannot be read ({error})") from None
        if len(names) != number or len(set(names)) != number:
            raise DataError(f"data.classes {file} has {len(set(names))} different names for {number} classes")
        return tuple(names)
    folders: list[str | None] = [None] * number
    for path, label in zip(paths, labels.tolist(), strict=True):
        folder = path.rpartition("/")[0].rpartition("/")[2]
        if folders[label] not in (None, folder):
            break
        folders[label] = folder
    else:
        if all(folders) and len(set(folders)) == number:
            return tuple(str(folder) for folder in folders)
    return tuple(str(k) for k in range(number))
