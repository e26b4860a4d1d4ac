"""A folder of prompt files as a library: what is in it, files put in and taken out whole, and those that are damaged.

The folder is the truth. What was read of each file is kept beside it in an index, which is a cache: anyone may delete
it, and a line of it holds as long as the file is the one that it was read of. Nothing here needs torch.
"""

import contextlib
import datetime
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lpt.errors import DiskError, LptError, PromptFileError, UnknownTask, printable, quoted
from lpt.files import local_file, write_atomic
from lpt.prompt_header import Header, read_fields, read_header

SUFFIX = ".safetensors"
INDEX = ".lpt-library.json"
INDEX_FORMAT = 1
LARGEST_INDEX = 2**26
"""Bytes: it is read whole, and may come with a folder from anyone."""
NAME = re.compile(r"[^\W_][\w .+@=-]{0,99}")
"""What a task may be called that is added: a file name everywhere, and no way out of the folder."""


class Row(NamedTuple):
    """What a table says of a task. `accuracy` is None where the file does not say; dates are in UTC."""

    task: str
    classes: int
    method: str
    accuracy: float | None
    backbone: str
    fingerprint: str
    image_size: int
    images: int
    """That it was trained on."""
    routable: bool
    bytes: int
    written: str


class Listing(NamedTuple):
    """The tasks of a library by name, and what is wrong with each file that is none."""

    rows: tuple[Row, ...]
    problems: dict[str, str]


def task_of(path: Path) -> str:
    """What the task of a file in a library is called."""
    return path.name.removesuffix(SUFFIX)


def files_of(folder: Path) -> list[Path]:
    """The prompt files of a library, in order. Raises LptError for what is no folder."""
    if not folder.is_dir():
        raise LptError(f"library {quoted(str(folder))} is no folder: give one with prompt files")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX) and entry.name[0] != ".")
    return [folder / name for name in names]


def listing(folder: Path) -> Listing:
    """What is in the library, by the headers of its files alone: of each one that is not in the index, or was replaced
    since. `check` reads all."""
    known = _read_index(folder)
    rows: list[Row] = []
    problems: dict[str, str] = {}
    index: dict[str, Any] = {}
    paths = files_of(folder)
    with ThreadPoolExecutor() as pool:
        for path, found in zip(paths, pool.map(lambda path: _row(path, known.get(path.name)), paths), strict=True):
            if found is None:
                continue  # taken out meanwhile
            stamp, row = found
            if isinstance(row, str):
                problems[path.name] = row
            else:
                rows.append(row)
                index[path.name] = [stamp, row._asdict()]
    if index != known:
        with contextlib.suppress(DiskError):  # a folder that cannot be written to is listed as well
            write_atomic(folder / INDEX, json.dumps({"format": INDEX_FORMAT, "files": index}).encode())
    return Listing(tuple(rows), problems)


def _row(path: Path, known: Any) -> tuple[list[int], Row | str] | None:
    """(its stamp, what the table says of a file, or what is wrong with it); None where there is no such file."""

    def read(status: os.stat_result) -> Row:
        return _row_in_index(known, _stamp(status), path) or _row_of(path, *read_fields(path), status)

    return _settled(path, read)


Read = TypeVar("Read")


def _settled(path: Path, read: Callable[[os.stat_result], Read]) -> tuple[list[int], Read | str] | None:
    """(the file's stamp, what `read` returns, or what it finds wrong with a file that stays as it is); None where it is
    taken out meanwhile. One that is replaced while it is read is read again."""
    error = None
    for _ in range(20):
        try:
            status = path.stat()
        except OSError:
            return None
        if error is not None and _stamp(status) == error[0]:
            return error
        try:
            return _stamp(status), read(status)
        except PromptFileError as found:
            error = _stamp(status), str(found)
    return error


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _row_of(path: Path, header: Header, names: Sequence[str], status: os.stat_result) -> Row:
    written = datetime.datetime.fromtimestamp(status.st_mtime, datetime.UTC)
    return Row(
        task=task_of(path),
        classes=len(header.classes),
        method=header.method,
        accuracy=header.metrics.get("accuracy"),
        backbone=header.backbone.name,
        fingerprint=header.backbone.fingerprint,
        image_size=header.backbone.image_size,
        images=sum(header.counts),
        routable="task.means" in names,
        bytes=status.st_size,
        written=written.isoformat(timespec="seconds").removesuffix("+00:00"),
    )


