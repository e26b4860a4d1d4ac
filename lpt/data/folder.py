"""Your own images: class folders, images with metadata.csv or .jsonl, parquet files, or a dataset of the Hub.

Images are decoded when a batch needs them.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from lpt.data.tables import PARTS, Part, metadata, read_metadata, read_tables
from lpt.data.task import Count, Files, Task, hold_out
from lpt.errors import DataError
from lpt.longtail import shot_groups
from lpt.preprocess import decoded

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2")
"""What is an image by its name; other files in a folder are passed over."""


def folder(
    root: str | None = None,
    *,
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    seed: Count = 0,
    val_per_class: Count = 0,
    on_error: Literal["raise", "skip"] = "raise",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Your own images: ROOT/<class>/*.jpg, also inside train/, val/ and test/; metadata.csv; parquet; a Hub id.

    Without a test part (nor a val part, which then serves as one) a stratified share of `test_share` is split off with
    `seed`; a class with one image keeps it for training. `val_per_class` holds out training images where there is no
    val part. Groups are many/medium/few by count where none of them is empty, else rank thirds. A file that cannot be
    decoded ends a run when a batch needs it; `on_error=skip` decodes every file first and goes on without those.
    """
    if root is None:
        raise DataError("data.root is missing: give a folder with one folder of images for each class")
    parts = _read(root, image_column, label_column)
    if "train" not in parts:
        raise DataError(f"data.root {root} has no training part, only {', '.join(parts) or 'nothing'}")
    used = {name for part in parts.values() for name in part.names}
    _same_but_for_spelling(used, root)
    classes = _in_order(parts["train"].order, used)
    made = {role: _files(root, part, classes) for role, part in parts.items()}
    broken: list[str] = []
    if on_error == "skip":
        for role, files in made.items():
            errors = _errors(files)
            broken += [error for error in errors if error]
            made[role] = files.subset([i for i, error in enumerate(errors) if not error])
        if len(made["train"]) == 0:
            raise DataError(f"data.root {root} has no training image that can be decoded, for example: {broken[0]}")
    train, val, test, split = made["train"], made.get("val"), made.get("test"), "as given"
    if test is None and val is not None:
        test, val, split = val, None, "the val part is the test set"
    if test is None:
        train, test = _split_off(train, test_share, seed)
        split = f"{test_share:g} of each class split off as test set with seed {seed}"
    if len(test) == 0:
        raise DataError(f"data.root {root} has no image to test on: a class needs two images to give one away")
    if val is None and val_per_class:
        every = np.arange(len(train))
        kept, held = hold_out(every, every, train.labels.numpy(), val_per_class, seed)
        if len(held) == 0:
            raise DataError(
                f"data.val_per_class {val_per_class}: no class of {root} has a second training image to give"
            )
        train, val = train.subset(kept.tolist()), train.subset(held.tolist())
    counts = torch.bincount(train.labels, minlength=len(classes))
    rule = "lt20" if all(len(group) for group in shot_groups(counts).values()) else "thirds"
    amiss = {
        "left_out": [name for part in parts.values() for name in part.left_out],
        "empty_folders": _empty_folders(Path(root)),
        "skipped": broken,
    }
    facts = {"variant": Path(root).resolve().name, "profile": "natural", "seed": seed, "test_part": split}
    return Task(
        name="folder",
        classes=tuple(classes),
        train=train,
        val=val,
        test=test,
        group_rule=rule,
        facts=facts | {what: names for what, names in amiss.items() if names},
    )


def _errors(files: Files) -> list[str]:
    """For each image what is wrong with it, or an empty text; all are decoded once, in threads."""

    def one(i: int) -> str:
        try:
            decoded(*files.take(torch.tensor([i])))
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(len(files))))


def _empty_folders(place: Path) -> list[str]:
    """Folders with nothing to see in them, which somebody may have meant as classes."""
    found = ((Path(here), [*folders, *files]) for here, folders, files in os.walk(place) if Path(here) != place)
    return sorted(str(here.relative_to(place)) for here, names in found if all(n.startswith(".") for n in names))


def _read(root: str, image_column: str | None, label_column: str | None) -> dict[str, Part]:
    """The parts train, val and test that are there."""
    place = Path(root)
    if place.is_dir():
        images = list(_images(place))
        if not images and any(place.rglob("*.parquet")):
            return read_tables(root, image_column, label_column)
        if not images:
            raise DataError(f"data.root {root} holds no image ({', '.join(SUFFIXES)}) and no parquet file")
        return _folders(place, images, label_column)
    if place.exists():
        raise DataError(f"data.root {root} is a file: give the folder that it lies in")
    if root.count("/") == 1 and not root.startswith((".", "/", "~")):
        return read_tables(root, image_column, label_column)
    raise DataError(f"data.root {root} does not exist")


