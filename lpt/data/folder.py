"""Your own images: class folders, images with metadata.csv or .jsonl, parquet files, or a dataset of the Hub.

Images are decoded when a batch needs them.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from lpt.data.lists import read_unlabeled
from lpt.data.longtail import usual_group_rule
from lpt.data.preprocess import decoded
from lpt.data.tables import PART_NAMES, EncodedPart, metadata, read_metadata, read_tables
from lpt.data.task import Files, Task, hold_out, rows_by_class
from lpt.errors import DataError
from lpt.settings import Count, Seed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2")
"""What is an image by its name; other files in a folder are passed over."""
UNLABELED_FOLDERS = ("unlabeled", "unlabelled")
"""How a folder of unlabeled images beside train/ may be called."""

RelativePath = tuple[str, ...]
"""A path below a root by its components: folders from the outside in, then the file."""


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

    Without a test part the val part is the test set; without both, a share `test_share` of each class is split off by
    `seed`, and a class with one image keeps it for training. `val_per_class` holds out training images where there is
    no val part. Groups are many/medium/few by count where none of them is empty, else rank thirds. A file that cannot
    be decoded ends a run when a batch needs it; `on_error=skip` decodes every file first and goes on without those.

    `unlabeled` is a folder with images at any depth, by default ROOT/unlabeled/ where it lies beside train/. An image
    whose topmost folder there bears the name of a class has that class as its truth, for audits alone. It may also be a
    list with a path a line, below the list's own folder, and after a space perhaps the number of the class.
    Raises DataError.
    """
    if root is None:
        raise DataError("data.root is missing: give a folder with one folder of images for each class")
    parts = _read_parts(root, unlabeled, image_column, label_column)
    if "train" not in parts:
        raise DataError(f"data.root {root} has no training part, only {', '.join(parts) or 'nothing'}")
    classes = _class_names(parts, root)
    if unlabeled:
        parts["unlabeled"] = _read_unlabeled_part(unlabeled, classes)
    images = {role: _to_files(root, role, part, classes) for role, part in parts.items()}
    skipped: list[str] = []
    if on_error == "skip":
        images, skipped = _without_broken(images, root)

    train, val, test, test_part = _with_test_part(images, root, test_share, seed)
    if val is None and val_per_class:
        train, val = _with_val_part(train, root, val_per_class, seed)

    facts = {"variant": Path(root).resolve().name, "profile": "natural", "seed": seed, "test_part": test_part}
    return Task(
        name="folder",
        classes=tuple(classes),
        train=train,
        val=val,
        test=test,
        unlabeled=images.get("unlabeled"),
        group_rule=usual_group_rule(torch.bincount(train.labels, minlength=len(classes))),
        facts=facts | _amiss(root, parts, skipped, test, images.get("unlabeled")),
    )


# Reading: which parts there are, and which images are in each.


def _read_parts(
    root: str, unlabeled: str | None, image_column: str | None, label_column: str | None
) -> dict[str, EncodedPart]:
    """The parts train, val, test and unlabeled that `root`, a folder or a Hub id, has."""
    root_folder = Path(root)
    if root_folder.is_dir():
        images = list(_image_paths(root_folder, without=_unlabeled_folder(root_folder, unlabeled)))
        if images:
            return _read_folders(root_folder, images, label_column)
        if any(root_folder.rglob("*.parquet")):
            return read_tables(root, image_column, label_column)
        raise DataError(f"data.root {root} holds no image ({', '.join(SUFFIXES)}) and no parquet file")
    if root_folder.exists():
        raise DataError(f"data.root {root} is a file: give the folder that it lies in")
    owner, _, name = root.partition("/")
    is_hub_id = owner and name and "/" not in name and not root.startswith((".", "~"))
    if is_hub_id:
        return read_tables(root, image_column, label_column)
    raise DataError(f"data.root {root} does not exist")


def _unlabeled_folder(root: Path, unlabeled: str | None) -> Path | None:
    """The folder of unlabeled images, which is no class where it lies inside root.

    None where it is root itself or one of its parts: these may serve as unlabeled images too, and stay what they are.
    """
    if unlabeled is None or os.path.realpath(unlabeled) == os.path.realpath(root):
        return None
    folder = Path(unlabeled)
    return folder if _role_called(folder.name) is None else None


