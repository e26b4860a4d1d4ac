"""A task: training, held-out and test images of one label set, frozen and hashed.

Shapes: pixels [N 3 h w] uint8, labels [N], counts [C].
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lpt.data.longtail import GroupRule
from lpt.data.preprocess import File
from lpt.errors import DataError, quoted


class Remark(NamedTuple):
    """How something is said that is amiss in a dataset, or worth knowing."""

    text: str
    """With the number of names in the place of {}."""
    is_problem: bool = True
    by_folder: bool = False
    """Whether the names are paths, to be counted in each folder."""


REMARKS = {
    "empty_folders": Remark("{} folders hold no image and are no classes"),
    "heic": Remark("{} HEIC photos are left out: install pillow-heif to read them", by_folder=True),
    "unread_pictures": Remark("{} pictures of other formats are left out: save them as JPEG or PNG", by_folder=True),
    "left_out": Remark("{} images belong to no class and are left out"),
    "skipped": Remark("{} images cannot be decoded and are skipped"),
    "same_file": Remark("{} images are one file under two names"),
    "leaked": Remark("{} unlabeled images are test images too"),
    "tables_beside": Remark("{} tables name images here and are not read; settings read them", is_problem=False),
    "not_read": Remark("{} parts or files of the dataset are not read", is_problem=False),
    "same_inside": Remark("{} class folders hold folders of the same names: if these are the classes, call the outer "
                          "ones train and test"),
    "other_files": Remark("{} files are no images and are left out", is_problem=False, by_folder=True),
    "back_links": Remark("{} links lead back to a folder that they lie in and are not followed", is_problem=False),
    "hidden": Remark("{} hidden files and folders are left out", is_problem=False, by_folder=True),
}  # fmt: skip
"""What is reported about a task whose `facts` list names under one of these keys. What is no problem is worth a
note."""

# A part of a task is `Images` or `Files`. Both have `labels` [N] and `ids`, a length, `digest`, `take`, `subset` and
# `content`; only what `take` returns differs, and the engine asks which of the two it has.


@dataclass(frozen=True)
class Images:
    """Images of one size in memory: `pixels` [N 3 h w] uint8, `labels` [N], and N `ids` that stay from run to run.

    >>> import lpt, torch
    >>> images = lpt.Images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    >>> len(images), images.subset([1]).ids
    (2, ('b',))
    """

    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises DataError for what is no such set of images."""
        pixels = _tensor("Images: pixels", self.pixels)
        if pixels.dtype != torch.uint8:
            raise DataError(
                f"Images: pixels are {pixels.dtype}: give torch.uint8 from 0 to 255, for example "
                "(pixels * 255).round().to(torch.uint8) of floats from 0 to 1"
            )
        if pixels.dim() != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
            raise DataError(f"Images: pixels have shape {list(pixels.shape)}: give [N, 3, height, width]")
        _check_part(self, pixels=len(pixels))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids and pixels in their order, in hex: what was computed from these images is cached by it."""
        digest = hashlib.sha256("\n".join(self.ids).encode(errors="surrogateescape"))
        digest.update(f"{tuple(self.pixels.shape)}".encode())
        digest.update(self.pixels.numpy().tobytes())
        return digest.hexdigest()

    def take(self, indices: Tensor) -> Tensor:
        """The pixels of images `indices` [B]: uint8 [B 3 h w], for `Preprocess.train` and `Preprocess.test`."""
        return self.pixels[indices]

    def subset(self, indices: Iterable[int]) -> "Images":
        """The images `indices` in their order, with labels and ids; pixels are copied."""
        rows = torch.as_tensor(list(indices), dtype=torch.long)
        ids = tuple(self.ids[i] for i in rows.tolist())
        return Images(self.pixels[rows], self.labels[rows], ids)

    def content(self, rows: np.ndarray) -> bytes:
        """What a split's hash covers of images `rows` beside ids and labels: their pixels."""
        return self.pixels[torch.from_numpy(rows)].numpy().tobytes()


