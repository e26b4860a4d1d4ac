"""Your own images: class folders, images with metadata.csv or .jsonl, parquet files, or a dataset of the Hub.

Images are decoded when a batch needs them.
"""

import hashlib
import inspect
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from lpt.data.image_hashes import image_draws
from lpt.data.lists import read_unlabeled, with_slashes
from lpt.data.longtail import usual_group_rule
from lpt.data.pack import is_pack, open_pack
from lpt.data.packed import Packed, read_packed, read_packed_file
from lpt.data.parquet import read_hub
from lpt.data.parts import FORMS, FolderPart, find_parts, role_called, role_in_path, same_inside
from lpt.data.preprocess import readable
from lpt.data.tables import (
    TABLE_SUFFIXES,
    Columns,
    EncodedPart,
    check_no_lists,
    metadata,
    read_metadata,
    settings_naming,
)
from lpt.data.task import REMARKS, Files, Task, counted_by_folder, hold_out, remarks, rows_by_class
from lpt.data.texts import spelling
from lpt.data.walk import SUFFIXES, RelativePath, Walk, as_text, joined, refuse, walk
from lpt.errors import DataError, quoted
from lpt.settings import Count, Seed

SplitBy = Literal["image", "position"]


def folder(
    root: str | None = None,
    *,
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    split_by: SplitBy = "image",
    seed: Seed = 0,
    val_per_class: Count = 0,
    unlabeled: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    table: str | None = None,
) -> Task:
    """Your own images: ROOT/<class>/*.jpg, also inside train/, val/ and test/; metadata.csv; parquet; WebDataset
    shards; a Hub id.

    Without a test part the val part is the test set; without both, about `test_share` of each class is split off: where
    an image goes is drawn from `seed` and the image itself, so that it stays there when others come, go or are renamed.
    A class has at least one image in both parts, and a single image is for training. `split_by=position` is the split
    of lpt 0.1: round(test_share · n) of each class by their order, where a new image moves others. `val_per_class`
    holds out training images where there is no val part. Groups are many/medium/few by count where none of them is
    empty, else rank thirds. A file that cannot be decoded ends a run when a batch needs it; `on_error=skip` decodes
    every file first and continues without those.

    `unlabeled` is a folder with images at any depth, by default ROOT/unlabeled/ where it lies beside train/. An image
    whose topmost folder there bears the name of a class has that class as its truth, for audits alone. It may also be a
    list with a path a line, below the list's own folder, and after a space perhaps the number of the class.

    `table` is a file with a row for each image, of any name: CSV, JSON lines or parquet. `image_column`, `label_column`
    and `split_column` say which of its columns hold the path (from ROOT or from the table's folder), the class and the
    part, where their names do not. Raises DataError.
    """
    return _load(
        root,
        refuse,
        Split(test_share, split_by, seed, val_per_class),
        Columns(image_column, label_column, split_column),
        table=table,
        unlabeled=unlabeled,
        on_error=on_error,
    )


def folder_with_mistakes(**settings: Any) -> Task:
    """As `folder`, but what ends a run stands in `facts` under "refused", a sentence each, as far as reading can
    continue."""
    bound = inspect.signature(folder).bind(**settings)
    bound.apply_defaults()
    given = bound.arguments
    mistakes: list[str] = []
    task = _load(
        given["root"],
        mistakes.append,
        Split(given["test_share"], given["split_by"], given["seed"], given["val_per_class"]),
        Columns(given["image_column"], given["label_column"], given["split_column"]),
        table=given["table"],
        unlabeled=given["unlabeled"],
        on_error=given["on_error"],
    )
    return replace(task, facts={**task.facts, "refused": mistakes}) if mistakes else task


class Split(NamedTuple):
    """How parts that are not there are taken from the training part; as the settings of `folder`."""

    test_share: float
    split_by: SplitBy
    seed: int
    val_per_class: int


OnMistake = Callable[[str], object]
"""What is done with a sentence on something that ends a run."""


