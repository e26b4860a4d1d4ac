"""A task from what somebody has in Python: a dataset of torch or of the Hub's `datasets`, or a list of images.

An image may be Pillow's, a path, encoded bytes, pixels [h w] or [h w 3] uint8 of numpy, or a tensor [3 h w] or [1 h w]
that is uint8, or floats from 0 to 1. Shapes: labels [N].
"""

import hashlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpt.data.loader import close_workers
from lpt.data.longtail import usual_group_rule
from lpt.data.preprocess import Content, File, decoded
from lpt.data.task import Files, Task, check_classes, hold_out, rows_by_class
from lpt.errors import DataError, quoted
from lpt.settings import Count, FractionBelowOne, Seed, checked_arguments

IMAGE_KEYS = ("image", "img", "pixel_values", "images")
LABEL_KEYS = ("label", "labels", "target", "targets", "fine_label", "class")
"""What an item's entries, a column or an attribute may be called where nobody has said, the likeliest first."""
FORMS = "give a PIL image, a path, bytes, uint8 pixels [h w 3], or a tensor [3 h w] of uint8 or of floats from 0 to 1"


def task_from(
    dataset: Any,
    *,
    labels: str | Sequence[Any] | None = None,
    classes: Sequence[str] | None = None,
    test: Any = None,
    test_labels: Sequence[Any] | None = None,
    image: str | None = None,
    test_share: FractionBelowOne = 0.2,
    val_per_class: Count = 0,
    seed: Seed = 0,
    name: str = "dataset",
) -> Task:
    """A task from a map-style `torch.utils.data.Dataset`, a Hub `datasets.Dataset`, or a list of N images.

    `labels` are N numbers or names; or the name of the column or attribute that holds them; by default a ClassLabel
    column, `targets`, `labels` or the like. Images are decoded for them only where the dataset has labels nowhere but
    in its items. `classes` names them, by default as the dataset does. Without a `test` dataset, `test_share` of each
    class is split off by `seed`, at least one image where a class has two; `val_per_class` more are held out.

    Images are read when they are needed, and by worker processes. Paths and the Hub's columns are taken as they are,
    without the dataset's own transform; other datasets should leave views to lpt, too. The split's hash covers the
    content of each image, and is computed when `manifest()` asks for it.

    Raises DataError, in one sentence, for a dataset without a length, for labels that cannot be found, that are not
    one for each image or none of the classes, and for items that are no images; ConfigError for the other arguments.

    >>> import numpy as np, lpt
    >>> photos = [np.full((8, 8, 3), 20 * i, dtype=np.uint8) for i in range(10)]
    >>> task = lpt.task_from(photos, labels=["cat", "dog"] * 5)
    >>> task.classes, task.counts.tolist(), len(task.test)
    (('cat', 'dog'), [4, 4], 2)
    """
    test_share, val_per_class, seed, name = checked_arguments(
        task_from, test_share=test_share, val_per_class=val_per_class, seed=seed, name=name
    )
    own = _Source.of("dataset", dataset, labels, image)
    other = None
    if test is not None:
        again = test_labels if test_labels is not None else labels if isinstance(labels, str) else None
        other = _Source.of("test", test, again, image)
    values = [*own.labels, *(other.labels if other else ())]
    names = own.classes or _names_of(values) if classes is None else classes
    check_classes("task_from", names)
    whole = own.part(names, before="")
    numbers = whole.labels.numpy()
    training = np.arange(len(whole))
    tested = training[:0]
    if other is None:
        tested = _split_off(numbers, test_share, seed)
        if not len(tested):
            raise DataError(
                f"task_from: test_share={test_share:g} of {len(whole)} images leaves none to test on: give test=, a "
                "dataset of its own, or a larger share"
            )
        training = np.setdiff1d(training, tested)
    held_out = training[:0]
    if val_per_class:
        training, held_out = hold_out(training, training, numbers, val_per_class, seed)
    train = whole.subset(training.tolist())
    return Task(
        name=name,
        classes=tuple(names),
        train=train,
        test=other.part(names, before="test/") if other else whole.subset(tested.tolist()),
        val=whole.subset(held_out.tolist()) if len(held_out) else None,
        group_rule=usual_group_rule(torch.bincount(train.labels, minlength=len(names))),
        test_is_official=other is not None,
        facts={
            "variant": f"a {type(dataset).__name__} in Python",
            "seed": seed,
            "test_part": "a dataset of its own" if other else f"{100 * test_share:g} % of each class, by seed",
        },
    )


