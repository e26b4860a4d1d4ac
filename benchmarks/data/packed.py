"""Images a second from a pack and from the files it was made of; and what a published set costs before its first image.

A turn asks for random batches, as training does, of each of the two in turn. Cold is after the kernel was asked to
forget the files (`posix_fadvise`); a disk with a cache of its own may not.
The dry run has all rows of a published set and none of its images: made-up names, a tail between the published numbers.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data.photos import fill
from benchmarks.data.turns import ROOT


def packed(*, quick: bool = False) -> list[dict[str, Any]]:
    """Training views a second of the same images, packed at a side of 256 and not."""
    from lpt.data import load_task
    from lpt.data.packing import pack

    images, turns = (60, 1) if quick else (1500, 5)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        fill(photos, images, classes=10)
        os.sync()
        whole = load_task("folder", root=str(photos))
        began = time.perf_counter()
        head = pack(whole, Path(folder, "pack"), side=256, settings={})
        rows: list[dict[str, Any]] = [
            {
                "value": round(sum(head["images"].values()) / (time.perf_counter() - began), 1),
                "unit": "images/s packing",
            }
        ]
        small = load_task("folder", root=str(Path(folder, "pack")))
        for state in ("warm", "cold"):
            rates: dict[str, list[float]] = {"packed": [], "files": []}
            for turn in range(turns):
                for name, task, place in (("packed", small, Path(folder, "pack")), ("files", whole, photos)):
                    if state == "cold":
                        _forget(place)
                    rates[name].append(_views_a_second(task.train, turn, batches=2 if quick else 8))
            best = {name: max(values) for name, values in rates.items()}
            for name, rate in best.items():
                rows.append({"value": round(rate, 1), "unit": f"training views/s, {state}, {name}"})
            unit = f"training views/s of a pack against its files, {state}"
            rows.append({"ratio": round(best["packed"] / best["files"], 2), "unit": unit})
        return rows


def _forget(place: Path) -> None:
    for path in place.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _views_a_second(images: Any, turn: int, *, batches: int) -> float:
    from lpt.data.preprocess import Preprocess

    generator = torch.Generator().manual_seed(turn)
    preprocess = Preprocess(min_area=0.08)
    began = time.perf_counter()
    for _ in range(batches):
        rows = torch.randint(len(images), (64,), generator=generator)
        preprocess.cut(images.take(rows), torch.rand(64, 5, generator=generator))
    return 64 * batches / (time.perf_counter() - began)


def startup_lists(*, quick: bool = False) -> list[dict[str, Any]]:
    """CPU seconds and peak memory of all rows of each published set: task, counts, manifest and a batch's rows."""
    rows: list[dict[str, Any]] = []
    for name in ("imagenet-lt", "places-lt", "inat2018"):
        with tempfile.TemporaryDirectory() as folder:
            program = [sys.executable, __file__, name, folder, "100" if quick else "1"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        what = f"{name}, {found['rows']:,} rows, no decoding"
        rows.append({"value": round(found["seconds"], 2), "unit": f"CPU seconds, {what}"})
        rows.append({"value": round(found["megabytes"]), "unit": f"MB of memory beyond the libraries, {what}"})
    return rows


def _dry_run(name: str, folder: Path, divisor: int) -> dict[str, float]:
    """In a process of its own."""
    import psutil

    from lpt.data import lists, load_task
    from lpt.data.longtail import count_fingerprint
    from lpt.data.samplers import ClassBalanced, InstanceBalanced
    from lpt.device import peak_memory

    published = lists.PUBLISHED[name]
    counts = _counts(published, divisor)
    _write_lists(published, counts, folder)
    shrunk = published._replace(
        train=sum(counts),
        largest=max(counts),
        smallest=min(counts),
        fingerprint=count_fingerprint(counts),
    )
    lists.PUBLISHED[name] = shrunk
    memory, began = psutil.Process().memory_info().rss, time.process_time()
    task = load_task(name, root=str(folder))
    task.manifest()
    for sampler in (InstanceBalanced, ClassBalanced):
        task.train.take(sampler(task.train.labels, batch_size=128, seed=0).batch(0))
    rows = sum(len(part) for part in (task.train, task.val, task.test) if part is not None)
    return {
        "rows": rows,
        "seconds": time.process_time() - began,
        "megabytes": (peak_memory(torch.device("cpu")) - memory) / 1e6,
    }


def _counts(published: Any, divisor: int) -> list[int]:
    """As many images in as many classes as were published, from the largest to the smallest."""
    total = max(published.train // divisor, published.classes * published.smallest)
    steepness = np.geomspace(1e-3, 1e3, 200)
    x = np.linspace(0, 1, published.classes)
    low, high = published.smallest, published.largest
    shapes = [(low + (high - low) * np.exp(-s * x) * (1 - x)).astype(int) for s in steepness]
    counts = min(shapes, key=lambda shape: abs(int(shape.sum()) - total)).clip(min=low)
    rest, large = total - int(counts.sum()), np.flatnonzero(counts > counts.mean())
    if len(large):  # what is too few or too many, shared by the larger classes
        counts[large] += np.sign(rest) * np.bincount(np.arange(abs(rest)) % len(large), minlength=len(large))
    return counts.clip(min=low).tolist()


def _write_lists(published: Any, counts: list[int], folder: Path) -> None:
    each_test = published.test // published.classes
    sizes = {"train": counts, "test": [each_test] * published.classes}
    if published.val:
        sizes["val"] = [published.val // published.classes] * published.classes
    for part, numbers in sizes.items():
        lines = [f"{part}/n{k:08}/n{k:08}_{i:08}.JPEG {k}\n" for k, number in enumerate(numbers) for i in range(number)]
        list_name = part if published.val else {"train": "train", "test": "val"}[part]
        (folder / f"{published.lists}_{list_name}.txt").write_text("".join(lines))
        for line in lines[:: max(1, len(lines) // 5)]:  # those that are looked for
            path = folder / line.rpartition(" ")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


if __name__ == "__main__":
    print(json.dumps(_dry_run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