@dataclass
class Contents:
    """What was read of a folder or a Hub dataset."""

    parts: dict[str, EncodedPart] = field(default_factory=dict)
    """By role: train, val, test and unlabeled."""
    facts: dict[str, list[str]] = field(default_factory=dict)
    """Names of what is in no part, under keys of `lpt.data.task.REMARKS`."""
    lost_links: list[str] = field(default_factory=list)

    def note(self, walked: Walk, prefix: RelativePath = ()) -> None:
        """Takes over what a walk left out; `prefix` is what its paths start at."""
        for reason, paths in walked.left_out.items():
            names = self.lost_links if reason == "lost_links" else self.facts.setdefault(reason, [])
            names += [joined((*prefix, *path)) for path in paths]


def _load(
    root: str | None,
    on_mistake: OnMistake,
    split: Split,
    columns: Columns,
    *,
    table: str | None,
    unlabeled: str | None,
    on_error: str,
) -> Task:
    if root is None and table:
        root = os.path.dirname(table) or "."
    if root is None:
        raise DataError("data.root is missing: give a folder with one folder of images for each class")
    if is_pack(root) and not table:
        return open_pack(root, "folder", {**split._asdict(), "unlabeled": unlabeled})
    contents = Contents()
    try:
        _read_parts(contents, root, unlabeled, columns, table, on_mistake)
        return _to_task(contents, root, unlabeled, split, on_mistake, skips=on_error == "skip")
    except DataError as error:
        # What was left out may be why the rest is not enough.
        hints = [REMARKS["tables_beside"]]
        reasons = [text for remark, text in remarks(contents.facts, most=1) if remark.is_problem or remark in hints]
        raise DataError(f"{error}; {'; '.join(reasons)}" if reasons else str(error)) from None


def _to_task(
    contents: Contents, root: str, unlabeled: str | None, split: Split, on_mistake: OnMistake, *, skips: bool
) -> Task:
    parts = contents.parts
    if "train" not in parts:
        raise DataError(f"data.root {quoted(root)} has no training part, only {', '.join(parts) or 'nothing'}")
    classes = _class_names(parts, root, on_mistake)
    if unlabeled:
        _read_unlabeled(contents, root, unlabeled, classes, on_mistake)
    skipped = [f"image {name} cannot be read (a link that leads to nothing)" for name in contents.lost_links]
    if contents.lost_links and not skips:
        on_mistake(
            f"data.root {quoted(root)} has {len(skipped)} links that lead to nothing, "
            f"{counted_by_folder(contents.lost_links)}: mend or remove them, or set data.on_error=skip"
        )
        skipped = []
    images = {role: _to_files(root, role, part, classes, on_mistake) for role, part in parts.items()}
    if skips:
        images, broken = _without_broken(images, parts, root)
        skipped += broken

    train, val, test, test_part = _with_test_part(images, parts, root, split)
    facts = {f"{role}_part": part.origin or "as given" for role, part in parts.items()}
    if test_part.startswith(VAL_IS_TEST):
        del facts["val_part"]
    if val is None and split.val_per_class:
        train, val = _with_val_part(train, root, split.val_per_class, split.seed)
        facts["val_part"] = f"{split.val_per_class} of each class, of the training images, with seed {split.seed}"

    variant = as_text(Path(root).resolve().name)
    facts |= {"variant": variant, "profile": "natural", "seed": split.seed, "test_part": test_part}
    return Task(
        name="folder",
        classes=tuple(classes),
        train=train,
        val=val,
        test=test,
        unlabeled=images.get("unlabeled"),
        group_rule=usual_group_rule(torch.bincount(train.labels, minlength=len(classes))),
        facts=facts | _amiss(contents, skipped, [train, val, test], images.get("unlabeled")),
    )


# Reading: which parts there are, and which images are in each.


