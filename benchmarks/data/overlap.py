"""Whether an evaluation decodes while the device works. The device sleeps: it takes its time and no core, as a GPU
does."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.data.photos import fill
from lpt.data.loader import close_workers, cut_ahead
from lpt.data.preprocess import available_cores
from lpt.data.task import Files
from lpt.engine.evaluate import predict
from lpt.model.backbones import load_backbone
from lpt.model.classifier import Output, PromptedClassifier
from lpt.model.heads import LinearHead

BATCH = 64


class Sleeper(PromptedClassifier):
    """A classifier whose forward is `seconds` of sleep for each batch, and nothing else."""

    seconds = 0.0

    def prefix(self, views: Any) -> Any:
        return torch.zeros(len(views), 5, self.backbone.width)

    def tail(self, tokens: Any, **_: Any) -> Output:
        time.sleep(self.seconds)
        return Output(torch.zeros(len(tokens), 2), torch.zeros(len(tokens), self.backbone.feature_width))


def overlap(*, quick: bool) -> list[dict[str, Any]]:
    """The hardest case: the device needs as long as decoding does. What the host does for the device, copies and
    normalizing, counts as the device's; a core is left for it, since decoding would else wait for that core."""
    number, workers = 256 if quick else 2048, max(1, available_cores() - 1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), number)
        paths = tuple(map(str, sorted(Path(folder).rglob("*.jpg"))))
        images = Files(paths.__getitem__, torch.zeros(number, dtype=torch.long), paths, ("",) * number)
        return _measured(images, workers, turns=1 if quick else 5)


def _measured(images: Files, workers: int, *, turns: int) -> list[dict[str, Any]]:
    number = len(images)
    backbone = load_backbone("nano")
    head = LinearHead(num_classes=2, width=backbone.feature_width)
    model: Any = Sleeper(backbone, head, classes=("a", "b")).eval()
    backbone.preprocess = backbone.preprocess.with_(size=224)
    batches = torch.arange(number).split(BATCH)
    cut = backbone.preprocess.cut(images.take(batches[0]))

    def decode() -> float:
        began = time.perf_counter()
        files = (images.take(rows) for rows in batches)
        with cut_ahead(files, backbone.preprocess, images=number, workers=workers) as made:
            for one in made:
                one.checked()
        return time.perf_counter() - began

    def device() -> float:
        began = time.perf_counter()
        for _ in batches:
            model(backbone.preprocess.normalized(cut, dtype=backbone.dtype))
        return time.perf_counter() - began

    decode()  # starts the workers
    ratios, walls, alone = [], [], []
    for _ in range(turns):
        model.seconds = 0.0
        before = decode()
        model.seconds = max(0.0, before - device()) / len(batches)
        began = time.perf_counter()
        predict(model, images, batch_size=BATCH, workers=workers)
        walls.append(time.perf_counter() - began)
        alone.append(max(device(), (before + decode()) / 2))
        ratios.append(walls[-1] / alone[-1])
    close_workers()
    return [
        {"ratio": round(statistics.median(ratios), 3), "unit": "seconds of an evaluation ÷ max(decoding, device)"},
        {"value": round(statistics.median(walls), 2), "unit": f"seconds of an evaluation of {number} photos"},
        {"value": round(statistics.median(alone), 2), "unit": f"seconds of the slower one alone, {workers} workers"},
    ]
