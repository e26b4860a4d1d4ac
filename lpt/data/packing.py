"""Making a pack of a task: shard by shard, so that a kill costs one of them, and read back whole at the end.

While it is made, each finished shard has a JSON file with its rows in `.packing/` beside it; `pack.json` is the last
file that is written. The format is in `lpt.data.pack`.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from lpt.data.pack import FORMAT, HEAD, INDEX, NAMES, PLAN, RECORDS, ROLES, Row
from lpt.data.preprocess import File, decoded, encoded
from lpt.data.task import Files, Task
from lpt.errors import DataError, LptError, quoted
from lpt.files import write_atomic

LOCK = "lock"
IN_A_SHARD = 2000
"""Images: some 50 MB at a side of 256, which is what a kill costs and what is in memory at once."""
QUALITY = 95
AS_THEY_ARE = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats of images that every reader knows: those that are no larger than wanted keep their bytes."""
Say = Callable[[str], object]


def pack(
    task: Task, out: Path, *, side: int, settings: Mapping[str, Any], say: Say = lambda text: None
) -> dict[str, Any]:
    """Writes the pack of `task` to the folder `out`, or continues with it, and returns what `pack.json` holds. The
    shorter side of an image has at most `side` pixels; `settings` are those of `data:` that the task was made with.

    Raises DataError for a task that is not of files, for an image that cannot be decoded, for an `out` that holds
    anything else, and for a pack that is not what was written; LptError where it cannot be written.
    """
    parts = {role: images for role in ROLES if (images := getattr(task, role)) is not None}
    for role, images in parts.items():
        if not isinstance(images, Files):
            raise DataError(f"{quoted(task.name)} has its {role} images in memory: only image files are packed")
    manifest = task.manifest()
    shards = _shards(parts)
    head = {
        "format": FORMAT,
        "side": side,
        "quality": QUALITY,
        "task": {
            "name": task.name,
            "classes": list(task.classes),
            "group_rule": task.group_rule,
            "facts": dict(task.facts),
            "counts": task.counts.tolist(),
        },
        "settings": dict(settings),
        "images": {role: len(images) for role, images in parts.items()},
        "split": {"sha256": manifest["sha256"]},
    }
    try:
        with _taken(out, head):
            records = _write_shards(out, parts, shards, side, say)
            return _finish(out, task, parts, head, records, say)
    except OSError as error:
        raise LptError(
            f"{quoted(error.filename or out)} cannot be written ({error.strerror or quoted(error)}): put that right, "
            "and the same command continues with the shards that are there"
        ) from error


def _shards(parts: Mapping[str, Files]) -> dict[str, tuple[str, list[int]]]:
    """Shard → (part, rows in it), in an order drawn once: whoever reads a shard from its start sees all classes."""
    shards: dict[str, tuple[str, list[int]]] = {}
    for role, images in parts.items():
        shuffled = np.random.default_rng(0).permutation(len(images)).tolist()
        for start in range(0, len(images), IN_A_SHARD):
            shards[f"{role}-{start // IN_A_SHARD:05d}.tar"] = role, shuffled[start : start + IN_A_SHARD]
    return shards


class _taken:
    """The folder `out`, for this process alone and for this pack alone."""

    def __init__(self, out: Path, head: Mapping[str, Any]) -> None:
        self.out, self.plan = out, json.dumps(head, sort_keys=True)

    def __enter__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        is_known = (self.out / HEAD).exists() or (self.out / RECORDS).exists()
        if not is_known and any(self.out.iterdir()):
            raise DataError(f"--out {quoted(self.out)} is not empty and no pack: give a new folder")
        (self.out / RECORDS).mkdir(exist_ok=True)
        self.lock = FileLock(self.out / RECORDS / LOCK)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"--out {quoted(self.out)}: another process is packing there") from None
        plan = self.out / RECORDS / PLAN
        known = plan.read_text() if plan.exists() else _plan_in(self.out / HEAD)
        if known is not None and known != self.plan:
            self.lock.release()
            raise DataError(
                f"--out {quoted(self.out)} has a pack of other images, or one that was made otherwise: give a new "
                "folder"
            )
        write_atomic(plan, self.plan.encode())

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.lock.release()
        if kind is None:
            shutil.rmtree(self.out / RECORDS)


def _plan_in(head: Path) -> str | None:
    """What a finished pack was made with."""
    try:
        known = json.loads(head.read_text())
        return json.dumps(
            {key: value for key, value in known.items() if key not in ("shards", "index_sha256")}, sort_keys=True
        )
    except (OSError, ValueError, AttributeError):
        return None


def _write_shards(
    out: Path, parts: Mapping[str, Files], shards: Mapping[str, tuple[str, list[int]]], side: int, say: Say
) -> dict[str, dict[str, Any]]:
    """Shard → its record, from the disk where it is there already."""
    records: dict[str, dict[str, Any]] = {}
    finished = _finished_records(out)
    total, done = sum(len(rows) for _, rows in shards.values()), 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        for name, (role, rows) in shards.items():
            known = finished.get(name)
            if known is None:
                images = parts[role]
                encoded = pool.map(lambda i, images=images: shrunk(File(images.ids[i], images.source(i)), side), rows)
                known = _write_shard(out / name, images, rows, encoded)
                write_atomic(out / RECORDS / f"{name}.json", json.dumps(known).encode())
            records[name] = known
            done += len(rows)
            say(f"{name}  {len(rows)} images, {known['bytes']:,} bytes; {done} of {total}")
    return records


