"""Which part each image of a folder is in, in every form that a split has on disk."""

import json
import shutil

import pytest

import lpt
from lpt.data.parts import role_called
from lpt.errors import DataError
from tests.support.command_line import lpt as command
from tests.support.pictures import fill, picture


def task_of(root, **settings):
    return lpt.load_task("folder", root=str(root), **settings)


def sizes(task):
    parts = (task.train, task.val, task.test, task.unlabeled)
    return [len(part) if part else 0 for part in parts]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "dev", "Testing"),
        ("train_set", "validation_set", "test-set"),
        ("TRAIN images", "valid", "heldout"),
        ("training_data", "validate", "evaluation"),
    ],
)
def test_parts_around_and_in_the_class_folders(tmp_path, train, val, test):
    for k, (role, counts) in enumerate(((train, (5, 3)), (val, (2, 1)), (test, (3, 2)))):
        counts = dict(zip(("cat", "dog"), counts, strict=True))
        fill(tmp_path / "around" / role, counts, seed=k)
        for name, count in counts.items():
            fill(tmp_path / "inside" / name, {role: count}, seed=10 * k + count)
    around, inside = task_of(tmp_path / "around"), task_of(tmp_path / "inside")
    assert sizes(around) == sizes(inside) == [8, 3, 5, 0]
    assert around.classes == inside.classes == ("cat", "dog") and around.counts.tolist() == [5, 3]
    assert set(inside.test.ids) == {f"{name}/{test}/{i}.png" for name, n in (("cat", 3), ("dog", 2)) for i in range(n)}
    line = around.summary_lines()[0]
    assert f"5 to 3 each ({train}/), 3 held out ({val}/), 5 test images ({test}/)" in line
    line = inside.summary_lines()[0]
    assert f"5 to 3 each (CLASS/{train}/), 3 held out (CLASS/{val}/), 5 test images (CLASS/{test}/)" in line


def test_the_doctor_and_a_run_say_where_the_parts_came_from(tmp_path, capsys):
    for name in ("cat", "dog"):
        fill(tmp_path / "p" / name, {"train": 4, "test": 2, "unlabeled": 3}, seed=len(name) + ord(name[0]))
    code, out, _ = command(capsys, "doctor", tmp_path / "p")
    assert code == 0 and out.startswith(
        "2 classes; images: 8 training (CLASS/train/), 6 unlabeled (CLASS/unlabeled/), 4 test (CLASS/test/)"
    )
    words = ("--out", tmp_path / "run", "backbone.name=nano", "method.name=class_mean", "train.device=cpu")
    code, out, said = command(capsys, "fit", tmp_path / "p", *words)
    assert code == 0 and "4 test images (CLASS/test/)" in out, said
    stored = json.loads((tmp_path / "run" / "split.json").read_text())
    assert stored["parts"]["test"]["ids"][0] == "cat/test/0.png" and stored["train_part"] == "CLASS/train/"


def test_class_folders_say_how_the_test_part_came_to_be(tmp_path):
    task = task_of(fill(tmp_path, {"cat": 6, "dog": 5}), val_per_class=1)
    assert task.summary_lines()[0].endswith(
        "7 training images of 2 classes, 4 to 3 each (class folders), 2 held out (1 of each class, of the training "
        "images, with seed 0), 2 test images (about 0.2 of each class split off as test set with seed 0)"
    )
    fill(tmp_path / "q" / "train", {"cat": 2, "dog": 1}), fill(tmp_path / "q" / "valid", {"cat": 2}, seed=2)
    line = task_of(tmp_path / "q").summary_lines()[0]
    assert line.endswith(
        "3 training images of 2 classes, 2 to 1 each (train/), 2 test images (the val part is the test set, valid/)"
    )


def table(root, rows, kind):
    """A metadata file with a species for each of `rows`."""
    if kind == "csv":
        lines = ["file_name,species", *(",".join(row) for row in rows)]
    else:
        lines = [json.dumps({"file_name": name, "species": label}) for name, label in rows]
    (root / f"metadata.{kind}").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("before", ["", "images/", "data/2024/"])
def test_one_table_above_the_parts(tmp_path, kind, before):
    rows = []
    for k, (role, count) in enumerate((("train", 9), ("val", 3), ("test", 4), ("unlabeled", 2))):
        fill(tmp_path / before if before else tmp_path, {role: count}, seed=k)
        if role != "unlabeled":
            rows += [(f"{before}{role}/{i}.png", ("wren", "robin")[i % 2]) for i in range(count)]
    table(tmp_path, rows, kind)
    task = task_of(tmp_path)
    unlabeled = 0 if before else 2
    assert sizes(task) == [9, 3, 4, unlabeled] and task.classes == ("robin", "wren")
    assert sorted(task.test.ids) == [f"{before}test/{i}.png" for i in range(4)]
    assert len(task.facts.get("left_out", ())) == 2 - unlabeled
    assert (
        f"(metadata.{kind}, train/)" in task.summary_lines()[0]
        and f"(metadata.{kind}, test/)" in task.summary_lines()[0]
    )