def _row_in_index(known: Any, stamp: list[int], path: Path) -> Row | None:
    """A line of an index, which may hold anything, where it is of this file as it is."""
    if not (isinstance(known, list) and len(known) == 2 and known[0] == stamp and isinstance(known[1], dict)):
        return None
    try:
        row = Row(**known[1])
    except TypeError:
        return None
    kinds = (str, int, str, float | int | None, str, str, int, int, bool, int, str)
    if row.task != task_of(path) or not all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True)):
        return None
    return row


def _read_index(folder: Path) -> dict[str, Any]:
    """Lines by file name; none where there is no index, or one that is damaged or newer."""
    path = folder / INDEX
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= LARGEST_INDEX:
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and content.get("format") == INDEX_FORMAT:
                return content["files"] if isinstance(content.get("files"), dict) else {}
    return {}


def check(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(file name, what is wrong with it, if anything) of every file, each of which is opened and read whole, several at
    a time."""
    with ThreadPoolExecutor() as pool:
        for name, found in pool.map(_checked, files_of(folder)):
            if found is not None:
                yield name, found[1]


def _checked(path: Path) -> tuple[str, tuple[list[int], str | None] | None]:
    def read(status: os.stat_result) -> None:
        read_header(path)

    return path.name, _settled(path, read)


def add(folder: Path, source: Path, *, name: str | None = None, replace: bool = False) -> str:
    """Puts a copy of a prompt file into the library, whole or not at all, as `name`, by default what its own file is
    called; returns the name. Who reads meanwhile finds the old file, or the new one. Raises PromptFileError for a file
    that is damaged, LptError for a name that cannot be, or is there already unless `replace` says so, DiskError."""
    name = _usual_name(source) if name is None else name
    source = local_file(source)
    if not NAME.fullmatch(name) or name != name.strip(" .") or name.lower() == "auto":
        raise LptError(f"a task cannot be called {quoted(repr(name), 120)}: use letters, digits, spaces and .-_+=@")
    target = folder / f"{name}{SUFFIX}"
    if target.exists() and not replace:
        raise LptError(f"library {quoted(str(folder))} has a task {quoted(name)}: add --replace, or --name another")
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, text = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        temporary = Path(text)
        with os.fdopen(handle, "wb") as file:
            with source.open("rb") as content:
                while block := content.read(2**20):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        read_header(temporary)  # of the copy: what was looked at is what is put there
        temporary.chmod(0o666 & ~_umask())
        _put(temporary, target, replace)
    except PromptFileError as error:
        raise PromptFileError(str(error).replace(str(temporary), str(source))) from None
    except FileExistsError:
        raise LptError(f"library {quoted(str(folder))} has a task {quoted(name)} by now: add --replace") from None
    except OSError as error:
        if not source.is_file():
            raise PromptFileError(f"prompt file {source} does not exist") from None
        raise DiskError(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return name


def _usual_name(source: Path) -> str:
    """As its file, or as its run's folder."""
    name = task_of(source)
    return source.resolve().parent.name if name == "prompt" else name


def _put(temporary: Path, target: Path, replace: bool) -> None:
    """Gives a whole file its name. Raises FileExistsError where another one has it by now."""
    if replace:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike a renaming this never takes the place of a file
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if target.exists():
            raise FileExistsError(target) from None
        temporary.replace(target)


def _umask() -> int:
    """What this process leaves out of the rights of new files."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("Umask:")[2].split()[0], 8)
    return 0o022


def remove(folder: Path, task: str) -> None:
    """Takes a task's file out. Raises UnknownTask."""
    found = {task_of(path): path for path in files_of(folder)}
    if task not in found:
        raise UnknownTask(task, found)
    try:
        found[task].unlink()
    except FileNotFoundError:
        raise UnknownTask(task, found.keys() - {task}) from None
    except OSError as error:
        raise DiskError(found[task], error) from error


def table(rows: Sequence[Row]) -> str:
    """For people."""
    if not rows:
        return "no task"
    lines = [("task", "classes", "images", "method", "accuracy", "backbone", "px", "kB", "written")]
    for row in rows:
        accuracy = "" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
        size = f"{max(1, round(row.bytes / 1000)):,}"
        names = (quoted(row.method, 24), quoted(row.backbone, 48))
        date = row.written.replace("T", " ")[:16]
        values = (quoted(row.task, 60), f"{row.classes}", f"{row.images:,}", names[0], accuracy, names[1])
        lines.append((*values, f"{row.image_size}", size, date))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numbers = (1, 2, 4, 6, 7)
    shown = []
    for line in lines:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append(printable("  ".join(cells).rstrip()))
    return "\n".join(shown)
