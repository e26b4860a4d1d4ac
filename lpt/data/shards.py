"""WebDataset shards: tar files in which all files of one image have one name, KEY.jpg beside KEY.cls or KEY.json.

They are read in the order of their names, as they lie; an image is read from its place in the file when it is needed.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lpt.data.data_files import files_by_role
from lpt.data.tables import LABEL_COLUMNS, Columns, EncodedPart, likely_columns
from lpt.data.texts import class_names_of, cleaned, read_text
from lpt.data.walk import SUFFIXES, RelativePath, as_text, joined
from lpt.errors import DataError, quoted

CLASS_FIELDS = ("cls", "class", "label", "cls.txt", "class.txt", "label.txt", "target")
"""Endings of the files that hold the class of an image."""
NAME_FILES = ("classnames.txt", "classes.txt", "class_names.txt")
"""Files beside the shards with the name of each class, a line each, where images have numbers."""
IMAGE_ENDINGS = (*(suffix.removeprefix(".") for suffix in SUFFIXES), "jpe", "jfif", "img")
MOST_IN_A_FIELD = 2**20
"""Bytes of a class or of a JSON object."""
PROBED = 30
"""Files at the beginning of an archive that show what it is."""


class Place(NamedTuple):
    """Where an image lies: in which shard, from which byte on, and how many."""

    shard: int
    start: int
    size: int


@dataclass
class Sample:
    """What one key has: its image, and its class (an empty text without one)."""

    key: str
    place: Place | None = None
    label: Any = None


@dataclass
class Shards:
    """The samples of one part, in order."""

    paths: list[str]
    samples: list[Sample] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Files with neither an image nor a class in them."""

    def source(self, rows: Sequence[Place]) -> Callable[[int], bytes]:
        paths = self.paths

        def read(i: int) -> bytes:
            place = rows[i]
            with open(paths[place.shard], "rb") as file:
                file.seek(place.start)
                return file.read(place.size)

        return read


def is_shard(path: Path, *, with_classes: bool = True) -> bool:
    """Whether a tar file begins with images, and `with_classes` beside them: a backup of something has none. One that
    cannot be looked into may be a shard without classes: reading it says what is wrong."""
    endings: set[str] = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in islice(archive, PROBED):
                if member.isfile():
                    endings.add(_key_and_ending(member.name)[1])
    except (tarfile.TarError, OSError, ValueError):
        pass  # cut off perhaps: what came before it shows what it is
    has_images = any(_is_image(ending) for ending in endings)
    if not with_classes:
        return has_images or not endings
    return has_images and any(ending in CLASS_FIELDS or ending == "json" for ending in endings)


def read_shards(
    root: Path, files: Sequence[RelativePath], columns: Columns
) -> tuple[dict[str, EncodedPart], list[str]]:
    """(the parts of shards below `root`, by their names; files in them that belong to no image). Raises DataError."""
    names = _names_beside(root)
    parts: dict[str, EncodedPart] = {}
    left_out: list[str] = []
    for role, paths in files_by_role(root, files, "tar").items():
        shards = Shards([str(root.joinpath(*path)) for path in paths])
        for number, path in enumerate(paths):
            _read_shard(root, shards, number, path, columns)
        part = _part(root, role, shards, paths, names)
        left_out += shards.left_out
        if part is None:
            left_out += [joined(path) for path in paths]
        else:
            parts[role] = part
    return parts, left_out


def _read_shard(root: Path, shards: Shards, number: int, path: RelativePath, columns: Columns) -> None:
    """Adds the samples of one archive. Raises DataError where it is damaged, cut off, packed, or has a key twice."""
    name = f"data.root {quoted(root)}: shard {quoted(joined(path))}"
    known: dict[str, Sample] = {}
    try:
        with tarfile.open(shards.paths[number], "r:") as archive:
            for member in archive:
                if member.isfile():
                    _take(name, shards, known, archive, member, number, path, columns)
            _check_end(name, archive)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{name} cannot be read ({quoted(error) or type(error).__name__}): give it as a whole, and unpacked where "
            "it is compressed (gunzip)"
        ) from None


def _take(
    name: str,
    shards: Shards,
    known: dict[str, Sample],
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    number: int,
    path: RelativePath,
    columns: Columns,
) -> None:
    """Puts one file of an archive where it belongs."""
    key, ending = _key_and_ending(member.name)
    if member.name.rpartition("/")[2].startswith("."):  # ._0001.jpg and other sidecars
        return
    if member.issparse():
        raise DataError(f"{name} has {quoted(member.name)} with holes in it (sparse): pack it again without --sparse")
    is_class = ending in CLASS_FIELDS or ending == "json"
    if not is_class and not _is_image(ending):
        if ending not in ("txt", "__key__"):
            shards.left_out.append(f"{joined(path)}/{as_text(member.name)}")
        return
    sample = known.get(key)
    if sample is None:
        sample = known[key] = Sample(f"{joined(path).removesuffix('.tar')}/{as_text(key)}")
        shards.samples.append(sample)
    if _is_image(ending):
        if sample.place is not None:
            raise DataError(f"{name} has two images of one key, {quoted(key)}: give each image a key of its own")
        sample.place = Place(number, member.offset_data, member.size)
        return
    file = archive.extractfile(member)
    assert file is not None
    content = file.read(MOST_IN_A_FIELD).decode("utf-8", errors="replace")
    label = _label_in_json(name, member.name, content, columns) if ending == "json" else cleaned(content)
    if label is not None and (ending != "json" or sample.label is None):  # .cls is before .json, whichever comes first
        sample.label = label