def _read_parts(
    contents: Contents,
    root: str,
    unlabeled: str | None,
    columns: Columns,
    table: str | None,
    on_mistake: OnMistake,
) -> None:
    """Fills `contents` with the parts that `root`, a folder or a Hub id, has."""
    root_folder = Path(root)
    if root_folder.is_dir():
        walked = walk(root_folder, without=_unlabeled_folder(root_folder, unlabeled), on_mistake=on_mistake)
        contents.note(walked)
        given = _given_table(root_folder, table) if table else None
        packed = read_packed_file(given, columns) if given else read_packed(root_folder, walked, columns)
        if packed:
            _take_packed(contents, packed, walked)
            return
        if not walked.images:
            raise DataError(
                f"data.root {quoted(root)} holds no image ({', '.join(SUFFIXES)}), no parquet, no shard (.tar with "
                f"images and their classes){_archives(walked)}"
            )
        _read_images(contents, root_folder, walked, columns, given)
        return
    if root_folder.exists():
        packed = read_packed_file(root_folder, columns)
        if packed is None:
            is_table = root_folder.suffix.lower() in TABLE_SUFFIXES
            is_archive = root_folder.suffix.lower() in (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z")
            way_out = "unpack it, and give the folder" if is_archive else "give the folder that it lies in"
            way_out = f"set data.table={quoted(root)} if it names images" if is_table else way_out
            raise DataError(f"data.root {quoted(root)} is a file: {way_out}")
        _take_packed(contents, packed, Walk())
        return
    owner, _, name = root.partition("/")
    is_hub_id = owner and name and "/" not in name and not root.startswith((".", "~"))
    if not is_hub_id:
        raise DataError(f"data.root {quoted(root)} does not exist")
    contents.parts, not_read = read_hub(root, columns)
    contents.facts["not_read"] = not_read


def _archives(walked: Walk) -> str:
    """What is reported about archives among the files that are no images."""
    kinds = (".tar", ".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")
    there = [path for path in walked.left_out.get("other_files", []) if path[-1].lower().endswith(kinds)]
    return f": unpack {quoted(joined(there[0]))} there" if there else ""


def _unlabeled_folder(root: Path, unlabeled: str | None) -> Path | None:
    """The folder of unlabeled images, which is no class where it lies inside root.

    None where it is root itself or one of its parts: these may serve as unlabeled images too, and stay what they are.
    """
    if unlabeled is None or os.path.realpath(unlabeled) == os.path.realpath(root):
        return None
    folder = Path(unlabeled)
    return folder if role_called(folder.name) in (None, "unlabeled") else None


def _given_table(root: Path, table: str) -> Path:
    """The file that `data.table` means: as it stands, or below `root`. Raises DataError where there is none."""
    path = next((path for path in (Path(table), root / table) if os.path.isfile(path)), None)
    if path is None:
        raise DataError(f"data.table {quoted(table)} is no file, and none in {quoted(root)}: give a table of images")
    return path


def _take_packed(contents: Contents, packed: Packed, walked: Walk) -> None:
    """Takes over what was read of parquet files or shards; loose images beside them are in no class."""
    read = {joined(path) for path in packed.files}
    others = contents.facts.get("other_files", [])
    contents.parts = packed.parts
    contents.facts |= {
        "other_files": [name for name in others if name not in read],
        "left_out": [joined(path) for path in walked.images],
        "not_read": packed.not_read,
    }


def _read_images(contents: Contents, root: Path, walked: Walk, columns: Columns, given: Path | None) -> None:
    """The parts of a folder of images: as the table `given` or its own says, or as its folders are called."""
    table, tables_read = given or metadata(root), set[str]()
    if table:
        tables_read.add(_path_from(root, _below(root, table)))
        contents.parts, strays = _parts_of_table(root, table, walked.images, columns, is_given=given is not None)
        class_level: set[RelativePath] = set()
    else:
        layout = find_parts(root, walked.images, lambda name: metadata(root / name) is not None)
        if list(layout.parts) in (["train"], ["train", "unlabeled"]):
            check_no_lists(root, walked)
            contents.facts["tables_beside"] = settings_naming(root, walked)
        strays = list(layout.strays)
        class_level = set()
        for role, part in layout.parts.items():
            contents.parts[role], others = _read_part(root, role, part, columns)
            strays += others
            own_table = metadata(root / part.folder) if part.folder and role != "unlabeled" else None
            if own_table:
                tables_read.add(joined((part.folder or "", own_table.name)))
            elif role != "unlabeled":
                outer = (part.folder,) if part.folder else ()
                class_level |= {path for path in walked.folders if len(path) == len(outer) + 1 and path[:-1] == outer}
        if list(layout.parts) == ["train"]:
            contents.facts["same_inside"] = same_inside(layout.parts["train"].images)
    others = contents.facts.get("other_files", [])
    contents.facts["other_files"] = [name for name in others if name not in tables_read]
    contents.facts["left_out"] = [joined(path) for path in strays]
    if table and given is None:
        if list(contents.parts) == ["train"]:
            check_no_lists(root, walked)
        _check_no_part_is_unnamed(root, table, strays, contents.parts)
    _check_parts_share_nothing(root, contents.parts)
    contents.facts["empty_folders"] = _without_images(walked, class_level)


def _check_no_part_is_unnamed(
    root: Path, table: Path, strays: Sequence[RelativePath], parts: Mapping[str, EncodedPart]
) -> None:
    """Raises DataError where a table above them names no image of a folder that is called as a part."""
    unnamed = Counter(path[0] for path in strays if len(path) > 1)
    for folder, number in unnamed.items():
        role = role_called(folder)
        if role in ("val", "test") and role not in parts:
            raise DataError(
                f"{quoted(table)} names no image of {quoted(folder)}, which holds {number}: give them rows, or move "
                "that folder away"
            )


def _check_parts_share_nothing(root: Path, parts: Mapping[str, EncodedPart]) -> None:
    """Raises DataError where an image is in two labeled parts by one path."""
    part_of: dict[str, str] = {}
    for role, part in parts.items():
        for name in part.ids if role != "unlabeled" else ():
            other = part_of.setdefault(name, role)
            if other != role:
                raise DataError(
                    f"data.root {quoted(root)} has {quoted(name)} in the {other} part and in the {role} part "
                    f"({parts[other].origin}, {part.origin}): take it out of one of them"
                )


def _read_part(root: Path, role: str, part: FolderPart, columns: Columns) -> tuple[EncodedPart, list[RelativePath]]:
    """(a part that is a folder of `root` or spread over its class folders, the images there that are in no class).

    Classes are from the metadata file of the folder, or else from its folders. Ids are paths from `root`.
    """
    table = metadata(root / part.folder) if part.folder else None
    if role == "unlabeled" and part.folder:  # its ids start at itself, as if it were given by name
        inside = [path[1:] for path in part.images]
        return _unlabeled_part(root / part.folder, inside, part.origin), []
    if table:
        rows = read_metadata(table, columns)
        rows.check_part(table, role)
        part = part._replace(origin=part.origin + table.name)
        return _part_of_table(root, [_below(root, path) for path in rows.files], rows.class_names, part)
    with_class = [path for path in part.images if len(path) > part.class_at + 1]
    folders = [path[part.class_at] for path in with_class]
    if role != "unlabeled":
        _check_class_folders(root / (part.folder or ""), folders)
    files = [str(root.joinpath(*path)) for path in with_class]
    class_names = [as_text(name) for name in folders]
    read = _part_of_files(files, [joined(path) for path in with_class], class_names, part.origin)
    return read, [path for path in part.images if len(path) <= part.class_at + 1]


def _part_of_table(
    root: Path, files: Sequence[Path], class_names: list[str], part: FolderPart
) -> tuple[EncodedPart, list[RelativePath]]:
    """(the part of the rows of a table, the images in its folder that it does not name)."""
    ids = [_path_from(root, path) for path in files]
    read = _part_of_files([str(path) for path in files], ids, class_names, part.origin)
    named = set(ids)
    return read, [path for path in part.images if joined(path) not in named]


def _parts_of_table(
    root: Path, table: Path, images: Sequence[RelativePath], columns: Columns, *, is_given: bool
) -> tuple[dict[str, EncodedPart], list[RelativePath]]:
    """(the parts of a table above them, the images that it does not name): its rows are of the part that a column says
    or one of the folders in their path is called as, or all of them for training. An unlabeled/ is a part without
    rows."""
    rows = read_metadata(table, columns, [root, table.parent] if is_given else [])
    listed, class_names, split = rows.files, rows.class_names, rows.split
    files = [_below(root, path) for path in listed]
    rows_of: dict[str | None, list[int]] = defaultdict(list)
    for row, path in enumerate(files):
        rows_of[split.roles[row] if split else role_in_path(_relative(root, path), class_names[row])].append(row)
    if not split and len(rows_of) > 1 and (None in rows_of or "train" not in rows_of):
        in_a_part = next(rows[0] for role, rows in rows_of.items() if role)
        other = f"{quoted(listed[rows_of[None][0]])} in none" if None in rows_of else "none in train/"
        raise DataError(f"{quoted(table)} names {quoted(listed[in_a_part])} in a part, and {other}: {FORMS}")
    for name in {path[0] for path in images if len(path) > 1}:
        if role_called(name) and metadata(root / name) and not is_given:
            raise DataError(
                f"data.root {quoted(root)} has {table.name}, and {quoted(name)} in it has one too: keep one of them"
            )
    unnamed = {joined(path): path for path in images}
    parts: dict[str, EncodedPart] = {}
    for role, rows in rows_of.items():
        folders = sorted({folder for row in rows for folder in _relative(root, files[row])[:-1] if role_called(folder)})
        origin = ", ".join([table.name, *(f"{as_text(folder)}/" for folder in folders if role)])
        if split and role:
            origin = f"{table.name}, {split.shown(role)}"
        part = FolderPart([], origin=origin)
        names = [class_names[row] for row in rows]
        parts[role or "train"], _ = _part_of_table(root, [files[row] for row in rows], names, part)
        for name in parts[role or "train"].ids:
            unnamed.pop(name, None)
    beside = {path[0] for path in unnamed.values() if len(path) > 1 and role_called(path[0]) == "unlabeled"}
    if len(beside) == 1 and "unlabeled" not in parts:
        (folder,) = beside
        inside = [path[1:] for path in unnamed.values() if path[0] == folder]
        parts["unlabeled"] = _unlabeled_part(root / folder, inside, f"{as_text(folder)}/")
        unnamed = {name: path for name, path in unnamed.items() if path[0] != folder}
    return parts, list(unnamed.values())


def _relative(root: Path, path: Path) -> RelativePath:
    return path.relative_to(root).parts if path.is_relative_to(root) else path.parts[-1:]


def _without_images(walked: Walk, class_level: set[RelativePath]) -> list[str]:
    """Folders that stand where classes do and hold no image, and folders that hold nothing at all: somebody may have
    meant them as classes."""
    with_images = _outer_folders(walked.images)
    with_anything = with_images | _outer_folders(walked.folders)
    for reason, paths in walked.left_out.items():
        if reason != "hidden":
            with_anything |= _outer_folders(paths)
    empty = {path for path in walked.folders if path and path not in with_anything}
    return [f"{joined(path)}" for path in sorted(empty | (class_level - with_images))]


def _outer_folders(paths: Sequence[RelativePath]) -> set[RelativePath]:
    """All folders on the way to `paths`."""
    folders: set[RelativePath] = set()
    for path in paths:
        outer = path[:-1]
        while outer and outer not in folders:
            folders.add(outer)
            outer = outer[:-1]
    return folders


def _check_class_folders(part: Path, class_names: Sequence[str]) -> None:
    if not class_names:
        raise DataError(f"data.root {quoted(part)} has images, but no class folders with images in them")
    shown: dict[str, str] = {}
    for name in dict.fromkeys(class_names):
        if role_called(name) == "unlabeled":
            raise DataError(
                f"data.root {quoted(part)} has {quoted(name)} among its class folders: set data.unlabeled="
                f"{quoted(part / name)} if its images have no label, or give the class another name"
            )
        if shown.setdefault(as_text(name), name) != name:
            raise DataError(f"data.root {quoted(part)} has two class folders that are shown as {name!r}: rename one")


def _below(root: Path, path: Path) -> Path:
    """`path` as one that starts with `root` where it lies below it: a table may name files by absolute paths, and root
    may be relative to the working directory."""
    absolute_root = root.absolute()
    if path.is_absolute() and path.is_relative_to(absolute_root):
        return root / path.relative_to(absolute_root)
    return path


def _path_from(root: Path, path: Path) -> str:
    if ".." in path.parts:
        path = Path(os.path.normpath(path))
    return as_text(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path))


