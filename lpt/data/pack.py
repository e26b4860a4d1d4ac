"""Packs: a task of image files, shrunk once into tar files that are read in place, with its split and its hashes.

A pack is a folder: `pack.json` says what it is of, `pack.index` is a parquet table with a row for each image (part, id,
label, shard, start, bytes and SHA-256 of the image), and PART-NNNNN.tar are WebDataset shards, which `webdataset` and
`datasets` read as well: KEY.jpg beside KEY.cls, numbers that `classnames.txt` explains, in a shuffled order. Shards and
not parquet, since nothing is copied or read before it is needed: `datasets` would write all of a parquet file once more
into its cache. Shapes: labels [N], rows [N].
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lpt.data.task import Files, Task
from lpt.errors import DataError, quoted

HEAD, INDEX, NAMES = "pack.json", "pack.index", "classnames.txt"
RECORDS, PLAN = ".packing", "plan.json"
"""What there is beside the shards until all of them are read back."""
FORMAT = 1
ROLES = ("train", "val", "test", "unlabeled")
SPLIT_SETTINGS = ("seed", "test_share", "val_per_class", "split_by")
"""Settings of `data:` that move images from part to part: a pack has the split that it was made with."""


class Row(NamedTuple):
    """One image of a pack."""

    part: str
    row: int
    """Which image of its part, as the task has them in order."""
    id: str
    label: int
    shard: str
    start: int
    bytes: int
    sha256: str


def is_pack(root: str) -> bool:
    """Whether it is one, or the beginning of one."""
    return any(os.path.isfile(os.path.join(root, name)) for name in (HEAD, os.path.join(RECORDS, PLAN)))


def open_pack(root: str, name: str, settings: Mapping[str, Any]) -> Task:
    """The task of a pack: classes, split, counts and order of images of what it was made of. `name` is that of the
    dataset as a config has it; as `folder` any pack is opened. Raises DataError for a pack of anything else, for one
    that is damaged or not finished, and for `settings` that another split would follow from.
    """
    folder = Path(root)
    head = _head(folder)
    if name not in ("folder", head["task"]["name"]):
        raise DataError(
            f"data.root {quoted(root)} is a pack of {quoted(head['task']['name'])} and not of {name}: set data.name to "
            "that, or to folder"
        )
    made_with = head["settings"]
    for key in SPLIT_SETTINGS if name == head["task"]["name"] else ():
        if key in settings and key in made_with and settings[key] != made_with[key]:
            raise DataError(
                f"data.root {quoted(root)} is a pack that was split with data.{key}={made_with[key]}, and "
                f"data.{key} is {settings[key]}: set it to that, or pack the images again"
            )
    if settings.get("unlabeled") and "unlabeled" not in head["images"]:
        raise DataError(
            f"data.root {quoted(root)} is a pack without unlabeled images: pack them too, with data.unlabeled"
        )
    stamp = _check_shards(folder, head["shards"])
    parts = _parts(folder, head, stamp)
    task = head["task"]
    return Task(
        name=task["name"],
        classes=tuple(task["classes"]),
        train=parts["train"],
        val=parts.get("val"),
        test=parts["test"],
        unlabeled=parts.get("unlabeled"),
        group_rule=settings.get("group_rule") or task["group_rule"],
        facts={**task["facts"], "packed": {"side": head["side"], "split_sha256": head["split"]["sha256"]}},
    )


def _head(folder: Path) -> dict[str, Any]:
    if not (folder / HEAD).is_file():
        raise DataError(
            f"data.root {quoted(folder)} is a pack that is not finished: the same lpt pack continues with it"
        )
    try:
        head = json.loads((folder / HEAD).read_text())
        number = head["format"]
        if number == FORMAT:
            assert {"task", "settings", "shards", "split", "side", "images"} <= head.keys()
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise DataError(f"{quoted(folder / HEAD)} is damaged: pack the images again, or copy it again") from None
    if number != FORMAT:
        raise DataError(f"{quoted(folder)} is a pack of format {quoted(number, 20)}, this lpt reads {FORMAT}")
    return head


def _check_shards(folder: Path, shards: list[Mapping[str, Any]]) -> str:
    """Raises DataError unless each shard is there at its full length. Returns what changes when one is written anew."""
    written: list[str] = []
    for shard in shards:
        try:
            status = os.stat(folder / shard["name"])
        except OSError:
            raise DataError(
                f"data.root {quoted(folder)}: shard {quoted(shard['name'])} is missing: copy it again"
            ) from None
        if status.st_size != shard["bytes"]:
            raise DataError(
                f"data.root {quoted(folder)}: shard {quoted(shard['name'])} has {status.st_size:,} bytes and not "
                f"{shard['bytes']:,}: copy it again"
            )
        written.append(f"{status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256(" ".join(written).encode()).hexdigest()


def _parts(folder: Path, head: Mapping[str, Any], stamp: str) -> dict[str, Files]:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(folder / INDEX).read()  # by its content: the name says nothing to pyarrow
        columns: dict[str, Any] = {name: table[name].combine_chunks() for name in Row._fields}
        in_shard = columns["start"].to_numpy(), columns["bytes"].to_numpy(), columns["label"].to_numpy()
    except Exception as error:  # pyarrow's own
        raise DataError(f"{quoted(folder / INDEX)} cannot be read ({quoted(error)}): copy the pack again") from None
    start, size, labels = in_shard
    roles, row = np.array(columns["part"].to_pylist()), columns["row"].to_numpy()
    parts: dict[str, Files] = {}
    for role, number in head["images"].items():
        rows = np.flatnonzero(roles == role)
        rows = rows[np.argsort(row[rows], kind="stable")]
        if len(rows) != number or not np.array_equal(row[rows], np.arange(number)):
            raise DataError(f"{quoted(folder / INDEX)} has {len(rows)} of {number} {role} images: copy the pack again")
        taken = {name: columns[name].take(rows).to_pylist() for name in ("id", "shard", "sha256")}
        parts[role] = Files(
            _source(folder, taken["shard"], start[rows], size[rows]),
            labels=torch.from_numpy(labels[rows].astype(np.int64)),
            ids=tuple(one.decode(errors="surrogateescape") for one in taken["id"]),
            fingerprints=tuple(one[:16] for one in taken["sha256"]),
            stamp=stamp,
        )
    return parts


def _source(folder: Path, shards: list[str], start: np.ndarray, size: np.ndarray) -> Callable[[int], bytes]:
    def read(i: int) -> bytes:
        with open(folder / shards[i], "rb") as file:
            file.seek(int(start[i]))
            return file.read(int(size[i]))

    return read