def labeled_images(images: Any, labels: Sequence[Any], classes: Sequence[str]) -> Files:
    """N images in any of the forms of `task_from`, with their labels, as one part of a task. Raises DataError."""
    return _Source.of("images", images, labels, None).part(classes, before="")


def _split_off(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Sorted rows of a test part: `share` of each class, at least one of it where it has two, and never all."""
    rng = np.random.default_rng((seed, 23))
    parts = [np.empty(0, dtype=int)]
    for rows in rows_by_class(np.arange(len(labels)), labels).values():
        number = min(max(1, round(share * len(rows))), len(rows) - 1) if share else 0
        parts.append(rng.permutation(rows)[:number])
    return np.sort(np.concatenate(parts))


def _names_of(values: Sequence[Any]) -> tuple[str, ...]:
    """Classes where nobody has named them: the names that labels are, in order, or numbers up to the largest. Raises
    DataError for numbers beside names, and below 0."""
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(values)))
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        raise DataError("task_from: some labels are numbers and some are names: give numbers alone, or names alone")
    if min(numbers) < 0:
        raise DataError(f"task_from: label {min(numbers)} is below 0: give numbers from 0 on, or names")
    return tuple(str(k) for k in range(max(numbers) + 1))


@dataclass(frozen=True)
class _Source:
    """Images of one dataset: N labels as they were found, numbers or names, how image i is got, whether its content is
    there without decoding, and the names of classes where the dataset has them."""

    what: str
    labels: list[Any]
    content: Callable[[int], Any]
    is_encoded: bool
    classes: tuple[str, ...]

    @staticmethod
    def of(what: str, dataset: Any, labels: str | Sequence[Any] | None, image: str | None) -> "_Source":
        """Raises DataError for what is no dataset of labeled images."""
        if isinstance(dataset, Mapping):
            parts = quoted(", ".join(map(str, dataset)), 80)
            raise DataError(f"task_from: {what} has parts ({parts}): give one of them, and another one as test=")
        if isinstance(dataset, str | bytes) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"task_from: {what} is a {type(dataset).__name__}, which has no length or no items by number: give a "
                "map-style dataset or a list of images"
            )
        if not len(dataset):
            raise DataError(f"task_from: {what} has no image: give at least one")
        found = _of_the_hub(dataset, labels, image) or _with_paths(dataset) or _of_items(dataset, image)
        values = list(found.labels(labels) if labels is None or isinstance(labels, str) else labels)
        if len(values) != len(dataset):
            raise DataError(f"task_from: {len(values)} labels for the {len(dataset)} images of {what}: give one each")
        numbers = [_plain(what, i, value) for i, value in enumerate(values)]
        if not found.is_encoded:
            try:
                found.content(0)  # what is no image says so at once, and not in the middle of training
            except DataError as error:
                raise DataError(f"task_from: image 0 of {what}: {error}") from None
        return _Source(what, numbers, found.content, found.is_encoded, tuple(found.classes))

    def part(self, classes: Sequence[str], *, before: str) -> Files:
        """The images and their labels as numbers of `classes`. Raises DataError for a label that is none."""
        number_of = {name: k for k, name in enumerate(classes)}
        labels: list[int] = []
        for i, value in enumerate(self.labels):
            k = number_of.get(value, -1) if isinstance(value, str) else value
            if not 0 <= k < len(classes):
                some = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
                known = f"{len(classes)} classes ({some})" if isinstance(value, str) else f"0 to {len(classes) - 1}"
                raise DataError(
                    f"task_from: label {quoted(repr(value), 80)} of image {i} of {self.what} is none of "
                    f"{quoted(known)}: put it right, or name all classes in classes="
                )
            labels.append(k)
        held = _Held(self.content)
        return Files(
            held.source if not self.is_encoded else self.content,
            labels=torch.tensor(labels),
            ids=tuple(f"{before}{i:07d}" for i in range(len(labels))),
            fingerprints=held.fingerprint,
            stamp=uuid4().hex,
        )


def _plain(what: str, i: int, value: Any) -> int | str:
    """A label as a number or a name. Raises DataError for anything else."""
    if isinstance(value, Tensor | np.generic) and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, str) or (isinstance(value, Integral) and not isinstance(value, bool)):
        return value if isinstance(value, str) else int(value)
    raise DataError(
        f"task_from: label {quoted(repr(value), 80)} of image {i} of {what} is neither a number nor a name: give one "
        "whole number or text for each image"
    )


# Where labels and images of a dataset are found.


class _Found(NamedTuple):
    labels: Callable[[str | None], Iterable[Any]]
    content: Callable[[int], Any]
    is_encoded: bool
    classes: Sequence[str] = ()


def _of_the_hub(dataset: Any, labels: Any, image: str | None) -> _Found | None:
    """A `datasets.Dataset`, whose images are taken encoded; None for any other."""
    features = getattr(dataset, "features", None)
    if "datasets" not in sys.modules or not isinstance(features, dict) or not hasattr(dataset, "select_columns"):
        return None
    from datasets import ClassLabel
    from datasets import Image as ImageColumn

    images = [key for key, kind in features.items() if isinstance(kind, ImageColumn)]
    column = image or (images[0] if len(images) == 1 else next((key for key in IMAGE_KEYS if key in features), None))
    if column not in features:
        what = f"no column {quoted(image, 60)}" if image else f"{len(images)} columns of images"
        raise DataError(f"task_from: dataset has {what} among {quoted(', '.join(features))}: name it as image=")
    marked = [key for key, kind in features.items() if isinstance(kind, ClassLabel)]
    wanted = labels if isinstance(labels, str) else None
    of_labels = wanted or (marked[0] if len(marked) == 1 else next((k for k in LABEL_KEYS if k in features), None))
    classes = getattr(features.get(of_labels), "names", None) or ()
    if labels is not None and not isinstance(labels, str):
        classes = ()

    def read_labels(name: str | None) -> Iterable[Any]:
        if of_labels not in features:
            what = f"no column {quoted(name, 60)}" if name else "no column of labels that is known"
            raise DataError(f"task_from: dataset has {what} among {quoted(', '.join(features))}: name it as labels=")
        return dataset.with_format(None).select_columns([of_labels])[:][of_labels]

    rows = dataset.with_format(None).select_columns([column])
    if not isinstance(features[column], ImageColumn):
        return _Found(read_labels, lambda i: as_content(rows[i][column]), False, classes)
    rows = rows.cast_column(column, ImageColumn(decode=False))

    def content(i: int) -> Any:
        cell = rows[i][column]
        return cell["bytes"] if cell["bytes"] is not None else cell["path"]

    return _Found(read_labels, content, True, classes)


def _with_paths(dataset: Any) -> _Found | None:
    """torchvision's class folders without a transform, whose files are read as they are; None for any other."""
    if "torchvision" not in sys.modules:
        return None
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader

    plain = type(dataset) is ImageFolder and dataset.loader is default_loader
    if not plain or dataset.transform is not None or dataset.target_transform is not None:
        return None
    labels = _labels_of(dataset)
    return _Found(labels, lambda i: dataset.samples[i][0], True, tuple(dataset.classes))


def _of_items(dataset: Any, image: str | None) -> _Found:
    """Any other: images are what its items are, or their first or so called entry."""
    named = _attribute(dataset, "classes")
    classes = named if isinstance(named, list | tuple) and all(isinstance(one, str) for one in named) else ()
    return _Found(_labels_of(dataset), lambda i: as_content(item_image(dataset[i], image)), False, classes)


def _labels_of(dataset: Any) -> Callable[[str | None], Iterable[Any]]:
    def labels(name: str | None) -> Iterable[Any]:
        for one in (name,) if name else LABEL_KEYS:
            values = _attribute(dataset, one)
            if isinstance(values, Sequence | np.ndarray | Tensor) and len(values) == len(dataset):
                return values if not isinstance(values, Tensor | np.ndarray) else values.tolist()
        return [_label_of(dataset[i], name, i) for i in range(len(dataset))]

    return labels


def _attribute(dataset: Any, name: str) -> Any:
    """An attribute of a dataset; of torch's `Subset` and `TensorDataset`, what stands for it."""
    from torch.utils.data import Subset, TensorDataset

    if isinstance(dataset, Subset):
        values = _attribute(dataset.dataset, name)
        if name == "classes" or not isinstance(values, Sequence | np.ndarray | Tensor):
            return values
        return [values[i] for i in dataset.indices] if len(values) == len(dataset.dataset) else None  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset) and name == "labels" and len(dataset.tensors) == 2:
        return dataset.tensors[1]
    values = getattr(dataset, name, None)
    changed = getattr(dataset, "target_transform", None)
    if name != "classes" and changed is not None and isinstance(values, Sequence | np.ndarray | Tensor):
        return [changed(value) for value in (values.tolist() if not isinstance(values, Sequence) else values)]
    return values


