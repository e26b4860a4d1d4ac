"""A prompt file on another dataset: classes are matched by name, and what only one side has is said."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lpt import run
from lpt.config import resolve
from lpt.data import load_task
from lpt.errors import LptError, PromptFileError
from lpt.prompt_file import read_prompt
from lpt.serve.evaluating import _label_of_each_class, evaluate_prompt
from lpt.serve.opening import open_prompt
from tests.support.command_line import lpt as command
from tests.support.pictures import fill

BACKBONE = {"name": "untrained:vit_tiny_patch16_224"}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    place = tmp_path_factory.mktemp("shift")
    fill(place / "photos", {"cat": 9, "dog": 6, "red owl": 4, "eel": 3})
    config = {
        "backbone": {**BACKBONE, "image_size": 32},
        "data": {"name": "folder", "root": str(place / "photos")},
        "method": {"name": "class_mean"},
        "train": {"precision": "fp32"},
    }
    run.train(resolve(config), place / "run")
    return place / "run" / "prompt.safetensors"


def test_another_dataset_is_matched_by_name(prompt, tmp_path):
    fill(tmp_path / "sketches", {"dog": 5, "ant": 7, "cat": 10, "red owl": 5}, seed=4)
    said = []
    found = evaluate_prompt(
        prompt, {"data": {"name": "folder", "root": str(tmp_path / "sketches")}, "backbone": BACKBONE}, say=said.append
    )
    text = "\n".join(said)
    assert "classes matched by name: 3 of 4, 20 of 27 images" in text
    assert "1 classes not in the data: eel" in text and "1 classes not in the prompt file: ant" in text
    assert found["absent_from_data"] == ["eel"] and found["unknown_to_prompt"] == ["ant"]
    # The same by hand: images one by one, the largest logit among the three classes that both know.
    model, header = open_prompt(prompt, **BACKBONE)
    task = load_task("folder", root=str(tmp_path / "sketches"))
    right = {name: [] for name in ("cat", "dog", "red owl")}
    test = task.train.plus(task.test)  # no part of it was trained on
    for i in range(len(test)):
        name = task.classes[test.labels[i]]
        if name in right:
            views = model.backbone.preprocess.cut(test.take(torch.tensor([i])))
            with torch.no_grad():
                logits = dict(
                    zip(header.classes, model(model.backbone.preprocess.normalized(views)).logits[0], strict=True)
                )
            right[name].append(max(right, key=lambda k: logits[k].item()) == name)
    means = [sum(r) / len(r) for r in right.values()]
    assert found["class_accuracy"] == pytest.approx(sum(means) / 3)
    assert found["per_class"][header.classes.index("eel")] is None


def test_another_folder_is_tested_on_all_of_its_images_whatever_the_run_held_out(tmp_path):
    fill(tmp_path / "photos", {"cat": 9, "dog": 6})
    config = {
        "backbone": {**BACKBONE, "image_size": 32},
        "data": {"name": "folder", "root": str(tmp_path / "photos"), "val_per_class": 2},
        "method": {"name": "class_mean"},
    }
    run.train(resolve(config), tmp_path / "run")
    fill(tmp_path / "sketches", {"cat": 7, "dog": 4, "ant": 5}, seed=4)
    said = []
    given = {"data": {"root": str(tmp_path / "sketches")}, "backbone": BACKBONE}
    evaluate_prompt(tmp_path / "run" / "prompt.safetensors", given, say=said.append)
    assert "11 of 16 images" in "\n".join(said)


def test_the_order_of_classes_does_not_matter(prompt, tmp_path):
    fill(tmp_path / "same", {"red owl": 5, "eel": 5, "dog": 5, "cat": 5}, seed=4)
    found = evaluate_prompt(prompt, {"data": {"name": "folder", "root": str(tmp_path / "same")}, "backbone": BACKBONE})
    assert found["absent_from_data"] == found["unknown_to_prompt"] == []


def test_classes_in_another_spelling_are_matched_and_said(prompt, tmp_path, capsys):
    fill(tmp_path / "same", {"Red_Owl": 4, "EEL": 4, "dog ": 4, "cat": 4, "Ant": 3}, seed=4)
    given = {"data": {"name": "folder", "root": str(tmp_path / "same")}, "backbone": BACKBONE}
    said = []
    found = evaluate_prompt(prompt, given, say=said.append)
    assert found["absent_from_data"] == [] and found["unknown_to_prompt"] == ["Ant"]
    assert found["other_spelling"] == ["EEL = eel", "Red_Owl = red owl", "dog  = dog"]
    text = "\n".join(said)
    assert "3 classes are spelled otherwise in the prompt file and matched all the same: EEL = eel, Red_Owl" in text
    assert "classes matched by name: 4 of 4, 16 of 19 images" in text
    for old, new in (("Red_Owl", "red owl"), ("EEL", "eel"), ("dog ", "dog")):
        (tmp_path / "same" / old).rename(tmp_path / "same" / new)
    again = evaluate_prompt(prompt, given)
    assert again["per_class"] == found["per_class"] and again["other_spelling"] == []
    (tmp_path / "same" / "cat").rename(tmp_path / "same" / "Cat")
    name = f"backbone.name={BACKBONE['name']}"
    code, out, error = command(capsys, "evaluate", prompt, f"data.root={tmp_path / 'same'}", name)
    assert (
        code == 0 and "1 classes are spelled otherwise in the prompt file and matched all the same: Cat = cat" in out
    ), error


def test_two_names_that_could_be_one_class_are_matched_exactly_or_not_at_all():
    assert _label_of_each_class(["Cat", "cat", "dog"], ["cat", "dog"]) == [-1, 0, 1]
    assert _label_of_each_class(["Cat", "CAT", "dog"], ["cat", "dog"]) == [-1, -1, 1]
    assert _label_of_each_class(["cat", "dog"], ["Cat", "CAT", "dog"]) == [-1, 2]
    assert _label_of_each_class(["1.0", "2"], ["1", "2"]) == [0, 1]


def test_other_classes_altogether_are_refused(prompt, tmp_path):
    fill(tmp_path / "other", {"apple": 5, "pear": 5, "cat": 5})
    with pytest.raises(PromptFileError, match="less than two names are the same"):
        evaluate_prompt(prompt, {"data": {"name": "folder", "root": str(tmp_path / "other")}})


def test_its_own_data_keeps_its_test_part_and_its_group_rule(prompt):
    found = evaluate_prompt(prompt, {"data": {"root": str(prompt.parents[1] / "photos")}, "backbone": BACKBONE})
    stored = json.loads((prompt.parent / "report.json").read_text())
    for key in ("accuracy", "many", "medium", "few", "group_rule", "nll"):
        assert found[key] == stored[key]


def test_unlabeled_images_need_not_be_at_hand_again(tmp_path):
    fill(tmp_path / "photos", {"cat": 9, "dog": 6, "red owl": 4})
    fill(tmp_path / "more", {"any": 7}, seed=5)
    config = {
        "backbone": {**BACKBONE, "image_size": 32},
        "data": {"name": "folder", "root": str(tmp_path / "photos"), "unlabeled": str(tmp_path / "more")},
        "method": {"name": "fixmatch", "tuning": "head", "head_init": "class_mean", "steps": 2, "rounds": 1},
        "train": {"precision": "fp32", "batch_size": 4},
    }
    report = run.train(resolve(config), tmp_path / "run")
    (tmp_path / "more").rename(tmp_path / "gone")
    given = {"data": {"root": str(tmp_path / "photos")}, "backbone": BACKBONE}
    found = evaluate_prompt(tmp_path / "run" / "prompt.safetensors", given)
    assert found["per_class"] == report["per_class"] and found["nll"] == report["nll"]  # the test part, not all images


def test_a_prompt_file_cannot_have_any_architecture_made(prompt):
    with pytest.raises(PromptFileError, match=r"is for untrained:vit_tiny_patch16_224: give backbone\.name"):
        open_prompt(prompt)


def test_a_prompt_file_cannot_say_where_data_is(prompt, tmp_path):
    header, tensors = read_prompt(prompt)
    for data in ({"settings": [1]}, {"settings": {"name": "folder", "root": "/etc"}}, {"group_rule": {}},
                 {"settings": {"name": "lists", "train": "/dev/zero"}}):  # fmt: skip
        text = json.dumps(header.model_dump(mode="json") | {"data": data, "format": 1})
        save_file(tensors, tmp_path / "p.safetensors", metadata={"lpt": text})
        with pytest.raises(LptError, match=r"data\.(name|root|train) is missing"):
            evaluate_prompt(tmp_path / "p.safetensors", {})