def _read_unlabeled(contents: Contents, root: str, source: str, classes: Sequence[str], on_mistake: OnMistake) -> None:
    """Images of the folder `source` at any depth, or of the list `source`. Their class is the topmost folder, or the
    label in the list as one of `classes`, and an empty text where there is none.

    Raises DataError.
    """
    folder, origin = Path(source), f"{as_text(os.path.basename(os.path.normpath(source)))}"
    if folder.is_dir():
        walked = walk(folder, on_mistake=on_mistake)
        if not _is_within(folder, root):  # else the walk over root has named what is no image
            contents.note(walked, (folder.resolve().name,))
        elif _unlabeled_folder(Path(root), source):
            contents.note(walked, Path(os.path.realpath(folder)).relative_to(os.path.realpath(root)).parts)
        if not walked.images:
            raise DataError(f"data.unlabeled {quoted(source)} holds no image ({', '.join(SUFFIXES)})")
        contents.parts["unlabeled"] = _unlabeled_part(folder, walked.images, f"{origin}/")
    elif folder.is_file():
        ids, labels = with_slashes(folder.parent, read_unlabeled(folder, len(classes)))
        names = [*classes, ""]  # label -1, an unknown class, indexes the last
        class_names = [names[label] for label in labels.tolist()]
        missing = [name for name in ids if not os.path.isfile(folder.parent / name)]
        if missing:
            raise DataError(
                f"list {quoted(source)} names {len(missing)} files that are not there, the first is "
                f"{quoted(missing[0])}: its paths start at {quoted(folder.parent)}"
            )
        files = [str(folder.parent / name) for name in ids]
        contents.parts["unlabeled"] = _part_of_files(files, ids, class_names, origin)
    else:
        raise DataError(f"data.unlabeled {quoted(source)} does not exist: give a folder of images, or a list of them")


