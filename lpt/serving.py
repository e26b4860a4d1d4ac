"""Doors of a prompt file: open it on its backbone, evaluate it on a task, predict images."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from lpt.backbones import load_backbone
from lpt.classifier import PromptedClassifier
from lpt.config import check_data
from lpt.data import PLACES, load_task
from lpt.data.folder import SUFFIXES
from lpt.data.task import Files, Images, Task
from lpt.device import PRECISIONS, pick_device, pick_precision, versions
from lpt.errors import ConfigError, DataError, PromptFileError, did_you_mean, quoted
from lpt.evaluate import measure, predict
from lpt.longtail import GroupRule
from lpt.preprocess import File
from lpt.prompt_file import Header, load_prompt, read_prompt


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
    if not name and wanted.startswith("untrained:"):  # any architecture, of any size, for the asking
        raise PromptFileError(f"prompt file {path} is for {quoted(wanted)}: give backbone.name if you want that made")
    backbone = load_backbone(wanted, weights=weights, image_size=header.backbone.image_size)
    backbone.preprocess = header.preprocess
    chosen = pick_precision(precision or header.precision, where)
    return load_prompt(path, backbone.to(PRECISIONS[chosen])).to(where), header


def evaluate_prompt(
    path: str | Path, settings: dict[str, dict[str, Any]], *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Metrics of a prompt file on a task: by default the one it was trained on, whose root must be given.

    On another dataset classes are matched by name: images of classes that the file does not know are left out, and
    predictions are among the classes that both have. Groups are by the training counts in the file.
    """
    header, _ = read_prompt(path)
    check_loading(settings, sections=("data", "backbone", "train"))
    stored = header.data.get("settings")
    stored = {k: v for k, v in stored.items() if k not in PLACES} if isinstance(stored, dict) else {}
    given = settings.get("data", {})
    data = {**stored, **given} if given.get("name", stored.get("name")) == stored.get("name") else dict(given)
    if not data.get("name"):
        raise DataError("data.name is missing: the prompt file does not say which data it was made with")
    task = load_task(**check_data(data))
    if "split off" in task.facts.get("test_part", ""):
        task = _whole(task, header)
    images, shift = _matched(task, header.classes, path)
    backbone, run = settings.get("backbone", {}), settings.get("train", {})
    model, _ = open_prompt(
        path,
        weights=backbone.get("weights"),
        name=backbone.get("name"),
        precision=run.get("precision"),
        device=run.get("device", "auto"),
    )
    for line in task.described():
        say(line)
    if shift["absent_from_data"] or shift["unknown_to_prompt"]:
        known = len(header.classes) - len(shift["absent_from_data"])
        say(
            f"classes matched by name: {known} of {len(header.classes)}, {len(images)} of {len(task.test)} images; "
            "predictions are among these classes"
        )
        for what, names in (("not in the data", "absent_from_data"), ("not in the prompt file", "unknown_to_prompt")):
            if missing := shift[names]:
                more = ", ..." * (len(missing) > 10)
                say(f"warning: {len(missing)} classes {what}: {quoted(', '.join(missing[:10]))}{more}")
    began = time.perf_counter()
    predictions = predict(model, images)
    if shift["absent_from_data"]:
        gone = [header.classes.index(name) for name in shift["absent_from_data"]]
        for logits in (predictions.logits, *predictions.opinions.values()):
            logits[:, gone] = -torch.inf
    rule = str(header.data.get("group_rule"))
    rule = rule if rule in get_args(GroupRule) else task.group_rule
    metrics = measure(model, predictions, torch.tensor(header.counts), group_rule=rule)
    return {
        **metrics,
        **shift,
        "method": quoted(header.method),
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


def _whole(task: Task, header: Header) -> Task:
    """A folder without parts that the prompt file was not trained on is a test set as a whole. Whether it was is asked
    of its labelled images: the unlabelled ones need not be at hand."""
    labelled = replace(task, unlabeled=None).manifest()["sha256"]
    if labelled == header.data.get("labelled_sha256", header.data.get("split_sha256")):
        return task
    assert isinstance(task.train, Files) and isinstance(task.test, Files)
    every = task.train.plus(task.test)
    if task.val:  # what the settings in the prompt file hold out of training images
        assert isinstance(task.val, Files)
        every = every.plus(task.val)
    return replace(task, test=every, val=None, facts={**task.facts, "test_part": "all images are tested on"})


def _matched(task: Task, classes: Sequence[str], path: str | Path) -> tuple[Images | Files, dict[str, list[str]]]:
    """Test images of the classes that the prompt file knows, labelled in its order, and the names that only one has."""
    place = {name: k for k, name in enumerate(classes)}
    ours = [place.get(name, -1) for name in task.classes]
    shift = {
        "absent_from_data": [name for name in classes if name not in task.classes],
        "unknown_to_prompt": [name for name in task.classes if name not in place],
    }
    if sum(k >= 0 for k in ours) < 2:
        raise PromptFileError(
            f"prompt file {path} knows {len(classes)} classes, {task.name} has {len(task.classes)}, and less than two "
            f"names are the same: for example {quoted(', '.join([*classes[:2], *task.classes[:2]]))}"
        )
    labels = torch.tensor(ours)[task.test.labels]
    kept = (labels >= 0).nonzero().flatten()
    if len(kept) == 0:
        raise PromptFileError(f"{task.name} has no test image of a class that prompt file {path} knows")
    return replace(task.test.subset(kept.tolist()), labels=labels[kept]), shift


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
