"""Tables of one's own images: a row for each image, with its file, its class, and perhaps its part.

They are metadata.csv and the like beside the images, or a file of any name that `data.table` gives.
"""

import csv
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lpt.data.parts import role_called, role_in_words
from lpt.data.texts import class_names_of, cleaned, read_text
from lpt.data.walk import SUFFIXES, RelativePath, Walk, joined
from lpt.errors import DataError, did_you_mean, quoted

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.tsv", "metadata.parquet")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".parquet")
FILE_COLUMNS = (
    *("file_name", "file", "path", "file_path", "image", "img", "image_name", "image_path", "image_file", "img_name"),
    *("img_path", "image_id", "img_id", "photo", "picture", "image_file_name"),
)
LABEL_COLUMNS = (
    *("label", "fine_label", "labels", "class", "category", "species"),
    *("class_name", "label_name", "category_name", "target"),
)
SPLIT_COLUMNS = ("split", "splits", "data_split", "dataset_split", "split_name", "partition", "subset")
"""Columns that say the part of each row, and are refused where their values are no parts."""
MAYBE_SPLIT_COLUMNS = ("set", "dataset", "data_set", "part", "phase", "mode", "purpose", "fold", "usage", "train_test")
"""Columns that say it where all their values are parts."""
TRUTHS = {
    **dict.fromkeys(
        ("is_train", "is_training", "is_training_image", "train", "in_train", "train_set", "is_train_set"),
        ("train", "test"),
    ),
    **dict.fromkeys(
        ("is_test", "is_testing", "is_test_image", "test", "in_test", "test_set", "is_test_set"), ("test", "train")
    ),
    **dict.fromkeys(("is_val", "is_valid", "is_validation"), ("val", "train")),
}
"""Columns of truths: the part of a row where it is true, and where it is false."""
TRUE, FALSE = ("1", "true", "yes", "t", "y"), ("0", "false", "no", "f", "n")
SEPARATORS = (",", ";", "\t", "|")
MOST_PROBED, MOST_TABLES, MOST_ROWS = 2**24, 10, 1000
"""Bytes of a table, tables and rows that are looked at without having been asked for."""


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


class Columns(NamedTuple):
    """Which columns of a table hold images, classes and parts, where the settings of `folder` say so."""

    image: str | None = None
    label: str | None = None
    split: str | None = None


