"""Door: a whole run from a config.

Here device, precision, processes, history, evaluation and the out-folder are bound once, for every method.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lpt.config import Config, load_config
from lpt.data import LOCATION_SETTINGS, load_task
from lpt.data.task import Task
from lpt.device import PRECISIONS, peak_memory, pick_device, pick_precision, versions
from lpt.engine.evaluate import PrefixCache, evaluate, measure, predict
from lpt.engine.history import History
from lpt.engine.lock import locked
from lpt.engine.loop import Fit
from lpt.engine.processes import together
from lpt.engine.selection import Best, watched
from lpt.engine.stopping import Stop
from lpt.errors import LptError
from lpt.files import to_bytes, write_atomic
from lpt.methods import METHODS
from lpt.methods.supervised import chain
from lpt.model.backbones import load_backbone
from lpt.model.backbones.base import Backbone, fingerprint_of, read_prototypes
from lpt.model.backbones.clip_text import read_templates
from lpt.model.backbones.clip_vit import ClipViT
from lpt.model.backbones.labels_seen import labels_seen
from lpt.model.classifier import PromptedClassifier
from lpt.prompt_file import DTYPES, beyond_fp16, save_prompt
from lpt.report.finished import Rows, command_of, split_of, write_page
from lpt.report.markdown import markdown
from lpt.report.pseudo_labels import diagnose, read_last_round

MADE = ("config.yaml", "checkpoints", "history.jsonl", "prompt.safetensors", "report.json")
"""By what a folder is known to hold a run."""
WATCHED = ("accuracy", "class_accuracy", "many", "medium", "few", "ece")
NO_EPOCHS = {"decoupled", "class_mean", "knn", "zero_shot"}
"""Methods that end otherwise than with a phase of epochs."""
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
    """Runs the method and fills `out`; returns the report.

    Raises LptError, and Stopped when Ctrl-C or SIGTERM has ended it: in a phase with a checkpoint.
    """
    stop = Stop()
    with contextlib.ExitStack() as held:
        held.enter_context(stop.listening())
        held.enter_context(together())
        return _train(config, Path(out), resume, stop, held, say, show)


def _train(
    config: Config, out: Path, resume: bool, stop: Stop, held: contextlib.ExitStack, say: Say, show: Show
) -> dict[str, Any]:
    from accelerate import Accelerator

    began = time.perf_counter()
    device = pick_device(config.train.device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    main, world = accelerator.is_main_process, accelerator.num_processes
    if out.exists() and not out.is_dir():
        raise LptError(f"--out {out} is a file: give a folder")
    _check_new(out, resume)  # at once, and again when the folder is locked
    if config.train.batch_size % world:
        raise LptError(
            f"train.batch_size {config.train.batch_size} cannot be shared by {world} processes: use a multiple"
        )

    task = load_task(**config.data)
    precision = pick_precision(config.train.precision, device)
    backbone = _backbone(config).to(device, PRECISIONS[precision])
    if config.train.compile:
        backbone.compile_blocks()
    manifest = task.manifest()
    identity = (manifest["sha256"], f"{backbone.fingerprint} in {precision}")
    if backbone.prototypes:
        identity = (identity[0], f"{identity[1]} with prototypes {fingerprint_of(backbone.prototypes.items())}")
    elif isinstance(backbone, ClipViT):
        identity = (identity[0], f"{identity[1]} with texts {backbone.templates}")
    run_hash = config.run_hash(*identity)

    def check_same() -> None:
        if (out / "config.yaml").exists() and load_config(out / "config.yaml").run_hash(*identity) != run_hash:
            raise LptError(
                f"--out {out} holds a run with other settings: use those in {out / 'config.yaml'}, or another --out"
            )
        if split_of(out).get("sha256", manifest["sha256"]) != manifest["sha256"]:
            raise LptError(f"--out {out} holds a run on other images than there are now: give another --out")

    check_same()
    for line in task.summary_lines():
        say(line)
    seen = labels_seen(task.classes, backbone.name)
    for name, shared in seen.items():
        say(f"warning: {backbone.name} has seen {len(shared)} of these {len(task.classes)} classes as labels of {name}")

    if config.train.select == "best_val" and task.val is None:
        raise LptError(
            "train.select=best_val needs held-out images: set data.val_per_class, or give the data a val part"
        )
    methods = list(chain(config.method))
    if config.train.select == "best_val" and (without := NO_EPOCHS & {of["name"] for of in methods}):
        raise LptError(f"train.select=best_val: {min(without)} does not end with epochs to choose from, use last")
    best = Best(out / "checkpoints", run_hash, writes=main)
    cache, feature_cache = PrefixCache(), Path(folder) if (folder := config.train.feature_cache) else None

    def held_out(model: PromptedClassifier, progress: Any) -> dict[str, Any]:
        if task.val is None:
            return {}
        metrics = evaluate(model, task.val, task.counts, group_rule=task.group_rule, cache=cache)
        if config.train.select == "best_val":
            best.offer(model, progress.phase, progress.step + 1, metrics["class_accuracy"])
        return {"val": {k: metrics[k] for k in WATCHED}}

    def after_epoch(model: PromptedClassifier, progress: Any) -> dict[str, Any]:
        found = held_out(model, progress)
        if progress.epochs - progress.epoch <= config.train.watch_test:
            metrics = evaluate(model, task.test, task.counts, group_rule=task.group_rule)
            found["test"] = {k: metrics[k] for k in WATCHED}
        return found

    history = History(out / "history.jsonl" if main else None)

    @functools.cache  # a method of two steps has two bindings of the loop, and either may be the first to start
    def begin() -> None:
        if main:
            held.enter_context(locked(out))
            _check_new(out, resume)
            check_same()
            history.read()
            write_atomic(out / "config.yaml", config.to_yaml().encode())
            write_atomic(out / "split.json", json.dumps(manifest).encode())

    fit = Fit(
        images=task.train,
        preprocess=backbone.preprocess,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        history=history,
        checkpoints=out / "checkpoints",
        feature_cache=feature_cache,
        run_hash=run_hash,
        dtype=PRECISIONS[precision],
        checkpoint_seconds=config.train.checkpoint_seconds,
        on_start=begin,
        on_epoch=after_epoch,
        count_flops=not config.train.compile,
        stop=stop,
        audit=out / "pseudo_labels.parquet",
        say=say if main else lambda text: None,
        show=show if main else lambda phase, step, steps, text: None,
    )
    settings = {key: value for key, value in config.method.items() if key != "name"}
    model = METHODS[config.method["name"]](task, backbone, fit, **settings)
    fit.start()

    phases = [phase for phase, cost in fit.cost.items() if cost["steps"]]
    selection = "last" if config.train.select == "last" else best.restore(model, phases[-1])
    # What is evaluated is what is stored: rounded first, so that the file reloads to the same bits.
    storage = config.train.storage
    if storage == "fp16" and (large := beyond_fp16(model)):
        say(f"warning: {large} holds numbers beyond fp16's 65504; the prompt file is stored in fp32")
        storage = "fp32"
    model.round_to(DTYPES[storage])
    model.only_train().eval()
    predictions = predict(model, task.test, folder=feature_cache)
    metrics = measure(model, predictions, task.counts, group_rule=task.group_rule)
    data = {
        "name": task.name,
        "variant": task.facts.get("variant"),
        "imbalance_factor": task.imbalance_factor,
        "split_sha256": manifest["sha256"],
        "counts": task.counts.tolist(),
        "group_rule": task.group_rule,
    }
    report = {
        **metrics,
        "method": config.method["name"],
        "selection": selection,
        "scale": model.head.scale,
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "data": data,
        "seed": config.train.seed,
        "precision": precision,
        "trainable_parameters": model.trainable_parameters,
        "cost": {key: sum(of[key] for of in fit.cost.values()) for key in ("steps", "images", "flops")},
        "absent_classes": task.absent_classes(),
        "skipped_images": list(task.facts.get("skipped", ())),
        "labels_seen": {name: len(shared) for name, shared in seen.items()},
        "versions": versions(),
    }
    if main:
        spent = sum(fit.seconds_before.values()) + time.perf_counter() - began
        save_prompt(
            out / "prompt.safetensors",
            model,
            method=config.method["name"],
            counts=task.counts,
            storage=storage,
            settings=settings,
            precision=precision,
            data={
                **data,
                "labelled_sha256": (replace(task, unlabeled=None).manifest() if task.unlabeled else manifest)["sha256"],
                "settings": {k: v for k, v in config.data.items() if k not in LOCATION_SETTINGS},
            },
            metrics={k: metrics[k] for k in (*WATCHED, "nll")},
            versions=versions(),
        )
        if told := _pseudo_labels(out / "pseudo_labels.parquet", task):
            report["pseudo_labels"] = told
        if seen_on_test := watched(fit.history.lines):
            report["watched"] = seen_on_test
        report |= {
            "prompt_bytes": (out / "prompt.safetensors").stat().st_size,
            "seconds": round(spent, 1),
            "peak_memory_bytes": peak_memory(device),
        }
        top = model.probabilities(predictions.logits).max(1)
        made = {"labels": predictions.labels, "predicted": top.indices, "confidence": top.values.float()}
        write_atomic(out / "predictions.safetensors", to_bytes(made))
        write_atomic(out / "report.md", markdown(report, classes=task.classes, command=command_of(out)).encode())
        write_atomic(out / "report.json", json.dumps(report, indent=1).encode())
        write_page(out, test=task.test)
    accelerator.wait_for_everyone()
    return report


def _pseudo_labels(path: Path, task: Task) -> dict[str, Any] | None:
    """What the last round of pseudo-labels was like, if there was one."""
    if not path.exists() or task.unlabeled is None:
        return None
    noted, number = read_last_round(path, task.classes)
    every = task.unlabeled.labels
    known = torch.bincount(every, minlength=len(task.classes)) if bool((every >= 0).all()) else None
    return {"round": number, **diagnose(noted, noted["truth"], task.counts, known)}


def _check_new(out: Path, resume: bool) -> None:
    if not resume and any((out / name).exists() for name in MADE):
        raise LptError(f"--out {out} already holds a run: add --resume to go on with it, or give another folder")


def _backbone(config: Config) -> Backbone:
    settings = config.backbone.model_dump()
    transform, min_area, flip = (settings.pop(key) for key in ("transform", "min_area", "flip"))
    backbone = load_backbone(**settings)
    pixels = backbone.preprocess.as_published(transform).with_(flip=flip)
    backbone.preprocess = pixels if min_area is None else pixels.with_(min_area=min_area)
    if config.prototypes.weights:
        backbone.prototypes = read_prototypes(Path(config.prototypes.weights))
    elif isinstance(backbone, ClipViT):
        backbone.templates = read_templates(config.prototypes.template)
    return backbone


def report_again(out: Path, *, against: Sequence[Path] = ()) -> Rows:
    """`write_page` once more, with the images if the data is still where the run's config says."""
    test = None
    if (out / "config.yaml").exists():
        with contextlib.suppress(LptError, OSError, ValueError):  # a page without pictures is better than none
            task = load_task(**load_config(out / "config.yaml").data)
            test = task.test if task.manifest()["sha256"] == split_of(out).get("sha256") else None
    return write_page(out, test=test, against=against)
