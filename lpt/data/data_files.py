"""Files that hold many images each, parquet and shards: which part each of them is, by its name and its folders.

What could be read in two ways is refused.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lpt.data.parts import role_called
from lpt.data.walk import RelativePath, joined
from lpt.errors import DataError, quoted

FORMS = (
    "what is read is train, val (or validation), test and unlabeled in the names of files or folders, for example "
    "train-00000-of-00002.{0}, data/test.{0} and val/0.{0}, or files without any of these, which are split by seed"
)
PICTURE_FOLDERS = {
    *("asset", "doc", "figure", "fig", "media", "example", "sample", "thumbnail", "static", "screenshot", "preview"),
    *("readme", "image", "img", "plot", "logo", "icon", "picture"),
}
"""How folders with pictures for the reader of a dataset are called, in one or in many."""


def files_by_role(root: Path, files: Sequence[RelativePath], kind: str) -> dict[str, list[RelativePath]]:
    """The data files of each part of `root`, in order of name. `kind` is their suffix, parquet or tar.

    Raises DataError where only some have a part in their names, and where they may be two datasets.
    """
    files_of: dict[str | None, list[RelativePath]] = defaultdict(list)
    first_in: dict[RelativePath, RelativePath] = {}
    for path in sorted(files):
        role, rest = _role_and_folders(root, path, kind)
        files_of[role].append(path)
        first_in.setdefault(rest, path)
    if len(first_in) > 1:
        one, other = sorted(first_in)[:2]
        raise DataError(
            f"data.root {quoted(root)} has .{kind} files in {len(first_in)} folders, for example "
            f"{quoted(joined(first_in[one]))} and {quoted(joined(first_in[other]))}, which may be two datasets: set "
            f"data.root={quoted(root.joinpath(*(other or one)))} for that one; {FORMS.format(kind)}"
        )
    unnamed = files_of.pop(None, [])
    if not files_of:
        return {"train": unnamed}
    if unnamed:
        role, (named, *_) = next(iter(files_of.items()))
        raise DataError(
            f"data.root {quoted(root)} has {quoted(joined(named))}, which is its {role} part, and "
            f"{quoted(joined(unnamed[0]))}, which is called as none: move it away or give it another name; "
            f"{FORMS.format(kind)}"
        )
    for role, paths in files_of.items():
        _check_one_name(root, str(role), paths)
    return {str(role): paths for role, paths in files_of.items()}


def _role_and_folders(root: Path, path: RelativePath, kind: str) -> tuple[str | None, RelativePath]:
    """(the part of a data file, the folders that it lies in but for those that are called as this part)."""
    role = None
    for name in (path[-1].rpartition(".")[0], *reversed(path[:-1])):
        roles = roles_in_words(name)
        if len(roles) > 1:
            raise DataError(
                f"data.root {quoted(root)}: {quoted(joined(path))} is called as two parts, {' and '.join(roles)}: give "
                f"it another name; {FORMS.format(kind)}"
            )
        if roles:
            (role,) = roles
            break
    return role, tuple(name for name in path[:-1] if role is None or roles_in_words(name) != [role])


def roles_in_words(name: str) -> list[str]:
    """The parts that words in a name are called as.

    >>> roles_in_words("cifar100-test-00000-of-00001"), roles_in_words("held_out"), roles_in_words("pretrained")
    (['test'], ['test'], [])
    """
    words = re.findall("[A-Za-z]+", name)
    named = [name, *words, *(a + b for a, b in pairwise(words))]
    return list(dict.fromkeys(role for word in named if (role := role_called(word))))


def _check_one_name(root: Path, role: str, paths: Sequence[RelativePath]) -> None:
    """Raises DataError for files of one part under two names, such as test.parquet and heldout.parquet, or those of two
    languages: shards of one part have one name and numbers."""
    named: dict[str, RelativePath] = {}
    for path in paths:
        stem, *folders = (path[-1].rpartition(".")[0], *reversed(path[:-1]))
        name = _without_number(stem) if roles_in_words(stem) else next(n for n in folders if roles_in_words(n))
        named.setdefault(name, path)
    if len(named) > 1:
        one, other = list(named.values())[:2]
        raise DataError(
            f"data.root {quoted(root)} has {quoted(joined(one))} and {quoted(joined(other))} for one part, {role}: "
            "keep one of them, or call them one name with numbers if they are pieces of it"
        )


def _without_number(stem: str) -> str:
    """The name that the pieces of a file share.

    >>> _without_number("en-test-00000-of-00002-a09b74b3ef9c3b56"), _without_number("test_1"), _without_number("test1")
    ('en-test', 'test', 'test')
    """
    stem = re.sub(r"([-_.]?\d+[-_]of[-_]\d+)?([-_.][0-9a-f]{16})?$", "", stem)
    stem = re.sub(r"[-_.]\d+$", "", stem)
    letters = stem.rstrip("0123456789")
    return letters if role_called(letters) else stem


def are_beside(images: Sequence[RelativePath], num_rows: int) -> bool | None:
    """True where loose `images` are beside data files with `num_rows` images, such as a preview in assets/; None where
    they may be a dataset of their own, in class folders."""
    folders = {path[0] for path in images if len(path) > 1}
    others = [name for name in folders if name.lower().removesuffix("s") not in PICTURE_FOLDERS]
    return None if len(others) > 1 and 2 * len(images) >= num_rows else True