def _is_within(folder: Path, root: str) -> bool:
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root))


def _unlabeled_part(folder: Path, images: Sequence[RelativePath], origin: str) -> EncodedPart:
    """Unlabeled images, by their paths from `folder`; the topmost folder of each may be its class."""
    class_names = [as_text(path[0]) if len(path) > 1 else "" for path in images]
    files = [str(folder.joinpath(*path)) for path in images]
    return _part_of_files(files, [joined(path) for path in images], class_names, origin)


def _part_of_files(paths: Sequence[str], ids: list[str], class_names: list[str], origin: str) -> EncodedPart:
    """A part of image files; the fingerprint of each is its size, the stamp a hash of when all were written.

    Raises DataError.
    """
    try:
        status = [os.stat(path) for path in paths]
    except OSError as error:
        raise DataError(f"image {quoted(error.filename)} cannot be read ({error.strerror}): move it away") from None
    sizes = [str(file.st_size) for file in status]
    written = " ".join(str(file.st_mtime_ns) for file in status)
    stamp = hashlib.sha256(written.encode()).hexdigest()
    return EncodedPart(lambda i: paths[i], ids, class_names, sizes, stamp, origin=origin)


# From parts to a task.


def _class_names(parts: Mapping[str, EncodedPart], root: str, on_mistake: OnMistake) -> list[str]:
    """The classes of all labeled parts: in the dataset's own order, or sorted where it has none, numbers as numbers."""
    used: set[str] = set()
    for role, part in parts.items():
        if role != "unlabeled":
            used.update(part.class_names)
    _check_spellings(used, root, on_mistake)
    own_order = parts["train"].class_order
    if used <= set(own_order):
        return list(own_order)
    numbers = {name for name in used if name.isdecimal()}
    return sorted(numbers, key=lambda name: (int(name), name)) + sorted(used - numbers)


