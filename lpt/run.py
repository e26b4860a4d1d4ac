"""Doors: a whole run from a config, and evaluation and prediction from a prompt file.

Here device, precision, processes, history, evaluation and the out-folder are bound once, for every method.
"""

import contextlib
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from lpt.backbones import load_backbone
from lpt.backbones.base import Backbone
from lpt.classifier import PromptedClassifier
from lpt.config import Config, check_data, load_config
from lpt.data import load_task
from lpt.data.folder import SUFFIXES
from lpt.data.task import Files, Images, Task
from lpt.engine.checkpoint import write_whole
from lpt.engine.loop import Fit
from lpt.errors import ConfigError, DataError, LptError, PromptFileError, did_you_mean
from lpt.evaluate import PrefixCache, evaluate, measure, predict
from lpt.history import History
from lpt.methods import METHODS
from lpt.page import html
from lpt.preprocess import File
from lpt.prompt_file import DTYPES, Header, load_prompt, read_prompt, save_prompt
from lpt.report import markdown

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

Say = Callable[[str], None]
Show = Callable[[str, int, int, str], None]


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    say: Say = lambda text: None,
    show: Show = lambda phase, step, steps, text: None,
) -> dict[str, Any]:
    """Runs the method and fills `out`; returns the report. Raises LptError before anything is written."""
    from accelerate import Accelerator

    out, began = Path(out), time.perf_counter()
    device = pick_device(config.train.device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    main = accelerator.is_main_process
    if out.exists() and not out.is_dir():
        raise LptError(f"--out {out} is a file: give a folder")
    used = any((out / name).exists() for name in ("config.yaml", "checkpoints", "history.jsonl", "report.json"))
    if used and not resume:
        raise LptError(f"--out {out} already holds a run: add --resume to go on with it, or give another folder")

    task = load_task(**config.data)
    precision = pick_precision(config.train.precision, device)
    backbone = _backbone(config).to(device, PRECISIONS[precision])
    if config.train.compile:
        backbone.compile_blocks()
    manifest = task.manifest()
    identity = (manifest["sha256"], f"{backbone.fingerprint} in {precision}")
    run_hash = config.run_hash(*identity)
    if resume and (out / "config.yaml").exists() and load_config(out / "config.yaml").run_hash(*identity) != run_hash:
        raise LptError(
            f"--out {out} holds a run with other settings: use those in {out / 'config.yaml'}, or another --out"
        )
    describe_task(task, say)
    for name in task.absent_classes():
        say(f"warning: class {name!r} has no training image; it is kept, and cannot be learned")

    cache, feature_cache = PrefixCache(), Path(folder) if (folder := config.train.feature_cache) else None

    def held_out(model: PromptedClassifier, progress: Any) -> dict[str, Any]:
        if task.val is None:
            return {}
        metrics = evaluate(model, task.val, task.counts, group_rule=task.group_rule, cache=cache)
        return {"val": {k: metrics[k] for k in ("accuracy", "class_accuracy", "many", "medium", "few", "ece")}}

    def begin() -> None:
        if main:
            write_whole(out / "config.yaml", config.to_yaml().encode())
            write_whole(out / "split.json", json.dumps(manifest).encode())

    fit = Fit(
        images=task.train,
        preprocess=backbone.preprocess,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        history=History(out / "history.jsonl" if main else None),
        checkpoints=out / "checkpoints",
        feature_cache=feature_cache,
        run_hash=run_hash,
        accelerator=accelerator,
        dtype=PRECISIONS[precision],
        on_start=begin,
        on_epoch=held_out,
        say=say if main else lambda text: None,
        show=show if main else lambda phase, step, steps, text: None,
    )
    settings = {key: value for key, value in config.method.items() if key != "name"}
    model = METHODS[config.method["name"]](task, backbone, fit, **settings)

    # What is evaluated is what is stored: rounded first, so that the file reloads to the same bits.
    model.round_to(DTYPES[config.train.storage])
    model.only_train().eval()
    predictions = predict(model, task.test, folder=feature_cache)
    metrics = measure(model, predictions, task.counts, group_rule=task.group_rule)
    data = {
        "name": task.name,
        "variant": task.facts.get("variant"),
        "imbalance_factor": task.imbalance_factor,
        "split_sha256": manifest["sha256"],
        "counts": task.counts.tolist(),
    }
    report = {
        **metrics,
        "method": config.method["name"],
        "selection": "last",
        "scale": model.head.scale,
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "data": data,
        "seed": config.train.seed,
        "precision": precision,
        "trainable_parameters": model.trainable_parameters,
        "absent_classes": task.absent_classes(),
        "versions": versions(),
    }
    if main:
        spent = fit.seconds_before + time.perf_counter() - began
        save_prompt(
            out / "prompt.safetensors",
            model,
            method=config.method["name"],
            counts=task.counts,
            storage=config.train.storage,
            settings=settings,
            precision=precision,
            data={
                **data,
                "settings": {k: v for k, v in config.data.items() if k not in ("root", "download")},
            },
            metrics={k: metrics[k] for k in ("accuracy", "class_accuracy", "many", "medium", "few", "ece", "nll")},
            versions=versions(),
        )
        report |= {
            "prompt_bytes": (out / "prompt.safetensors").stat().st_size,
            "seconds": round(spent, 1),
            "peak_memory_bytes": peak_memory(device),
        }
        top = model.probabilities(predictions.logits).max(1)
        made = {"labels": predictions.labels, "predicted": top.indices, "confidence": top.values.float()}
        write_whole(out / "predictions.safetensors", to_bytes({k: v.contiguous() for k, v in made.items()}))
        write_whole(out / "report.md", markdown(report, classes=task.classes, command=_command(out)).encode())
        write_whole(out / "report.json", json.dumps(report, indent=1).encode())
        write_page(out, test=task.test)
    accelerator.wait_for_everyone()
    return report


def write_page(out: Path, *, test: Images | Files | None = None, against: Sequence[Path] = ()) -> Path:
    """`report.html` from what a finished run has left in `out`, beside the runs `against`; returns its path.

    Raises LptError where a folder holds no finished run, or one on other classes.
    """

    def finished(folder: Path) -> tuple[dict[str, Any], list[str]]:
        try:
            classes = json.loads((folder / "split.json").read_text())["classes"]
            return json.loads((folder / "report.json").read_text()), classes
        except (OSError, ValueError, KeyError):
            raise LptError(f"{folder} holds no finished run: report.json or split.json cannot be read") from None

    report, classes = finished(out)
    if len(against) > 3:
        raise LptError(f"{len(against)} runs are too many beside one: give up to 3")
    others: dict[str, dict[str, Any]] = {}
    for folder in against:
        other, theirs = finished(folder)
        if theirs != classes:
            raise LptError(f"{folder} is a run on {len(theirs)} other classes: only runs on the same can be compared")
        whole = folder.resolve()
        alone = sum(o.resolve().name == whole.name for o in against) == 1
        name = whole.name if alone else f"{whole.parent.name}/{whole.name}"
        others[name if other["data"] == report["data"] else f"{name} (another split)"] = other
    try:
        predictions = load_file(out / "predictions.safetensors")
    except (OSError, SafetensorError) as error:
        raise LptError(f"{out / 'predictions.safetensors'} cannot be read ({error})") from None
    try:
        text = html(
            report,
            classes=classes,
            predictions=predictions,
            history=History(out / "history.jsonl").lines,
            config=(out / "config.yaml").read_text(),
            command=_command(out),
            test=test,
            against=others,
        )
    except KeyError as error:
        raise LptError(f"{out} was written by another version of lpt: its report has no {error}") from None
    write_whole(out / "report.html", text.encode())
    return out / "report.html"


def report_again(out: Path, *, against: Sequence[Path] = ()) -> Path:
    """`report.html` once more, with the images if the data is still where the run's config says."""
    test = None
    if (out / "config.yaml").exists():
        with contextlib.suppress(LptError, OSError, ValueError):  # a page without pictures is better than none
            task = load_task(**load_config(out / "config.yaml").data)
            stored = json.loads((out / "split.json").read_text()) if (out / "split.json").exists() else {}
            test = task.test if task.manifest()["sha256"] == stored.get("sha256") else None
    return write_page(out, test=test, against=against)


def _command(out: Path) -> str:
    return shlex.join(["lpt", "train", str(out / "config.yaml"), "--out", f"{out}-again"])


def open_prompt(
    path: str | Path,
    *,
    weights: str | None = None,
    name: str | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> tuple[PromptedClassifier, Header]:
    """The model of a prompt file, its backbone loaded by the name in the file (or from `weights`)."""
    header, _ = read_prompt(path)
    where = pick_device(device)
    wanted = name or header.backbone.name
    backbone = load_backbone(wanted, weights=weights, image_size=header.backbone.image_size)
    backbone.preprocess = header.preprocess
    model = load_prompt(path, backbone)
    chosen = pick_precision(precision or header.precision, where)
    model.backbone.to(PRECISIONS[chosen])
    return model.to(where), header


def evaluate_prompt(
    path: str | Path, settings: dict[str, dict[str, Any]], *, say: Say = lambda text: None
) -> dict[str, Any]:
    """Metrics of a prompt file on a task: by default the one it was trained on, whose root must be given."""
    header, _ = read_prompt(path)
    check_loading(settings, sections=("data", "backbone", "train"))
    stored = header.data.get("settings", {})
    given = settings.get("data", {})
    data = {**stored, **given} if given.get("name", stored.get("name")) == stored.get("name") else dict(given)
    if not data.get("name"):
        raise DataError("data.name is missing: the prompt file does not say which data it was made with")
    task = load_task(**check_data(data))
    if list(task.classes) != header.classes:
        theirs = set(task.classes) ^ set(header.classes)
        raise PromptFileError(
            f"prompt file {path} knows {len(header.classes)} classes, {task.name} has {len(task.classes)}; "
            f"they differ in {', '.join(sorted(theirs)[:5]) or 'order'}"
        )
    backbone, run = settings.get("backbone", {}), settings.get("train", {})
    model, _ = open_prompt(
        path,
        weights=backbone.get("weights"),
        name=backbone.get("name"),
        precision=run.get("precision"),
        device=run.get("device", "auto"),
    )
    describe_task(task, say)
    began = time.perf_counter()
    metrics = evaluate(model, task.test, torch.tensor(header.counts), group_rule=task.group_rule)
    return {
        **metrics,
        "method": header.method,
        "backbone": {"name": model.backbone.name, "fingerprint": model.backbone.fingerprint},
        "data": {
            "name": task.name,
            "imbalance_factor": task.imbalance_factor,
            "split_sha256": task.manifest()["sha256"],
            "counts": header.counts,
        },
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }


def check_loading(settings: Mapping[str, Mapping[str, Any]], *, sections: Sequence[str]) -> None:
    """What evaluate and predict understand: where the backbone is, and how to compute. Raises ConfigError."""
    known = {"backbone": ("name", "weights"), "train": ("precision", "device")}
    mistakes = [
        f"{k}: there is no such section here ({', '.join(sections)})" for k in sorted(settings.keys() - set(sections))
    ]
    for section, keys in known.items():
        for key, value in settings.get(section, {}).items():
            if key not in keys:
                mistakes.append(f"{section}.{key}: not a setting here ({', '.join(keys)}){did_you_mean(key, keys)}")
            elif not isinstance(value, str) or (key == "precision" and value not in ("auto", *PRECISIONS)):
                mistakes.append(f"{section}.{key}: got {value!r}")
    if mistakes:
        raise ConfigError(mistakes)


def predict_files(
    model: PromptedClassifier, paths: Sequence[Path], *, topk: int = 5, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """For each image `{"image", "classes", "probabilities"}`, or `{"image", "error"}` where it cannot be read."""
    device, preprocess = next(model.parameters()).device, model.backbone.preprocess
    topk = min(topk, len(model.classes))

    def cut(some: Sequence[Path]) -> torch.Tensor:
        return preprocess.cut([File(str(path), path) for path in some])

    for first in range(0, len(paths), batch_size):
        part = paths[first : first + batch_size]
        answers: list[dict[str, Any]] = [{"image": str(path)} for path in part]
        try:
            views = [cut(part)]
        except DataError:  # one of them, or more: find out which
            views = []
            for path, answer in zip(part, answers, strict=True):
                try:
                    views.append(cut([path]))
                except DataError as error:
                    answer["error"] = str(error)
        good = [a for a in answers if "error" not in a]
        if good:
            with torch.no_grad():
                batch = preprocess.normalised(torch.cat(views).to(device), dtype=model.backbone.dtype)
                top = model.probabilities(model(batch).logits).topk(topk)
            for answer, values, ids in zip(good, top.values.tolist(), top.indices.tolist(), strict=True):
                answer["classes"] = [model.classes[i] for i in ids]
                answer["probabilities"] = values
        yield from answers


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images inside them, sorted. Raises DataError for a path that is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
            if not inside:
                raise DataError(f"folder {path} holds no image")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"image {path} does not exist")
    return found


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises LptError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LptError(f"train.device {name!r} is no device: use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise LptError(f"train.device {name!r} is not supported: use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LptError(f"train.device is {name}, but torch sees {torch.cuda.device_count()} GPUs: use cpu or auto")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the processor computes in it, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def describe_task(task: Task, say: Say) -> None:
    held = f", {len(task.val)} held out" if task.val else ""
    say(
        f"{task.name} ({task.facts.get('variant')}): {len(task.train)} training images of {len(task.classes)} "
        f"classes, {int(task.counts.max())} to {int(task.counts.min())} each{held}, {len(task.test)} test images"
        + (f" ({task.facts['test_part']})" if "test_part" in task.facts else "")
    )
    if left_out := task.facts.get("left_out"):
        say(f"warning: {len(left_out)} images belong to no class and are left out, for example {left_out[0]}")


def versions() -> dict[str, str]:
    names = ("lpt", "torch", "torchvision", "timm", "faiss-cpu", "numpy", "safetensors", "accelerate")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: on the GPU where it ran there, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _backbone(config: Config) -> Backbone:
    settings = config.backbone.model_dump()
    min_area = settings.pop("min_area")
    backbone = load_backbone(**settings)
    backbone.preprocess = backbone.preprocess.with_(min_area=min_area)
    return backbone
