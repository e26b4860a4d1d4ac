"""Images in parquet files and in datasets of the Hub, read through `datasets`, decoded when a batch needs them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpt.data.data_files import files_by_role, roles_in_words
from lpt.data.parts import role_called
from lpt.data.tables import (
    LABEL_COLUMNS,
    Columns,
    EncodedPart,
    SplitColumn,
    choose_column,
    find_split_column,
    likely_columns,
)
from lpt.data.texts import class_names_of
from lpt.data.walk import RelativePath, joined
from lpt.errors import DataError, LptError, quoted, require
from lpt.files import why_not_downloaded

IMAGE_COLUMNS = ("image", "img")
"""Columns that hold images where no type and no setting says which do."""


def holding_images(root: Path, files: Sequence[RelativePath], columns: Columns) -> tuple[list[RelativePath], int]:
    """(the parquet files that have a column of encoded images, the rows in them)."""
    import pyarrow.parquet as pq

    holding: list[RelativePath] = []
    num_rows = 0
    for path in files:
        try:
            metadata = pq.read_metadata(root.joinpath(*path))
            schema = metadata.schema.to_arrow_schema()
        except Exception:  # pyarrow's own, for a file that only looks like one: reading it says so
            continue
        if any(_may_hold_images(field, columns) for field in schema):
            holding.append(path)
            num_rows += metadata.num_rows
    return holding, num_rows


def _may_hold_images(field: Any, columns: Columns) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(field.type):
        return field.type.get_field_index("bytes") >= 0
    is_binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    return is_binary and field.name in (columns.image, *IMAGE_COLUMNS)


def read_parquet(
    root: Path, files: Sequence[RelativePath], columns: Columns
) -> tuple[dict[str, EncodedPart], list[str]]:
    """(the parts of parquet files below `root`, by their names or a column; parts that are left out, and why).

    Raises DataError.
    """
    require("datasets", extra="hub", gives=f"data.root {quoted(root)}, images in parquet files,")
    files_of = files_by_role(root, files, "parquet")
    splits = {role: _read_files(root, paths) for role, paths in files_of.items()}
    called = {role: joined(paths[0]) for role, paths in files_of.items()}
    return _read_splits(str(root), splits, called, columns)


def read_hub(root: str, columns: Columns) -> tuple[dict[str, EncodedPart], list[str]]:
    """As `read_parquet`, for a dataset of the Hub. Raises DataError."""
    require(
        "datasets", extra="hub", gives=f"data.root {quoted(root)}, which is no folder here but a dataset of the Hub,"
    )
    import datasets

    loaded = _quietly(root, lambda: datasets.load_dataset(root))
    splits: dict[str, Any] = {}
    called: dict[str, str] = {}
    left_out: list[str] = []
    # The usual names first: of validation and dev, for example, one is read and the other is said to be left out.
    for name in sorted(loaded, key=lambda name: name not in ("train", "validation", "test")):
        roles = roles_in_words(name) if role_called(name) is None else [role_called(name)]
        role = roles[0] if len(roles) == 1 else None
        if role is None and len(loaded) == 1:
            role = "train"
        if role is None or role in splits:
            left_out.append(name)
        else:
            splits[role], called[role] = loaded[name], f"split {name}"
    parts, others = _read_splits(root, splits, called, columns)
    return parts, [*left_out, *others]


def _read_splits(
    root: str, splits: Mapping[str, Any], called: Mapping[str, str], columns: Columns
) -> tuple[dict[str, EncodedPart], list[str]]:
    parts: dict[str, EncodedPart] = {}
    left_out: list[str] = []
    for role in ("train", "val", "test", "unlabeled"):
        if role not in splits:
            continue
        rows = splits[role]
        column = _split_column(root, rows, columns)
        for inner, inner_rows, origin in _by_column(root, role, rows, column, called[role], is_only=len(splits) == 1):
            part = _read_split(root, inner, inner_rows, columns)
            if part is None:
                left_out.append(f"{origin} (no image has a class)")
            else:
                parts[inner] = part._replace(origin=origin)
    return parts, left_out


def _split_column(root: str, rows: Any, columns: Columns) -> SplitColumn | None:
    import datasets

    def values_of(name: str) -> list[Any]:
        feature, values = rows.features[name], rows[name]
        if isinstance(feature, datasets.ClassLabel):
            return [feature.names[value] if value is not None and value >= 0 else None for value in values]
        return list(values)

    typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    return find_split_column(root, list(rows.features), values_of, columns, taken=typed)


def _by_column(
    root: str, role: str, rows: Any, column: SplitColumn | None, called: str, *, is_only: bool
) -> list[tuple[str, Any, str]]:
    """(part, its rows, where they came from): all rows as the part `role`, or divided by a column that says so."""
    if column is None:
        return [(role, rows, called)]
    others = [one for one in column.roles if one != role]
    if not others:
        return [(role, rows, called)]
    if role != "train" or not is_only:  # a dataset that was not divided is called train by the programs that write it
        raise DataError(
            f"data.root {quoted(root)}: rows of {quoted(called)} have {quoted(column.name)}={others[0]}: give the "
            "column or the file another name"
        )
    divided: list[tuple[str, Any, str]] = []
    for inner in column.rows_by_role():
        inner_rows = rows.select(column.rows_by_role()[inner])
        divided.append((inner, inner_rows, f"{called}, {column.shown(inner)}"))
    return divided


def _read_split(root: str, role: str, rows: Any, columns: Columns) -> EncodedPart | None:
    """The part `role` from the rows of a `datasets.Dataset`.

    None for a part of labeled images other than train whose labels are withheld, as the Hub's test parts often are.
    """
    import datasets

    features = rows.features
    typed_images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    typed_labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image = choose_column(
        root, "image", columns.image, typed_images + likely_columns(features, IMAGE_COLUMNS), features
    )
    likely = typed_labels + likely_columns(features, LABEL_COLUMNS)
    if role == "unlabeled" and not likely and columns.label not in features:
        class_order, class_names = [], [""] * len(rows)
    else:
        label = choose_column(root, "label", columns.label, likely, features)
        class_order, class_names = _class_names(root, rows, label)
        missing = class_names.count("")
        if role not in ("train", "unlabeled") and missing == len(class_names):
            return None
        if missing and role != "unlabeled":
            raise DataError(
                f"data.root {quoted(root)}: {missing} of the {role} images have no {quoted(label)}; every image needs "
                "a class: give it one, or take out these rows"
            )
    cells, fingerprints = _image_cells(root, role, rows, image)

    def source(i: int) -> str | bytes:
        cell = cells[i][image]
        return cell["bytes"] or cell["path"]

    ids = [f"{role}/{i:07d}" for i in range(len(class_names))]
    return EncodedPart(source, ids, class_names, fingerprints, class_order=class_order)


def _class_names(root: str, rows: Any, label: str) -> tuple[list[str], list[str]]:
    """(the classes in the dataset's own order, where it has one; the class of each row, an empty text without one)."""
    import datasets

    feature, values = rows.features[label], list(rows[label])
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        return names, [names[value] if value is not None and value >= 0 else "" for value in values]
    try:
        return [], class_names_of([None if value == -1 else value for value in values])
    except TypeError as error:
        raise DataError(
            f"data.root {quoted(root)}: {quoted(label)} is to be the name of a class, and not {quoted(error)}"
        ) from None


def _image_cells(root: str, role: str, rows: Any, image: str) -> tuple[Any, list[str]]:
    """(rows with the column `image` alone, each {"bytes", "path"} of an encoded image; a fingerprint of each).

    All bytes are read once, for the fingerprints; after that only the rows that are asked for come into memory.
    """
    import datasets

    try:
        cells = rows.cast_column(image, datasets.Image(decode=False)).select_columns(image)
        contents = [cell[image] for cell in cells]
    except Exception:  # pyarrow's and datasets' own, for a column of another type
        raise DataError(
            f"data.{image}: this column of {quoted(root)} ({rows.features[image]}) holds no images"
        ) from None
    empty = [i for i, content in enumerate(contents) if not content or not (content["bytes"] or content["path"])]
    if empty:
        raise DataError(
            f"data.root {quoted(root)}: {len(empty)} {role} rows hold no image, the first is row {empty[0]}"
        )
    fingerprints: list[str] = []
    for content in contents:
        encoded = content["bytes"]
        fingerprints.append(hashlib.sha256(encoded).hexdigest()[:16] if encoded else str(content["path"]))
    return cells, fingerprints


def _read_files(root: Path, files: Sequence[RelativePath]) -> Any:
    """The rows of parquet files as a `datasets.Dataset`, in one cache of all callers. Raises DataError."""
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet

    # Not load_dataset, which takes a path for a pattern: one with [ ] in it would find nothing.
    paths = [str(root.resolve().joinpath(*path)) for path in files]
    written: Any = []
    for path in paths:
        status = Path(path).stat()
        written.append((path, f"{status.st_size} {status.st_mtime_ns}"))

    def load() -> Any:
        builder = Parquet(data_files=DataFilesDict({"train": DataFilesList(paths, written)}))
        builder.download_and_prepare()
        return builder.as_dataset(split="train")

    return _quietly(str(root), load)


def _quietly(root: str, load: Any) -> Any:
    """`load()` without progress bars, with the many errors of `datasets` in one sentence."""
    import datasets

    had_progress_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return load()
    except LptError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        if not Path(root).exists():
            raise DataError(
                f"data.root {quoted(root)} is no folder here, and cannot be read as a dataset of the Hub "
                f"({why_not_downloaded(error)}): check the name, or give a folder"
            ) from None
        raise DataError(f"data.root {quoted(root)} cannot be read as a dataset of images ({_reason(error)})") from None
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return quoted(text.splitlines()[0], 300)
