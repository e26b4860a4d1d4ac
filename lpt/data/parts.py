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
    if "train" not in outer:
        outer = _parts_by_word(root, by_folder) or outer
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
    _check_inner_folders(root, by_folder)
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


def role_in_words(name: str) -> tuple[str | None, str]:
    """(the part that one word of a name says, the other words); no part where no word says one, or two do.

    >>> role_in_words("train2017"), role_in_words("ILSVRC2012_img_val"), role_in_words("cats")
    (('train', ''), ('val', 'ilsvrc img'), (None, 'cats'))
    """
    words = re.findall("[^\\W\\d_]+", name.lower())
    said = [(role_called(word), word) for word in words]
    roles = [role for role, _ in said if role]
    return roles[0] if len(roles) == 1 else None, " ".join(word for role, word in said if not role)


def _parts_by_word(root: Path, by_folder: Mapping[str, Sequence[RelativePath]]) -> dict[str, list[str]]:
    """The topmost folders by part where their names differ in one word, and that says it: train2017 and val2017; none
    where they do not. Raises DataError where they are classes and parts at once: train_cat, test_cat, train_dog."""
    said = {name: role_in_words(name) for name in by_folder}
    names_of: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name, (role, rest) in said.items():
        if role:
            names_of[rest].setdefault(role, []).append(name)
    several = {
        rest: roles
        for rest, roles in names_of.items()
        if len(roles) > 1 and "train" in roles and not all(role_called(name) for (name, *_) in roles.values())
    }  # folders called train and test as a whole may be classes
    if not several:
        return {}
    first = [name for names in next(iter(several.values())).values() for name in names]
    if len(several) > 1 or any(role is None for role, _ in said.values()):
        raise DataError(
            f"data.root {quoted(root)} has {quoted(' and '.join(first[:2]))}, which are called as parts, beside other "
            f"folders: {FORMS}"
        )
    (roles,) = several.values()
    return roles


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
        what = "and no class folders: put them into some, or move it" if role_called(others[0]) else "too: move it"
        raise DataError(
            f"data.root {quoted(root)} has parts ({quoted(', '.join(folder_of.values()))}) and beside them "
            f"{quoted(others[0])}, which holds images {what} elsewhere"
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
    _check_classes_in_parts(root, images_of["train"])
    return {
        role: FolderPart(paths, origin=", ".join(f"CLASS/{as_text(name)}/" for name in sorted(names_of[role])))
        for role, paths in sorted(images_of.items(), key=lambda item: list(PART_FOLDERS).index(item[0]))
    }


def _check_classes_in_parts(root: Path, training: Sequence[RelativePath]) -> None:
    """Raises DataError for site1/train/cat and site2/train/cat: the classes may be the folders inside."""
    outer_of: dict[str, set[str]] = defaultdict(set)
    for path in training:
        if len(path) > 3:
            outer_of[path[2]].add(path[0])
    shared = next((name for name, outer in outer_of.items() if len(outer) > 1), None)
    if shared:
        first, second = sorted(outer_of[shared])[:2]
        raise DataError(
            f"data.root {quoted(root)} has {quoted(shared)} in the parts of {quoted(first)} and of {quoted(second)}: "
            f"which are the classes? {FORMS}"
        )


def _check_inner_folders(root: Path, by_folder: Mapping[str, Sequence[RelativePath]]) -> None:
    """Raises DataError where folders further inside are called as parts."""
    example: dict[str, RelativePath] = {}
    for path in (path for images in by_folder.values() for path in images):
        for name in path[2:-1]:
            if role := role_called(name):
                example.setdefault(role, path)
    if "train" in example and len(example) > 1:
        other = next(path for role, path in example.items() if role != "train")
        raise DataError(
            f"data.root {quoted(root)} has {quoted(joined(example['train']))} and {quoted(joined(other))}, in folders "
            f"that are called as parts, at a depth where none is read: {FORMS}"
        )


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
    """The class folders where all of them hold folders of about the same names, two or more: they may be parts of a
    dataset under other names than are known. A rare class need not be in each."""
    inside: dict[str, set[str]] = defaultdict(set)
    for path in images:
        inside[path[0]].add(path[1] if len(path) > 2 else "")
    largest = max(inside.values(), key=len, default=set[str]())
    if len(inside) < 2 or len(largest) < 2 or any("" in names for names in inside.values()):
        return []
    if any(len(names & largest) < max(1, len(names) / 2) for names in inside.values()):
        return []
    return [as_text(name) for name in inside]
