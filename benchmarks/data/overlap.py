"""Whether an evaluation decodes while the device works. The device sleeps: it takes its time and no core, as a GPU
does."""

import statistics
import time
from typing import Any

import torch

from benchmarks.data.photos import photo
from lpt.data.loader import close_workers
from lpt.data.preprocess import available_cores
from lpt.data.task import Files
from lpt.engine.evaluate import predict, views_ahead
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
    """The hardest case: the device needs as long as decoding does."""
    number, workers = 256 if quick else 2048, available_cores()
    torch.set_num_threads(1)  # a second one would wait for a core that a worker has
    contents = [photo(i) for i in range(64)]
    images = Files(
        lambda i: contents[i % 64],
        torch.zeros(number, dtype=torch.long),
        tuple(f"{i}.jpg" for i in range(number)),
        ("",) * number,
    )
    backbone = load_backbone("nano")
    head = LinearHead(num_classes=2, width=backbone.feature_width)
    model: Any = Sleeper(backbone, head, classes=("a", "b")).eval()
    backbone.preprocess = backbone.preprocess.with_(size=224)
    batches = torch.arange(number).split(BATCH)

    def decode() -> float:
        began = time.perf_counter()
        with views_ahead(model, images, batches, workers=workers) as views:
            for _ in views:
                pass
        return time.perf_counter() - began

    decode()  # starts the workers
    ratios, walls, devices = [], [], []
    for _ in range(1 if quick else 3):
        alone = decode()
        model.seconds = alone / len(batches)
        began = time.perf_counter()
        predict(model, images, batch_size=BATCH, workers=workers)
        wall = time.perf_counter() - began
        device = model.seconds * len(batches)
        slower = max(device, (alone + decode()) / 2)
        ratios.append(wall / slower)
        walls.append(wall)
        devices.append(device)
    close_workers()
    return [
        {"ratio": round(statistics.median(ratios), 3), "unit": "seconds of an evaluation ÷ max(decoding, device)"},
        {"value": round(statistics.median(walls), 2), "unit": f"seconds of an evaluation of {number} photos"},
        {"value": round(statistics.median(devices), 2), "unit": "seconds of decoding alone, and of the device alone"},
    ]
