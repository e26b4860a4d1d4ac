"""Python takes what the command line takes, and refuses what it refuses, in one sentence; nothing is half-written."""

import re
from pathlib import Path

import pytest
import torch

import lpt
from lpt.config import resolve
from lpt.data import Files
from tests.support.command_line import lpt as command
from tests.support.toy import small_backbone, toy_task

PIXELS = torch.randint(0, 255, (10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS, IDS = torch.arange(10) % 2, tuple(map(str, range(10)))
IMAGES = lpt.Images(PIXELS, LABELS, IDS)


@pytest.fixture(scope="module")
def trained():
    task, backbone = toy_task(), small_backbone()
    return task, backbone, lpt.tune(task, backbone, method="class_mean")


def refused(call, says):
    """`call` ends in one sentence for people, which says that."""
    with pytest.raises(lpt.LptError, match=says) as error:
        call()
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("pixels", "labels", "ids", "says"),
    [
        (PIXELS / 255, LABELS, IDS, r"pixels are torch\.float32: give torch\.uint8 from 0 to 255"),
        (PIXELS.int(), LABELS, IDS, r"pixels are torch\.int32"),
        (PIXELS[:, :1], LABELS, IDS, r"shape \[10, 1, 8, 8\]: give \[N, 3, height, width\]"),
        (PIXELS.permute(0, 2, 3, 1), LABELS, IDS, r"shape \[10, 8, 8, 3\]"),
        (PIXELS.numpy(), LABELS, IDS, "pixels are ndarray: give a torch tensor"),
        (PIXELS, LABELS.float(), IDS, r"labels have shape \[10\] and type torch\.float32"),
        (PIXELS, LABELS[:, None], IDS, r"labels have shape \[10, 1\]"),
        (PIXELS, LABELS.tolist(), IDS, "labels are list"),
        (PIXELS, LABELS, range(10), "are no texts"),
        (PIXELS[:5], LABELS, IDS, "5 pixels, 10 labels, 10 ids"),
    ],
)
def test_images_that_are_none_are_refused(pixels, labels, ids, says):
    refused(lambda: lpt.Images(pixels, labels, ids), says)


def test_files_are_checked_too_and_labels_become_what_losses_take():
    images = lpt.Images(PIXELS, LABELS.int(), list(IDS))
    assert images.labels.dtype == torch.int64 and images.ids == IDS
    refused(lambda: Files("folder", LABELS, IDS, IDS), "source is 'folder'")
    refused(lambda: Files(str, LABELS, IDS, IDS[:3]), "3 fingerprints, 10 labels, 10 ids")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": ("cat",) * 10}, "two classes are called 'cat'"),
        ({"classes": "ab"}, "give a tuple of names"),
        ({"classes": ("a", " ")}, "give each class a name"),
        ({"classes": (1, 2)}, "class 0 is called 1"),
        ({"train": lpt.Images(PIXELS, LABELS + 1, IDS)}, "train has label 2: labels of 2 classes are 0 to 1"),
        ({"test": lpt.Images(PIXELS, LABELS - 1, IDS)}, "test has label -1"),
        ({"val": lpt.Images(PIXELS, LABELS * 7, IDS)}, "val has label 7"),
        ({"unlabeled": lpt.Images(PIXELS, LABELS - 2, IDS)}, "unlabeled has label -2: labels of 2 classes are -1 to 1"),
        ({"train": IMAGES.subset([])}, "train has no image"),
        ({"val": IMAGES.subset([])}, "val has no image"),
        ({"test": None}, "test is None"),
        ({"group_rule": "lt30"}, "group_rule 'lt30' is none of lt20, le20, thirds"),
    ],
)
def test_tasks_that_are_none_are_refused(changes, says):
    whole = {"name": "mine", "classes": ("a", "b"), "train": IMAGES, "test": IMAGES}
    assert lpt.Task(**whole).counts.tolist() == [5, 5]
    refused(lambda: lpt.Task(**whole | changes), says)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("folder", {"test_share": 2}, r"data\.test_share: got 2; input should be less than 1"),
        ("folder", {"on_error": "ignore"}, r"data\.on_error: got 'ignore'"),
        ("folder", {"rot": "photos"}, r"data\.rot: there is no such setting; did you mean root"),
        ("folder", {"root": 3}, r"data\.root: got 3"),
        ("folder", {"seed": True}, r"data\.seed: got True; a whole number is needed"),
        ("digits-lt", {"val_per_class": 1.0}, r"data\.val_per_class: got 1\.0; a whole number is needed: 1"),
        ("digits", {}, "did you mean digits-lt"),
        (3, {}, r"data\.name 3 is not known"),
    ],
)
def test_settings_of_data_are_those_of_configs(name, settings, says):
    refused(lambda: lpt.load_task(name, **settings), says)