def item_image(item: Any, image: str | None = None) -> Any:
    """The image of an item."""
    if isinstance(item, Mapping):
        key = image if image else next((key for key in IMAGE_KEYS if key in item), None)
        if key not in item:
            raise DataError(f"an item has no image among {quoted(', '.join(map(str, item)))}: name it as image=")
        return item[key]
    return item[0] if isinstance(item, tuple | list) and len(item) else item


def _label_of(item: Any, name: str | None, i: int) -> Any:
    if isinstance(item, Mapping):
        key = name if name else next((key for key in LABEL_KEYS if key in item), None)
        if key in item:
            return item[key]
    elif isinstance(item, tuple | list) and len(item) > 1 and name is None:
        return item[1]
    where = f"under {quoted(name, 60)}" if name else "that is known"
    raise DataError(f"task_from: item {i} has no label {where}: give labels=, a name or one for each image")


# Images in whatever form.


def as_content(value: Any) -> Content:
    """An image in any of the forms of this file, as what a `File` holds. Raises DataError for anything else."""
    if isinstance(value, Image.Image | bytes | str | Path):
        return value
    if isinstance(value, Tensor):
        value = _pixels_of(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.size:
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3):
            return Image.fromarray(value)
        if value.ndim == 3 and value.shape[2] == 1:
            return Image.fromarray(value[:, :, 0])
    if isinstance(value, np.ndarray):
        raise DataError(f"it is an array of {value.dtype} and shape {list(value.shape)}: {FORMS}")
    raise DataError(f"it is a {type(value).__name__}: {FORMS}")


