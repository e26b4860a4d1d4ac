"""Tables of one's own images: metadata.csv or .jsonl beside them, parquet files with the images inside, Hub datasets.

Parquet is read through `datasets`; images are decoded when a batch needs them.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lpt.errors import DataError, LptError, did_you_mean, quoted

PART_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
METADATA = ("metadata.csv", "metadata.jsonl")
LABELS = ("label", "fine_label", "labels", "class", "category", "species")


class EncodedPart(NamedTuple):
    """Encoded images of one part by number, and for each an id, a class name and a print of its content. `order` is
    the dataset's own order of its classes, `left_out` what lies beside them and belongs to none."""

    source: Callable[[int], str | bytes]
    ids: list[str]
    names: list[str]
    fingerprints: list[str]
    stamp: str = ""
    order: Sequence[str] = ()
    left_out: Sequence[str] = ()


def metadata(place: Path) -> Path | None:
    """The file in `place` that says which class each image is of, if there is one."""
    return next((place / name for name in METADATA if (place / name).is_file()), None)


def read_metadata(table: Path, label_column: str | None) -> tuple[list[Path], list[str]]:
    """(files, class names) of a metadata file, row by row. Raises DataError."""
    try:
        if not (rows := _rows(table)):
            raise ValueError("it has no rows")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table ({quoted(error)})") from None
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if "file_name" not in columns:
        raise DataError(f"{table} has columns {quoted(', '.join(columns))}: it needs file_name and a class")
    others = [name for name in columns if name != "file_name"]
    usual = [name for name in LABELS if name in others]
    label = _column(str(table), "label", label_column, usual or (others if len(others) == 1 else []), others)
    names = [row.get(label) for row in rows]
    if (empty := sum(name is None or name == "" for name in names)) > 0:
        raise DataError(f"{table} has {empty} rows without a {quoted(label)}; every image needs a class")
    if odd := next((name for name in names if not isinstance(name, str | int | float)), None):
        raise DataError(f"{table}: {quoted(label)} is to be the name of a class, and not {quoted(odd)}")
    files = [table.parent / str(row.get("file_name")) for row in rows]
    if missing := [path for path in files if "\0" in str(path) or not path.is_file()]:
        raise DataError(f"{table} names {len(missing)} files that are not there, the first is {quoted(missing[0])}")
    return files, [str(name) for name in names]


def _rows(table: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, or of a file with a JSON object a line. Raises ValueError, OSError,
    RecursionError and csv.Error."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        if table.suffix == ".csv":
            columns, *lines = list(csv.reader(file, strict=True)) or [[]]
            if len(set(columns)) < len(columns):
                raise ValueError("two columns have one name")
            if odd := next((i for i, line in enumerate(lines, 2) if line and len(line) != len(columns)), None):
                raise ValueError(f"row {odd} has not as many cells as the first, which has {len(columns)}")
            return [dict(zip(columns, line, strict=True)) for line in lines if line]
        rows = [json.loads(line) for line in file if line.strip()]
    if odd := next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
        raise ValueError(f"row {odd} is no object with a value for each column")
    return rows


def read_tables(root: str, image_column: str | None, label_column: str | None) -> dict[str, EncodedPart]:
    """The parts of a folder of parquet files or of a Hub dataset. Raises DataError."""
    # Of a folder its parquet files alone: a README beside them may name others, anywhere.
    local = Path(root).is_dir()
    found = _load(root, "parquet", data_dir=str(Path(root).resolve())) if local else _load(root, root)
    parts: dict[str, EncodedPart] = {}
    for role, names in PART_NAMES.items():
        name = next((n for n in names if n in found), None)
        if name and (part := _table(root, role, found[name], image_column, label_column)):
            parts[role] = part
    return parts


def _table(root: str, role: str, rows: Any, image_column: str | None, label_column: str | None) -> EncodedPart | None:
    """None for a part other than train whose labels are withheld, as the Hub's test parts often are."""
    import datasets

    features = rows.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    named = [name for name in ("image", "img") if name in features]
    image = _column(root, "image", image_column, images + named, features)
    label = _column(root, "label", label_column, labels + [n for n in LABELS if n in features], features)
    values, kind = rows[label], features[label]
    unlabelled = sum(v is None or v == -1 for v in values)
    if unlabelled == len(values) and role != "train":
        return None
    if unlabelled:
        raise DataError(
            f"data.root {root}: {unlabelled} of the {role} images have no {label}; every image needs a class"
        )
    try:
        cells = rows.cast_column(image, datasets.Image(decode=False)).select_columns(image)
        contents = [cell[image] for cell in cells]
    except Exception:  # pyarrow's and datasets' own, for a column of another type
        raise DataError(f"data.{image}: this column of {root} ({features[image]}) holds no images") from None
    if empty := [i for i, c in enumerate(contents) if not c or not (c["bytes"] or c["path"])]:
        raise DataError(f"data.root {root}: {len(empty)} {role} rows hold no image, the first is row {empty[0]}")
    fingerprints = [hashlib.sha256(c["bytes"]).hexdigest()[:16] if c["bytes"] else str(c["path"]) for c in contents]
    del contents

    def source(i: int) -> str | bytes:
        cell = cells[i][image]
        return cell["bytes"] or cell["path"]

    order = list(kind.names) if isinstance(kind, datasets.ClassLabel) else []
    names = [order[v] for v in values] if order else [str(v) for v in values]
    return EncodedPart(source, [f"{role}/{i:07d}" for i in range(len(names))], names, fingerprints, "", order)


def _load(what: str, *words: str, **settings: Any) -> Any:
    """`datasets.load_dataset`, quietly, with its many errors in one sentence."""
    import datasets

    quiet = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*words, **settings)
    except LptError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        reason = quoted((str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0], 300)
        raise DataError(f"data.root {what} cannot be read as a dataset of images ({reason})") from None
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _column(root: str, what: str, wanted: str | None, found: list[str], columns: Any) -> str:
    if wanted is not None and wanted not in columns:
        there = f"({quoted(', '.join(columns))}){did_you_mean(wanted, columns)}"
        raise DataError(f"data.{what}_column {wanted!r} is no column of {root} {there}")
    if wanted is None and not found:
        raise DataError(
            f"data.root {root} has columns {quoted(', '.join(columns))}: which holds the {what}? Set data.{what}_column"
        )
    return wanted or found[0]