def _finished_records(out: Path) -> dict[str, dict[str, Any]]:
    """The records of shards that are there whole, of a pack that is made or that was."""
    records: dict[str, dict[str, Any]] = {}
    if (out / HEAD).exists() and (out / INDEX).exists():
        rows = _rows_by_shard(out)
        for shard in json.loads((out / HEAD).read_text())["shards"]:
            records[shard["name"]] = {**shard, "rows": rows[shard["name"]]}
    for path in (out / RECORDS).glob("*.tar.json"):
        record = json.loads(path.read_bytes())
        records[record["name"]] = record
    lengths = {path.name: path.stat().st_size for path in out.glob("*.tar")}
    return {name: record for name, record in records.items() if lengths.get(name) == record["bytes"]}


def _rows_by_shard(out: Path) -> dict[str, list[list[Any]]]:
    """[start, bytes, sha256] of the images in each shard, in their order there, from the index."""
    import pyarrow.parquet as pq

    rows: dict[str, list[list[Any]]] = {}
    for row in pq.ParquetFile(out / INDEX).read().to_pylist():
        rows.setdefault(row["shard"], []).append([row["start"], row["bytes"], row["sha256"]])
    return {name: sorted(inside) for name, inside in rows.items()}


def shrunk(file: File, side: int) -> tuple[bytes, str]:
    """(the image with its shorter side at most `side`, encoded; its ending). One that is no larger, in a format that
    all know, is the bytes that it was, once they have been decoded. Raises DataError."""
    content = encoded(file)
    image = decoded(File(file.name, content), min_side=2 * side)
    with Image.open(io.BytesIO(content)) as unopened:
        kind, shorter = unopened.format, min(unopened.size)
    if shorter <= side and kind in AS_THEY_ARE:
        return content, AS_THEY_ARE[kind]
    scale = side / min(image.size)
    if scale < 1:
        width, height = (max(side, round(scale * length)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=QUALITY)
    return written.getvalue(), "jpg"


def _write_shard(path: Path, images: Files, rows: list[int], encoded: Iterator[tuple[bytes, str]]) -> dict[str, Any]:
    """Writes a shard whole or not at all, and returns its length, its SHA-256 and where each image lies in it."""
    temporary = path.with_name(f".{path.name}.tmp")
    places: list[list[Any]] = []
    labels = images.labels.tolist()
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for row, (content, ending) in zip(rows, encoded, strict=True):
                start = archive.offset + tarfile.BLOCKSIZE  # behind its header
                _add(archive, f"{row:08d}.{ending}", content)
                places.append([start, len(content), hashlib.sha256(content).hexdigest()])
                if labels[row] >= 0:
                    _add(archive, f"{row:08d}.cls", str(labels[row]).encode())
        file.flush()
        os.fsync(file.fileno())
    digest = _sha256(temporary)
    temporary.replace(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest, "images": len(rows), "rows": places}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _finish(
    out: Path,
    task: Task,
    parts: Mapping[str, Files],
    head: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    say: Say,
) -> dict[str, Any]:
    """Reads everything back, and writes the index, the names and at last the head."""
    for name, record in records.items():
        _verify(out / name, record)
    say(f"{len(records)} shards read back: they hold what was written")
    rows = list(_rows(parts, records))
    write_atomic(out / INDEX, _as_parquet(rows))
    names = [" ".join(name.split()) for name in task.classes]
    write_atomic(out / NAMES, "".join(f"{name}\n" for name in names).encode(errors="surrogateescape"))
    shards = [{key: value for key, value in record.items() if key != "rows"} for record in records.values()]
    finished = {**head, "shards": shards, "index_sha256": _sha256(out / INDEX)}
    write_atomic(out / HEAD, json.dumps(finished, indent=1).encode())
    return finished


def _verify(path: Path, record: Mapping[str, Any]) -> None:
    content = path.read_bytes()
    intact = hashlib.sha256(content).hexdigest() == record["sha256"]
    if intact:
        intact = all(
            hashlib.sha256(content[start : start + size]).hexdigest() == sha for start, size, sha in record["rows"]
        )
    if not intact:
        raise DataError(
            f"shard {quoted(path)} does not hold what was written: remove it, and the same command makes it"
        )


def _rows(parts: Mapping[str, Files], records: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    for name, (role, inside) in _shards(parts).items():
        images, labels = parts[role], parts[role].labels
        for row, (start, size, sha) in zip(inside, records[name]["rows"], strict=True):
            yield Row(role, row, images.ids[row], int(labels[row]), name, start, size, sha)


def _as_parquet(rows: list[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = dict(zip(Row._fields, map(list, zip(*rows, strict=True)), strict=True))
    columns["id"] = [one.encode(errors="surrogateescape") for one in columns["id"]]  # names that are no UTF-8
    written = io.BytesIO()
    pq.write_table(pa.table(columns), written)
    return written.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