def _pixels_of(image: Tensor) -> np.ndarray:
    """uint8 [h w 3] or [h w 1]. Raises DataError."""
    image = image.detach().cpu()
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise DataError(f"it is a tensor of shape {list(image.shape)}: {FORMS}")
    if image.is_floating_point():
        if not bool((image >= 0).all() and (image <= 1).all()):
            raise DataError(
                "it is a tensor of floats that are not from 0 to 1: leave out the dataset's own normalization, the "
                "model has one"
            )
        image = (255 * image).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise DataError(f"it is a tensor of {image.dtype}: {FORMS}")
    return image.permute(1, 2, 0).numpy()


# Items are read where views are made: a process that is forked finds the dataset in its memory, and nothing of it is
# sent. Elsewhere they are read by the process that has it.

_numbers = count()
_held: "weakref.WeakValueDictionary[int, _Held]" = weakref.WeakValueDictionary()


class _Held:
    """What gives the images of a dataset, under a number by which worker processes find it."""

    def __init__(self, content: Callable[[int], Any]) -> None:
        self.content, self.process, self.lock = content, os.getpid(), threading.Lock()
        self.number = next(_numbers)
        _held[self.number] = self
        close_workers()  # those that wait for work were forked before this was there

    def read(self, i: int) -> Content:
        """Image i; one at a time, since a dataset need not bear two threads."""
        if os.getpid() != self.process:
            return self.content(i)
        with self.lock:
            return self.content(i)

    def source(self, i: int) -> Any:
        return _Item(self.number, i) if sys.platform.startswith("linux") else self.read(i)

    def fingerprint(self, i: int) -> str:
        """A hash of the encoded bytes, or of size and pixels where there are none; of a file its size."""
        content = self.read(i)
        if isinstance(content, str | Path):
            return str(os.stat(content).st_size) if os.path.isfile(content) else ""
        if isinstance(content, Image.Image):
            image = decoded(File(f"{i}", content))
            content = f"{image.size}".encode() + image.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


class _Item(NamedTuple):
    """One image of a dataset, read where it is called."""

    number: int
    row: int

    def __call__(self) -> Content:
        held = _held.get(self.number)
        if held is None:
            raise DataError("its dataset was made after this worker: make tasks before training begins")
        return held.read(self.row)
