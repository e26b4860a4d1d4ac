"""The one walk over folders of images, for training, predictions and the doctor: what is an image, and what is not.

A file is an image by its suffix, or else by its first bytes. Every other file is named in `left_out`.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from lpt.data.preprocess import is_common_image, is_heic, is_image
from lpt.errors import DataError, quoted

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2")
"""What is an image by its name, without a look into the file."""
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
# The raw ones among them are TIFFs by their first bytes, and hold nothing that Pillow reads but a thumbnail.
PICTURE_SUFFIXES = (
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw"),
    *(".raw", ".psd", ".xcf", ".svg", ".jxl", ".jxr", ".eps", ".ai", ".exr", ".hdr", ".dds", ".tga", ".ico", ".pcx"),
    *(".dcm", ".pdf", ".fits", ".icns", ".qoi", ".sgi", ".xpm", ".xbm", ".wmf", ".emf"),
)
"""What is a picture to its owner, and not read."""
MACHINE_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
"""Folders that a machine makes beside one's own, with copies and thumbnails in them. They count as hidden."""
MOST_NAMES = 200
"""Of one folder, by links. A few folders that all link to each other have millions of paths."""

RelativePath = tuple[str, ...]
"""A path below a root by its components: folders from the outside in, then the file."""


def refuse(sentence: str) -> NoReturn:
    """Ends a run: what a walk does with a mistake, where it is not to continue and name others too."""
    raise DataError(sentence)


@dataclass
class Walk:
    """What lies below a folder, in order of name, files before folders."""

    images: list[RelativePath] = field(default_factory=list)
    folders: list[RelativePath] = field(default_factory=list)
    """All that were entered."""
    left_out: dict[str, list[RelativePath]] = field(default_factory=dict)
    """Every other file by why it is none of the images, the keys of `lpt.data.task.REMARKS`; a hidden folder stands for
    what is in it, and so does a link that is not followed."""

    def leave_out(self, reason: str, path: RelativePath) -> None:
        self.left_out.setdefault(reason, []).append(path)


class Folder(NamedTuple):
    """A folder to enter: its path below the top, where it really is, and where the links were that led there."""

    path: RelativePath
    real: str
    linked_from: tuple[str, ...]


def walk(top: str | Path, *, without: str | Path | None = None, on_mistake: Callable[[str], object] = refuse) -> Walk:
    """All files below `top`, but for the folder `without`. Links are followed, unless they lead back to a folder that
    they lie in. `on_mistake` is given a sentence for each folder that cannot be read. Raises DataError."""
    walked = Walk()
    for images in walk_by_folder(top, walked, without=without, on_mistake=on_mistake):
        walked.images += images
    return walked


def walk_by_folder(
    top: str | Path,
    walked: Walk,
    *,
    without: str | Path | None = None,
    on_mistake: Callable[[str], object] = refuse,
) -> Iterator[list[RelativePath]]:
    """`walk` for more images than are to be held at once: yields those of each folder, and puts the rest of what it
    meets into `walked`."""
    passed_over = os.path.realpath(without) if without else None
    waiting = [Folder((), os.path.realpath(top), ())]
    names_of: Counter[str] = Counter()
    while waiting:
        here = waiting.pop()
        names_of[here.real] += 1
        if names_of[here.real] > MOST_NAMES:
            raise DataError(
                f"folder {quoted(here.real)} is there under more than {MOST_NAMES} names, one is "
                f"{quoted(joined(here.path))}: folders that link to each other; remove such links"
            )
        if here.real == passed_over and here.path:
            continue
        try:
            with os.scandir(os.path.join(str(top), *here.path)) as opened:
                met, inside = _entries(opened, here)
        except OSError as error:
            on_mistake(
                f"folder {quoted(error.filename)} cannot be read ({error.strerror}): give yourself the right, or move "
                "it away"
            )
            continue
        walked.folders.append(here.path)
        for reason, paths in met.left_out.items():
            walked.left_out.setdefault(reason, []).extend(paths)
        waiting += reversed(inside)
        yield met.images


def _entries(opened: Iterable["os.DirEntry[str]"], here: Folder) -> tuple[Walk, list[Folder]]:
    """What lies in the folder `here`, in order of name, and the folders to enter. Entries are looked at as they come: a
    folder may hold millions, each several times as large as its name."""
    met = Walk()
    inside = [folder for entry in opened if (folder := _take(met, entry, here))]
    for paths in (met.images, *met.left_out.values()):
        paths.sort()
    return met, sorted(inside)


def _take(walked: Walk, entry: "os.DirEntry[str]", here: Folder) -> Folder | None:
    """Puts an entry of the folder `here` where it belongs; the folder to enter, if it is one."""
    path, name = (*here.path, entry.name), entry.name.lower()
    is_link = entry.is_symlink()
    if name.startswith(".") or name in MACHINE_FOLDERS:
        walked.leave_out("hidden", path)
        return None
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself, for example
        is_folder = is_file = False
    if is_folder:
        return _folder(walked, entry, here)
    if is_link and not is_file and not os.path.exists(entry.path):
        walked.leave_out("lost_links", path)
    elif is_file and name.endswith(SUFFIXES):
        walked.images.append(path)
    else:
        reason = _why_no_image(entry.path, name) if is_file else "other_files"  # a pipe would be waited for
        if reason is None:
            walked.images.append(path)
        else:
            walked.leave_out(reason, path)
    return None


def _folder(walked: Walk, entry: "os.DirEntry[str]", here: Folder) -> Folder | None:
    """The folder `entry` as one to enter, unless it is a link that would never end."""
    path = (*here.path, entry.name)
    if not entry.is_symlink():
        return Folder(path, os.path.join(here.real, entry.name), here.linked_from)
    real = os.path.realpath(entry.path)
    # It leads back where one of the folders on the way is that folder, or lies in it.
    if any(_lies_in(folder, real) for folder in (*here.linked_from, here.real)):
        walked.leave_out("back_links", path)
        return None
    return Folder(path, real, (*here.linked_from, here.real))


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _why_no_image(path: str, name: str) -> str | None:
    """Why a file without the suffix of an image is none; None where it is one by its content."""
    if name.endswith(PICTURE_SUFFIXES) and not is_common_image(path):
        return "unread_pictures"
    if is_image(path):
        return None
    return "heic" if name.endswith(HEIC_SUFFIXES) or is_heic(path) else "other_files"


_UNDECODED = re.compile("[\ud800-\udfff]")


def as_text(name: str) -> str:
    """A name as the file system gives it, with bytes that are no UTF-8 shown as numbers: it can be written anywhere.

    >>> print(as_text("jos\\udce9"), as_text("josé"))
    jos\\xe9 josé
    """

    def shown(letter: re.Match[str]) -> str:
        number = ord(letter.group())
        is_byte = 0xDC80 <= number <= 0xDCFF  # as Python keeps it
        return f"\\x{number - 0xDC00:02x}" if is_byte else f"\\u{number:04x}"

    return _UNDECODED.sub(shown, name)


def joined(path: RelativePath) -> str:
    """A path as text, for ids and messages."""
    return as_text("/".join(path))