def _role_called(name: str) -> str | None:
    """The part that a folder of this name may be: train, val or test."""
    for role, names in PART_NAMES.items():
        if name.lower() in names:
            return role
    return None


def _image_paths(top: Path, *, without: Path | None = None) -> Iterator[RelativePath]:
    """Image files below `top` in order of name; hidden ones and the folder `without` are passed over, links are
    followed."""
    visited = {os.path.realpath(without)} if without else set[str]()
    for here, folders, files in os.walk(top, onerror=_raise_unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:  # a link to where the walk has been, or `without`
            folders.clear()
            continue
        visited.add(real)
        # os.walk goes on with what is left in this very list, in this order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (*Path(here).relative_to(top).parts, name)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(
        f"folder {error.filename} cannot be read ({error.strerror}): give yourself the right, or move it away"
    )


def _read_folders(root: Path, images: list[RelativePath], label_column: str | None) -> dict[str, EncodedPart]:
    """The parts of a folder of images: train, val, test and unlabeled where it has such folders, else all as train."""
    by_folder: dict[str, list[RelativePath]] = {}
    for path in images:
        if len(path) > 1:
            by_folder.setdefault(path[0], []).append(path)
    folders_by_role = _folders_by_role(root, by_folder)
    if "train" not in folders_by_role or metadata(root):
        return {"train": _read_part(root, root, images, label_column)}
    for names in folders_by_role.values():
        if len(names) > 1:
            raise DataError(f"data.root {root} has two folders for one part, {' and '.join(names)}: keep one of them")
    folder_of = {role: names[0] for role, names in folders_by_role.items()}
    others = sorted(by_folder.keys() - set(folder_of.values()))
    if others:
        raise DataError(
            f"data.root {root} has parts ({', '.join(folder_of.values())}) and beside them {others[0]}, "
            "which holds images too: move it elsewhere"
        )
    unlabeled = folder_of.pop("unlabeled", None)
    parts = {role: _read_part(root, root / name, by_folder[name], label_column) for role, name in folder_of.items()}
    if unlabeled:
        parts["unlabeled"] = _read_unlabeled_part(str(root / unlabeled), ())
    return parts


def _folders_by_role(root: Path, by_folder: Mapping[str, Sequence[RelativePath]]) -> dict[str, list[str]]:
    """Which folders in `root` are called as a part and are one.

    A folder called train may be a part or a class. It is a part where images lie one folder deeper, in class folders,
    or where a metadata file describes them.
    """
    folders: dict[str, list[str]] = {}
    for name, images in by_folder.items():
        role = _role_called(name)
        has_class_folders = any(len(path) > 2 for path in images)
        if role and (has_class_folders or metadata(root / name)):
            folders.setdefault(role, []).append(name)
        if name.lower() in UNLABELED_FOLDERS:
            folders.setdefault("unlabeled", []).append(name)
    return folders


def _read_part(root: Path, part: Path, images: list[RelativePath], label_column: str | None) -> EncodedPart:
    """The `images` of folder `part`, root itself or one inside it; classes are from its metadata file, or else its
    folders. Ids are paths from `root`."""
    table = metadata(part)
    if table:
        listed, class_names = read_metadata(table, label_column)
        files = [_below(root, path) for path in listed]
    else:
        depth = len(part.relative_to(root).parts)  # where in a path the class folder stands
        in_class_folders = [path for path in images if len(path) > depth + 1]
        files = [root.joinpath(*path) for path in in_class_folders]
        class_names = [path[depth] for path in in_class_folders]
        _check_class_folders(part, class_names)
    ids = [_path_from(root, path) for path in files]
    with_class = set(ids)
    left_out = [name for name in map("/".join, images) if name not in with_class]
    return _part_of_files([str(path) for path in files], ids, class_names, left_out)


def _check_class_folders(part: Path, class_names: Sequence[str]) -> None:
    if not class_names:
        raise DataError(f"data.root {part} has images, but no class folders with images in them")
    for name in class_names:
        if name.lower() in UNLABELED_FOLDERS:
            raise DataError(
                f"data.root {part} has {name} among its class folders: set data.unlabeled={part / name} if its "
                "images have no label, or give the class another name"
            )