def _check_spellings(names: set[str], root: str, on_mistake: OnMistake) -> None:
    """Names two classes that differ in case, underscores or Unicode form alone."""
    known: dict[str, str] = {}
    for name in sorted(names):
        key = spelling(name)
        if key in known:
            on_mistake(
                f"data.root {quoted(root)}: classes {quoted(repr(known[key]))} and {quoted(repr(name))} are one in two "
                "spellings: rename one"
            )
        known[key] = name


def _to_files(root: str, role: str, part: EncodedPart, classes: list[str], on_mistake: OnMistake) -> Files:
    """A part with classes as numbers; -1 where a name is no class, as in the unlabeled part alone."""
    if len(set(part.ids)) < len(part.ids):
        twice = next(name for name in part.ids if part.ids.count(name) > 1)
        on_mistake(f"the {role} part of data.root {quoted(root)} lists an image twice: {quoted(twice)}")
    label_of = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([label_of.get(name, -1) for name in part.class_names])
    return Files(part.source, labels, tuple(part.ids), tuple(part.fingerprints), part.stamp)


def _without_broken(
    images: Mapping[str, Files], parts: Mapping[str, EncodedPart], root: str
) -> tuple[dict[str, Files], list[str]]:
    """(the parts without the images that cannot be decoded, an error for each of these).

    Raises DataError where a part has nothing left.
    """
    names = {"train": "training", "unlabeled": "unlabeled", "val": "held-out", "test": "test"}
    decodable: dict[str, Files] = {}
    all_errors: list[str] = []
    for role, files in images.items():
        # Ids of an unlabeled part start at its own folder: without it they could be taken for others.
        folder = parts[role].origin if role == "unlabeled" and parts[role].origin.endswith("/") else ""
        errors = _decoding_errors(files, "" if folder.startswith("CLASS/") else folder)
        all_errors += [error for error in errors if error]
        decodable[role] = files.subset([i for i, error in enumerate(errors) if not error])
        if len(decodable[role]) == 0:
            raise DataError(
                f"data.root {quoted(root)} has no {names[role]} image that can be decoded, for example: "
                f"{all_errors[-1]}"
            )
    return decodable, all_errors


