"""LPT as published against ours, in one process, interleaved, with the same weights and inputs.

    python -m benchmarks.speed --backbone vit_base_patch16_224 --image-size 224 --batch 8 --json FILE
    python -m benchmarks.speed --device cuda --batch 64 --fed --json FILE

Published: prompts concatenated to the tokens, whole blocks, two full passes a stream, fp32 (`tests/support/plain.py`).
Ours: prompts as keys and values, one prefix and two tails, the last block for the pooled token, both streams in one
batch where no gradient is needed, and a backward for each stream. `batch` counts the images of one stream; a step has
two. Inference is also timed as `method.query` has it: full, early and none. Beside them stand the rate of one large
matrix product, as what the device can do, and with `--fed` the images that this machine's processes decode and cut in a
second, as what can be fed to it.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data.photos import photo
from lpt.data.loader import Order, made_ahead
from lpt.data.preprocess import File, Preprocess, available_cores
from lpt.device import PRECISIONS, pick_device, pick_precision, used_memory, versions
from lpt.files import write_atomic
from lpt.losses import GCL
from lpt.model.backbones.timm_vit import TimmViT, untrained
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.model.prompts import DeepPrompt, PromptPool, summary_width
from lpt.sweep import processor
from lpt.terms import QueryMode
from tests.support.plain import plain_forward

CLASSES = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="a timm architecture; random weights")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--fed", action="store_true", help="images a second that are decoded here")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = pick_device(given.device)
    fp32_model = model_on(backbone_of(given).to(device))
    if given.compile:  # the published procedure runs timm's own blocks, which this leaves alone
        fp32_model.backbone.compile_blocks()
    result: dict[str, Any] = {
        "backbone": given.backbone,
        "image_size": given.image_size,
        "batch_per_stream": given.batch,
        "pairs": given.pairs,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "platform": platform.platform(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "versions": versions(),
        "command": f"python -m benchmarks.speed --backbone {given.backbone} --image-size {given.image_size} "
        f"--batch {given.batch} --pairs {given.pairs} --device {given.device}"
        + " --compile" * given.compile
        + " --fed" * given.fed,
        "product_flops": {name: product_rate(device, dtype) for name, dtype in PRECISIONS.items()},
    }
    if given.fed:
        result["images_fed"] = images_fed(given.image_size)
    result |= compare(fp32_model, fp32_model, given.batch, given.pairs, device)
    result["queries"] = compare_queries(fp32_model.backbone, given.batch, given.pairs, device)
    show("fp32 against published in fp32", result, result["product_flops"]["fp32"])
    show_queries(result["queries"])
    if pick_precision("auto", device) == "bf16":
        bf16_model = model_on(backbone_of(given).to(device, torch.bfloat16))
        if given.compile:
            bf16_model.backbone.compile_blocks()
        result["bf16"] = compare(fp32_model, bf16_model, given.batch, given.pairs, device)
        result["bf16"]["queries"] = compare_queries(bf16_model.backbone, given.batch, given.pairs, device)
        show("bf16 against published in fp32", result["bf16"], result["product_flops"]["bf16"])
        show_queries(result["bf16"]["queries"])
    if given.fed:
        print(f"{result['images_fed']:,.0f} images/s can be fed (JPEG of 500 × 375, all cores of this machine)")
    if given.json:
        write_atomic(given.json, json.dumps(result, indent=1).encode())


def backbone_of(given: argparse.Namespace) -> TimmViT:
    """With random weights. Layer scales start so near 0 that prompts would be all but ignored: they are 0.5 here."""
    backbone = untrained(given.backbone, image_size=given.image_size)
    with torch.no_grad():
        for name, value in backbone.named_parameters():
            if name.rpartition(".")[2] in ("gamma_1", "gamma_2") or ".ls" in name:
                value.fill_(0.5)
    return backbone


def model_on(backbone: TimmViT, query: QueryMode = "full") -> PromptedClassifier:
    """LPT's published shapes: 10 tokens, pool of 20, 2 chosen, from the middle block on."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"length": 10, "width": backbone.width, "generator": generator}
    pool = PromptPool(
        size=2 if query == "none" else 20,
        topk=2,
        prefix_blocks=backbone.depth // 2,
        depth=backbone.depth,
        key_width=backbone.feature_width,
        query=query,
        summary_width=summary_width(backbone.width, backbone.prefix),
        **sizes,
    )
    head = CosineHead(num_classes=CLASSES, width=backbone.feature_width, scale=20, generator=generator)
    shared = DeepPrompt(layers=backbone.depth, **sizes)
    device = next(backbone.parameters()).device
    model = PromptedClassifier(backbone, head, classes=tuple(map(str, range(CLASSES))), shared=shared, pool=pool)
    return model.to(device)


