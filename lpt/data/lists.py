"""Long-tailed sets by list files, a `relative/path label` a line: ImageNet-LT, Places-LT, iNaturalist 2018, yours.

The published lists are not shipped: their license is unclear. What they hold is checked against known totals instead.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpt.data.longtail import GroupRule, count_fingerprint
from lpt.data.pack import is_pack, open_pack
from lpt.data.task import Files, Task, hold_out
from lpt.data.texts import cleaned, read_text
from lpt.errors import DataError, quoted
from lpt.settings import Count, Seed


class Published(NamedTuple):
    """What a published split holds (protocols, section 2): numbers of classes and of images, the largest and the
    smallest class, a fingerprint of all counts; and how the names of its list files begin."""

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


def imagenet_lt(
    root: str | None = None, *, lists: str | None = None, classes: str | None = None, group_rule: GroupRule = "lt20"
) -> Task:
    """ImageNet-LT (Liu 2019, OLTR): `root` holds ImageNet's train/ and val/, `lists` (or root) ImageNet_LT_*.txt."""
    return _published("imagenet-lt", root, lists, classes, group_rule)


def places_lt(
    root: str | None = None, *, lists: str | None = None, classes: str | None = None, group_rule: GroupRule = "lt20"
) -> Task:
    """Places-LT (Liu 2019, OLTR): `root` holds Places365's images, `lists` (or root) Places_LT_*.txt."""
    return _published("places-lt", root, lists, classes, group_rule)