@dataclass(frozen=True)
class Files:
    """Encoded images, read only when they are asked for, with `labels` [N] and N `ids` that stay from run to run.

    `source(i)` is the path of image i, its encoded bytes, or what else a `File` may hold. `fingerprints` say what is in
    each image (its size in bytes, or a hash) without regard to where and when it was written; a function from i to one
    is asked for the hash of a split alone. `stamp` also changes when a file is written anew or lies elsewhere; beside
    such a function it belongs to these images alone.
    """

    source: Callable[[int], Any]
    labels: Tensor
    ids: tuple[str, ...]
    fingerprints: tuple[str, ...] | Callable[[int], str]
    stamp: str = ""

    def __post_init__(self) -> None:
        """Raises DataError for what is no such set of images."""
        if not callable(self.source):
            raise DataError(
                f"Files: source is {quoted(repr(self.source), 80)}: give a function from i to path or bytes"
            )
        _check_part(self, **({} if callable(self.fingerprints) else {"fingerprints": len(self.fingerprints)}))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over stamp, ids and fingerprints in their order, in hex; no file is read for it."""
        known = () if callable(self.fingerprints) else self.fingerprints
        text = "\n".join([self.stamp, *self.ids, *known])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def take(self, indices: Tensor) -> list[File]:
        """The encoded images `indices` [B], for `Preprocess.cut`: B files, not yet decoded."""
        return [File(self.ids[i], self.source(i)) for i in indices.tolist()]

    def fingerprint(self, i: int) -> str:
        """What is in image i."""
        return self.fingerprints(i) if callable(self.fingerprints) else self.fingerprints[i]

    def subset(self, indices: Iterable[int]) -> "Files":
        """The images `indices` in their order, with labels, ids and fingerprints, under the same stamp."""
        rows = [int(i) for i in indices]
        source, ids = self.source, tuple(self.ids[row] for row in rows)
        of_row = self.fingerprint
        fingerprints = (lambda i: of_row(rows[i])) if callable(self.fingerprints) else tuple(map(of_row, rows))
        return Files(lambda i: source(rows[i]), self.labels[rows], ids, fingerprints, self.stamp)

    def plus(self, other: "Files") -> "Files":
        """These images and then those of `other`, in one."""
        first, second, length = self.source, other.source, len(self)
        assert isinstance(self.fingerprints, tuple) and isinstance(other.fingerprints, tuple)

        def source(i: int) -> Any:
            return first(i) if i < length else second(i - length)

        return Files(
            source,
            labels=torch.cat([self.labels, other.labels]),
            ids=self.ids + other.ids,
            fingerprints=self.fingerprints + other.fingerprints,
            stamp=self.stamp + other.stamp,
        )

    def content(self, rows: np.ndarray) -> bytes:
        """What a split's hash covers of images `rows` beside ids and labels: their fingerprints. To read every file of
        a long list would take an hour."""
        return "\n".join(map(self.fingerprint, rows.tolist())).encode(errors="surrogateescape")


@dataclass(frozen=True)
class Task:
    """One dataset with its label set. `counts` always come from the training part, not from the labels present.

    >>> import lpt, torch
    >>> images = lpt.Images(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]), ("a", "b", "c"))
    >>> task = lpt.Task("mine", ("cat", "dog"), train=images, test=images)
    >>> task.counts.tolist(), task.imbalance_factor
    ([1, 2], 2.0)
    """

    name: str
    classes: tuple[str, ...]
    train: Images | Files
    test: Images | Files
    val: Images | Files | None = None
    unlabeled: Images | Files | None = None
    """Images whose labels no method may train on. Where the truth is known they hold it, for the audit, else -1."""
    group_rule: str = "lt20"
    test_is_official: bool = False
    """Whether the test part is the dataset's own, whatever the settings are: no training image can get into it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of the split, as `split.json` holds it: variant, profile, seed, where the parts came from, and
    the keys of `REMARKS`."""

    def __post_init__(self) -> None:
        """Raises DataError for classes, parts or a group rule that make no task."""
        name = quoted(self.name, 80)
        check_classes(name, self.classes)
        parts = {"train": self.train, "val": self.val, "unlabeled": self.unlabeled, "test": self.test}
        for role, images in parts.items():
            if images is None and role in ("val", "unlabeled"):
                continue
            if images is None or not (hasattr(images, "take") and isinstance(getattr(images, "labels", None), Tensor)):
                raise DataError(f"{name}: {role} is {quoted(repr(images), 80)}: give lpt.Images or lpt.data.Files")
            if role == "unlabeled" and not len(images.labels):
                continue  # methods that need unlabeled images say so themselves
            check_labels(f"{name}: {role}", images, len(self.classes), lowest=-1 if role == "unlabeled" else 0)
        if self.group_rule not in get_args(GroupRule):
            rules = ", ".join(get_args(GroupRule))
            raise DataError(f"{name}: group_rule {quoted(repr(self.group_rule), 80)} is none of {rules}")

    @cached_property
    def counts(self) -> Tensor:
        """Training images of each class [C]; 0 for a class without any."""
        return torch.bincount(self.train.labels, minlength=len(self.classes))

    @property
    def imbalance_factor(self) -> float:
        """n_max / n_min over the classes that have training images, to four decimals."""
        present = self.counts[self.counts > 0]
        return round((present.max() / present.min()).item(), 4)

    def manifest(self) -> dict[str, Any]:
        """What exactly is in the split, for `split.json`: facts, counts, ids and a SHA-256.

        The hash covers roles, ids, labels, and the content of each part: pixels; sizes of files; hashes of bytes in a
        table; of images in published or own lists nothing but their paths. It depends on neither file-system order nor
        working directory: rows are sorted by role and id.
        """
        digest = hashlib.sha256()
        parts: dict[str, Any] = {}
        class_names = [*self.classes, ""]  # label -1, an unknown class, indexes the last
        roles = {"train": self.train, "unlabeled": self.unlabeled, "val": self.val, "test": self.test}
        for role, images in roles.items():
            if images is None:
                continue
            order = np.argsort(np.array(images.ids))
            sorted_ids = [images.ids[row] for row in order.tolist()]
            labels = images.labels.tolist()
            for row, image_id in zip(order.tolist(), sorted_ids, strict=True):
                line = f"{role}\t{image_id}\t{class_names[labels[row]]}\n"
                digest.update(line.encode(errors="surrogateescape"))  # names that are no UTF-8 as their bytes
            digest.update(images.content(order))
            parts[role] = {"images": len(images), "ids": sorted_ids}
        return {
            "name": self.name,
            **self.facts,
            "imbalance_factor": self.imbalance_factor,
            "classes": list(self.classes),
            "counts": self.counts.tolist(),
            "sha256": digest.hexdigest(),
            "parts": parts,
        }

    def summary_lines(self) -> list[str]:
        """What a run reports about its data before it trains: a line on sizes, and one for each thing amiss."""
        lines = [self._size_line()]
        for remark, text in remarks(self.facts, most=1):
            lines.append(f"{'warning' if remark.is_problem else 'note'}: {text}")
        for name in self.absent_classes():
            lines.append(
                f"warning: class {quoted(repr(name))} has no training image; it is kept, and cannot be learned"
            )
        return lines

    def _size_line(self) -> str:
        largest, smallest = int(self.counts.max()), int(self.counts.min())
        line = (
            f"{quoted(self.name)} ({quoted(self.facts.get('variant'))}): {len(self.train)} training images of "
            f"{len(self.classes)} classes, {largest} to {smallest} each{self.source_of('train')}"
        )
        if self.unlabeled:
            line += f", {len(self.unlabeled)} unlabeled{self.source_of('unlabeled')}"
        if self.val:
            line += f", {len(self.val)} held out{self.source_of('val')}"
        return f"{line}, {len(self.test)} test images{self.source_of('test')}"

    def source_of(self, role: str) -> str:
        """Where the images of a part came from, in brackets, where it is known."""
        source = self.facts.get(f"{role}_part")
        return f" ({quoted(source)})" if source else ""

    def absent_classes(self) -> list[str]:
        """Classes without a single training image; they stay in the label set and are reported."""
        return [name for name, count in zip(self.classes, self.counts.tolist(), strict=True) if count == 0]


def remarks(facts: Mapping[str, Any], *, most: int) -> list[tuple[Remark, str]]:
    """What `facts` hold of `REMARKS`, each as a sentence with the names of a few: `most`, or as many as fit in a line
    where they are counted by folder."""
    said: list[tuple[Remark, str]] = []
    for key, remark in REMARKS.items():
        names = facts.get(key)
        if not names:
            continue
        text = remark.text.format(len(names))
        if remark.by_folder:
            text += f": {counted_by_folder(names)}"
        else:
            text += f", for example {quoted(names[0])}" if most == 1 else f": {first_few(names, most=most)}"
        said.append((remark, text))
    return said


def counted_by_folder(paths: Sequence[str], most: int = 5) -> str:
    """How many of `paths` each folder has, with the names of two: "cat 3 (a.txt, b.txt, ...), dog 1 (c.txt)"."""
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(str(PurePosixPath(path).parent), []).append(PurePosixPath(path).name)
    counted: list[str] = []
    for folder, inside in names.items():
        shown = ", ".join(quoted(name, 30) for name in inside[:2]) + (", ..." if len(inside) > 2 else "")
        counted.append(f"{quoted(folder, 50)} {len(inside)} ({shown})")
    return first_few(counted, most=most)


def first_few(items: Sequence[str], between: str = ", ", *, most: int = 5) -> str:
    """The first few `items` in one line, fit for a terminal, and how many more there are."""
    line = between.join(quoted(item) for item in items[:most])
    rest = len(items) - most
    return f"{line}{between}and {rest} more" if rest > 0 else line


def check_labels(what: str, images: Images | Files, num_classes: int, *, lowest: int = 0) -> None:
    """Raises DataError where `images` are none at all, or have labels that are no class of `num_classes`."""
    if not len(images.labels):
        raise DataError(f"{what} has no image: give at least one, or None where a part may be absent")
    least, most = int(images.labels.min()), int(images.labels.max())
    if least < lowest or most >= num_classes:
        wrong = least if least < lowest else most
        raise DataError(f"{what} has label {wrong}: labels of {num_classes} classes are {lowest} to {num_classes - 1}")


def _check_part(images: Images | Files, **lengths: int) -> None:
    """Raises DataError for labels or ids of `images` that are none, or not as many as what else is there."""
    kind = type(images).__name__
    labels = _tensor(f"{kind}: labels", images.labels)
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{kind}: labels have shape {list(labels.shape)} and type {labels.dtype}: give int64 [N]")
    object.__setattr__(images, "labels", labels.long())  # losses take no other type
    if isinstance(images.ids, str) or not all(isinstance(one, str) for one in images.ids):
        raise DataError(f"{kind}: ids {quoted(repr(images.ids), 80)} are no texts: give one for each image")
    object.__setattr__(images, "ids", tuple(images.ids))
    lengths |= {"labels": len(labels), "ids": len(images.ids)}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{number} {name}" for name, number in lengths.items())
        raise DataError(f"{kind}: {counted}: give one of each for every image")


def _tensor(what: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(f"{what} are {type(value).__name__}: give a torch tensor, for example torch.as_tensor(...)")
    return value


def check_classes(task: str, classes: Any) -> None:
    """Raises DataError for what is no sequence of two or more names, all different."""
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise DataError(f"{task}: classes are {quoted(repr(classes), 80)}: give a tuple of names")
    if len(classes) < 2:
        raise DataError(f"{task} has {len(classes)} class: a task needs at least 2")
    seen: set[str] = set()
    for number, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{task}: class {number} is called {quoted(repr(name), 80)}: give each class a name")
        if name in seen:
            raise DataError(f"{task}: two classes are called {quoted(repr(name), 80)}: give each a name of its own")
        seen.add(name)


def hold_out(
    candidates: np.ndarray, chosen: np.ndarray, labels: np.ndarray, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A balanced held-out part of a training set: (`chosen` without it, held out), as sorted indices into `labels` [N].

    As ImageNet-LT does it: `per_class` images of each class from `candidates`, the official training images, of those
    that the long tail leaves out. Where too few are left, the class's own chosen images make up for them, but for one.
    """
    rng = np.random.default_rng((seed, 7))
    no_rows = chosen[:0]
    spare_by_class = rows_by_class(np.setdiff1d(candidates, chosen), labels)
    chosen_by_class = rows_by_class(np.sort(chosen), labels)
    parts = [no_rows]
    for k in np.unique(labels[candidates]).tolist():
        spare = rng.permutation(spare_by_class.get(k, no_rows))[:per_class]
        parts.append(spare)
        own = chosen_by_class.get(k, no_rows)
        missing = min(per_class - len(spare), len(own) - 1)  # one image always stays for training
        if missing > 0:
            parts.append(rng.permutation(own)[:missing])
    held_out = np.sort(np.concatenate(parts))
    return np.setdiff1d(chosen, held_out), held_out


def rows_by_class(rows: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """The `rows` of each class that has some, in their order; `labels` [N] are those of all rows."""
    if len(rows) == 0:
        return {}
    # One stable sort, not a pass over all labels for each class: there may be a million rows of 8142 classes.
    order = np.argsort(labels[rows], kind="stable")
    present, first = np.unique(labels[rows][order], return_index=True)
    return dict(zip(present.tolist(), np.split(rows[order], first[1:]), strict=True))