def _decoding_errors(files: Files, folder: str) -> list[str]:
    """For each image what is wrong with it, or an empty text; all are decoded once, in threads. `folder` is what the
    names of images in a sentence begin with."""

    def error_of(i: int) -> str:
        try:
            (file,) = files.take(torch.tensor([i]))
            readable(file._replace(name=folder + file.name))
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return list(pool.map(error_of, range(len(files))))


VAL_IS_TEST = "the val part is the test set"


def _with_test_part(
    images: Mapping[str, Files], parts: Mapping[str, EncodedPart], root: str, split: Split
) -> tuple[Files, Files | None, Files, str]:
    """(training, val, test, what the test part is): a test part as given, or else the val part, or else split off."""
    train, val, test = images["train"], images.get("val"), images.get("test")
    if test is not None:
        test_part = parts["test"].origin or "as given"
    elif val is not None:
        test, val = val, None
        test_part = ", ".join(text for text in (VAL_IS_TEST, parts["val"].origin) if text)
    else:
        train, test = _split_off(train, split)
        about = "about " if split.split_by == "image" else ""
        test_part = f"{about}{split.test_share:g} of each class split off as test set with seed {split.seed}"
    if len(test) == 0:
        raise DataError(f"data.root {quoted(root)} has no image to test on: a class needs two images to give one away")
    return train, val, test, test_part


