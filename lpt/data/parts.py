"""Which part each image of a folder is in: by folders called train, val and test, around the class folders or in them.

What could be read in two ways is refused.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lpt.data.walk import RelativePath, as_text, joined
from lpt.errors import DataError, quoted

PART_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
"""How a folder may be called to be a part, in any case, also as train_set, test images and the like."""
FORMS = (
    "what is read is CLASS/*.jpg, train/CLASS/*.jpg with val/ and test/ beside it, CLASS/train/*.jpg with CLASS/val/ "
    "and CLASS/test/ beside it, and metadata.csv or .jsonl in the folder, or in each of train/, val/ and test/"
)


class FolderPart(NamedTuple):
    """The images of one part; the folder that is it, where it is one; where in their paths the class folder stands."""

    images: list[RelativePath]
    folder: str | None = None
    class_at: int = 0
    origin: str = "class folders"


class Layout(NamedTuple):
    """The parts of a folder by role, and the images that are in none."""

    parts: dict[str, FolderPart]
    strays: list[RelativePath]


def role_called(name: str) -> str | None:
    """The part that a folder of this name may be.

    >>> role_called("Training"), role_called("test_set"), role_called("test tubes")
    ('train', 'test', None)
    """
    letters = re.sub("[^a-z0-9]", "", name.lower())
    for ending in ("images", "data", "split", "set"):
        letters = letters.removesuffix(ending)
    for role, names in PART_FOLDERS.items():
        if letters in names:
            return role
    return None


def role_in_path(path: Sequence[str], class_name: str) -> str | None:
    """The part that a folder in a path is called as; None where none is, or two are, or where it is the class.

    >>> role_in_path(("images", "test", "1.png"), "cat"), role_in_path(("train", "1.png"), "train")
    ('test', None)
    """
    roles = {role_called(name) for name in path[:-1] if name != class_name} - {None}
    return roles.pop() if len(roles) == 1 else None


def find_parts(root: Path, images: Sequence[RelativePath], has_table: Callable[[str], bool]) -> Layout:
    """The parts of the folder `root`, which has no table of its own; `has_table` says which folders in it have one.
    Raises DataError."""
    by_folder: dict[str, list[RelativePath]] = defaultdict(list)
    for path in images:
        if len(path) > 1:
            by_folder[path[0]].append(path)
    strays = [path for path in images if len(path) == 1]
    outer = _outer_parts(by_folder, has_table)
    if "train" in outer:
        return Layout(_parts_around_classes(root, by_folder, outer), strays)
    inner = _parts_in_classes(root, by_folder)
    if inner:
        return Layout(inner, strays)
    for role, names in outer.items():
        if role != "unlabeled":
            raise DataError(
                f"data.root {quoted(root)} has {quoted(names[0])} with class folders in it, and no train beside it: "
                f"{FORMS}"
            )
    _check_class_folders(root, by_folder)
    return Layout({"train": FolderPart([path for path in images if len(path) > 1])}, strays)


def _outer_parts(
    by_folder: Mapping[str, Sequence[RelativePath]], has_table: Callable[[str], bool]
) -> dict[str, list[str]]:
    """Which of the topmost folders are called as a part and are one.

    A folder called train may be a part or a class. It is a part where images lie one folder deeper, in class folders,
    or where a table describes them.
    """
    names_of: dict[str, list[str]] = {}
    for name, images in by_folder.items():
        role = role_called(name)
        if role is None:
            continue
        has_class_folders = any(len(path) > 2 for path in images)
        if role == "unlabeled" or has_class_folders or has_table(name):
            names_of.setdefault(role, []).append(name)
    return names_of


def _parts_around_classes(
    root: Path, by_folder: Mapping[str, list[RelativePath]], names_of: Mapping[str, list[str]]
) -> dict[str, FolderPart]:
    for names in names_of.values():
        if len(names) > 1:
            raise DataError(
                f"data.root {quoted(root)} has two folders for one part, {quoted(' and '.join(names))}: keep "
                "one of them"
            )
    folder_of = {role: names[0] for role, names in names_of.items()}
    others = sorted(by_folder.keys() - set(folder_of.values()))
    if others:
        raise DataError(
            f"data.root {quoted(root)} has parts ({quoted(', '.join(folder_of.values()))}) and beside them "
            f"{quoted(others[0])}, which holds images too: move it elsewhere"
        )
    return {
        role: FolderPart(by_folder[name], name, class_at=1, origin=f"{as_text(name)}/")
        for role, name in folder_of.items()
    }


def _parts_in_classes(root: Path, by_folder: Mapping[str, list[RelativePath]]) -> dict[str, FolderPart]:
    """The parts where each class folder has folders called train, val and test in it; none where no class has.

    Raises DataError where some have and others have not.
    """
    images_of: dict[str, list[RelativePath]] = defaultdict(list)
    names_of: dict[str, set[str]] = defaultdict(set)
    in_no_part: list[RelativePath] = []
    for path in sorted(path for images in by_folder.values() for path in images):
        name = path[1:-1][:1]  # the folder in the class folder, if there is one
        role = role_called(name[0]) if name else None
        if role is None:
            in_no_part.append(path)
        else:
            images_of[role].append(path)
            names_of[role].update(name)
    if not images_of:
        return {}
    example = next(iter(images_of.values()))[0]
    if len(by_folder) == 1:
        raise DataError(
            f"data.root {quoted(root)} has all its images in {quoted(example[0])}: set data.root="
            f"{quoted(root / example[0])} if its folders are the parts"
        )
    if in_no_part or "train" not in images_of:
        other = f"{quoted(joined(in_no_part[0]))} is in no part" if in_no_part else "no class has a folder train"
        raise DataError(
            f"data.root {quoted(root)} has {quoted(joined(example))} in a folder called as a part, and {other}: "
            f"{FORMS}; if it is no part, give that folder another name"
        )
    return {
        role: FolderPart(paths, origin=", ".join(f"CLASS/{as_text(name)}/" for name in sorted(names_of[role])))
        for role, paths in sorted(images_of.items(), key=lambda item: list(PART_FOLDERS).index(item[0]))
    }


def _check_class_folders(root: Path, by_folder: Mapping[str, Sequence[RelativePath]]) -> None:
    """Raises DataError where the topmost folders with images are no classes."""
    roles = [role_called(name) for name in by_folder]
    if "train" in roles and None not in roles and len(roles) > 1:
        raise DataError(
            f"data.root {quoted(root)} has {quoted(' and '.join(by_folder))}, and no class folders in them: {FORMS}"
        )
    if len(by_folder) == 1:
        ((name, images),) = by_folder.items()
        if all(len(path) > 2 for path in images):
            raise DataError(
                f"data.root {quoted(root)} has all its images in {quoted(name)}: set data.root="
                f"{quoted(root / name)} if its folders are the classes"
            )


def same_inside(images: Sequence[RelativePath]) -> list[str]:
    """The class folders where all of them hold folders of the same names, two or more: they may be parts of a dataset
    under other names than are known."""
    inside: dict[str, set[str]] = defaultdict(set)
    for path in images:
        inside[path[0]].add(path[1] if len(path) > 2 else "")
    first = next(iter(inside.values()), set[str]())
    if len(inside) < 2 or len(first) < 2 or "" in first or any(names != first for names in inside.values()):
        return []
    return [as_text(name) for name in inside]