class SplitColumn(NamedTuple):
    """A column that says which part each row is of."""

    name: str
    roles: list[str]
    values: list[str]
    """As the column has them."""

    def rows_by_role(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, role in enumerate(self.roles):
            rows.setdefault(role, []).append(row)
        return rows

    def shown(self, role: str) -> str:
        """The rows of a part as a person would say which they are: split=test."""
        values = dict.fromkeys(value for value, one in zip(self.values, self.roles, strict=True) if one == role)
        return f"{self.name}={'/'.join(quoted(value, 20) for value in values)}"


class TableRows(NamedTuple):
    """What a table says of each image: its file, its class (an empty text without one), and its part."""

    files: list[Path]
    class_names: list[str]
    split: SplitColumn | None

    def check_part(self, table: Path, role: str) -> None:
        """Raises DataError where the table of a part says that a row is of another one."""
        other = next((one for one in self.split.roles if one != role), None) if self.split else None
        if self.split and other:
            raise DataError(
                f"{quoted(table)} is the table of the {role} part, and says {self.split.shown(other)}: put it beside "
                "the folders of the parts, or give this column another name"
            )

    def without(self, rows: Iterable[int]) -> "TableRows":
        gone = set(rows)
        left = [row for row in range(len(self.files)) if row not in gone]
        split = self.split
        if split:
            split = SplitColumn(split.name, [split.roles[i] for i in left], [split.values[i] for i in left])
        return TableRows([self.files[i] for i in left], [self.class_names[i] for i in left], split)


def metadata(folder: Path) -> Path | None:
    """The file in `folder` that says which class each image is of, if there is one."""
    for name in METADATA_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def read_metadata(table: Path, columns: Columns, folders: Sequence[Path] = ()) -> TableRows:
    """The rows of a table. Paths in it start at one of `folders`, by default the table's own.

    Rows of a test part without a single class are left out, as its labels are withheld. Raises DataError.
    """
    content = _content(table, columns)
    names = list(content)
    split = find_split_column(str(table), names, content.__getitem__, columns)
    image = _file_column(table, content, columns, folders or [table.parent])
    label = _label_column(table, names, columns, image, split)
    files, missing = _files(content[image], folders or [table.parent])
    if missing:
        raise DataError(
            f"{quoted(table)} names {len(missing)} files that are not there, the first is {quoted(missing[0])}: its "
            f"paths start at {' or '.join(quoted(folder) for folder in folders or [table.parent])}"
        )
    if label is None:
        class_names = _classes_by_folder(table, files, folders or [table.parent])
    else:
        try:
            class_names = class_names_of(content[label])
        except TypeError as error:
            raise DataError(
                f"{quoted(table)}: {quoted(label)} is to be the name of a class, and not {quoted(error)}"
            ) from None
    rows = TableRows(files, class_names, split)
    for role, own_rows in (split.rows_by_role() if split else {"train": range(len(files))}).items():
        without_class = [row for row in own_rows if not class_names[row]]
        if without_class and role in ("val", "test") and len(without_class) == len(own_rows):
            rows = rows.without(without_class)
        elif without_class and role != "unlabeled":
            raise DataError(
                f"{quoted(table)} has {len(without_class)} rows without a {quoted(label)}; every image needs a class: "
                "give it one, or take out these rows"
            )
    return rows


def _content(table: Path, columns: Columns) -> dict[str, list[Any]]:
    """The columns of a table by name, in order; None where a row has no such value. Raises DataError."""
    try:
        rows = _rows(table, columns)
        if not rows:
            raise ValueError("it has no rows")
    except Exception as error:
        # csv's, json's and pyarrow's own; RecursionError of nested JSON.
        if not isinstance(error, OSError | ValueError | RecursionError | csv.Error) and table.suffix != ".parquet":
            raise
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(f"{quoted(table)} cannot be read as a table ({quoted(reason)})") from None
    names: dict[str, None] = {}  # in the order in which rows name them
    for row in rows:
        names.update(dict.fromkeys(row))
    return {name: [row.get(name) for row in rows] for name in names}


def _rows(table: Path, columns: Columns) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, of JSON objects a line or in a list, or of a parquet file without images.

    Raises ValueError, OSError, RecursionError, csv.Error, and for parquet what pyarrow does.
    """
    kind = table.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(table).to_pylist()
    if kind in (".xls", ".xlsx", ".ods", ".numbers"):
        raise ValueError("it is a spreadsheet: save it as CSV")
    text = read_text(table)
    if kind not in (".jsonl", ".ndjson", ".json"):
        return _csv_rows(text, columns)
    rows = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(rows, list):
        raise ValueError("it is no list of objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object with a value for each column")
    return [{cleaned(name): value for name, value in row.items()} for row in rows]


def _csv_rows(text: str, columns: Columns) -> list[dict[str, Any]]:
    """Rows by the names in the first line; empty lines are passed over. Raises ValueError and csv.Error."""
    lines = list(io.StringIO(text, newline=""))  # str.splitlines also splits where names may have letters
    said = re.fullmatch(r"sep=(.)\s*", lines[0]) if lines else None  # as Excel writes and reads it
    separator = said.group(1) if said else _separator(lines, columns)
    cells_of = list(csv.reader(lines[1:] if said else lines, strict=True, delimiter=separator))
    if not cells_of:
        return []
    names = [cleaned(name) for name in cells_of[0]]
    if any(names.count(name) > 1 for name in names if name):
        raise ValueError("two columns have one name")
    rows: list[dict[str, Any]] = []
    for number, cells in enumerate(cells_of[1:], start=2):
        if not cells:
            continue
        if len(cells) != len(names):
            raise ValueError(f"row {number} has not as many cells as the first, which has {len(names)}")
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


def _separator(lines: Sequence[str], columns: Columns) -> str:
    """What stands between the cells: of those that make several columns of the first line, one that gives a column of a
    known name, or else the one that gives the most."""
    number_of_cells: dict[str, int] = {}
    for separator in SEPARATORS:
        names = next(iter(csv.reader(lines[:1], delimiter=separator)), [])
        if len(names) > 1:
            wanted = {_plain(name) for name in (*FILE_COLUMNS, *filter(None, columns))}
            has_known = any(_plain(name) in wanted for name in names)
            number_of_cells[separator] = len(names) + 1000 * has_known
    return max(number_of_cells, key=lambda separator: number_of_cells[separator], default=",")


# Which column holds what.


def _plain(name: str) -> str:
    """A column's name for comparing: FileName, file-name and "file name" are file_name."""
    return re.sub("[^a-z0-9]", "", name.lower())


def likely_columns(names: Iterable[str], usual_names: Sequence[str]) -> list[str]:
    """Those of `names` that are usual, the most usual first, in any spelling."""
    spelled: dict[str, list[str]] = {}
    for name in names:
        spelled.setdefault(_plain(name), []).append(name)
    return [name for usual in dict.fromkeys(map(_plain, usual_names)) for name in spelled.get(usual, [])]


def choose_column(table: str, what: str, wanted: str | None, likely: Sequence[str], names: Iterable[str]) -> str:
    """The column that holds the `what`, image or label: the `wanted` one, or else the likeliest. Raises DataError."""
    names = list(names)
    if wanted is not None:
        if wanted not in names:
            existing = f"({quoted(', '.join(names))}){did_you_mean(wanted, names)}"
            raise DataError(f"data.{what}_column {wanted!r} is no column of {quoted(table)} {existing}")
        return wanted
    if not likely:
        raise DataError(
            f"data.root {quoted(table)} has columns {quoted(', '.join(names))}: which holds the {what}? "
            f"Set data.{what}_column"
        )
    return likely[0]


def _file_column(table: Path, content: dict[str, list[Any]], columns: Columns, folders: Sequence[Path]) -> str:
    """The column with the paths of the images: of several that could be, the one whose files are there."""
    names = list(content)
    if columns.image is not None:
        return choose_column(str(table), "image", columns.image, (), names)
    likely = likely_columns(names, FILE_COLUMNS)
    if "file_name" in names:
        return "file_name"
    if not likely:
        raise DataError(
            f"{quoted(table)} has columns {quoted(', '.join(names))}: it needs file_name and a class, or set "
            "data.image_column and data.label_column"
        )
    if len(likely) > 1:
        there = [name for name in likely if not _files(content[name][:5], folders)[1]]
        likely = there or likely[:1]
    if len(likely) > 1:
        raise DataError(
            f"{quoted(table)} names files in {len(likely)} columns, {quoted(', '.join(likely))}: set data.image_column"
        )
    return likely[0]


def _label_column(
    table: Path, names: Sequence[str], columns: Columns, image: str, split: SplitColumn | None
) -> str | None:
    """The column with the classes; None where the rows hold nothing but files and parts."""
    taken = (image, split.name if split else "")
    others = [name for name in names if name not in taken and name and not name.lower().startswith("unnamed:")]
    likely = likely_columns(others, LABEL_COLUMNS)
    if not likely and len(others) == 1:
        likely = others
    if not others and split and columns.label is None:
        return None
    return choose_column(str(table), "label", columns.label, likely, others)


def find_split_column(
    table: str,
    names: Sequence[str],
    values_of: Callable[[str], Sequence[Any]],
    columns: Columns,
    *,
    taken: Sequence[str] = (),
) -> SplitColumn | None:
    """The column that says the part of each row, if there is one. Raises DataError where one says it and cannot be
    understood, and where two say different things."""
    if columns.split is not None:
        name = choose_column(table, "split", columns.split, (), names)
        return _split_column(table, name, values_of(name), must=True)
    free = [name for name in names if name not in (columns.image, columns.label, *taken)]
    label = likely_columns(free, LABEL_COLUMNS)[:1] if columns.label is None else []
    candidates: list[SplitColumn] = []
    for name in likely_columns([name for name in free if name not in label], (*SPLIT_COLUMNS, *MAYBE_SPLIT_COLUMNS)):
        must = _plain(name) in map(_plain, SPLIT_COLUMNS)
        column = _split_column(table, name, values_of(name), must=must)
        candidates += [column] if column else []
    for name in likely_columns(free, list(TRUTHS)):
        column = _truth_column(name, values_of(name))
        candidates += [column] if column else []
    if not candidates:  # a column of any name whose values are parts
        others = {*label, *likely_columns(free, FILE_COLUMNS)}
        for name in [name for name in free if name not in others]:
            column = _split_column(table, name, values_of(name), must=False, all_parts=True)
            candidates += [column] if column and {"train"} < set(column.roles) else []
    if not candidates:
        return None
    first = candidates[0]
    for other in candidates[1:]:
        if other.roles != first.roles:
            raise DataError(
                f"{quoted(table)} says the part of each row in {quoted(first.name)} and in {quoted(other.name)}, which "
                "do not agree: set data.split_column"
            )
    return first


def _split_column(
    table: str, name: str, values: Sequence[Any], *, must: bool, all_parts: bool = False
) -> SplitColumn | None:
    """The column `name` as parts. Where not all its values are: None if `all_parts` or none is, else a DataError, and
    always one if it `must` be such a column."""
    texts = ["" if value is None else cleaned(str(value)) for value in values]
    roles = [role_called(text) for text in texts]
    if None not in roles:
        return SplitColumn(name, [str(role) for role in roles], texts)
    as_truths = _truth_column(name, values)
    if as_truths:
        return as_truths
    if not must and (all_parts or not any(roles)):
        return None
    row = roles.index(None)
    raise DataError(
        f"{quoted(table)} has a column {quoted(name)} with {quoted(repr(texts[row]))} in row {row + 1}, which is no "
        "part: call the parts train, val, test and unlabeled, or give the column another name if it does not say the "
        "part"
    )


def _truth_column(name: str, values: Sequence[Any]) -> SplitColumn | None:
    plain = {_plain(usual): roles for usual, roles in TRUTHS.items()}
    if _plain(name) not in plain:
        return None
    if_true, if_false = plain[_plain(name)]
    texts = ["" if value is None else cleaned(str(value)).casefold().removesuffix(".0") for value in values]
    if not all(text in (*TRUE, *FALSE) for text in texts):
        return None
    return SplitColumn(name, [if_true if text in TRUE else if_false for text in texts], texts)


# Files.


def _files(values: Sequence[Any], folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """(the file of each value, the values without one). All are below the first of `folders` where the first is."""
    names = ["" if value is None else cleaned(str(value)) for value in values]
    folder = next((folder for folder in folders if names and _file(folder, names[0])), folders[0])
    files: list[Path] = []
    missing: list[str] = []
    for name in names:
        path = _file(folder, name)
        if path is None:
            missing.append(str(folder / name))
        else:
            files.append(path)
    return files, missing


def _file(folder: Path, name: str) -> Path | None:
    """The file of this name: as it stands, with the slashes of another system, or without the suffix of an image."""
    if not name or "\0" in name:
        return None
    for spelled in dict.fromkeys((name, name.replace("\\", "/"))):
        path = folder / spelled
        # Not Path.is_file, which raises OSError for a name that is longer than the file system allows.
        if os.path.isfile(path):
            return path
        if not spelled.lower().endswith(SUFFIXES):
            ended = (f"{path}{ending}" for suffix in SUFFIXES for ending in (suffix, suffix.upper()))
            there = [ending for ending in ended if os.path.isfile(ending)]
            if len(there) == 1:
                return Path(there[0])
    return None


def _classes_by_folder(table: Path, files: Sequence[Path], folders: Sequence[Path]) -> list[str]:
    """The class of each file in a table without one: the first of its folders that is not called as a part."""
    names: list[str] = []
    for path in files:
        start = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        inner = [name for name in path.relative_to(start).parts[:-1] if role_called(name) is None]
        if not inner:
            raise DataError(
                f"{quoted(table)} has no column with classes, and {quoted(path)} lies in no class folder: give it a "
                "column label, or set data.label_column"
            )
        names.append(inner[0])
    return names


def settings_naming(root: Path, walked: Walk) -> list[str]:
    """The settings that would read tables among the other files of `root`, each of which names its images. Raises
    DataError where one says which part each image is of: a split of its own must not be overlooked."""
    images = {joined(path) for path in walked.images}
    return [
        settings
        for path in _small_files(root, walked, TABLE_SUFFIXES)
        if not (len(path) == 2 and path[1] in METADATA_FILES and role_called(path[0]))  # that of a part is read
        if (settings := _settings_reading(root, path, images))
    ]


def check_no_lists(root: Path, walked: Walk) -> None:
    """Raises DataError for a list among the other files of `root` that is called as a part, or says which images one
    has: train.txt and test.txt for example."""
    images = {joined(path).rpartition(".")[0]: joined(path) for path in walked.images}
    for path in _small_files(root, walked, (*TABLE_SUFFIXES, ".lst", ".list", ".yaml", ".yml")):
        stem = path[-1].rpartition(".")[0]
        try:
            text = read_text(root.joinpath(*path))
        except (OSError, ValueError):
            continue
        is_called_so = role_in_words(stem)[0] is not None
        if "split" in stem.lower() or (is_called_so and _names_images(text, images)):
            raise DataError(
                f"data.root {quoted(root)} has {quoted(joined(path))}, which is called as the list of a part is, and "
                "is not read: with a number for the class in each line set data.name=lists data.train=FILE "
                "data.test=FILE, else put the images into train/ and test/, or move that file away"
            )


def _names_images(text: str, images: dict[str, str]) -> bool:
    """Whether most lines of a text name images by their paths, or by the last two or the last part of them; `images`
    are paths by paths without their suffix."""
    words = re.findall(r"[^\s,;\t\"'\[\]{}]+", text[: MOST_ROWS * 200])[: 4 * MOST_ROWS]
    known = {end for path in images.items() for one in path for end in _ends(one) if not end.isdecimal()}
    named = {end for word in words for end in _ends(word.replace("\\", "/")) if end in known}
    return len(named) >= max(2, min(len(images), MOST_ROWS) / 20)


def _ends(path: str) -> Iterator[str]:
    """A path, and its last two and last part.

    >>> list(_ends("a/b/c"))
    ['a/b/c', 'b/c', 'c']
    """
    yield path
    parts = path.split("/")
    if len(parts) > 2:
        yield "/".join(parts[-2:])
    if len(parts) > 1:
        yield parts[-1]


def _small_files(root: Path, walked: Walk, suffixes: tuple[str, ...]) -> list[RelativePath]:
    files = [path for path in walked.left_out.get("other_files", []) if path[-1].lower().endswith(suffixes)]
    return [path for path in files if os.path.getsize(root.joinpath(*path)) <= MOST_PROBED][:MOST_TABLES]


def _settings_reading(root: Path, path: RelativePath, images: set[str]) -> str | None:
    """The settings that read a table, where half of the `images`, paths below `root`, stand in one of its columns and
    another says more of them than their folders do; else None."""
    table = root.joinpath(*path)
    try:
        content = _content(table, Columns())
    except DataError:
        return None
    inner = sorted({name.split("/")[0] for name in images if "/" in name})
    folders = [root, table.parent, *(root / name for name in inner)]
    for image, values in content.items():
        files, _ = _files(values[:MOST_ROWS], folders[:MOST_TABLES])
        named = [name for file in files if (name := _path_below(root, file)) in images]
        if 2 * len(set(named)) < min(len(images), MOST_ROWS):
            continue
        try:
            split = find_split_column(str(table), list(content), content.__getitem__, Columns(), taken=(image,))
        except DataError:
            split = None
        if split and len(set(split.roles)) > 1:
            words = {"table": joined(path), "image_column": image, "split_column": split.name}
            settings = " ".join(shlex.quote(f"data.{key}={value}") for key, value in words.items())
            raise DataError(
                f"data.root {quoted(root)} has {quoted(joined(path))}, which says which part each image is of, and is "
                f"not read: set {settings}, or move that file away"
            )
        label = _possible_label(content, image, named)
        if label:
            words = {"table": joined(path), "image_column": image, "label_column": label}
            return " ".join(shlex.quote(f"data.{key}={value}") for key, value in words.items())
    return None


def _path_below(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else ""


def _possible_label(content: dict[str, list[Any]], image: str, named: Sequence[str]) -> str | None:
    """A column that may hold the classes of images: the usual one, or else the one that repeats itself the most. None
    where the images' folders say what one of the columns does."""
    others = [name for name in content if name and name != image]
    folders = [name.split("/")[:-1] for name in named]
    for name in others:
        texts = [str(value) for value in content[name][: len(named)]]
        if all(text in inside for text, inside in zip(texts, folders, strict=False)):
            return None
    number_of = {name: len({str(value) for value in content[name]}) for name in others}
    repeats = [name for name in others if 1 < number_of[name] <= max(2, len(content[name]) / 2)]
    return next(iter(likely_columns(others, LABEL_COLUMNS) or sorted(repeats, key=lambda name: number_of[name])), None)
