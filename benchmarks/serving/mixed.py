"""What it costs that images of a batch are of different tasks: turns of all forms after one another, medians of turns.

The measure is the single task's own model (`lpt.load_prompt`) on a batch of as many images.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving.libraries import Kind, backbone_of, fill, model_of
from lpt.model import mixed as mixed_model
from lpt.model.backbones.base import Backbone
from lpt.prompt_file import load_prompt
from lpt.serve.bank import TaskBank

BATCH = 64


def mixed(model: str, precision: str, *, quick: bool) -> list[dict[str, Any]]:
    """Deep prompts: 1, 8, 64 and 200 tasks in batches of 64, and a forward for each task."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = backbone_of(model, precision, image_size=32 if quick else 224)
        names = fill(Path(folder), backbone, "deep", 8 if quick else 200)
        bank = TaskBank(backbone, folder)
        views = views_of(backbone)
        forms = {
            "alone": alone(backbone, Path(folder) / f"{names[0]}.safetensors", views),
            **{f"mixed-{number}": from_bank(bank, names[:number], views) for number in (1, 8, 64, 200)},
            "per-task-forward": each_by_itself(backbone, Path(folder), names[:BATCH], views),
        }
        return ratios(forms, f"{model}/{precision}", turns=turns_of(model, quick))


def kinds(model: str, precision: str, *, quick: bool) -> list[dict[str, Any]]:
    """What else a task may be: LPT's pools, and a quarter each of four kinds in one batch."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        backbone = backbone_of(model, precision, image_size=32 if quick else 224)
        of: dict[Kind, list[str]] = {
            kind: fill(Path(folder), backbone, kind, 2 if quick else 64) for kind in ("pool", "deep", "head", "lora")
        }
        bank, views = TaskBank(backbone, folder), views_of(backbone)
        for kind in ("pool", "lora"):
            path = Path(folder) / f"{of[kind][0]}.safetensors"
            forms = {
                "alone": alone(backbone, path, views),
                f"mixed-8-{kind}": from_bank(bank, of[kind][:8], views),
                f"mixed-64-{kind}": from_bank(bank, of[kind], views),
            }
            if kind == "lora":
                forms["lora-sub-batches-8"] = by_sub_batches(bank, of[kind][:8], views)
                forms["lora-sub-batches-64"] = by_sub_batches(bank, of[kind], views)
            rows += ratios(forms, f"{model}/{precision}", turns=turns_of(model, quick))
        every = [name for four in zip(*of.values(), strict=True) for name in four]
        alone_each = [alone(backbone, Path(folder) / f"{of[kind][0]}.safetensors", views[: BATCH // 4]) for kind in of]
        forms = {
            "alone": lambda: [form() for form in alone_each],
            "mixed-methods": from_bank(bank, every, views),
        }
        return [*rows, *ratios(forms, f"{model}/{precision}", turns=turns_of(model, quick))]


def peft_mixed(model: str, precision: str, *, quick: bool) -> list[dict[str, Any]]:
    """peft's batch of several LoRA adapters (`adapter_names`), of one adapter's; and ours of the same sizes."""
    import timm
    from peft import LoraConfig, get_peft_model

    from benchmarks.serving.libraries import ARCHITECTURES

    number, size = (2, 32) if quick else (BATCH, 224)
    backbone = backbone_of(model, precision, image_size=size)
    views = views_of(backbone)
    vit = timm.create_model(ARCHITECTURES[model], num_classes=0, img_size=size).eval().to(backbone.dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"], init_lora_weights=False)
    theirs: Any = get_peft_model(vit, config, adapter_name="0")
    for adapter in range(1, number):
        theirs.add_adapter(str(adapter), config)
    theirs.set_adapter("0")
    theirs = theirs.to(backbone.dtype).eval()

    def by_peft(tasks: int) -> Callable[[], object]:
        return lambda: theirs(views, adapter_names=[str(row % tasks) for row in range(len(views))])

    forms: dict[str, Callable[[], object]] = {
        "alone": lambda: theirs(views),
        "peft-mixed": by_peft(min(8, number)),
        "peft-mixed-64": by_peft(number),
    }
    return ratios(forms, f"{model}/{precision}", turns=turns_of(model, quick))


# Forms of one batch: each is a function that computes it once.


def views_of(backbone: Backbone) -> Tensor:
    size = backbone.preprocess.size
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0)).to(backbone.dtype)


def alone(backbone: Backbone, path: Path, views: Tensor) -> Callable[[], object]:
    model = load_prompt(path, backbone)
    return lambda: model.probabilities(model(views).logits).topk(5)


def from_bank(bank: TaskBank, names: list[str], views: Tensor) -> Callable[[], object]:
    """A batch whose tasks are drawn anew each time, all of them where there are no more than images."""
    draw = random.Random(0)

    def form() -> object:
        drawn = names if len(names) <= len(views) else draw.sample(names, len(views))
        tasks = bank.hold([drawn[row % len(drawn)] for row in range(len(views))])
        return mixed_model.forward(bank.backbone, [task.model for task in tasks], views).top(5)

    return form


def each_by_itself(backbone: Backbone, folder: Path, names: list[str], views: Tensor) -> Callable[[], object]:
    models = [load_prompt(folder / f"{name}.safetensors", backbone) for name in names]
    of = [models[row % len(models)] for row in range(len(views))]
    return lambda: [m.probabilities(m(views[row : row + 1]).logits).topk(5) for row, m in enumerate(of)]


def by_sub_batches(bank: TaskBank, names: list[str], views: Tensor) -> Callable[[], object]:
    """A forward for each adapter, in turn put into the one copy of the backbone."""
    tasks = [task.model for task in bank.hold(names)]
    backbone = tasks[0].adapted.backbone if tasks[0].adapted else bank.backbone
    shell = model_of(bank.backbone, "head", 0, classes=10)
    shell.backbone = backbone

    def form() -> object:
        found = []
        for number, task in enumerate(tasks):
            assert task.adapted is not None and task.learned is not None
            with task.adapted.of_one(task.learned):
                found.append(task.head(shell.feature(views[number :: len(tasks)])).topk(5))
        return found

    return form


def turns_of(model: str, quick: bool) -> int:
    return 1 if quick else 3 if model == "vit_base" else 7


@torch.no_grad()
def ratios(forms: Mapping[str, Callable[[], object]], of: str, *, turns: int) -> list[dict[str, Any]]:
    """Throughput of each form ÷ that of `alone`, of the same turns, whose order goes round."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    order = list(forms)
    for turn in range(-1, turns):  # the first one warms up
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            began = time.perf_counter()
            forms[name]()
            synchronize()
            if turn >= 0:
                taken[name].append(time.perf_counter() - began)
    rows = []
    for name in forms:
        if name == "alone":
            continue
        each = [one / other for one, other in zip(taken["alone"], taken[name], strict=True)]
        rows.append({
            "check": f"{name}/{of}",
            "ratio": round(statistics.median(each), 3),
            "unit": f"images/s in batches of {BATCH}, of one task's",
            "images_a_second": round(BATCH / statistics.median(taken[name]), 1),
            "alone": round(BATCH / statistics.median(taken["alone"]), 1),
            "spread": [round(min(each), 3), round(max(each), 3)],
            "threads": torch.get_num_threads(),
        })  # fmt: skip
    return rows


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
