"""CIFAR-10-LT and CIFAR-100-LT, from the Hub's parquet layout or torchvision's own files.

Which images make the tail (`protocols.md` §3): the legacy NumPy generator seeded with `seed`, classes in
ascending label, indices in file order shuffled, the first n_k taken. With the official binary files and seed 0
these are the images of LDAM-DRW and LIFT (`cao`), with seed 42 LPT's (`lpt42`). A parquet folder may hold the
images in another order; the same seed then gives other images, and the variant says `-reordered`.

Shapes: pixels [N 3 32 32] uint8, labels [N].
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpt.data.longtail import GroupRule, Profile, long_tail
from lpt.data.preprocess import File, decoded
from lpt.data.task import Images, Task, hold_out
from lpt.errors import DataError
from lpt.settings import Count, Seed

ClassOrder = Literal["label", "seed"]
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")


def cifar100_lt(
    root: str | None = None,
    *,
    imbalance_factor: float = 100,
    profile: Profile = "exponential",
    class_order: ClassOrder = "label",
    group_rule: GroupRule = "lt20",
    seed: Seed = 0,
    val_per_class: Count = 0,
    download: bool = False,
) -> Task:
    """CIFAR-100-LT: 500 images of the largest class, 500/IF of the smallest; the test set stays balanced.

    Every published split ranks classes by label, which ties the tail to the last classes; `class_order=seed` draws
    the ranks by `seed` (ours).
    """
    return _cifar_lt(
        "cifar100-lt",
        num_classes=100,
        root=root,
        imbalance_factor=imbalance_factor,
        profile=profile,
        class_order=class_order,
        group_rule=group_rule,
        seed=seed,
        val_per_class=val_per_class,
        download=download,
    )


def cifar10_lt(
    root: str | None = None,
    *,
    imbalance_factor: float = 100,
    profile: Profile = "exponential",
    class_order: ClassOrder = "label",
    group_rule: GroupRule = "thirds",
    seed: Seed = 0,
    val_per_class: Count = 0,
    download: bool = False,
) -> Task:
    """CIFAR-10-LT: 5000 images of the largest class; groups by rank thirds, since no class has below 20."""
    return _cifar_lt(
        "cifar10-lt",
        num_classes=10,
        root=root,
        imbalance_factor=imbalance_factor,
        profile=profile,
        class_order=class_order,
        group_rule=group_rule,
        seed=seed,
        val_per_class=val_per_class,
        download=download,
    )


def _cifar_lt(
    name: str,
    *,
    num_classes: int,
    root: str | None,
    imbalance_factor: float,
    profile: Profile,
    class_order: ClassOrder,
    group_rule: GroupRule,
    seed: int,
    val_per_class: int,
    download: bool,
) -> Task:
    counts = long_tail(num_classes, 50_000 // num_classes, imbalance_factor, profile)
    if class_order == "seed":
        ranks = np.random.default_rng((seed, 17)).permutation(num_classes)
        counts = [counts[rank] for rank in ranks]
    cifar = open_cifar(name, num_classes, root, download)
    chosen = _draw_tail(name, cifar, counts, seed)
    held_out = chosen[:0]
    if val_per_class:
        every_row = np.arange(len(cifar.train_labels))
        chosen, held_out = hold_out(every_row, chosen, cifar.train_labels, val_per_class, seed)
    variant = {0: "cao", 42: "lpt42"}.get(seed, f"seed{seed}")
    if not cifar.official_order:
        variant += "-reordered"
    if class_order == "seed":
        variant += "-permuted"
    return Task(
        name=name,
        test_is_official=True,
        classes=cifar.classes,
        train=cifar.train_images(chosen.tolist()),
        val=cifar.train_images(held_out.tolist()) if len(held_out) else None,
        test=cifar.test,
        group_rule=group_rule,
        facts={"variant": variant, "profile": profile, "seed": seed, "val_per_class": val_per_class},
    )


def _draw_tail(name: str, cifar: "Cifar", counts: Sequence[int], seed: int) -> np.ndarray:
    """Sorted rows of the training images that make the tail, `counts[k]` of class k."""
    rng = np.random.RandomState(seed)  # the legacy generator, as the published splits were drawn
    chosen: list[int] = []
    for k, count in enumerate(counts):
        rows = np.where(cifar.train_labels == k)[0]
        if len(rows) < count:
            raise DataError(f"{name}: class {cifar.classes[k]!r} has {len(rows)} images, {count} are needed")
        rng.shuffle(rows)
        chosen += rows[:count].tolist()
    return np.array(sorted(chosen))


# CIFAR as it is stored.

ReadPixels = Callable[[np.ndarray], Tensor]
"""Row numbers [n] -> pixels [n 3 32 32] uint8."""


class StoredPart(NamedTuple):
    """The training or the test part on the disk: all labels [N], and a function that reads the pixels of some rows."""

    labels: np.ndarray
    read: ReadPixels

    def images(self, part: str, rows: np.ndarray) -> Images:
        """The images `rows` [n], with ids that begin with the name of the part."""
        ids = tuple(f"{part}/{row:05d}" for row in rows.tolist())
        return Images(self.read(rows), torch.from_numpy(self.labels[rows]), ids)


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100: the test images, and training images by row."""

    classes: tuple[str, ...]
    train: StoredPart
    test: Images
    official_order: bool
    """Whether rows are in the order of the official files, so that a seed draws the published images."""

    @property
    def train_labels(self) -> np.ndarray:
        """Labels of all training images [50000]."""
        return self.train.labels

    def train_images(self, rows: Sequence[int]) -> Images:
        """The training images `rows`."""
        return self.train.images("train", np.array(rows, dtype=int))