WORKS = ("inference", "phase1_step", "phase2_step")
"""What is measured, by its key in the result."""


class Pair:
    """The published procedure with the model `plain` and ours with `ours`, on the same two streams of `batch` images.

    The two may be one model. What each work returns is compared: logits [2 B C], or the gradients of a step.
    """

    def __init__(self, plain: PromptedClassifier, ours: PromptedClassifier, batch: int, device: torch.device):
        self.plain, self.ours, self.batch = plain, ours, batch
        generator = torch.Generator().manual_seed(1)
        size = plain.backbone.preprocess.size
        self.streams: list[tuple[Tensor, Tensor]] = []  # (views [B 3 S S], labels [B])
        for _ in range(2):
            views = torch.randn(batch, 3, size, size, generator=generator)
            labels = torch.randint(CLASSES, (batch,), generator=generator)
            self.streams.append((views.to(device), labels.to(device)))
        self.views = torch.cat([views for views, _ in self.streams])
        self.gcl = GCL(torch.arange(CLASSES, 0, -1).to(device))
        self.pools = {model: model.pool for model in {plain, ours}}

    def prepare(self, work: str) -> None:
        """Phase 1 has no pool yet; each step trains the parameters of its phase."""
        trained = {"inference": (), "phase1_step": ("shared.", "head."), "phase2_step": ("pool.", "head.")}[work]
        for model, pool in self.pools.items():
            model.pool = None if work == "phase1_step" else pool
            model.only_train(*trained)

    def published(self, work: str) -> list[Tensor]:
        if work == "inference":
            with torch.no_grad():
                return [plain_forward(self.plain, self.views).logits]
        self.plain.zero_grad(set_to_none=True)
        outputs = [plain_forward(self.plain, views) for views, _ in self.streams]
        losses = [self.loss(output, labels) for output, (_, labels) in zip(outputs, self.streams, strict=True)]
        sum(losses).backward()
        return gradients(self.plain)

    def our(self, work: str) -> list[Tensor]:
        """As `lpt.methods.lpt` does it: what needs no gradient once for both streams, then one tail after the other."""
        if work == "inference":
            with torch.no_grad():
                return [self.ours(self.views).logits]
        self.ours.zero_grad(set_to_none=True)
        tokens = self.ours.prefix(self.views)
        query = None if self.ours.pool is None else self.ours.query(tokens)
        for i, (_, labels) in enumerate(self.streams):
            rows = slice(i * self.batch, (i + 1) * self.batch)
            output = self.ours.tail(tokens[rows], query=None if query is None else query[rows])
            self.loss(output, labels).backward()
        return gradients(self.ours)

    def bare_forward(self) -> None:
        """One plain forward of the same images, without prompts, at our precision."""
        with torch.no_grad():
            tokens = self.ours.backbone.embed(self.views)
            for i in range(self.ours.backbone.depth):
                tokens = self.ours.backbone.block(i, tokens)
            self.ours.backbone.pool(tokens)

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        total = self.gcl(output.logits, labels)
        return total if output.similarity is None else total - 0.5 * output.similarity.sum(1).mean()


