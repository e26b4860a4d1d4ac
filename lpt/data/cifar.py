"""CIFAR-10-LT and CIFAR-100-LT, from the Hub's parquet layout or torchvision's own files.

Which images make the tail (`protocols.md` §3): the legacy NumPy generator seeded with `seed`, classes in
ascending label, indices in file order shuffled, the first n_k taken. With the official binary files and seed 0
these are the images of LDAM-DRW and LIFT (`cao`), with seed 42 LPT's (`lpt42`). A parquet folder may hold the
images in another order; the same seed then gives other images, and the variant says `-reordered`.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lpt.data.longtail import GroupRule, Profile, long_tail
from lpt.data.preprocess import File, decoded
from lpt.data.task import Images, Task, hold_out
from lpt.errors import DataError
from lpt.settings import Count, Seed

ClassOrder = Literal["label", "seed"]


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
    tail = (imbalance_factor, profile, class_order, group_rule)
    return _cifar_lt("cifar100-lt", 100, root, *tail, seed, val_per_class, download)


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
    tail = (imbalance_factor, profile, class_order, group_rule)
    return _cifar_lt("cifar10-lt", 10, root, *tail, seed, val_per_class, download)


def _cifar_lt(
    name: str,
    num_classes: int,
    root: str | None,
    factor: float,
    profile: Profile,
    class_order: ClassOrder,
    group_rule: GroupRule,
    seed: int,
    val_per_class: int,
    download: bool,
) -> Task:
    wanted = long_tail(num_classes, 50_000 // num_classes, factor, profile)
    if class_order == "seed":
        rank = np.random.default_rng((seed, 17)).permutation(num_classes)
        wanted = [wanted[r] for r in rank]
    names, labels, train_part, test, official = parts_of(name, num_classes, root, download)
    rng = np.random.RandomState(seed)
    chosen: list[int] = []
    for k, n in enumerate(wanted):
        indices = np.where(labels == k)[0]
        if len(indices) < n:
            raise DataError(f"{name}: class {names[k]!r} has {len(indices)} images, {n} are needed")
        rng.shuffle(indices)
        chosen += indices[:n].tolist()
    train, held = np.array(sorted(chosen)), np.array([], dtype=int)
    if val_per_class:
        train, held = hold_out(np.arange(len(labels)), train, labels, val_per_class, seed)
    variant = {0: "cao", 42: "lpt42"}.get(seed, f"seed{seed}") + ("" if official else "-reordered")
    return Task(
        name=name,
        classes=names,
        train=train_part(train.tolist()),
        val=train_part(held.tolist()) if len(held) else None,
        test=test,
        group_rule=group_rule,
        facts={
            "variant": variant + ("-permuted" if class_order == "seed" else ""),
            "profile": profile,
            "seed": seed,
            "val_per_class": val_per_class,
        },
    )


def parts_of(
    name: str, num_classes: int, root: str | None, download: bool
) -> tuple[tuple[str, ...], np.ndarray, Callable[[Sequence[int]], Images], Images, bool]:
    """(class names, labels of all training images, a function from rows of those to images, the test part, whether
    their order is the official one). Raises DataError."""
    source = _open(name, num_classes, root, download)

    def part(which: str, rows: np.ndarray) -> Images:
        of = source[f"{which}_labels"]
        ids = tuple(f"{which}/{row:05d}" for row in rows.tolist())
        return Images(source[which](rows), torch.from_numpy(of[rows]), ids)

    test = part("test", np.arange(len(source["test_labels"])))
    names = tuple(source["classes"])
    return names, source["train_labels"], lambda rows: part("train", np.array(rows)), test, source["official_order"]


def _open(name: str, num_classes: int, root: str | None, download: bool) -> dict[str, Any]:
    if root is None:
        raise DataError(
            f"data.root is missing: {name} needs a folder with train.parquet and test.parquet, or with "
            "torchvision's CIFAR files (data.download=true fetches them)"
        )
    folder = Path(root)
    if (folder / "train.parquet").is_file() and (folder / "test.parquet").is_file():
        return _open_parquet(name, num_classes, folder)
    return _open_torchvision(name, num_classes, folder, download)


def _open_parquet(name: str, num_classes: int, folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: dict[str, Any] = {"official_order": False, "classes": None}
    for which in ("train", "test"):
        path = folder / f"{which}.parquet"
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None
        label = next((c for c in ("fine_label", "label") if c in table.column_names), None)
        image = next((c for c in ("img", "image") if c in table.column_names), None)
        if label is None or image is None:
            raise DataError(
                f"{path} has columns {table.column_names}: an image column (img) and a label column "
                "(fine_label or label) are needed"
            )
        labels = table.column(label).to_numpy()
        found = len(np.unique(labels))
        if found != num_classes:
            raise DataError(f"{path} holds {found} classes, {name} has {num_classes}: is data.root the right folder?")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(f"{path}: column {label} does not hold labels from 0 to {num_classes - 1}")
        cells = table.column(image).combine_chunks()
        source[f"{which}_labels"] = labels
        source[which] = lambda rows, cells=cells, path=path: _decode(cells, rows, path)
        names = _hub_names(table.schema.metadata, label) or ()
        if len(set(names)) == num_classes == len(names):
            source["classes"] = source["classes"] or names
    source["classes"] = source["classes"] or [str(k) for k in range(num_classes)]
    return source


def _hub_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """Class names as the Hub's `datasets` writes them beside the columns."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][label]["names"]]
    except (KeyError, ValueError, TypeError):
        return None


def _decode(cells: Any, rows: np.ndarray, path: Path) -> Tensor:
    def one(row: int) -> np.ndarray:
        cell = cells[row].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else None
        if not isinstance(content, bytes):
            raise DataError(f"{path}, row {row}: there is no image")
        return np.asarray(decoded(File(f"{path}, row {row}", content)))

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(one, rows.tolist()))
    if odd := next((row for row, of in zip(rows, found, strict=True) if of.shape != found[0].shape), None):
        raise DataError(f"{path}, row {odd}: the image is not of the same size as the others")
    pixels = np.stack(found)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _open_torchvision(name: str, num_classes: int, folder: Path, download: bool) -> dict[str, Any]:
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = CIFAR100 if num_classes == 100 else CIFAR10
    try:
        parts = {which: dataset(str(folder), train=which == "train", download=download) for which in ("train", "test")}
    except RuntimeError:
        raise DataError(
            f"data.root {folder} holds neither train.parquet and test.parquet nor torchvision's "
            f"{dataset.base_folder}: check the path, or let data.download=true fetch them there"
        ) from None
    except OSError as error:
        raise DataError(f"{name} could not be downloaded to {folder} ({error})") from None
    source: dict[str, Any] = {"official_order": True, "classes": parts["train"].classes}
    for which, part in parts.items():
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2)
        source[f"{which}_labels"] = np.array(part.targets)
        source[which] = lambda rows, pixels=pixels: pixels[torch.from_numpy(rows)].contiguous()
    return source