def open_cifar(name: str, num_classes: int, root: str | None, download: bool) -> Cifar:
    """CIFAR with `num_classes` from a folder with train.parquet and test.parquet, or with torchvision's files, which
    `download` may fetch. `name` is for errors. Raises DataError."""
    if root is None:
        raise DataError(
            f"data.root is missing: {name} needs a folder with train.parquet and test.parquet, or with "
            "torchvision's CIFAR files (data.download=true fetches them)"
        )
    folder = Path(root)
    is_parquet = all((folder / f"{part}.parquet").is_file() for part in ("train", "test"))
    if is_parquet:
        classes, train, test = _open_parquet(name, num_classes, folder)
    else:
        classes, train, test = _open_torchvision(name, num_classes, folder, download)
    test_images = test.images("test", np.arange(len(test.labels)))
    return Cifar(tuple(classes), train, test_images, official_order=not is_parquet)


def _open_parquet(name: str, num_classes: int, folder: Path) -> tuple[Sequence[str], StoredPart, StoredPart]:
    """(class names, training part, test part); numbers are the names where neither file has any."""
    train, train_names = _read_parquet(name, num_classes, folder / "train.parquet")
    test, test_names = _read_parquet(name, num_classes, folder / "test.parquet")
    for names in (train_names, test_names):
        if len(set(names)) == num_classes == len(names):
            return names, train, test
    return [str(k) for k in range(num_classes)], train, test


def _read_parquet(name: str, num_classes: int, path: Path) -> tuple[StoredPart, list[str]]:
    """(the part in the file, class names as the file has them, or none)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None
    label = next((column for column in LABEL_COLUMNS if column in table.column_names), None)
    image = next((column for column in IMAGE_COLUMNS if column in table.column_names), None)
    if label is None or image is None:
        raise DataError(
            f"{path} has columns {table.column_names}: an image column (img) and a label column "
            "(fine_label or label) are needed"
        )
    labels = table.column(label).to_numpy()
    present = len(np.unique(labels))
    if present != num_classes:
        raise DataError(f"{path} holds {present} classes, {name} has {num_classes}: is data.root the right folder?")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{path}: column {label} does not hold labels from 0 to {num_classes - 1}")
    cells = table.column(image).combine_chunks()
    part = StoredPart(labels, lambda rows: _decode_cells(cells, rows, path))
    return part, _hub_class_names(table.schema.metadata, label)


def _hub_class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str]:
    """Class names as the Hub's `datasets` writes them beside the columns; none where it did not write the file."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][label]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _decode_cells(cells: Any, rows: np.ndarray, path: Path) -> Tensor:
    """Images in a column of encoded ones → pixels [n 3 h w] uint8. Raises DataError."""

    def decode(row: int) -> np.ndarray:
        cell = cells[row].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else None
        if not isinstance(content, bytes):
            raise DataError(f"{path}, row {row}: there is no image")
        return np.asarray(decoded(File(f"{path}, row {row}", content)))

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(decode, rows.tolist()))
    for row, image in zip(rows, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(f"{path}, row {row}: the image is not of the same size as the others")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _open_torchvision(
    name: str, num_classes: int, folder: Path, download: bool
) -> tuple[Sequence[str], StoredPart, StoredPart]:
    """(class names, training part, test part) of the official files, in their order."""
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = CIFAR100 if num_classes == 100 else CIFAR10
    try:
        train = dataset(str(folder), train=True, download=download)
        test = dataset(str(folder), train=False, download=download)
    except RuntimeError:
        raise DataError(
            f"data.root {folder} holds neither train.parquet and test.parquet nor torchvision's "
            f"{dataset.base_folder}: check the path, or let data.download=true fetch them there"
        ) from None
    except OSError as error:
        raise DataError(f"{name} could not be downloaded to {folder} ({error})") from None
    return train.classes, _torchvision_part(train), _torchvision_part(test)


def _torchvision_part(dataset: Any) -> StoredPart:
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    return StoredPart(np.array(dataset.targets), lambda rows: pixels[torch.from_numpy(rows)].contiguous())