def gradients(model: PromptedClassifier) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def compare(
    plain: PromptedClassifier, ours: PromptedClassifier, batch: int, pairs: int, device: torch.device
) -> dict[str, Any]:
    """The fields of `README.md` for each of WORKS."""
    pair = Pair(plain, ours, batch, device)
    result: dict[str, Any] = {}
    for work in WORKS:
        pair.prepare(work)
        slow, fast = partial(pair.published, work), partial(pair.our, work)
        error = max(relative(a, b) for a, b in zip(fast(), slow(), strict=True))
        times = []
        for _ in range(pairs):  # interleaved: what else the machine does then slows all three
            times.append((seconds(slow, device), seconds(fast, device), seconds(pair.bare_forward, device)))
        ratios = [slow_time / fast_time for slow_time, fast_time, _ in times]
        result[work] = {
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "relative_error": error,
            "memory_ratio": peak(fast, device) / peak(slow, device),
            "over_forward": statistics.median(fast_time / bare_time for _, fast_time, bare_time in times),
            "flops_ratio": flops(slow) / flops(fast),
            "flops": flops(fast),
            "seconds_published": statistics.median(slow_time for slow_time, _, _ in times),
            "seconds_ours": statistics.median(fast_time for _, fast_time, _ in times),
            "images": 2 * batch,
        }
    pair.prepare("phase2_step")  # the pools are back for the next comparison
    return result


def compare_queries(backbone: TimmViT, batch: int, pairs: int, device: torch.device) -> dict[str, Any]:
    """Inference by each `method.query`, interleaved with one plain forward of the same images."""
    models = {query: model_on(backbone, query).only_train() for query in get_args(QueryMode)}
    works = {query: Pair(model, model, batch, device) for query, model in models.items()}
    rounds: list[dict[str, float]] = []
    for i in range(pairs + 1):
        times = {query: seconds(partial(pair.our, "inference"), device) for query, pair in works.items()}
        times["plain"] = seconds(works["full"].bare_forward, device)
        if i:  # in the first, constants are made
            rounds.append(times)
    result = {}
    for query, pair in works.items():
        ratios = [times[query] / times["plain"] for times in rounds]
        result[query] = {
            "over_forward": statistics.median(ratios),
            "over_forward_min": min(ratios),
            "over_forward_max": max(ratios),
            "seconds": statistics.median(times[query] for times in rounds),
            "flops_over_forward": flops(partial(pair.our, "inference")) / flops(pair.bare_forward),
        }
    return result


def show_queries(result: dict[str, Any]) -> None:
    print("| inference by method.query | ÷ one plain forward | FLOPs ÷ its |\n|---|---|---|")
    for query, measured in result.items():
        low, high = measured["over_forward_min"], measured["over_forward_max"]
        print(
            f"| {query} | {measured['over_forward']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{measured['flops_over_forward']:.2f} |",
            flush=True,
        )


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference as a share of b's."""
    return ((a - b).norm() / b.norm()).item()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `work` needs at once beyond what was there before; on CPUs the resident set, sampled every ms."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # what earlier steps freed must not serve this one unseen
    before, highest, done = used_memory(device), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, used_memory(device))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(highest - before, 1)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product: what a step can come near to."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b  # the first time, libraries choose how
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def images_fed(image_size: int) -> float:
    """Training views a second that all cores of this machine decode and cut from JPEG photos of 500 × 375."""
    preprocess, cores = Preprocess(size=image_size), available_cores()
    files = [File(str(i), photo(i)) for i in range(64)]
    orders = [Order(files=files, preprocess=preprocess, chance=torch.rand(64, 5).numpy())]
    for jobs in (cores, 8 * cores):  # the first starts the workers
        began = time.perf_counter()
        with made_ahead([(None, orders)] * jobs, workers=cores) as made:
            number = sum(len(one.checked()) for _, (one,) in made)
    return number / (time.perf_counter() - began)


def show(title: str, result: dict[str, Any], product_flops: float) -> None:
    print(
        f"{title}\n| | times faster | relative error | memory | ÷ one plain forward | FLOPs | images/s | of product |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for work in WORKS:
        measured = result[work]
        images, rate = (measured[key] / measured["seconds_ours"] for key in ("images", "flops"))
        print(
            f"| {work} | {measured['ratio']:.2f} ({measured['ratio_min']:.2f} to {measured['ratio_max']:.2f}) | "
            f"{measured['relative_error']:.1e} | {measured['memory_ratio']:.2f} | {measured['over_forward']:.2f} | "
            f"{measured['flops_ratio']:.2f} | {images:,.0f} | {rate / product_flops:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
