"""Numbers that go wrong: each must be said in a sentence that names the way out, and what was finite must stay."""

import functools
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from benchmarks.reliability.hostile import backbone
from benchmarks.reliability.row import Row
from lpt.config import resolve
from lpt.data.samplers import InstanceBalanced
from lpt.data.task import Images, Task
from lpt.engine.batches import Stream
from lpt.engine.checkpoint import load_checkpoint
from lpt.engine.loop import run_phase
from lpt.engine.phase import Phase, Recipe
from lpt.engine.session import Session
from lpt.errors import LptError, TrainingError
from lpt.methods import METHODS
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.prompt_file import read_prompt
from lpt.run import train
from lpt.tuning import tune

STEPS, PER_EPOCH = 10, 4
RATES = (("sgd", 0.3), ("sgd", 0.99), ("adamw", 0.3), ("adamw", 0.99))
Check = Callable[[Path], None]
"""Does one thing in an empty folder; raises what is wrong, mostly an AssertionError with a reason."""


def rows(quick: bool) -> list[Row]:
    at, rates, epochs = ((0, 6), (("sgd", 0.99),), (1, 0)) if quick else (range(STEPS), RATES, (1, 1))
    checks: dict[str, tuple[list[Check], str]] = {
        "a loss that is not finite": (
            [lambda place, t=t, bad=bad: _goes_wrong(place, t, lambda loss, head: loss * bad, "loss")
             for t in at for bad in (float("nan"), float("inf"))],
            "named with phase, step, epoch, rate, remedy; the checkpoint before is finite and resumes to the same bits",
        ),
        "a gradient that is not finite while the loss is": (
            [lambda place, t=t: _goes_wrong(place, t, _steep, "gradient") for t in at],
            "the same: neither weights, moments nor checkpoint hold it",
        ),
        "a training image whose feature is not finite": (
            [lambda place, bad=bad: _bad_feature(place, bad) for bad in (math.nan, math.inf)], "named at its step",
        ),
        "a step out of the range of numbers": (
            [lambda place, lr=lr, t=t: _too_far(place, lr, t) for lr in (1e30, 1e38) for t in (0.0, 1e9)],
            "no checkpoint holds it",
        ),
        "learning rates far too high on digits and nano": (
            [lambda place, name=name, lr=lr: _high_rate(place, name, lr, epochs) for name, lr in rates],
            "the run ends whole or with the sentence; nothing is half-written",
        ),
        "a class without a training image": (
            [_absent_in_lists, _absent_in_folder], "kept, said, in report.json; of lists, and of a folder with skip",
        ),
        "all keys collapsed": ([_collapsed], "said with the settings that help, which are settings"),
        "all pseudo-labels rejected": ([_rejected], "said with the names of the classes, and the run continues"),
        "numbers beyond fp16": ([_beyond_fp16], "said, and stored in fp32: the file reads, and predicts the same"),
    }  # fmt: skip
    return [_row(name, some, note) for name, (some, note) in checks.items()]


