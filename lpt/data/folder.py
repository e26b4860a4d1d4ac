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

from lpt.data.lists import read_unlabeled
from lpt.data.longtail import shot_groups
from lpt.data.preprocess import decoded
from lpt.data.tables import PART_NAMES, EncodedPart, metadata, read_metadata, read_tables
from lpt.data.task import Files, Task, hold_out, rows_by_class
from lpt.errors import DataError
from lpt.settings import Count, Seed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2")
"""What is an image by its name; other files in a folder are passed over."""
UNLABELED = ("unlabeled", "unlabelled")


def folder(
    root: str | None = None,
    *,
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    seed: Seed = 0,
    val_per_class: Count = 0,
    unlabeled: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    image_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Your own images: ROOT/<class>/*.jpg, also inside train/, val/ and test/; metadata.csv; parquet; a Hub id.

    Without a test part (nor a val part, which then serves as one) a stratified share of `test_share` is split off with
    `seed`; a class with one image keeps it for training. `val_per_class` holds out training images where there is no
    val part. Groups are many/medium/few by count where none of them is empty, else rank thirds. A file that cannot be
    decoded ends a run when a batch needs it; `on_error=skip` decodes every file first and goes on without those.

    `unlabeled` is a folder with images at any depth, by default ROOT/unlabeled/ where it lies beside train/. An image
    whose topmost folder there is called as a class keeps that as its truth, for audits only. It may also be a list: a
    path a line that starts at the list's own folder, then perhaps a space and the number of the class in their order.
    """
    if root is None:
        raise DataError("data.root is missing: give a folder with one folder of images for each class")
    parts = _read(root, unlabeled, image_column, label_column)
    if "train" not in parts:
        raise DataError(f"data.root {root} has no training part, only {', '.join(parts) or 'nothing'}")
    used = {name for role, part in parts.items() if role != "unlabeled" for name in part.names}
    _same_but_for_spelling(used, root)
    classes = _in_order(parts["train"].order, used)
    if unlabeled:
        parts["unlabeled"] = _unlabeled(unlabeled, classes)
    made = {role: _files(root, role, part, classes) for role, part in parts.items()}
    broken: list[str] = []
    if on_error == "skip":
        for role, files in made.items():
            errors = _errors(files)
            broken += [error for error in errors if error]
            made[role] = files.subset([i for i, error in enumerate(errors) if not error])
            word = {"train": "training", "unlabeled": "unlabelled"}.get(role)
            if word and len(made[role]) == 0:
                raise DataError(f"data.root {root} has no {word} image that can be decoded, for example: {broken[-1]}")
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
        "leaked": _same_files(test, made["unlabeled"]) if "unlabeled" in made else [],
    }
    facts = {"variant": Path(root).resolve().name, "profile": "natural", "seed": seed, "test_part": split}
    return Task(
        name="folder",
        classes=tuple(classes),
        train=train,
        val=val,
        test=test,
        unlabeled=made.get("unlabeled"),
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


def _read(
    root: str, unlabeled: str | None, image_column: str | None, label_column: str | None
) -> dict[str, EncodedPart]:
    """The parts train, val, test and unlabeled that are there."""
    place = Path(root)
    if place.is_dir():
        images = list(_images(place, without=_apart(place, unlabeled)))
        if not images and any(place.rglob("*.parquet")):
            return read_tables(root, image_column, label_column)
        if not images:
            raise DataError(f"data.root {root} holds no image ({', '.join(SUFFIXES)}) and no parquet file")
        return _folders(place, images, label_column)
    if place.exists():
        raise DataError(f"data.root {root} is a file: give the folder that it lies in")
    owner, _, name = root.partition("/")
    if owner and name and "/" not in name and not root.startswith((".", "~")):
        return read_tables(root, image_column, label_column)
    raise DataError(f"data.root {root} does not exist")


def _apart(root: Path, unlabeled: str | None) -> Path | None:
    """A folder of unlabelled images, which is no class if it lies inside root; root and its parts may serve as one."""
    if unlabeled is None or os.path.realpath(unlabeled) == os.path.realpath(root):
        return None
    name = Path(unlabeled).name.lower()
    return None if any(name in names for names in PART_NAMES.values()) else Path(unlabeled)


# Folders of images.


def _images(place: Path, *, without: Path | None = None) -> Iterator[tuple[str, ...]]:
    """Image files below `place` as path parts, in order of name; hidden ones and the folder `without` are passed over,
    links are followed."""
    seen = {os.path.realpath(without)} if without else set[str]()
    for here, folders, files in os.walk(place, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to where we have been, or `without`
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


def _folders(place: Path, images: list[tuple[str, ...]], label_column: str | None) -> dict[str, EncodedPart]:
    """A folder called train may be a part or a class: it is a part where images lie one folder deeper, or where a
    metadata file describes them. Beside train a folder called unlabeled is a part too."""
    inside: dict[str, list[tuple[str, ...]]] = {}
    for parts in images:
        if len(parts) > 1:
            inside.setdefault(parts[0], []).append(parts)
    roles: dict[str, list[str]] = {}
    for name, own in inside.items():
        role = next((r for r, names in PART_NAMES.items() if name.lower() in names), None)
        if role and (metadata(place / name) or any(len(parts) > 2 for parts in own)):
            roles.setdefault(role, []).append(name)
        if name.lower() in UNLABELED:
            roles.setdefault("unlabeled", []).append(name)
    if "train" not in roles or metadata(place):
        return {"train": _part(place, place, images, label_column)}
    if double := [names for names in roles.values() if len(names) > 1]:
        raise DataError(f"data.root {place} has two folders for one part, {' and '.join(double[0])}: keep one of them")
    if others := sorted(inside.keys() - {names[0] for names in roles.values()}):
        raise DataError(
            f"data.root {place} has parts ({', '.join(n[0] for n in roles.values())}) and beside them {others[0]}, "
            "which holds images too: move it elsewhere"
        )
    loose = roles.pop("unlabeled", None)
    found = {role: _part(place, place / name, inside[name], label_column) for role, (name,) in roles.items()}
    return found | {"unlabeled": _unlabeled(str(place / loose[0]), ())} if loose else found


def _part(root: Path, place: Path, images: list[tuple[str, ...]], label_column: str | None) -> EncodedPart:
    depth = len(place.relative_to(root).parts)
    if table := metadata(place):
        files, names = read_metadata(table, label_column)
        files = [_below(root, path) for path in files]
        listed = {path.relative_to(root).as_posix() for path in files if path.is_relative_to(root)}
        left_out = ["/".join(parts) for parts in images if "/".join(parts) not in listed]
    else:
        inside = [parts for parts in images if len(parts) > depth + 1]
        left_out = ["/".join(parts) for parts in images if len(parts) <= depth + 1]
        files, names = [root.joinpath(*parts) for parts in inside], [parts[depth] for parts in inside]
        if not files:
            raise DataError(f"data.root {place} has images, but no class folders with images in them")
        if loose := next((name for name in names if name.lower() in UNLABELED), None):
            raise DataError(
                f"data.root {place} has {loose} among its class folders: set data.unlabeled={place / loose} if its "
                "images have no label, or give the class another name"
            )
    ids = [path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in files]
    paths = [str(path) for path in files]
    return EncodedPart(lambda i: paths[i], ids, names, *_fingerprints(paths), (), left_out)


def _below(root: Path, path: Path) -> Path:
    """`path` as one that starts with `root` where it lies below it: a table may name files by absolute paths, and root
    may be relative to the working directory."""
    if path.is_absolute() and path.is_relative_to(whole := root.absolute()):
        return root / path.relative_to(whole)
    return path


def _unlabeled(given: str, classes: Sequence[str]) -> EncodedPart:
    """Images of a folder at any depth, or of a list; `names` hold folders or classes, and nothing where there is none.

    Raises DataError.
    """
    place = Path(given)
    if os.path.isdir(given):
        images = list(_images(place))
        ids, names = ["/".join(parts) for parts in images], [parts[0] if len(parts) > 1 else "" for parts in images]
        if not images:
            raise DataError(f"data.unlabeled {given} holds no image ({', '.join(SUFFIXES)})")
    elif os.path.isfile(given):
        place = place.parent
        ids, labels = read_unlabeled(Path(given), len(classes))
        known = [*classes, ""]  # the last, -1, is an unknown label
        names = [known[k] for k in labels.tolist()]
        if missing := [name for name in ids if not os.path.isfile(place / name)]:
            raise DataError(
                f"list {given} names {len(missing)} files that are not there, the first is {missing[0]}: its paths "
                f"start at {place}"
            )
    else:
        raise DataError(f"data.unlabeled {given} does not exist: give a folder of images, or a list of them")
    paths = [str(place / name) for name in ids]
    return EncodedPart(lambda i: paths[i], ids, names, *_fingerprints(paths))


def _fingerprints(paths: Sequence[str]) -> tuple[list[str], str]:
    """(the size of each file, a stamp of when they were written). Raises DataError."""
    try:
        facts = [os.stat(path) for path in paths]
    except OSError as error:
        raise DataError(f"image {error.filename} cannot be read ({error.strerror}): move it away") from None
    written = " ".join(str(f.st_mtime_ns) for f in facts)
    return [str(f.st_size) for f in facts], hashlib.sha256(written.encode()).hexdigest()


def _same_files(test: Files, unlabeled: Files) -> list[str]:
    """Ids of unlabelled images whose file is a test image's too, by whatever path; images in tables have no file."""
    first = test.source(0)
    if isinstance(first, bytes) or not os.path.isfile(first):
        return []

    def file(images: Files, i: int) -> tuple[int, int]:
        found = os.stat(images.source(i))
        return found.st_dev, found.st_ino

    tested = {file(test, i) for i in range(len(test))}
    return [unlabeled.ids[i] for i in range(len(unlabeled)) if file(unlabeled, i) in tested]


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


def _files(root: str, role: str, part: EncodedPart, classes: list[str]) -> Files:
    """A part with classes as numbers; -1 where a name is none, as in the unlabelled part alone."""
    if len(set(part.ids)) < len(part.ids):
        twice = next(name for name in part.ids if part.ids.count(name) > 1)
        raise DataError(f"the {role} part of data.root {root} lists an image twice: {twice}")
    index = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([index.get(name, -1) for name in part.names])
    return Files(part.source, labels, tuple(part.ids), tuple(part.fingerprints), part.stamp)


def _split_off(files: Files, share: float, seed: int) -> tuple[Files, Files]:
    """(training, test): of each class round(share · n) images, at least one where there are two or more."""
    rng = np.random.default_rng((seed, 13))
    by_id = np.argsort(np.array(files.ids))  # not the file system's order
    test: list[int] = []
    for of in rows_by_class(by_id, files.labels.numpy()).values():
        own = rng.permutation(of)
        test += own[: min(max(round(share * len(own)), 1), len(own) - 1)].tolist()
    kept = sorted(set(range(len(files))) - set(test))
    return files.subset(kept), files.subset(sorted(test))
