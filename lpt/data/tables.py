"""Tables of one's own images: metadata.csv or .jsonl beside them, parquet files with the images inside, Hub datasets.

Parquet is read through `datasets`; images are decoded when a batch needs them.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lpt.errors import DataError, LptError, did_you_mean, quoted

PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
"""How a folder, or a split of the Hub, may be called to be each part."""
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "category", "species")
"""Columns that hold images and classes where no type and no setting says which do."""


class EncodedPart(NamedTuple):
    """One part of a dataset as it was read: its encoded images by number, and what is known of each."""

    source: Callable[[int], str | bytes]
    """The path of image i, or its bytes."""
    ids: list[str]
    class_names: list[str]
    """The class of each image."""
    fingerprints: list[str]
    """Of the content of each image, for hashes."""
    stamp: str = ""
    """As in `lpt.data.task.Files`."""
    class_order: Sequence[str] = ()
    """All classes in the dataset's own order, where it has one."""
    left_out: Sequence[str] = ()
    """Images that lie beside these and belong to no class."""
    origin: str = ""
    """Where the part came from: a folder for example."""


def metadata(folder: Path) -> Path | None:
    """The file in `folder` that says which class each image is of, if there is one."""
    for name in METADATA_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def read_metadata(table: Path, label_column: str | None) -> tuple[list[Path], list[str]]:
    """(files, class names) of a metadata file, row by row. Raises DataError."""
    try:
        rows = _rows(table)
        if not rows:
            raise ValueError("it has no rows")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table ({quoted(error)})") from None
    columns: dict[str, None] = {}  # in the order in which rows name them
    for row in rows:
        columns.update(dict.fromkeys(row))
    if "file_name" not in columns:
        raise DataError(f"{table} has columns {quoted(', '.join(columns))}: it needs file_name and a class")
    others = [name for name in columns if name != "file_name"]
    likely = [name for name in LABEL_COLUMNS if name in others]
    if not likely and len(others) == 1:
        likely = others
    label = _column(str(table), "label", label_column, likely, others)
    class_names = [row.get(label) for row in rows]
    _check_class_names(table, label, class_names)
    files = [table.parent / str(row.get("file_name")) for row in rows]
    # Not Path.is_file, which raises OSError for a name that is longer than the file system allows.
    missing = [path for path in files if "\0" in str(path) or not os.path.isfile(path)]
    if missing:
        raise DataError(f"{table} names {len(missing)} files that are not there, the first is {quoted(missing[0])}")
    return files, [str(name) for name in class_names]


def _check_class_names(table: Path, label: str, class_names: Sequence[Any]) -> None:
    empty = sum(name is None or name == "" for name in class_names)
    if empty:
        raise DataError(f"{table} has {empty} rows without a {quoted(label)}; every image needs a class")
    for name in class_names:
        if not isinstance(name, str | int | float):
            raise DataError(f"{table}: {quoted(label)} is to be the name of a class, and not {quoted(name)}")