def inat2018(
    root: str | None = None, *, lists: str | None = None, classes: str | None = None, group_rule: GroupRule = "lt20"
) -> Task:
    """iNaturalist 2018: `root` holds train_val2018/, `lists` (or root) iNaturalist18_train.txt and _val.txt."""
    return _published("inat2018", root, lists, classes, group_rule)


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

    `classes` is a file with a name a line. Without it classes are named after their folders where each has one folder
    of its own, else by number. `unlabeled` is a list too, but its lines need no label: a label there is known truth,
    and serves audits alone. Without `val`, `val_per_class` training images of each class are held out.
    Raises DataError.
    """
    if root is not None and is_pack(root):
        split = {"seed": seed, "val_per_class": val_per_class, "group_rule": group_rule, "unlabeled": unlabeled}
        return open_pack(root, "lists", split)
    root_folder = _existing_root("lists", root)
    paths = {"train": train, "val": val, "test": test}
    lists = {role: read_list(Path(path)) for role, path in paths.items() if path}
    if unlabeled:
        num_classes = 1 + _largest_label(lists)
        lists["unlabeled"] = read_unlabeled(Path(unlabeled), num_classes)
    return _task(
        "lists",
        root_folder,
        lists,
        variant="own lists",
        classes_file=classes,
        group_rule=group_rule,
        seed=seed,
        val_per_class=val_per_class,
    )


def _published(
    name: str, root: str | None, lists_folder: str | None, classes_file: str | None, group_rule: GroupRule
) -> Task:
    """The published split `name`. Classes are called after their folders, WordNet ids or numbers, unless a file has
    their names. Raises DataError where the lists hold anything else."""
    if root is not None and is_pack(root):
        return open_pack(root, name, {"group_rule": group_rule})
    root_folder, published = _existing_root(name, root), PUBLISHED[name]
    folder = Path(lists_folder) if lists_folder else root_folder
    list_of = {"train": "train", "val": "val", "test": "test"}
    if not published.val:  # iNaturalist's val list is its test set
        list_of = {"train": "train", "test": "val"}
    lists = {role: read_list(folder / f"{published.lists}_{word}.txt") for role, word in list_of.items()}
    task = _task(name, root_folder, lists, variant="published", classes_file=classes_file, group_rule=group_rule)
    counts = task.counts
    sizes = (len(task.train), len(task.val) if task.val else 0, len(task.test))
    published_sizes = (published.train, published.val, published.test)
    same_counts = len(counts) == published.classes and count_fingerprint(counts.tolist()) == published.fingerprint
    if sizes != published_sizes or not same_counts:
        raise DataError(
            f"the lists in {folder} are not {name}: {len(counts)} classes and {sizes} images in train, val and test, "
            f"{int(counts.max())} to {int(counts.min())} a class; published are {published.classes} classes, "
            f"{published_sizes}, {published.largest} to {published.smallest}. For lists of your own use data.name=lists"
        )
    return task


def _existing_root(name: str, root: str | None) -> Path:
    """`root` as a path. Raises DataError where it is no folder."""
    if root is None:
        raise DataError(f"data.root is missing: {name} needs the folder that the paths in its lists start at")
    if not Path(root).is_dir():
        raise DataError(f"data.root {root} is not a folder")
    return Path(root)


class ListedImages(NamedTuple):
    """What a list file names: N paths below a root, and their labels [N]."""

    paths: list[str]
    labels: Tensor


SEPARATORS = (" ", "\t", ",", ";")
"""What may stand between path and label: one and the same in all lines of a list."""


def read_list(path: Path) -> ListedImages:
    """Paths and labels of a list file: a line is split at its *last* space, tab, comma or semicolon, since names may
    hold some. With any but a space, the first line may be a heading.

    Raises DataError with the number of a line that is not `relative/path label`.
    """
    lines = _lines(path)
    for separator in SEPARATORS:
        pairs = [_path_and_label(line, separator) for _, line in lines]
        if pairs[0] is None and separator != " " and len(pairs) > 1:
            pairs = pairs[1:]
        whole = [pair for pair in pairs if pair is not None]
        if len(whole) == len(pairs):
            labels = np.array([label for _, label in whole], dtype=np.int64)
            return ListedImages([name for name, _ in whole], torch.from_numpy(labels))
    number, line = next((number, line) for number, line in lines if _path_and_label(line, " ") is None)
    raise DataError(
        f"list {path}, line {number}: {line[:80]!r} is not `relative/path label`, with a space, tab or comma between "
        "them and a label that is a number from 0 on"
    )


def _path_and_label(line: str, separator: str) -> tuple[str, int] | None:
    name, between, label = line.rpartition(separator)
    if not between or not name.strip() or not _is_label(label.strip()):
        return None
    if separator in " \t" and name.rstrip().endswith((",", ";")):  # that one is what separates
        return None
    name = name.rstrip(f" {separator}") if separator in " \t" else name.strip()
    quotes = re.fullmatch(r'"(.*)"', name) if separator in ",;" else None
    return quotes.group(1).replace('""', '"') if quotes else name, int(label)


def read_unlabeled(path: Path, num_classes: int) -> ListedImages:
    """Paths and labels of a list that needs no labels: -1 where a line ends with none, or with -1.

    A line whose last word is no number is a path as a whole. A tab may stand for the space, and a comma or semicolon
    where a number is behind the last of every line. Raises DataError for a label of no class.
    """
    lines = _lines(path)
    paths: list[str] = []
    labels = np.full(len(lines), -1, dtype=np.int64)
    everywhere = (mark for mark in ",;" if all(re.search(rf"{mark}\s*(-1|\d{{1,9}})$", line) for _, line in lines))
    between = next(everywhere, None)
    for row, (number, line) in enumerate(lines):
        name, space, label = line.rpartition(between or ("\t" if "\t" in line else " "))
        label = label.strip()
        has_label = space and (label == "-1" or _is_label(label))
        if not has_label:
            paths.append(line)
            continue
        labels[row] = int(label)
        if labels[row] >= num_classes:
            raise DataError(
                f"list {path}, line {number}: label {label}, and classes are 0 to {num_classes - 1}: leave out the "
                "label of an image that is of none"
            )
        paths.append(name.rstrip())
    return ListedImages(paths, torch.from_numpy(labels))


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank. Raises DataError where there are none."""
    try:
        # Not str.splitlines, which also splits at letters that a name may have.
        lines = [line.rstrip() for line in re.split("\r\n|\r|\n", read_text(path))]
    except (OSError, ValueError) as error:
        raise DataError(f"list {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not any(lines):
        raise DataError(f"list {path} is empty")
    return [(number, line) for number, line in enumerate(lines, start=1) if line]


def _is_label(word: str) -> bool:
    return (
        word.isascii() and word.isdigit() and len(word) <= 9
    )  # a longer number is no class, and may not fit into 64 bits


def _largest_label(lists: Mapping[str, ListedImages]) -> int:
    return max(int(listed.labels.max()) for listed in lists.values())


def _task(
    name: str,
    root: Path,
    lists: Mapping[str, ListedImages],
    *,
    variant: str,
    group_rule: GroupRule,
    classes_file: str | None = None,
    seed: int = 0,
    val_per_class: int = 0,
) -> Task:
    largest = _largest_label(lists)
    num_train = len(lists["train"].paths)
    if largest > 10 * num_train:  # numbers of some other kind, and as many classes would fill the memory
        raise DataError(
            f"{name}: a list has label {largest} with {num_train} training images: labels start at 0 and have no gaps"
        )
    lists = {role: with_slashes(root, listed) for role, listed in lists.items()}
    classes = _class_names(classes_file, lists["train"], largest + 1)
    for role, listed in lists.items():
        _check_root(root, role, listed.paths)
    parts = {role: _files(root, listed) for role, listed in lists.items()}
    train, val, test, unlabeled = parts["train"], parts.get("val"), parts["test"], parts.get("unlabeled")
    if val is None and val_per_class:
        rows = np.arange(len(train))
        remaining, held_out = hold_out(rows, rows, train.labels.numpy(), val_per_class, seed)
        train, val = train.subset(remaining.tolist()), train.subset(held_out.tolist())
    facts: dict[str, Any] = {"variant": variant, "profile": "natural", "seed": seed}
    leaked = _same_paths(test, unlabeled) if unlabeled else []
    if leaked:
        facts["leaked"] = leaked
    return Task(
        name=name,
        test_is_official=True,
        classes=classes,
        train=train,
        val=val,
        test=test,
        unlabeled=unlabeled,
        group_rule=group_rule,
        facts=facts,
    )


def with_slashes(root: Path, listed: ListedImages) -> ListedImages:
    """A list as another system writes it, with slashes; as it stands where its backslashes are letters of names."""
    first = next((path for path in listed.paths if "\\" in path), None)
    if first is None or os.path.isfile(root / first):
        return listed
    return listed._replace(paths=[path.replace("\\", "/") for path in listed.paths])


def _check_root(root: Path, role: str, paths: list[str]) -> None:
    """Looks at a few paths of a list, so that a wrong root shows at once and not after an hour. Raises DataError."""
    step = max(1, len(paths) // 5)
    for path in paths[::step]:
        if not os.path.isfile(root / path):
            raise DataError(f"data.root {root} has no {quoted(path, 99)}, which the {role} list names")


def _files(root: Path, listed: ListedImages) -> Files:
    paths = listed.paths
    # The list itself stands for the images: reading a million files to fingerprint them would take an hour.
    no_fingerprints = ("",) * len(paths)
    return Files(
        lambda i: str(root / paths[i]),
        labels=listed.labels,
        ids=tuple(paths),
        fingerprints=no_fingerprints,
        stamp=os.path.realpath(root),
    )


def _same_paths(test: Files, unlabeled: Files) -> list[str]:
    """Ids of unlabeled images that are test images too."""
    tested = {os.path.normpath(path) for path in test.ids}
    return [path for path in unlabeled.ids if os.path.normpath(path) in tested]


def _class_names(file: str | None, train: ListedImages, num_classes: int) -> tuple[str, ...]:
    """Names from `file`, a line each; or the folders of the training images; or numbers. Raises DataError."""
    if file is not None:
        return _names_in_file(file, num_classes)
    folders = _folder_of_each_class(train, num_classes)
    if all(folders) and len(set(folders)) == num_classes:
        return tuple(str(folder) for folder in folders)
    return tuple(str(k) for k in range(num_classes))


def _names_in_file(file: str, num_classes: int) -> tuple[str, ...]:
    try:
        text = read_text(Path(file))
    except (OSError, ValueError) as error:
        raise DataError(f"data.classes {file} cannot be read ({error})") from None
    names = [name for line in re.split("\r\n|\r|\n", text) if (name := cleaned(line))]
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise DataError(f"data.classes {file} has {len(set(names))} different names for {num_classes} classes")
    return tuple(names)


def _folder_of_each_class(train: ListedImages, num_classes: int) -> list[str | None]:
    """The innermost folder of each class's images, None for a class without any; all None where a class has two."""
    folders: list[str | None] = [None] * num_classes
    for path, label in zip(train.paths, train.labels.tolist(), strict=True):
        folder = path.rpartition("/")[0].rpartition("/")[2]
        if folders[label] not in (None, folder):
            return [None] * num_classes
        folders[label] = folder
    return folders
