"""What is measured in turns: run as a program, `pipelines.py NAME SETTINGS`, that makes one round for each line it gets
and says how many images (or draws) it makes in a second, and in a second of one core.

Works with the `lpt` of any commit that is compared: what is of one alone is imported where it is used.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 64
MEAN_STD = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
Round = Callable[[], int]
"""Makes everything once, and says how many it made."""


def paths_in(folder: str) -> list[str]:
    return [str(path) for path in sorted(Path(folder).rglob("*.jpg"))]


def pixels_module(name: str) -> Any:
    """`lpt.data.NAME`, or where the commit before had it."""
    try:
        return importlib.import_module(f"lpt.data.{name}")
    except ModuleNotFoundError:
        return importlib.import_module(f"lpt.{name}")


def preprocess() -> Any:
    return pixels_module("preprocess").Preprocess(size=224, interpolation="bicubic", crop_ratio=0.9, **MEAN_STD)


def ours(*, view: str, folder: str, workers: int) -> Round:
    """Our training view through the batches of a phase, or our test view through those of an evaluation."""
    import torch

    from lpt.data.loader import Order, made_ahead
    from lpt.data.task import Files

    paths, pixels = paths_in(folder), preprocess()
    images = Files(paths.__getitem__, torch.zeros(len(paths), dtype=torch.long), tuple(paths), ("",) * len(paths))

    def one_round() -> int:
        jobs = []
        for rows in torch.arange(len(paths)).split(BATCH):
            chance = torch.rand(len(rows), 5).numpy() if view == "train" else None
            jobs.append((len(rows), [Order(files=images.take(rows), preprocess=pixels, chance=chance)]))
        with made_ahead(jobs, workers=workers) as made:
            return sum(len(one.checked()) for _, (one,) in made)

    return one_round


def before(*, view: str, folder: str) -> Round:
    """The same views as `Preprocess.cut` of the commit before made them, in threads."""
    import torch

    paths, pixels = paths_in(folder), preprocess()

    def one_round() -> int:
        done = 0
        for first in range(0, len(paths), BATCH):
            files = [pixels_module("preprocess").File(path, path) for path in paths[first : first + BATCH]]
            chance = torch.rand(len(files), 5) if view == "train" else None
            done += len(pixels.cut(files, chance))
        return done

    return one_round


def torchvision(*, view: str, folder: str, workers: int, decoder: str) -> Round:
    """What torchvision's documentation has people write: ImageFolder, transforms, DataLoader; bytes, as we send them.

    `decoder` is Pillow, ImageFolder's own, or torchvision.io, which is deprecated."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    torch.set_num_threads(1)
    bicubic: Any = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    if view == "train":
        steps = [v2.RandomResizedCrop(224, scale=(0.7, 1.0), **bicubic), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(int(224 / 0.9), **bicubic), v2.CenterCrop(224)]
    more: dict[str, Any] = {}
    if decoder == "io":
        from torchvision.io import ImageReadMode, decode_image

        more["loader"] = lambda path: decode_image(path, mode=ImageReadMode.RGB)
    else:
        steps.append(v2.PILToTensor())
    loader = DataLoader(
        ImageFolder(folder, v2.Compose(steps), **more),
        batch_size=BATCH,
        shuffle=view == "train",
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    return lambda: sum(len(images) for images, _ in loader)


def small_pixels(number: int) -> Any:
    import torch

    return torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def strong(*, of: str, folder: str, number: int, workers: int) -> Round:
    """Strong views of images of 32 pixels in memory, or of files."""
    import torch

    from lpt.data.loader import Order, made_ahead

    paths, pixels = paths_in(folder)[:number], small_pixels(number).numpy()

    def order(rows: slice) -> Order:
        seeds = range(number)[rows]
        changes: Any = [("strong", seed) for seed in seeds]
        if of == "memory":
            return Order(pixels=pixels[rows], changes=changes)
        from lpt.data.preprocess import File

        chance = torch.rand(len(seeds), 5).numpy()
        files = [File(path, path) for path in paths[rows]]
        return Order(files=files, preprocess=preprocess(), chance=chance, changes=changes)

    def one_round() -> int:
        jobs = [(None, [order(slice(first, first + BATCH))]) for first in range(0, number, BATCH)]
        with made_ahead(jobs, workers=workers) as made:
            return sum(len(one.checked()) for _, (one,) in made)

    return one_round


def strong_before(*, of: str, folder: str, number: int) -> Round:
    """The same as the commit before made them, one by one in one thread."""
    import torch

    paths, pixels = paths_in(folder)[:number], small_pixels(number)

    def one_round() -> int:
        done = 0
        for first in range(0, number, BATCH):
            seeds = list(range(number)[first : first + BATCH])
            if of == "memory":
                content = pixels[first : first + BATCH]
            else:
                files = [pixels_module("preprocess").File(path, path) for path in paths[first : first + BATCH]]
                content = preprocess().cut(files, torch.rand(len(files), 5))
            done += len(pixels_module("augment").augmented(content, seeds, "strong"))
        return done

    return one_round


def noise(*, rows: int, classes: int, world: int, draws: int) -> Round:
    """The noise of a step of `rows` images on each of `world` processes."""
    import torch

    from lpt.engine.batches import Progress

    torch.set_num_threads(1)

    def one_round() -> int:
        for step in range(draws):
            Progress("phase1", step, draws, draws, 0, 0, world).normal("cloud", rows, classes)
        return draws

    return one_round


PIPELINES: dict[str, Callable[..., Round]] = {
    "ours": ours,
    "before": before,
    "torchvision": torchvision,
    "strong": strong,
    "strong_before": strong_before,
    "noise": noise,
}


def main() -> None:
    one_round = PIPELINES[sys.argv[1]](**json.loads(sys.argv[2]))
    for _ in sys.stdin:
        began, busy = time.perf_counter(), processor_seconds()
        number = one_round()
        rates = {"a_second": number / (time.perf_counter() - began)}
        rates["a_core_second"] = number / max(processor_seconds() - busy, 1e-9)
        print(json.dumps(rates), flush=True)


def processor_seconds() -> float:
    """What this process and its workers have computed."""
    import psutil

    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    main()