# Folders of images.


def _images(place: Path) -> Iterator[tuple[str, ...]]:
    """Image files below `place` as path parts, in order of name; hidden ones are passed over, links are followed."""
    seen: set[str] = set()
    for here, folders, files in os.walk(place, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (*Path(here).relative_to(place).parts, name)


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"folder {error.filename} cannot be read ({error.strerror}): give yourself the right, or move it away"
    )


def _folders(place: Path, images: list[tuple[str, ...]], label_column: str | None) -> dict[str, Part]:
    """A folder called train may be a part or a class: it is a part where images lie one folder deeper, or where a
    metadata file describes them."""
    inside: dict[str, list[tuple[str, ...]]] = {}
    for parts in images:
        if len(parts) > 1:
            inside.setdefault(parts[0], []).append(parts)
    roles: dict[str, list[str]] = {}
    for name, own in inside.items():
        role = next((r for r, names in PARTS.items() if name.lower() in names), None)
        if role and (metadata(place / name) or any(len(parts) > 2 for parts in own)):
            roles.setdefault(role, []).append(name)
    if "train" not in roles or metadata(place):
        return {"train": _part(place, place, images, label_column)}
    if double := [names for names in roles.values() if len(names) > 1]:
        raise DataError(f"data.root {place} has two folders for one part, {' and '.join(double[0])}: keep one of them")
    if others := sorted(inside.keys() - {names[0] for names in roles.values()}):
        raise DataError(
            f"data.root {place} has parts ({', '.join(n[0] for n in roles.values())}) and beside them {others[0]}, "
            "which holds images too: move it elsewhere"
        )
    return {role: _part(place, place / names[0], inside[names[0]], label_column) for role, names in roles.items()}


def _part(root: Path, place: Path, images: list[tuple[str, ...]], label_column: str | None) -> Part:
    depth = len(place.relative_to(root).parts)
    if table := metadata(place):
        files, names = read_metadata(table, label_column)
        listed = {path.relative_to(root).as_posix() for path in files if path.is_relative_to(root)}
        left_out = ["/".join(parts) for parts in images if "/".join(parts) not in listed]
    else:
        inside = [parts for parts in images if len(parts) > depth + 1]
        left_out = ["/".join(parts) for parts in images if len(parts) <= depth + 1]
        files, names = [root.joinpath(*parts) for parts in inside], [parts[depth] for parts in inside]
        if not files:
            raise DataError(f"data.root {place} has images, but no class folders with images in them")
    ids = [path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in files]
    facts = [os.stat(path) for path in files]
    stamp = hashlib.sha256(" ".join(str(f.st_mtime_ns) for f in facts).encode()).hexdigest()
    paths = [str(path) for path in files]
    return Part(lambda i: paths[i], ids, names, [str(f.st_size) for f in facts], stamp, (), left_out)


# From parts to a task.


def _same_but_for_spelling(names: set[str], root: str) -> None:
    known: dict[str, str] = {}
    for name in sorted(names):
        key = unicodedata.normalize("NFKC", name).casefold().replace("_", " ").strip()
        if key in known:
            raise DataError(
                f"data.root {root}: classes {known[key]!r} and {name!r} are one in two spellings: rename one"
            )
        known[key] = name


def _in_order(order: Sequence[str], used: set[str]) -> list[str]:
    """The dataset's own order of its classes; sorted where it has none, numbers as numbers."""
    if used <= set(order):
        return list(order)
    return sorted(used, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _files(root: str, part: Part, classes: list[str]) -> Files:
    if len(set(part.ids)) < len(part.ids):
        twice = next(name for name in part.ids if part.ids.count(name) > 1)
        raise DataError(f"data.root {root} lists an image twice: {twice}")
    index = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([index[name] for name in part.names])
    return Files(part.source, labels, tuple(part.ids), tuple(part.prints), part.stamp)


def _split_off(files: Files, share: float, seed: int) -> tuple[Files, Files]:
    """(training, test): of each class round(share · n) images, at least one where there are two or more."""
    rng = np.random.default_rng((seed, 13))
    by_id = np.argsort(np.array(files.ids))  # not the file system's order
    labels = files.labels.numpy()
    test: list[int] = []
    for k in np.unique(labels):
        own = rng.permutation(by_id[labels[by_id] == k])
        test += own[: min(max(round(share * len(own)), 1), len(own) - 1)].tolist()
    kept = sorted(set(range(len(files))) - set(test))
    return files.subset(kept), files.subset(sorted(test))
