"""Are pseudo-labels as precise as `lpt pseudo-label` says? On CIFAR-100-semi, where the truth is known.

    python -m benchmarks.accuracy.pseudo_labels --data DIR --weights FILE [--json FILE] [--shape consistent]

Trains a linear probe with logit adjustment on the labeled images, 20 of each class held out, writes the unlabeled ones
as files, labels them with the command, and counts. The pool is long-tailed (400 to 40 images of a class) and holds no
labeled image; held-out images are balanced.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from lpt.data import load_task
from lpt.data.longtail import shot_groups
from lpt.data.task import Images, Task
from lpt.files import write_atomic

CONFIG = """
backbone: {{name: "timm:deit_tiny_patch16_224", image_size: {size}, weights: {weights}}}
data: {{name: cifar100-semi, root: {data}, val_per_class: 20, preset: simpro, shape: {shape}}}
method: {{name: linear_probe, epochs: 20, loss: la}}
train: {{batch_size: 128}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.pseudo_labels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder of CIFAR-100")
    parser.add_argument("--weights", type=Path, required=True, help="DeiT-Tiny's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, default=112, help="pixels")
    parser.add_argument("--shape", default="consistent")
    parser.add_argument("--labels", default="0.8:images,0.9:images,0.9:held-out", help="what is asked for")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lpt-labels-") as made:
        folder = Path(made)
        task = load_task("cifar100-semi", root=str(given.data), val_per_class=20, preset="simpro", shape=given.shape)
        write_images(task, folder / "pool")
        places = {"data": given.data.resolve(), "weights": given.weights.resolve()}
        (folder / "config.yaml").write_text(CONFIG.format(size=given.size, shape=given.shape, **places))
        lpt("train", folder / "config.yaml", "--out", folder / "run")
        for labels in given.labels.split(","):
            rows += checked(task, folder, given, *labels.split(":"))
    if given.json:
        write_atomic(given.json, json.dumps(rows, indent=1).encode())


def checked(task: Task, folder: Path, given: argparse.Namespace, precision: str, prior: str) -> list[dict[str, Any]]:
    """What was expected of the labels of each group of predicted classes, and what came of it."""
    out = folder / f"labels-{prior}-{precision}.parquet"
    settings = (f"data.root={given.data}", f"backbone.weights={given.weights}")
    wanted = ("--precision", precision, "--prior", prior)
    lpt("pseudo-label", folder / "run" / "prompt.safetensors", folder / "pool", *settings, "--out", out, *wanted)
    report = json.loads(Path(f"{out}.json").read_text())
    table = pq.read_table(out, columns=["path", "class", "sure"]).to_pylist()
    number = {name: k for k, name in enumerate(task.classes)}
    predicted = np.array([number[row["class"]] for row in table])
    truth = np.array([int(Path(row["path"]).parent.name) for row in table])
    sure = np.array([row["sure"] for row in table])
    groups = {name: classes.numpy() for name, classes in shot_groups(task.counts, task.group_rule).items()}
    rows: list[dict[str, Any]] = []
    for name, classes in (groups | {"all": np.arange(len(number))}).items():
        inside = np.isin(predicted, classes)
        expected = report["groups"][name]["expected"]
        row = {
            "shape": given.shape,
            "prior": prior,
            "wanted": float(precision),
            "group": name,
            "images": int(inside.sum()),
            "labeled": int((inside & sure).sum()),
            "expected_precision": expected["precision"],
            "true_precision": (predicted == truth)[inside & sure].mean() if (inside & sure).any() else None,
            "expected_coverage": expected["coverage"],
            "true_coverage": sure[inside].mean(),
            "accuracy": (predicted == truth)[inside].mean(),
        }
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table in docs/pseudo_labels.md."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def span(value: dict[str, float] | None) -> str:
        return (
            "-"
            if value is None
            else f"{percent(value['estimate'])} ({percent(value['low'])} to {percent(value['high'])})"
        )

    cells = (
        row["prior"],
        row["wanted"],
        row["group"],
        f"{row['images']:,}",
        percent(row["accuracy"]),
        span(row["expected_precision"]),
        percent(row["true_precision"]),
        span(row["expected_coverage"]),
        percent(row["true_coverage"]),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def write_images(task: Task, folder: Path) -> None:
    """The unlabeled images as PNG files, each in a folder with the number of its class, which nobody is told."""
    images = task.unlabeled
    assert isinstance(images, Images)
    for i, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        path = folder / f"{label:03d}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, compress_level=1)


def lpt(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "lpt", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