def _row(name: str, checks: list[Check], note: str) -> Row:
    began, problems = time.perf_counter(), list[str]()
    for number, check in enumerate(checks):
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(Path(folder))
            except Exception as error:  # whatever it is, it is the result
                problems.append(f"{number}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    said = "".join(f"; {problem}" for problem in problems)
    survived = len(checks) - len(problems)
    return Row(f"numbers: {name}", len(checks), survived, len(problems), time.perf_counter() - began, note + said)


# A short phase whose loss, gradient or step goes wrong.


def _phase(
    place: Path,
    change: Callable[[Tensor, CosineHead, int], Tensor] = lambda loss, head, step: loss,
    *,
    lr: float = 0.01,
    features: Tensor | None = None,
    often: float = 0.0,
    optimizer: Any = "sgd",
) -> CosineHead:
    """Trains a head for ten steps in `place`; `change` may spoil the loss of a step."""
    bare = backbone()
    pixels = torch.randint(0, 255, (16, 3, 16, 16), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    images = Images(pixels, torch.arange(4).repeat(4), tuple(str(i) for i in range(16)))
    head = CosineHead(num_classes=4, width=32, scale=20.0, generator=torch.Generator().manual_seed(0))
    model = PromptedClassifier(bare, head, classes=("ant", "bee", "cat", "dog")).only_train("head.")
    session = Session(
        images=images,
        preprocess=bare.preprocess,
        batch_size=4,
        checkpoints=place,
        checkpoint_seconds=often,
        run_hash="a",
        count_flops=False,
    )

    def step(model: PromptedClassifier, batches: Any, progress: Any) -> dict[str, Tensor]:
        views, labels, _ = batches["all"]
        logits = model(views).logits if features is None else model.classify(views)
        return {"loss": change(F.cross_entropy(20 * logits, labels), head, progress.step)}

    stream = {"all": Stream(InstanceBalanced(images.labels, batch_size=4, seed=0), features=features)}
    rest: dict[str, Any] = {"optimizer": optimizer, "lr": lr, "weight_decay": 0.0}
    phase = Phase(
        name="phase1", trains=("head.",), step=step, streams=stream, steps=STEPS, steps_per_epoch=PER_EPOCH, **rest
    )
    run_phase(phase, model, session)
    return head


def _sentence(run: Callable[[], Any], *words: str) -> str:
    """What a TrainingError says, which must hold `words`."""
    try:
        run()
    except TrainingError as error:
        said = str(error)
    else:
        raise AssertionError("nothing was said")
    assert said.isprintable() and len(said) < 500, f"no sentence: {said}"
    assert not (missing := [word for word in words if word not in said]), f"{missing} not in: {said}"
    return said


def _is_finite(path: Path) -> int | None:
    """The step of a checkpoint, all of whose numbers must be finite; None where there is none."""
    found = load_checkpoint(path, run_hash="a")
    if found is None:
        return None
    for part in (found.tensors, found.moments, found.memory):
        assert all(bool(torch.isfinite(value).all()) for value in part.values()), (
            f"{path.name} holds what is not finite"
        )
    return found.step


def _steep(loss: Tensor, head: CosineHead) -> Tensor:
    """The same loss with a gradient of 0/0."""
    return loss + (0 * head.weight).square().sum().sqrt()


def _goes_wrong(place: Path, t: int, spoiled: Callable[[Tensor, CosineHead], Tensor], what: str) -> None:
    def change(loss: Tensor, head: CosineHead, step: int) -> Tensor:
        return spoiled(loss, head) if step == t else loss

    named = ("phase1", what, f"step {t} ", f"epoch {t // PER_EPOCH + 1}", "learning rate", "lower method.lr")
    for optimizer in ("sgd", "adamw"):
        folder = place / optimizer
        _sentence(lambda f=folder, o=optimizer: _phase(f, change, optimizer=o), *named)
        assert _is_finite(folder / "phase1.safetensors") == (t or None), "the last finite checkpoint is not there"
        again, whole = _phase(folder, optimizer=optimizer), _phase(place / f"{optimizer} whole", optimizer=optimizer)
        assert torch.equal(again.weight, whole.weight), "it does not continue to the same bits"


def _bad_feature(place: Path, bad: float) -> None:
    features = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    features[5, 7] = bad
    said = _sentence(lambda: _phase(place, features=features), "phase1", "step", "lower method.lr")
    _kept(place, said)


def _too_far(place: Path, lr: float, often: float) -> None:
    def change(loss: Tensor, head: CosineHead, step: int) -> Tensor:
        return loss + 1e5 * head.weight.square().sum()

    said = _sentence(lambda: _phase(place, change, lr=lr, often=often), "phase1", "step", "lower method.lr")
    if often:
        assert _is_finite(place / "phase1.safetensors") is None, "there was no time for a checkpoint"
    else:
        _kept(place, said)


def _kept(place: Path, said: str) -> None:
    """The checkpoint of the step before the one that the sentence names is there, and finite."""
    found = re.search(r"step (\d+) ", said)
    assert found, f"no step in: {said}"
    assert _is_finite(place / "phase1.safetensors") == (int(found[1]) or None), (
        "the last finite checkpoint is not there"
    )


# Whole runs.


def _run(place: Path, data: dict[str, Any], method: dict[str, Any], **rest: Any) -> tuple[dict[str, Any], list[str]]:
    """(report.json, what was said) of a run on nano."""
    settings = {"batch_size": 16, "precision": "fp32", "device": "cpu", **rest}
    said: list[str] = []
    train(
        resolve({"backbone": {"name": "nano"}, "data": data, "method": method, "train": settings}),
        place / "run",
        say=said.append,
    )
    return json.loads((place / "run" / "report.json").read_text()), said


def _high_rate(place: Path, optimizer: str, lr: float, epochs: tuple[int, int]) -> None:
    method = {"name": "lpt", "epochs": epochs, "optimizer": optimizer, "lr": [lr, lr], "pool_size": 5, "topk": 2}
    out = place / "run"
    try:
        report, _ = _run(place, {"name": "digits-lt", "imbalance_factor": 50}, method)
    except LptError as error:
        assert "lower method.lr" in str(error) and "step" in str(error), f"it says {error}"
        assert not (out / "prompt.safetensors").exists() and not (out / "report.json").exists(), "files of no result"
    else:
        assert math.isfinite(report["nll"]), "the result is not finite"
        read_prompt(out / "prompt.safetensors")
    for path in (out / "checkpoints").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                assert bool(torch.isfinite(file.get_tensor(name).float()).all()), f"{path.name} is not finite"
    assert not list(out.rglob("*.tmp")), "a file is half-written"


def _pictures(place: Path, numbers: dict[str, int]) -> None:
    """Class folders with images of one grey each."""
    for k, (name, number) in enumerate(numbers.items()):
        (place / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (16, 16), (60 * k + i,) * 3).save(place / name / f"{i}.png")


PROBE = {"name": "linear_probe", "epochs": 1}


def _told(report: dict[str, Any], said: list[str], name: str) -> None:
    assert report["absent_classes"] == [name], f"report.json has {report['absent_classes']}"
    assert any(f"class {name!r} has no training image" in line for line in said), "not said"
    assert math.isfinite(report["nll"]) and report["data"]["counts"].count(0) == 1


def _absent_in_lists(place: Path) -> None:
    _pictures(place / "images", {"ant": 9, "bee": 3, "cat": 7})
    lines = {"train": [f"ant/{i}.png 0" for i in range(6)] + [f"cat/{i}.png 2" for i in range(4)]}
    lines["test"] = ["ant/7.png 0", "bee/0.png 1", "cat/5.png 2"]
    files = {role: str(place / f"{role}.txt") for role in lines}
    for role, path in files.items():
        Path(path).write_text("\n".join(lines[role]))
    report, said = _run(place, {"name": "lists", "root": str(place / "images"), **files}, PROBE)
    _told(report, said, "1")


def _absent_in_folder(place: Path) -> None:
    for part in ("train", "test"):
        _pictures(place / "images" / part, {"ant": 6, "bee": 2, "cat": 4})
    for path in (place / "images" / "train" / "bee").iterdir():
        path.write_bytes(b"no image")
    report, said = _run(place, {"name": "folder", "root": str(place / "images"), "on_error": "skip"}, PROBE)
    _told(report, said, "bee")
    assert any("2 images cannot be decoded" in line for line in said), "the images are not said"


def _toy(counts: tuple[int, ...] = (20, 8, 4, 3), unlabeled: int = 0) -> Task:
    """Images of one colour a class."""

    def images(labels: Tensor, name: str) -> Images:
        noise = torch.randint(0, 80, (len(labels), 3, 16, 16), generator=torch.Generator().manual_seed(1))
        pixels = (noise + labels[:, None, None, None] * 40).to(torch.uint8)
        return Images(pixels, labels, tuple(f"{name}{i}" for i in range(len(labels))))

    every = torch.arange(4)
    pool = images(every.repeat(unlabeled), "u") if unlabeled else None
    train = images(every.repeat_interleave(torch.tensor(counts)), "a")
    return Task("toy", ("ant", "bee", "cat", "dog"), train, images(every, "b"), unlabeled=pool, group_rule="thirds")


def _collapsed(place: Path) -> None:
    said: list[str] = []
    settings = {"epochs": (1, 2), "prompt_length": 2, "prefix_blocks": 1, "pool_size": 20, "topk": 1}
    tune(_toy(), backbone(), batch_size=8, say=said.append, **settings)
    told = [line for line in said if "keys collapsed" in line]
    assert told, "not said"
    remedy = [word for word in told[0].split() if word.startswith("method.")]
    data = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": "lpt"}}
    assert len(remedy) == 2 and resolve(data, remedy), f"no remedy in: {told[0]}"


def _rejected(place: Path) -> None:
    said: list[str] = []
    settings: dict[str, Any] = {"steps": 4, "rounds": 2, "tau": 1.0, "head_init": "random", "bottleneck": 2}
    model = tune(_toy(unlabeled=5), backbone(), method="fixmatch", batch_size=4, say=said.append, **settings)
    told = [line for line in said if "kept no pseudo-label of 4 classes" in line]
    assert len(told) == 2 and all(name in told[0] for name in model.classes), f"said was {said}"
    assert all(bool(torch.isfinite(value).all()) for value in model.learned_state().values())


def _beyond_fp16(place: Path) -> None:
    real = METHODS["linear_probe"]

    @functools.wraps(real.build)
    def large(*context: Any, **settings: Any) -> Recipe:
        recipe = real.build(*context, **settings)

        def phases() -> Iterator[Phase]:
            yield from recipe.phases or ()
            with torch.no_grad():
                recipe.model.head.weight.mul_(1e5 / recipe.model.head.weight.abs().max())

        return Recipe(recipe.model, phases())

    with patch.dict(METHODS, linear_probe=replace(real, build=large)):
        report, said = _run(place, {"name": "digits-lt"}, PROBE, storage="fp16")
    assert any("head.weight holds numbers beyond fp16's 65504" in line for line in said), f"said was {said[-3:]}"
    found = read_prompt(place / "run" / "prompt.safetensors").tensors["head.weight"]
    assert bool(torch.isfinite(found).all()) and found.abs().max() > 9e4 and math.isfinite(report["nll"])