def _below(root: Path, path: Path) -> Path:
    """`path` as one that starts with `root` where it lies below it: a table may name files by absolute paths, and root
    may be relative to the working directory."""
    absolute_root = root.absolute()
    if path.is_absolute() and path.is_relative_to(absolute_root):
        return root / path.relative_to(absolute_root)
    return path


def _path_from(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _read_unlabeled_part(source: str, classes: Sequence[str]) -> EncodedPart:
    """Images of the folder `source` at any depth, or of the list `source`. Their class is the topmost folder, or the
    label in the list as one of `classes`, and an empty text where there is none.

    Raises DataError.
    """
    if os.path.isdir(source):
        root = Path(source)
        images = list(_image_paths(root))
        ids = ["/".join(path) for path in images]
        class_names = [path[0] if len(path) > 1 else "" for path in images]
        if not images:
            raise DataError(f"data.unlabeled {source} holds no image ({', '.join(SUFFIXES)})")
    elif os.path.isfile(source):
        root = Path(source).parent
        ids, labels = read_unlabeled(Path(source), len(classes))
        names = [*classes, ""]  # label -1, an unknown class, indexes the last
        class_names = [names[label] for label in labels.tolist()]
        missing = [name for name in ids if not os.path.isfile(root / name)]
        if missing:
            raise DataError(
                f"list {source} names {len(missing)} files that are not there, the first is {missing[0]}: its paths "
                f"start at {root}"
            )
    else:
        raise DataError(f"data.unlabeled {source} does not exist: give a folder of images, or a list of them")
    return _part_of_files([str(root / name) for name in ids], ids, class_names)


def _part_of_files(
    paths: Sequence[str], ids: list[str], class_names: list[str], left_out: Sequence[str] = ()
) -> EncodedPart:
    """A part of image files; the fingerprint of each is its size, the stamp a hash of when all were written.

    Raises DataError.
    """
    try:
        status = [os.stat(path) for path in paths]
    except OSError as error:
        raise DataError(f"image {error.filename} cannot be read ({error.strerror}): move it away") from None
    sizes = [str(file.st_size) for file in status]
    written = " ".join(str(file.st_mtime_ns) for file in status)
    stamp = hashlib.sha256(written.encode()).hexdigest()
    return EncodedPart(lambda i: paths[i], ids, class_names, sizes, stamp, left_out=left_out)


# From parts to a task.


def _class_names(parts: Mapping[str, EncodedPart], root: str) -> list[str]:
    """The classes of all labeled parts: in the dataset's own order, or sorted where it has none, numbers as numbers."""
    used: set[str] = set()
    for role, part in parts.items():
        if role != "unlabeled":
            used.update(part.class_names)
    _check_spellings(used, root)
    own_order = parts["train"].class_order
    if used <= set(own_order):
        return list(own_order)
    numbers = {name for name in used if name.isdecimal()}
    return sorted(numbers, key=lambda name: (int(name), name)) + sorted(used - numbers)


def _check_spellings(names: set[str], root: str) -> None:
    """Raises DataError for two classes whose names differ in case, underscores or Unicode form alone."""
    known: dict[str, str] = {}
    for name in sorted(names):
        key = unicodedata.normalize("NFKC", name).casefold().replace("_", " ").strip()
        if key in known:
            raise DataError(
                f"data.root {root}: classes {known[key]!r} and {name!r} are one in two spellings: rename one"
            )
        known[key] = name


def _to_files(root: str, role: str, part: EncodedPart, classes: list[str]) -> Files:
    """A part with classes as numbers; -1 where a name is no class, as in the unlabeled part alone."""
    if len(set(part.ids)) < len(part.ids):
        twice = next(name for name in part.ids if part.ids.count(name) > 1)
        raise DataError(f"the {role} part of data.root {root} lists an image twice: {twice}")
    label_of = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([label_of.get(name, -1) for name in part.class_names])
    return Files(part.source, labels, tuple(part.ids), tuple(part.fingerprints), part.stamp)


def _without_broken(images: Mapping[str, Files], root: str) -> tuple[dict[str, Files], list[str]]:
    """(the parts without the images that cannot be decoded, an error for each of these).

    Raises DataError where nothing is left to train on.
    """
    needed = {"train": "training", "unlabeled": "unlabelled"}
    decodable: dict[str, Files] = {}
    all_errors: list[str] = []
    for role, files in images.items():
        errors = _decoding_errors(files)
        all_errors += [error for error in errors if error]
        decodable[role] = files.subset([i for i, error in enumerate(errors) if not error])
        if role in needed and len(decodable[role]) == 0:
            raise DataError(
                f"data.root {root} has no {needed[role]} image that can be decoded, for example: {all_errors[-1]}"
            )
    return decodable, all_errors


def _decoding_errors(files: Files) -> list[str]:
    """For each image what is wrong with it, or an empty text; all are decoded once, in threads."""

    def error_of(i: int) -> str:
        try:
            decoded(*files.take(torch.tensor([i])))
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return list(pool.map(error_of, range(len(files))))


def _with_test_part(
    images: Mapping[str, Files], root: str, test_share: float, seed: int
) -> tuple[Files, Files | None, Files, str]:
    """(training, val, test, what the test part is): a test part as given, or else the val part, or else split off."""
    train, val, test = images["train"], images.get("val"), images.get("test")
    test_part = "as given"
    if test is None and val is not None:
        test, val = val, None
        test_part = "the val part is the test set"
    elif test is None:
        train, test = _split_off(train, test_share, seed)
        test_part = f"{test_share:g} of each class split off as test set with seed {seed}"
    assert test is not None
    if len(test) == 0:
        raise DataError(f"data.root {root} has no image to test on: a class needs two images to give one away")
    return train, val, test, test_part


def _split_off(files: Files, share: float, seed: int) -> tuple[Files, Files]:
    """(training, test): of each class round(share · n) images, at least one where there are two or more."""
    rng = np.random.default_rng((seed, 13))
    by_id = np.argsort(np.array(files.ids))  # not the file system's order
    test: list[int] = []
    for rows in rows_by_class(by_id, files.labels.numpy()).values():
        shuffled = rng.permutation(rows)
        size = max(round(share * len(rows)), 1)
        test += shuffled[: min(size, len(rows) - 1)].tolist()
    train = sorted(set(range(len(files))) - set(test))
    return files.subset(train), files.subset(sorted(test))


def _with_val_part(train: Files, root: str, val_per_class: int, seed: int) -> tuple[Files, Files]:
    """(training, val) from training images, of which each class keeps one."""
    rows = np.arange(len(train))
    remaining, held_out = hold_out(rows, rows, train.labels.numpy(), val_per_class, seed)
    if len(held_out) == 0:
        raise DataError(f"data.val_per_class {val_per_class}: no class of {root} has a second training image to give")
    return train.subset(remaining.tolist()), train.subset(held_out.tolist())


def _amiss(
    root: str, parts: Mapping[str, EncodedPart], skipped: list[str], test: Files, unlabeled: Files | None
) -> dict[str, list[str]]:
    """What a run warns of (`lpt.data.task.WARNINGS`), where there is any."""
    left_out: list[str] = []
    for part in parts.values():
        left_out += part.left_out
    lists = {
        "left_out": left_out,
        "empty_folders": _empty_folders(Path(root)),
        "skipped": skipped,
        "leaked": _same_files(test, unlabeled) if unlabeled else [],
    }
    return {fact: names for fact, names in lists.items() if names}


def _empty_folders(root: Path) -> list[str]:
    """Folders without a visible file or folder in them, which somebody may have meant as classes."""
    empty: list[str] = []
    for here, folders, files in os.walk(root):
        is_empty = all(name.startswith(".") for name in [*folders, *files])
        if is_empty and Path(here) != root:
            empty.append(str(Path(here).relative_to(root)))
    return sorted(empty)


def _same_files(test: Files, unlabeled: Files) -> list[str]:
    """Ids of unlabeled images whose file is a test image's too, by whatever path; images in tables have no file."""
    first = test.source(0)
    if isinstance(first, bytes) or not os.path.isfile(first):
        return []

    def inode(images: Files, i: int) -> tuple[int, int]:
        status = os.stat(images.source(i))
        return status.st_dev, status.st_ino

    tested = {inode(test, i) for i in range(len(test))}
    return [unlabeled.ids[i] for i in range(len(unlabeled)) if inode(unlabeled, i) in tested]
