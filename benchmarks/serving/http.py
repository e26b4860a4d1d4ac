"""The server under load: its rate against the bare forward's, twice of what it can do, and files that change meanwhile.

Server and clients share the machine's cores, as they do not where it matters: the ratios are lower bounds.
"""

import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving import load
from benchmarks.serving.libraries import backbone_of, fill, model_of
from benchmarks.serving.mixed import BATCH, from_bank, views_of
from lpt.model.backbones import load_backbone
from lpt.model.backbones.base import Backbone
from lpt.prompt_file import save_prompt
from lpt.serve.bank import TaskBank

OVERLOAD_SECONDS = float(os.environ.get("LPT_OVERLOAD_SECONDS", "600"))
GROWTH = 200e6
"""Bytes that a server may take beyond what it had after the first tenth of an overload."""
TASKS, IMAGES, TOPK = 64, 8, 3


def http(model: str, precision: str, *, quick: bool) -> list[dict[str, Any]]:
    """Closed loops of 1, 8 and 64 clients. The bare forward is measured before and after each of them."""
    rows, seconds, size = [], 1.0 if quick else 20.0, 32 if quick else 224
    with tempfile.TemporaryDirectory() as name:
        backbone = backbone_of(model, precision, image_size=size)
        names = fill(Path(name), backbone, "deep", 8 if quick else TASKS)
        bank = TaskBank(backbone, name)
        bare = from_bank(bank, names, views_of(backbone))
        asked = load.questions(names, load.photos(IMAGES), topk=TOPK)
        with load.serving(Path(name), "--backbone", backbone.name, f"train.precision={precision}") as (_, port):
            load.in_turn(port, asked, clients=8, seconds=1)
            for clients in (1, 8, 64):
                before = rate_of(bare, seconds / 4)
                began = time.perf_counter()
                replies = load.in_turn(port, asked, clients=clients, seconds=seconds)
                taken = time.perf_counter() - began
                rate = sum(reply.status == 200 for reply in replies) / taken
                alone = statistics.mean([before, rate_of(bare, seconds / 4)])
                rows.append({
                    "check": f"http-{clients}",
                    "ratio": round(rate / alone, 3),
                    "unit": f"requests/s of one image, of the bare forward's images/s, {model} {precision}",
                    "requests_a_second": round(rate, 1),
                    "bare": round(alone, 1),
                    **load.times(replies),
                    "statuses": dict(Counter(str(reply.status) for reply in replies)),
                    "threads": torch.get_num_threads(),
                })  # fmt: skip
    return rows


def rate_of(form: Any, seconds: float) -> float:
    """Images a second of a batch that is computed again and again."""
    form()
    began, number = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not number:
        form()
        number += BATCH
    return number / (time.perf_counter() - began)