def test_a_path_is_as_good_as_its_text():
    refused(lambda: lpt.load_task("folder", root=Path("absent")), "absent does not exist")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0}, r"tune\.batch_size: got 0; input should be greater than or equal to 1"),
        ({"batch_size": True}, r"tune\.batch_size: got True"),
        ({"seed": 2**64}, r"tune\.seed: got 18446744073709551616; input should be less than 2147483647"),
        ({"method": "linear_probe", "epochs": True}, r"method\.epochs: got True; a whole number is needed"),
        ({"method": "linear_probe", "epochs": 1.0}, r"method\.epochs: got 1\.0; a whole number is needed: 1"),
        ({"method": "lpt", "epochs": (1, True)}, r"method\.epochs\.1: got True"),
        ({"method": "lpt", "query_head": 1}, r"method\.query_head: got 1; true or false is needed"),
        ({"method": "two_stage", "then": {"name": "knn", "k": True}}, r"method\.k: got True"),
        ({"method": "linear_probe", "epochs": 2**70}, "numbers have at most 63 bits"),
    ],
)
def test_tune_takes_what_configs_take(trained, settings, says):
    refused(lambda: lpt.tune(*trained[:2], **settings), says)


def test_arguments_of_another_kind_are_named(trained, tmp_path):
    task, backbone, model = trained
    refused(lambda: lpt.tune("digits", backbone), "task is 'digits': give what lpt.load_task returns")
    refused(lambda: lpt.tune(task, "nano"), "backbone is 'nano': give what lpt.load_backbone returns")
    refused(lambda: lpt.load_prompt(tmp_path / "p", "nano"), "backbone is 'nano'")
    refused(lambda: lpt.read_prompt(3), "prompt file is 3")
    refused(lambda: lpt.evaluate(3, task), "model is 3")
    refused(lambda: lpt.evaluate(model, "digits"), "data is 'digits'")
    refused(lambda: lpt.load_config(3), "config is 3")
    for size in (0, True, 32.0, 5000):
        refused(lambda size=size: lpt.load_backbone("nano", image_size=size), "load_backbone.image_size: got")
    refused(lambda: lpt.load_backbone(3), "load_backbone.name: got 3")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda counts: torch.cat([counts, counts]), r"shape \[8\].*one whole number for each of the 4 classes"),
        (lambda counts: counts * float("nan"), "counts hold nan"),
        (lambda counts: -counts, "counts hold -"),
        (lambda counts: counts + 0.5, "counts hold 30.5"),
        (lambda counts: "many", "counts 'many' are no numbers"),
        (lambda counts: counts > 3, "type torch.bool"),
    ],
)
def test_counts_are_one_for_each_class(trained, tmp_path, change, says):
    task, _, model = trained
    wrong = change(task.counts)
    refused(lambda: lpt.evaluate(model, task, wrong), says)
    refused(lambda: lpt.evaluate(model, task.test, wrong), says)
    refused(lambda: lpt.save_prompt(tmp_path / "p.safetensors", model, method="class_mean", counts=wrong), says)
    assert list(tmp_path.iterdir()) == []
    right = task.counts.tolist()
    assert lpt.evaluate(model, task.test, right) == lpt.evaluate(model, task.test, task.counts)
    assert lpt.save_prompt(tmp_path / "p.safetensors", model, method="class_mean", counts=right).counts == right


def test_evaluations_that_mean_nothing_are_refused(trained):
    task, _, model = trained
    refused(lambda: lpt.evaluate(model, task, batch_size=0), "evaluate.batch_size: got 0")
    refused(lambda: lpt.evaluate(model, task.test.subset([]), task.counts), "has no image")
    high = lpt.Images(task.test.pixels, task.test.labels + 4, task.test.ids)
    refused(lambda: lpt.evaluate(model, high, task.counts), "has label 7: labels of 4 classes are 0 to 3")
    other = lpt.Task("other", task.classes[::-1], task.train, task.test)
    refused(lambda: lpt.evaluate(model, other), "another order")