def _rows(table: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, or of a file with a JSON object a line.

    Raises ValueError, OSError, RecursionError and csv.Error.
    """
    with table.open(encoding="utf-8-sig", newline="") as file:
        if table.suffix == ".csv":
            return _csv_rows(list(csv.reader(file, strict=True)))
        rows = [json.loads(line) for line in file if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object with a value for each column")
    return rows


def _csv_rows(lines: list[list[str]]) -> list[dict[str, Any]]:
    """Rows by the names in the first line; empty lines are passed over. Raises ValueError."""
    if not lines:
        return []
    columns = lines[0]
    if len(set(columns)) < len(columns):
        raise ValueError("two columns have one name")
    rows: list[dict[str, Any]] = []
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        if len(cells) != len(columns):
            raise ValueError(f"row {number} has not as many cells as the first, which has {len(columns)}")
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def read_tables(root: str, image_column: str | None, label_column: str | None) -> dict[str, EncodedPart]:
    """The parts of a folder of parquet files or of a Hub dataset. Raises DataError."""
    is_folder = Path(root).is_dir()
    # Of a folder only its parquet files: a README beside them may name others, anywhere.
    splits = _load(root, "parquet", data_dir=str(Path(root).resolve())) if is_folder else _load(root, root)
    parts: dict[str, EncodedPart] = {}
    for role, names in PART_NAMES.items():
        split = next((name for name in names if name in splits), None)
        if split is None:
            continue
        part = _read_split(root, role, splits[split], image_column, label_column)
        if part is not None:
            parts[role] = part
    return parts


def _read_split(
    root: str, role: str, rows: Any, image_column: str | None, label_column: str | None
) -> EncodedPart | None:
    """The part `role` from the rows of a `datasets.Dataset`.

    None for a part other than train whose labels are withheld, as the Hub's test parts often are.
    """
    import datasets

    features = rows.features
    likely_images = _likely_columns(features, datasets.Image, IMAGE_COLUMNS)
    likely_labels = _likely_columns(features, datasets.ClassLabel, LABEL_COLUMNS)
    image = _column(root, "image", image_column, likely_images, features)
    label = _column(root, "label", label_column, likely_labels, features)
    labels = rows[label]
    unlabeled = sum(value is None or value == -1 for value in labels)
    if unlabeled == len(labels) and role != "train":
        return None
    if unlabeled:
        raise DataError(
            f"data.root {root}: {unlabeled} of the {role} images have no {label}; every image needs a class"
        )
    cells, fingerprints = _image_cells(root, role, rows, image)

    def source(i: int) -> str | bytes:
        cell = cells[i][image]
        return cell["bytes"] or cell["path"]

    class_order = list(features[label].names) if isinstance(features[label], datasets.ClassLabel) else []
    class_names = [class_order[value] if class_order else str(value) for value in labels]
    ids = [f"{role}/{i:07d}" for i in range(len(labels))]
    return EncodedPart(source, ids, class_names, fingerprints, class_order=class_order)


def _likely_columns(features: Mapping[str, Any], feature_type: type, usual_names: Sequence[str]) -> list[str]:
    """Columns of `feature_type`, then those that have a usual name."""
    typed = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    return typed + [name for name in usual_names if name in features]


def _image_cells(root: str, role: str, rows: Any, image: str) -> tuple[Any, list[str]]:
    """(rows with the column `image` alone, each {"bytes", "path"} of an encoded image; a fingerprint of each).

    All bytes are read once, for the fingerprints; after that only the rows that are asked for come into memory.
    """
    import datasets

    try:
        cells = rows.cast_column(image, datasets.Image(decode=False)).select_columns(image)
        contents = [cell[image] for cell in cells]
    except Exception:  # pyarrow's and datasets' own, for a column of another type
        raise DataError(f"data.{image}: this column of {root} ({rows.features[image]}) holds no images") from None
    empty = [i for i, content in enumerate(contents) if not content or not (content["bytes"] or content["path"])]
    if empty:
        raise DataError(f"data.root {root}: {len(empty)} {role} rows hold no image, the first is row {empty[0]}")
    fingerprints: list[str] = []
    for content in contents:
        encoded = content["bytes"]
        fingerprints.append(hashlib.sha256(encoded).hexdigest()[:16] if encoded else str(content["path"]))
    return cells, fingerprints


def _load(root: str, *words: str, **settings: Any) -> Any:
    """`datasets.load_dataset(*words, **settings)`, quietly, with its many errors in one sentence."""
    import datasets

    had_progress_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*words, **settings)
    except LptError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        text = str(error.__cause__ or error).strip() or type(error).__name__
        reason = quoted(text.splitlines()[0], 300)
        raise DataError(f"data.root {root} cannot be read as a dataset of images ({reason})") from None
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()


def _column(root: str, what: str, wanted: str | None, likely: list[str], columns: Any) -> str:
    """The column that holds the `what`, image or label: the `wanted` one, or else the likeliest. Raises DataError."""
    if wanted is not None:
        if wanted not in columns:
            existing = f"({quoted(', '.join(columns))}){did_you_mean(wanted, columns)}"
            raise DataError(f"data.{what}_column {wanted!r} is no column of {root} {existing}")
        return wanted
    if not likely:
        raise DataError(
            f"data.root {root} has columns {quoted(', '.join(columns))}: which holds the {what}? Set data.{what}_column"
        )
    return likely[0]
