"""Your own images: a folder of class folders, a folder with metadata.csv or .jsonl, parquet files, or a Hub dataset.

All are read through `datasets`; images are decoded when a batch needs them.
"""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from lpt.data.task import Count, Files, Task, hold_out
from lpt.errors import DataError, did_you_mean
from lpt.longtail import shot_groups

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


def folder(
    root: str | None = None,
    *,
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    seed: Count = 0,
    val_per_class: Count = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """Your own images: ROOT/<class>/*.jpg, also inside train/, val/ and test/; metadata.csv; parquet; a Hub id.

    Without a test part (nor a val part, which then serves as one) a stratified share of `test_share` is split off with
    `seed`; a class with one image keeps it for training. Groups are many/medium/few by count where none of them is
    empty, else rank thirds.
    """
    if root is None:
        raise DataError("data.root is missing: give a folder with one folder of images for each class")
    found = _read(root)
    if "train" not in found:
        raise DataError(f"data.root {root} has no training part, only {', '.join(found)}")
    parts = {role: _part(root, role, rows, image_column, label_column) for role, rows in found.items()}
    classes = _in_order(parts["train"].order, {name for part in parts.values() for name in part.names})
    made = {role: _files(part, classes) for role, part in parts.items()}
    train, val, test, split = made["train"], made.get("val"), made.get("test"), "as given"
    if test is None and val is not None:
        test, val, split = val, None, "the val part is the test set"
    if test is None:
        train, test = _split_off(train, test_share, seed)
        split = f"{test_share:g} of each class split off as test set with seed {seed}"
    if val is None and val_per_class:
        kept, held = hold_out(np.arange(len(train)), np.arange(len(train)), train.labels.numpy(), val_per_class, seed)
        train, val = train.subset(kept.tolist()), train.subset(held.tolist())
    counts = torch.bincount(train.labels, minlength=len(classes))
    rule = "lt20" if all(len(group) for group in shot_groups(counts).values()) else "thirds"
    return Task(
        name="folder",
        classes=tuple(classes),
        train=train,
        val=val,
        test=test,
        group_rule=rule,
        facts={"variant": Path(root).name, "profile": "natural", "seed": seed, "test_part": split},
    )


class Part(NamedTuple):
    """Rows of `datasets` with encoded images in `column`, an id and a class name for each, and the names' own order."""

    rows: Any
    column: str
    ids: list[str]
    names: list[str]
    order: list[str]


def _read(root: str) -> dict[str, Any]:
    """The parts train, val and test that are there, as `datasets` reads them."""
    import datasets
    from datasets.exceptions import DatasetsError

    place = Path(root)
    quiet = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if place.is_dir():
            found = _open_folder(place)
        elif place.exists():
            raise DataError(f"data.root {root} is a file: give the folder that it lies in")
        elif root.count("/") == 1 and not root.startswith((".", "/", "~")):
            found = datasets.load_dataset(root)
        else:
            raise DataError(f"data.root {root} does not exist")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(f"data.root {root} cannot be read as a dataset of images ({reason})") from None
    finally:
        if quiet:
            datasets.enable_progress_bars()
    named = {role: next((n for n in names if n in found), None) for role, names in PARTS.items()}
    return {role: found[name] for role, name in named.items() if name is not None}


def _open_folder(place: Path) -> Any:
    """As `datasets` reads it; which folders are parts is decided here, since a class may be called train or test."""
    import datasets

    tables = sorted(p.name for p in place.rglob("*.parquet"))
    inside = [p for p in sorted(place.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if tables:
        return datasets.load_dataset(str(place))
    roles = {role: p for role, names in PARTS.items() for p in inside if p.name in names}
    if len(roles) == len(inside) and "train" in roles:
        files = {role: f"{p.name}/**" for role, p in roles.items()}
    else:
        files = {"train": "**"}
    described = any(place.rglob("metadata.*"))  # names the classes itself
    return datasets.load_dataset(
        "imagefolder", data_dir=str(place), data_files=files, drop_labels=None if described else False
    )


def _part(root: str, role: str, rows: Any, image_column: str | None, label_column: str | None) -> Part:
    import datasets

    features = rows.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [name for name in ("label", "fine_label", "labels", "class", "category", "species") if name in features]
    image = _column(root, "image", image_column, images + [n for n in ("image", "img") if n in features], features)
    label = _column(root, "label", label_column, labels + usual, features)
    rows = rows.cast_column(image, datasets.Image(decode=False))
    values, kind = rows[label], features[label]
    if any(v is None or v == -1 for v in values):
        raise DataError(f"data.root {root}: {role} has images without a {label}; every image needs a class")
    order = list(kind.names) if isinstance(kind, datasets.ClassLabel) else []
    names = [order[v] for v in values] if order else [str(v) for v in values]
    base = Path(root).resolve()
    ids = []
    for i, cell in enumerate(rows.select_columns(image)):
        path = None if cell[image]["bytes"] else Path(cell[image]["path"])
        inside = path is not None and path.is_relative_to(base)
        ids.append(path.relative_to(base).as_posix() if inside and path else f"{role}/{i:07d}")
    return Part(rows.select_columns(image), image, ids, names, order)


def _column(root: str, what: str, wanted: str | None, found: list[str], features: Any) -> str:
    if wanted is not None and wanted not in features:
        raise DataError(
            f"data.{what}_column {wanted!r} is no column of {root} ({', '.join(features)})"
            f"{did_you_mean(wanted, features)}"
        )
    if wanted is None and not found:
        raise DataError(
            f"data.root {root} has columns {', '.join(features)}: which holds the {what}? Set data.{what}_column"
        )
    return wanted or found[0]


def _in_order(order: list[str], used: set[str]) -> list[str]:
    """The dataset's own order of its classes; sorted where it has none, numbers as numbers."""
    if used <= set(order):
        return order
    return sorted(used, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _files(part: Part, classes: list[str]) -> Files:
    index = {name: k for k, name in enumerate(classes)}
    rows, column = part.rows, part.column

    def source(i: int) -> str | bytes:
        cell = rows[i][column]
        return cell["bytes"] or cell["path"]

    digest = hashlib.sha256(str(rows._fingerprint).encode())
    for cell in rows:
        if not cell[column]["bytes"]:
            facts = os.stat(cell[column]["path"])
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
    labels = torch.tensor([index[name] for name in part.names])
    return Files(source, labels, tuple(part.ids), digest.hexdigest())


def _split_off(files: Files, share: float, seed: int) -> tuple[Files, Files]:
    """(training, test): of each class round(share · n) images, at least one where there are two or more."""
    rng = np.random.default_rng((seed, 13))
    by_id = np.argsort(np.array(files.ids))  # not the file system's order
    test: list[int] = []
    for k in np.unique(files.labels.numpy()):
        own = rng.permutation(by_id[files.labels.numpy()[by_id] == k])
        test += own[: min(max(round(share * len(own)), 1), len(own) - 1)].tolist()
    kept = sorted(set(range(len(files))) - set(test))
    return files.subset(kept), files.subset(sorted(test))
