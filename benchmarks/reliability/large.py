"""Long and large: a list of a million images, ten thousand classes, thousands of steps in level memory."""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.reliability.row import Row
from lpt import run
from lpt.config import resolve
from lpt.data import DATA, Task
from lpt.data.lists import own_lists
from lpt.data.samplers import ClassBalanced
from lpt.data.task import Files
from lpt.device import used_memory

STARTS_WITHIN = 20.0
GROWS_BY = 0.02
"""Of the resident memory, from the steps behind the first 200 to as many last ones: means over a tenth of all steps,
since every checkpoint and every evaluation takes some for a moment."""


def rows(quick: bool) -> list[Row]:
    images, classes, steps = (20_000, 500, 300) if quick else (1_000_000, 10_000, 2_000)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _lists(place, images, classes)
        DATA["made"] = made
        try:
            started, memory, report = _run(place, steps)
            balanced = _balanced(place)
        finally:
            del DATA["made"]
    seconds = time.perf_counter() - began
    settled = memory[min(200, len(memory) // 2) :]
    early, late = statistics.fmean(settled[: len(memory) // 10]), statistics.fmean(settled[-(len(memory) // 10) :])
    grown = late / early - 1
    in_time, level = started <= STARTS_WITHIN, grown <= GROWS_BY
    whole = len(report["per_class"]) == len(report["data"]["counts"]) == classes
    return [
        Row(
            "a long list starts at once",
            1,
            int(in_time),
            0,
            seconds,
            f"{images:,} rows, an image of each class held out: first step after {started:.1f} s",
        ),
        Row(
            "class-balanced batches start at once",
            1,
            int(balanced <= STARTS_WITHIN),
            0,
            balanced,
            f"LPT's sampler over the same list: first batch after {balanced:.1f} s",
        ),
        Row(
            "memory stays level",
            steps,
            steps if level else 0,
            0,
            seconds,
            f"{early / 2**20:.0f} MiB after step 200, {late / 2**20:.0f} MiB before step {steps:,}: "
            f"{100 * grown:+.2f} %; between {min(settled) / 2**20:.0f} and {max(settled) / 2**20:.0f} all the while, "
            "with a checkpoint every 2 s and 20 evaluations",
        ),
        Row("many classes", classes, classes if whole else 0, 0, seconds, "head, samplers, loss and report"),
    ]


def made(root: str | None = None, *, train: str, test: str, val_per_class: int = 0) -> Task:
    """`data.name=lists` on images that do not exist: each is a small PNG of one colour, made when it is asked for. Of
    the held-out images a hundred are looked at."""
    task = own_lists(root, train=train, test=test, val_per_class=val_per_class)
    assert isinstance(task.train, Files) and isinstance(task.test, Files) and isinstance(task.val, Files)
    val = task.val.subset(list(range(100)))
    parts = {"train": task.train, "test": task.test, "val": val}
    return replace(task, **{name: replace(part, source=_image) for name, part in parts.items()})


def _image(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (i % 251, i // 251 % 251, i % 83)).save(buffer, "PNG")
    return buffer.getvalue()


def _lists(place: Path, images: int, classes: int) -> None:
    """A long tail over `classes`, and one test image of each; of the images only those that a first look asks for."""
    share = (np.arange(classes) + 1.0) ** -0.8
    counts = np.maximum(1, (images * share / share.sum()).astype(int))
    counts[0] += images - counts.sum()
    labels = np.repeat(np.arange(classes), counts)
    for name, of in (("train", labels), ("test", np.arange(classes))):
        paths = [f"{name}/{k}/{i}.png" for i, k in enumerate(of.tolist())]
        (place / f"{name}.txt").write_text("".join(f"{path} {k}\n" for path, k in zip(paths, of.tolist(), strict=True)))
        for path in paths[:: max(1, len(paths) // 5)]:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(_image(0))


def _run(place: Path, steps: int) -> tuple[float, list[int], dict[str, Any]]:
    """(seconds to the first step, resident bytes after every step, report) of a run on the lists."""
    config = resolve(
        {
            "backbone": {"name": "untrained:vit_tiny_patch16_224", "image_size": 32},
            "data": {
                "name": "made",
                "root": str(place),
                "train": str(place / "train.txt"),
                "test": str(place / "test.txt"),
                "val_per_class": 1,
            },
            "method": {"name": "fixmatch", "tuning": "head", "lambda_u": 0, "head_init": "random", "steps": steps},
            "train": {"batch_size": 32, "checkpoint_seconds": 2.0},
        }
    )
    memory: list[int] = []
    started: list[float] = []
    show = _watch(time.perf_counter(), memory, started)
    report = run.train(config, place / "run", show=show)
    return started[0], memory, report


def _balanced(place: Path) -> float:
    """Seconds from the labels of the list to the first batch."""
    lines = (place / "train.txt").read_text().splitlines()
    labels = torch.tensor([int(line.rpartition(" ")[2]) for line in lines])
    began = time.perf_counter()
    ClassBalanced(labels, batch_size=256, seed=0).batch(0)
    return time.perf_counter() - began


def _watch(began: float, memory: list[int], started: list[float]) -> Callable[[str, int, int, str], None]:
    def show(phase: str, step: int, steps: int, text: str) -> None:
        if not started:
            started.append(time.perf_counter() - began)
        memory.append(used_memory(torch.device("cpu")))

    return show