def overload(*, quick: bool) -> list[dict[str, Any]]:
    """Twice as many requests as are answered by a closed loop of 64 clients, for `LPT_OVERLOAD_SECONDS`."""
    seconds, size = (3.0, 32) if quick else (OVERLOAD_SECONDS, 224)
    with tempfile.TemporaryDirectory() as name:
        backbone = backbone_of("deit_tiny", "fp32", image_size=size)
        names = fill(Path(name), backbone, "deep", 8)
        images = load.photos(IMAGES)
        asked = load.questions(names, images, topk=TOPK)
        expected = answers(TaskBank(backbone, name), names, images)
        errors, memory = Path(name) / "stderr", list[int]()
        words = ["--backbone", backbone.name, "train.precision=fp32", *(["--queue", "32"] if quick else [])]
        with load.serving(Path(name), *words, stderr=errors) as (process, port):
            first = 2.0 if quick else 15.0
            warm = load.in_turn(port, asked, clients=16 if quick else 64, seconds=first)
            capacity = sum(reply.status == 200 for reply in warm) / first
            rate = (6 if quick else 2) * capacity  # in seconds no queue fills
            replies = load.at_rate(
                port, asked, rate=rate, seconds=seconds, watch=lambda: memory.append(load.memory_of(process))
            )
        server_log = errors.read_text()
    statuses = Counter(reply.status for reply in replies)
    accepted = [reply for reply in replies if reply.status == 200]
    right = sum(load.is_right(reply, [expected[reply.question.task, reply.question.image]]) for reply in accepted)
    early, most = max(memory[: max(1, len(memory) // 10)]), max(memory)
    refused = [reply for reply in replies if reply.status == 429]
    problems = [f"{number} answers of {status}" for status, number in statuses.items() if status not in (200, 429, 504)]
    problems += ["nothing was refused: that was no overload"] * (not refused)
    problems += ["a 429 without Retry-After"] * (not all("retry-after: " in reply.headers for reply in refused))
    problems += [f"memory grew by {(most - early) / 1e6:.0f} MB"] * (most - early > GROWTH)
    problems += [f"the log says: {server_log[:200]}"] * bool(server_log)
    return [{
        "check": "overload",
        "value": round(right / max(1, len(accepted)), 6),
        "unit": f"of accepted requests answered rightly, at {rate:.0f} requests/s, where it can do {capacity:.0f}",
        "accepted": len(accepted),
        "accepted_a_second": round(len(accepted) / seconds, 1),
        "statuses": {str(status): number for status, number in statuses.items()},
        "memory_mb": {"after a tenth": round(early / 1e6), "at most": round(most / 1e6)},
        **load.times(replies),
        "lasted": seconds,
        "problems": problems,
    }]  # fmt: skip


def replace(*, quick: bool) -> list[dict[str, Any]]:
    """Files replaced 200 times under load of 8 clients: each answer is of one version, in the end of the last."""
    turns, every = (4, 1.2) if quick else (50, 1.2)  # four files each
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
        folder, versions = Path(name), [Path(other) / "0", Path(other) / "1"]
        backbone = load_backbone("nano")
        names = ["shoes", "lamps", "birds", "tools"]
        for number, place in enumerate(versions):
            place.mkdir()
            for k, task in enumerate(names):
                version(place / f"{task}.safetensors", backbone, number, k)
        images = load.photos(IMAGES)
        each = [answers(TaskBank(backbone, place), names, images) for place in versions]
        put(versions[0], folder, names)
        asked = load.questions(names, images, topk=TOPK)
        errors, wrong = folder / "stderr", list[str]()
        with load.serving(folder, "train.precision=fp32", stderr=errors) as (_, port):
            load.in_turn(port, asked, clients=8, seconds=1)
            changing = threading.Thread(target=change, args=(versions, folder, names, turns, every))
            changing.start()
            replies = list[load.Reply]()
            while changing.is_alive():
                replies += load.in_turn(port, asked, clients=8, seconds=2)
            time.sleep(3)
            after = load.in_turn(port, asked, clients=8, seconds=1)
        server_log = errors.read_text().splitlines()
    for number, (part, known) in enumerate(((replies, each), (after, [each[turns % 2]]))):
        for reply in part:
            key = reply.question.task, reply.question.image
            if reply.status != 200 or not load.is_right(reply, [answer[key] for answer in known]):
                wrong.append(f"{'while' if not number else 'after'}: {reply.status} {str(reply.content)[:200]}")
    amiss = [line for line in server_log if not line.endswith("is replaced")]
    return [{
        "check": "replace",
        "value": len(wrong),
        "unit": f"wrong answers of {len(replies) + len(after)} while files were replaced {turns * len(names)} times",
        "seen": sum(line.endswith("is replaced") for line in server_log),
        "problems": [*wrong[:5], *amiss[:5]],
        **load.times(replies),
    }]  # fmt: skip


def version(path: Path, backbone: Backbone, number: int, task: int) -> None:
    model = model_of(backbone, ("pool", "deep", "lora", "head")[(task + number) % 4], 10 * number + task, classes=12)
    model.classes = tuple(f"class {k} of version {number}" for k in range(12))
    save_prompt(path, model, method="random", counts=torch.full((12,), 5))


def put(place: Path, folder: Path, names: list[str]) -> None:
    for task in names:
        temporary = folder / f".{task}"
        temporary.write_bytes((place / f"{task}.safetensors").read_bytes())
        temporary.replace(folder / f"{task}.safetensors")


def change(versions: list[Path], folder: Path, names: list[str], turns: int, every: float) -> None:
    for turn in range(1, turns + 1):
        time.sleep(every)
        put(versions[turn % 2], folder, names)


def answers(bank: TaskBank, names: list[str], images: list[bytes]) -> dict[tuple[str, int], Any]:
    """What is right, by task and number of the image."""
    pairs = [(task, number) for task in names for number in range(len(images))]
    predicted = bank.predict([images[number] for _, number in pairs], [task for task, _ in pairs], topk=TOPK)
    return dict(zip(pairs, predicted, strict=True))