def test_a_table_whose_rows_are_partly_in_parts(tmp_path):
    fill(tmp_path, {"train": 3, "test": 3, "car": 3})
    names = [f"{folder}/{i}.png" for folder in ("car", "test", "train") for i in range(3)]
    table(tmp_path, [(name, name.partition("/")[0]) for name in names], "csv")  # its classes are called so
    task = task_of(tmp_path)
    assert task.classes == ("car", "test", "train") and sizes(task) == [6, 0, 3, 0]
    table(tmp_path, [(name, "ab"[k % 2]) for k, name in enumerate(names)], "csv")
    with pytest.raises(
        DataError, match=r"metadata\.csv names .*test/0\.png in a part, and .*car/0\.png in none: what is read"
    ):
        task_of(tmp_path)
    table(tmp_path, [(name, "ab"[k % 2]) for k, name in enumerate(names) if name.startswith("test")], "csv")
    with pytest.raises(DataError, match="has no training part, only test"):
        task_of(tmp_path)


def test_a_table_above_and_one_inside(tmp_path):
    fill(tmp_path, {"train": 4, "test": 2})
    rows = [(f"{role}/{i}.png", "ab"[i % 2]) for role, n in (("train", 4), ("test", 2)) for i in range(n)]
    table(tmp_path, rows, "csv")
    table(tmp_path / "test", [("0.png", "a"), ("1.png", "b")], "jsonl")
    with pytest.raises(DataError, match=r"has metadata\.csv, and test in it has one too: keep one of them"):
        task_of(tmp_path)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"cat/train": 3, "cat/test": 1, "dog": 4}, r"cat/test/0\.png in a folder called as a part, and dog/0\.png is"),
        ({"cat/train": 3, "dog/test": 1, "dog/more": 1}, r"as a part, and dog/more/0\.png is in no part: what is read"),
        ({"cat/test": 3, "dog/val": 1}, "called as a part, and no class has a folder train: what is read is CLASS/"),
        ({"cat": 3, "dog": 3, "test/cat": 1, "test/dog": 1}, "has test with class folders in it, and no train"),
        ({"test/cat": 3, "test/dog": 1}, "has test with class folders in it, and no train beside it: what is read"),
        ({"train": 3, "test": 2}, "has test and train, and no class folders in them: what is read is CLASS/"),
        ({"train": 3, "validation": 2, "Test": 2}, "no class folders in them"),
        ({"train/cat": 3, "train/dog": 2, "test": 2}, "has parts .train. and beside them test, .* no class folders"),
        ({"train/cat": 2, "test/cat": 1, "eval/cat": 1}, "two folders for one part, eval and test: keep one of them"),
        ({"photos/train/cat": 3, "photos/test/cat": 1}, "has all its images in photos: set data.root=.* parts"),
        ({"photos/cat": 3, "photos/dog": 1}, "has all its images in photos: set data.root=.* classes"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, capsys, counts, says):
    for k, (path, count) in enumerate(counts.items()):
        outer, _, name = path.rpartition("/")
        fill(tmp_path / "p" / outer, {name: count}, seed=k)
    with pytest.raises(DataError, match=says):
        task_of(tmp_path / "p")
    code, out, said = command(capsys, "doctor", tmp_path / "p")
    assert code == 2 and said.startswith("error: data.root ") and not out


def test_class_folders_with_folders_of_the_same_names_are_pointed_at(tmp_path):
    for k, outer in enumerate(("site A", "site B", "site C")):
        fill(tmp_path / outer, {"cat": 2, "dog": 2}, seed=k)
    line = task_of(tmp_path).summary_lines()[1]
    assert line.startswith(
        "warning: 3 class folders hold folders of the same names: if these are the classes, call the"
    )
    shutil.rmtree(tmp_path / "site C")
    fill(tmp_path / "site C", {"eel": 2, "owl": 2, "yak": 2}, seed=9)
    assert len(task_of(tmp_path).summary_lines()) == 1


def test_images_beside_the_parts_are_named(tmp_path):
    fill(tmp_path / "train", {"cat": 3, "dog": 2}), fill(tmp_path / "test", {"cat": 1}, seed=1)
    for path in ("logo.png", "train/cover.png", "test/cover.png"):
        picture(77).save(tmp_path / path)
    assert task_of(tmp_path).facts["left_out"] == ["logo.png", "test/cover.png", "train/cover.png"]


def test_names_of_parts():
    assert [role_called(name) for name in ("Train", "train_images", "Testing", "holdout", "un-labelled", "dev")] == [
        "train", "train", "test", "test", "unlabeled", "val",
    ]  # fmt: skip
    for name in ("test tubes", "trainers", "dataset", "images", "devices", "val d'isere", "protest", "set", ""):
        assert role_called(name) is None, name