@pytest.mark.parametrize(
    "facts", [{"storage": "bf16"}, {"storage": ["fp16"]}, {"data": {"a": object()}}, {"method": 3}]
)
def test_prompt_files_are_written_whole_or_not_at_all(trained, tmp_path, facts):
    task, _, model = trained
    settings = {"method": "class_mean", "counts": task.counts, **facts}
    refused(lambda: lpt.save_prompt(tmp_path / "p.safetensors", model, **settings), "storage|is not written")
    assert list(tmp_path.iterdir()) == []


RAW = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": "linear_probe", "lr": 0.01}}


@pytest.mark.parametrize("name", ["linear_probe ", " linear_probe", '"linear_probe"', "'linear_probe' # the same"])
def test_the_same_name_in_other_letters_changes_nothing(name):
    assert resolve(RAW, [f"method.name={name}"]) == resolve(RAW)
    inside = {**RAW, "method": {"name": "two_stage", "then": RAW["method"]}}
    assert resolve(inside, [f"method.then.name={name}"]) == resolve(inside)
    assert resolve(inside, ["method.name=knn", "method.name=two_stage"]) == resolve(inside)  # the last one counts


def test_another_method_inside_leaves_out_what_is_said_of_the_first():
    inside = {**RAW, "method": {"name": "two_stage", "then": RAW["method"], "epochs_stage1": 3}}
    method = resolve(inside, ["method.then.name=knn"]).method
    assert method["then"] == {"name": "knn", "k": 20, "temperature": 0.07} and method["epochs_stage1"] == 3
    refused(lambda: resolve(RAW, ['method.name="linear_probe "']), "'linear_probe ' is unknown .*did you mean linear_p")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.batch_size=true", "got True; a whole number is needed"),
        ("train.batch_size=64.0", "got 64.0; a whole number is needed: 64"),
        ("method.steps=1e3", "got 1000.0; a whole number is needed: 1000"),
        ("backbone.flip=1", "got 1; true or false is needed"),
        ("train.compile=0.0", "got 0.0; true or false is needed"),
        ("train.checkpoint_seconds=true", "got True; a number is needed"),
        ("train.seed=18446744073709551616", "got 18446744073709551616; input should be less than 2147483647"),
        ("train.seed=-" + "9" * 99, "got '-999.*no setting takes so much"),
        ("method.rounds=18446744073709551616", "got 18446744073709551616; numbers have at most 63 bits"),
    ],
)
def test_truths_numbers_and_whole_numbers_are_told_apart(setting, says):
    raw = {**RAW, "method": {"name": "ulfine"}}
    section, key = setting.partition("=")[0].split(".")
    path = f"{section}.{key}"
    refused(lambda: resolve(raw, [setting]), re.escape(path) + ": " + says)
    if section == "method" and key == "steps":
        inside = {**raw, "method": {"name": "two_stage", "then": {"name": "ulfine"}}}
        refused(lambda: resolve(inside, [setting.replace("method.", "method.then.")]), r"method\.then\.steps: " + says)


def test_numbers_that_are_written_as_texts_are_read_as_before():
    assert resolve({**RAW, "method": {"name": "linear_probe", "lr": "5e-3"}}).method["lr"] == 5e-3
    assert resolve(RAW, ["method.lr=5e-3", "method.tau=2"]).method["tau"] == 2.0


LONG = "x" * 70_000


@pytest.mark.parametrize(
    "words",
    [
        ["train", "configs/digits_lt/lpt.yaml", f"backbone.name={LONG}"],
        ["train", "configs/digits_lt/lpt.yaml", f"{LONG}.name=1"],
        ["plan", "configs/digits_lt/lpt.yaml", f"train.device={LONG}"],
        ["train", LONG],
        ["fit", "absent", f"prototypes.template={LONG}"],
        ["fit", LONG],
        ["doctor", "absent", f"data.root={LONG}"],
        ["doctor", LONG],
        ["evaluate", "absent", f"data.root={LONG}"],
        ["evaluate", LONG],
        ["predict", "absent", LONG],
        ["predict", "absent", "a.png", f"backbone.weights={LONG}"],
        ["inspect", LONG],
        ["list", LONG],
        ["report", LONG],
    ],
)
def test_what_is_very_long_is_not_repeated(capsys, words):
    code, said, err = command(capsys, *words)
    assert code == 2 and len(said + err) < 1500 and "Traceback" not in err
