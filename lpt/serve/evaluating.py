"""A prompt file evaluated on a task: the one it was trained on, or another, whose classes are matched by name."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpt.config import check_data, with_later_settings
from lpt.data import LOCATION_SETTINGS, load_task
from lpt.data.image_hashes import can_be_hashed, image_hashes, unpacked
from lpt.data.task import Files, Images, Task
from lpt.data.texts import spelling
from lpt.device import versions
from lpt.engine.evaluate import measure, predict
from lpt.errors import DataError, PromptFileError, quoted, short
from lpt.memory import PREDICTED_AT_ONCE
from lpt.methods import described
from lpt.prompt_file import Header, read_prompt
from lpt.report.markdown import FIVE_CROPS
from lpt.serve.opening import check_loading, open_prompt, workers_in
from lpt.terms import Ensemble


def evaluate_prompt(
    path: str | Path,
    settings: dict[str, dict[str, Any]],
    *,
    tta: Ensemble = "none",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Metrics of a prompt file on a task: by default the one it was trained on, whose root must be given.

    `settings` are the sections `data`, `backbone` and `train` of a config. On another dataset classes are matched by
    name: images of classes that the file does not know are left out, and predictions are among the classes that both
    have. Groups are by the training counts in the file. With `tta="five_crop"` an answer is the mean of the logits of
    five crops. Raises ConfigError, DataError or PromptFileError.
    """
    header, _ = read_prompt(path)
    loading = check_loading(settings, sections=("data", "backbone", "train"))
    task = load_task_of(header, settings.get("data", {}))
    task, trained_on, remark = without_training_images(task, header)
    images, unmatched = match_classes(task, header.classes, path)
    model, _ = open_prompt(path, **loading, at_once=min(PREDICTED_AT_ONCE, len(images)))
    for line in [*task.summary_lines(), *_matching_lines(task, header.classes, len(images), unmatched)]:
        say(line)
    if remark:
        say(f"warning: {remark}")
    began = time.perf_counter()
    predictions = predict(model, images, workers=workers_in(settings), tta=tta)
    if unmatched["absent_from_data"]:
        absent = [header.classes.index(name) for name in unmatched["absent_from_data"]]
        for logits in (predictions.logits, *predictions.head_logits.values()):
            logits[:, absent] = -torch.inf
    group_rule = header.group_rule or task.group_rule
    metrics = measure(model, predictions, torch.tensor(header.counts), group_rule=group_rule)
    return {
        **metrics,
        **{side: [short(name) for name in names] for side, names in unmatched.items()},
        "trained_on_left_out": trained_on,
        "method": quoted(header.method),
        "described": described(header.method, header.settings) + FIVE_CROPS * (tta == "five_crop"),
        "tta": tta,
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


def load_task_of(header: Header, given: Mapping[str, Any]) -> Task:
    """The task that the section `data` in `given` means, where it is silent that of the prompt file."""
    stored = header.data.get("settings")
    if not isinstance(stored, dict):
        stored = {}
    # A prompt file comes from anyone: it must not choose which files of this disk are read.
    stored = {key: value for key, value in with_later_settings(stored).items() if key not in LOCATION_SETTINGS}
    if "name" in given and given["name"] != stored.get("name"):  # the stored settings are those of other data
        stored = {}
    settings = {**stored, **given}
    if not settings.get("name"):
        raise DataError("data.name is missing: the prompt file does not say which data it was made with")
    task = load_task(**check_data(settings))
    if "split off" in task.facts.get("test_part", "") and not was_trained_on(task, header):
        return _tested_on_all_images(task)
    return task


def held_out_of(header: Header, given: Mapping[str, Any]) -> tuple[Task, str, bool]:
    """(the task that `given` means, with labeled images that were not trained on as its test part; what these are;
    whether that is certain): the held-out part where there is one, else the test part."""
    return _held_out_of(load_task_of(header, given), header)


def held_out_in(folder: Path, header: Header) -> tuple[Task, str, bool, int]:
    """As `held_out_of`, of all images in class folders but for those that were trained on, whose number is the last; of
    the folder that was trained on, its held-out or test part."""
    task = load_task(**check_data({"name": "folder", "root": str(folder)}))
    if was_trained_on(task, header):
        return *_held_out_of(task, header), 0
    task, trained_on, _ = without_training_images(_tested_on_all_images(task), header)
    return task, "given as held out", header.trained_on is not None, trained_on


def _held_out_of(task: Task, header: Header) -> tuple[Task, str, bool]:
    is_same = was_trained_on(task, header)
    # Held out now and not in training: a part that is no part of the training images as they were.
    if task.val is not None and (is_same or was_trained_on(replace(task, val=None), header)):
        return replace(task, test=task.val, val=None), f"held out of {task.name}", True
    is_known = is_same or (header.trained_on is not None and can_be_hashed(task.test))
    is_official = task.test_is_official and task.name == header.data.get("name")
    return without_training_images(task, header)[0], f"test images of {task.name}", is_known or is_official


def was_trained_on(task: Task, header: Header) -> bool:
    """Whether the prompt file's run had this split of labeled images; the unlabeled ones need not be at hand."""
    labeled_sha256 = replace(task, unlabeled=None).manifest()["sha256"]
    return labeled_sha256 == header.data.get("labeled_sha256", header.data.get("split_sha256"))


def _tested_on_all_images(task: Task) -> Task:
    """A folder without parts of its own, with training, held-out and test images as the test part."""
    # `folder` makes Files of every kind of folder.
    assert isinstance(task.train, Files) and isinstance(task.test, Files)
    images = task.train.plus(task.test)
    if task.val:  # the settings in the prompt file can hold images out of the training part
        assert isinstance(task.val, Files)
        images = images.plus(task.val)
    return replace(task, test=images, val=None, facts={**task.facts, "test_part": "all images are tested on"})


def without_training_images(task: Task, header: Header) -> tuple[Task, int, str]:
    """(the task without test images that the prompt file was trained on, how many these were, what is reported about
    it).

    The split that the prompt file was trained with holds none. Raises DataError where nothing is left to test on.
    """
    if was_trained_on(task, header):
        return task, 0, ""
    if header.trained_on is None:  # of an official test part, or of lpt 0.1
        if header.data.get("name") in (None, task.name) and not task.test_is_official:
            return task, 0, "the prompt file does not know its training images: some may be among these test images"
        return task, 0, ""
    if not can_be_hashed(task.test):
        return task, 0, "whether the prompt file was trained on some of these test images is not looked at in lists"
    new = ~np.isin(image_hashes(task.test), unpacked(header.trained_on))
    left_out = int((~new).sum())
    if not new.any():
        raise DataError(
            f"all {len(task.test)} test images were trained on: give images that the prompt file does not know"
        )
    if not left_out:
        return task, 0, ""
    test = task.test.subset(np.flatnonzero(new).tolist())
    return replace(task, test=test), left_out, f"{left_out} test images were trained on, and are left out"


def match_classes(
    task: Task, prompt_classes: Sequence[str], path: str | Path
) -> tuple[Images | Files, dict[str, list[str]]]:
    """(test images of the classes that the prompt file knows, labeled in its order, the names that only one side has or
    spells otherwise).

    Raises PromptFileError where less than two classes, or no image, can be matched.
    """
    label_of_class = _label_of_each_class(task.classes, prompt_classes)
    pairs = list(zip(task.classes, label_of_class, strict=True))
    unmatched = {
        "absent_from_data": [name for k, name in enumerate(prompt_classes) if k not in label_of_class],
        "unknown_to_prompt": [name for name, k in pairs if k < 0],
        "other_spelling": [
            f"{name} = {prompt_classes[k]}" for name, k in pairs if k >= 0 and name != prompt_classes[k]
        ],
    }
    if len(task.classes) - len(unmatched["unknown_to_prompt"]) < 2:
        raise PromptFileError(
            f"prompt file {path} knows {len(prompt_classes)} classes, {task.name} has {len(task.classes)}, and less "
            f"than two names are the same: for example {quoted(', '.join([*prompt_classes[:2], *task.classes[:2]]))}"
        )
    labels = torch.tensor(label_of_class)[task.test.labels]
    matched_rows = (labels >= 0).nonzero().flatten()
    if len(matched_rows) == 0:
        raise PromptFileError(f"{task.name} has no test image of a class that prompt file {path} knows")
    return replace(task.test.subset(matched_rows.tolist()), labels=labels[matched_rows]), unmatched


def _label_of_each_class(names: Sequence[str], prompt_classes: Sequence[str]) -> list[int]:
    """For each of `names` the class of the prompt file that is called so, or that alone is called so but for case,
    spaces around it and the like; -1 where there is none."""
    label_of = {name: k for k, name in enumerate(prompt_classes)}
    free = Counter(spelling(name) for name in names if name not in label_of)
    free_of_prompt = [name for name in prompt_classes if name not in set(names)]
    theirs = Counter(map(spelling, free_of_prompt))
    alike = {spelling(name): label_of[name] for name in free_of_prompt if theirs[spelling(name)] == 1}
    labels: list[int] = []
    for name in names:
        key = spelling(name)
        by_spelling = alike.get(key, -1) if free[key] == 1 else -1
        labels.append(label_of.get(name, by_spelling))
    return labels


def _matching_lines(
    task: Task, prompt_classes: Sequence[str], images: int, unmatched: Mapping[str, Sequence[str]]
) -> list[str]:
    """A note on the match, none where both sides have the same classes. `images` counts the matched ones."""
    absent, unknown = unmatched["absent_from_data"], unmatched["unknown_to_prompt"]
    lines: list[str] = []
    if respelled := unmatched["other_spelling"]:
        shown = quoted(", ".join(respelled[:5])) + (", ..." if len(respelled) > 5 else "")
        lines.append(
            f"{len(respelled)} classes are spelled otherwise in the prompt file and matched all the same: {shown}"
        )
    if not absent and not unknown:
        return lines
    matched = len(prompt_classes) - len(absent)
    lines += [
        f"classes matched by name: {matched} of {len(prompt_classes)}, {images} of {len(task.test)} images; "
        "predictions are among these classes"
    ]
    for side, names in (("not in the data", absent), ("not in the prompt file", unknown)):
        if names:
            shown = quoted(", ".join(names[:10])) + (", ..." if len(names) > 10 else "")
            lines.append(f"warning: {len(names)} classes {side}: {shown}")
    return lines
