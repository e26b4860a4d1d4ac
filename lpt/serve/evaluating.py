"""A prompt file evaluated on a task: the one it was trained on, or another, whose classes are matched by name."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from lpt.config import check_data
from lpt.data import PLACES, load_task
from lpt.data.longtail import GroupRule
from lpt.data.task import Files, Images, Task
from lpt.device import versions
from lpt.engine.evaluate import measure, predict
from lpt.errors import DataError, PromptFileError, quoted
from lpt.prompt_file import Header, read_prompt
from lpt.serve.opening import check_loading, open_prompt


def evaluate_prompt(
    path: str | Path, settings: dict[str, dict[str, Any]], *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Metrics of a prompt file on a task: by default the one it was trained on, whose root must be given.

    On another dataset classes are matched by name: images of classes that the file does not know are left out, and
    predictions are among the classes that both have. Groups are by the training counts in the file.
    """
    header, _ = read_prompt(path)
    loading = check_loading(settings, sections=("data", "backbone", "train"))
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
    model, _ = open_prompt(path, **loading)
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