def _label_in_json(name: str, member: str, content: str, columns: Columns) -> Any:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(f"{name} has {quoted(member)}, which is no JSON: put it right, or take it out") from None
    if not isinstance(row, dict):
        return None
    if columns.label is not None:
        return row.get(columns.label)
    likely = likely_columns(row, LABEL_COLUMNS)
    return row[likely[0]] if likely else None


def _check_end(name: str, archive: tarfile.TarFile) -> None:
    """Raises DataError where an archive ends without its two empty blocks, or continues after them: tarfile stops at
    either without a word."""
    file: Any = archive.fileobj
    file.seek(archive.offset)
    rest = file.read(2**20)
    if not rest or rest.strip(b"\0"):
        raise DataError(f"{name} is cut off or damaged after {len(archive.getmembers())} files: copy it again")


def _key_and_ending(name: str) -> tuple[str, str]:
    """A member's name up to the first dot of its last part, and what is behind it, in small letters."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}{slash}{key}", ending.lower()


def _is_image(ending: str) -> bool:
    return ending.rpartition(".")[2] in IMAGE_ENDINGS


def _part(
    root: Path, role: str, shards: Shards, paths: Sequence[RelativePath], names: Sequence[str]
) -> EncodedPart | None:
    """The samples of a part; None where it is one to test on and no image has a class."""
    samples = [sample for sample in shards.samples if sample.place is not None]
    shards.left_out += [sample.key for sample in shards.samples if sample.place is None]
    origin = joined(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    where = f"data.root {quoted(root)}: the {role} shards ({quoted(origin)})"
    if not samples:
        raise DataError(f"{where} hold no image (KEY.jpg beside KEY.cls or KEY.json)")
    try:
        class_names = class_names_of([sample.label for sample in samples])
    except TypeError as error:
        raise DataError(
            f"{where} have {quoted(error)} as a class: name the key of the JSON in data.label_column"
        ) from None
    missing = [sample.key for sample, name in zip(samples, class_names, strict=True) if not name]
    if role in ("val", "test") and len(missing) == len(samples):
        return None
    if missing and role != "unlabeled":
        raise DataError(
            f"{where} have {len(missing)} images without a class, the first is {quoted(missing[0])}: put KEY.cls "
            "beside KEY.jpg, or KEY.json with a label, or set data.label_column to its key"
        )
    class_names, class_order = _with_names(where, class_names, names)
    ids = [sample.key for sample in samples]
    twice = next((key for key, n in Counter(ids).items() if n > 1), None)
    if twice:
        raise DataError(f"{where} have the key {quoted(twice)} twice: give each image one of its own")
    places = [sample.place for sample in samples if sample.place is not None]
    status = [os.stat(path) for path in shards.paths]
    written = " ".join(f"{one.st_size} {one.st_mtime_ns}" for one in status)
    return EncodedPart(
        shards.source(places),
        ids,
        class_names,
        [str(place.size) for place in places],  # as of files: to read all of them would take an hour
        stamp=hashlib.sha256(written.encode()).hexdigest(),
        class_order=class_order,
        origin=origin,
    )


def file_of_names(root: Path) -> Path | None:
    """The file beside the shards with the names of the classes, if there is one."""
    return next((root / name for name in NAME_FILES if (root / name).is_file()), None)


def _names_beside(root: Path) -> list[str]:
    """The names of the classes, a line each, of a file beside the shards; nothing where there is none."""
    path = file_of_names(root)
    if path is None:
        return []
    try:
        names = [cleaned(line) for line in read_text(path).split("\n")]
    except (OSError, ValueError) as error:
        raise DataError(f"{quoted(path)} cannot be read ({quoted(error)})") from None
    return [line for line in names if line]


def _with_names(where: str, class_names: list[str], names: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """(class names, the order of the classes) where `names` are those of the numbers."""
    used = set(class_names) - {""}
    if not names or not used or not all(name.isdecimal() for name in used):
        return class_names, ()
    largest = max(int(name) for name in used)
    if largest >= len(names) or len(set(names)) < len(names):
        raise DataError(f"{where} have class {largest}, and the file of names beside them has {len(set(names))} names")
    return [names[int(name)] if name else "" for name in class_names], list(names)


def number_of_samples(paths: Sequence[Path]) -> int:
    """How many images shards hold, about: the files in them are counted by name alone."""
    return sum(1 for path in paths for name in _names_in(path) if _is_image(_key_and_ending(name)[1]))


def _names_in(path: Path) -> Iterator[str]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield from (member.name for member in archive if member.isfile())
    except (tarfile.TarError, OSError):
        return