def _split_off(files: Files, split: Split) -> tuple[Files, Files]:
    """(training, test). Of a class with two images or more at least one is in each."""
    test_of_class = _drawn_by_image if split.split_by == "image" else _drawn_by_position
    test = test_of_class(files, split)
    train = sorted(set(range(len(files))) - set(test))
    return files.subset(train), files.subset(sorted(test))


def _drawn_by_image(files: Files, split: Split) -> list[int]:
    """The test images of each class: those whose own draw, uniform in [0, 1), is below `test_share`."""
    draws = image_draws(files, split.seed)
    test: list[int] = []
    for rows in rows_by_class(np.argsort(draws, kind="stable"), files.labels.numpy()).values():
        different = np.unique(draws[rows])  # copies of an image have one draw, and stay together
        number = min(max(int((different < split.test_share).sum()), 1), len(different) - 1)
        if number:
            test += rows[draws[rows] <= different[number - 1]].tolist()
    return test


def _drawn_by_position(files: Files, split: Split) -> list[int]:
    """The test images of each class: round(share · n), at least one where there are two or more."""
    rng = np.random.default_rng((split.seed, 13))
    by_id = np.argsort(np.array(files.ids))  # not the file system's order
    test: list[int] = []
    for rows in rows_by_class(by_id, files.labels.numpy()).values():
        shuffled = rng.permutation(rows)
        size = max(round(split.test_share * len(rows)), 1)
        test += shuffled[: min(size, len(rows) - 1)].tolist()
    return test


def _with_val_part(train: Files, root: str, val_per_class: int, seed: int) -> tuple[Files, Files]:
    """(training, val) from training images, of which each class keeps one."""
    rows = np.arange(len(train))
    remaining, held_out = hold_out(rows, rows, train.labels.numpy(), val_per_class, seed)
    if len(held_out) == 0:
        raise DataError(f"data.val_per_class {val_per_class}: no class of {root} has a second training image to give")
    return train.subset(remaining.tolist()), train.subset(held_out.tolist())


def _amiss(
    contents: Contents, skipped: list[str], labeled: Sequence[Files | None], unlabeled: Files | None
) -> dict[str, list[str]]:
    """What a run reports about it (`lpt.data.task.REMARKS`), where there is any."""
    test = labeled[-1]
    lists = {
        **contents.facts,
        "skipped": skipped,
        "same_file": _one_file_twice([part for part in labeled if part]),
        "leaked": _same_files(test, unlabeled) if test and unlabeled else [],
    }
    return {fact: names for fact, names in lists.items() if names}


def _one_file_twice(parts: Sequence[Files]) -> list[str]:
    """Pairs of ids that are one file, in one part or in two."""
    first: dict[tuple[int, int], str] = {}
    pairs: list[str] = []
    for part in parts:
        if isinstance(part.source(0), bytes):
            continue
        for i, name in enumerate(part.ids):
            known = first.setdefault(_inode(part, i), name)
            if known != name:
                pairs.append(f"{known} = {name}")
    return pairs


def _inode(images: Files, i: int) -> tuple[int, int]:
    status = os.stat(images.source(i))
    return status.st_dev, status.st_ino


def _same_files(test: Files, unlabeled: Files) -> list[str]:
    """Ids of unlabeled images whose file is a test image's too, by whatever path; images in tables have no file."""
    first = test.source(0)
    if isinstance(first, bytes) or not os.path.isfile(first):
        return []
    tested = {_inode(test, i) for i in range(len(test))}
    return [unlabeled.ids[i] for i in range(len(unlabeled)) if _inode(unlabeled, i) in tested]
