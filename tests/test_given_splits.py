"""A split that is given is used, or refused in a sentence with the way out: it is never cut anew in silence."""

import json
import os
import shutil

import pytest

import lpt
from lpt import run, serve
from lpt.config import resolve
from lpt.data.parts import role_in_words
from lpt.errors import DataError
from tests.support.command_line import lpt as command
from tests.support.pictures import fill, picture


def task_of(root, **settings):
    return lpt.load_task("folder", root=str(root), **settings)


def sizes(task):
    parts = (task.train, task.val, task.test, task.unlabeled)
    return [len(part) if part else 0 for part in parts]


def classes_in(root, **parts):
    """Class folders of 4 cats and 3 dogs in each folder of `parts`, called as the values say."""
    for k, folder in enumerate(parts.values()):
        fill(root / folder, {"cat": 4, "dog": 3}, seed=k)
    return root


# Folders.


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train2017", "val2017"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        ("images_train", "images_test"),
        ("train_2020", "test_2021"),
        ("birds-train", "birds-test"),
        ("x.train", "x.heldout"),
    ],
)
def test_folders_that_differ_in_the_word_that_says_the_part_are_parts(tmp_path, train, test):
    task = task_of(classes_in(tmp_path, train=train, test=test))
    assert sizes(task) == [7, 0, 7, 0] and task.classes == ("cat", "dog")
    assert f"({train}/)" in task.summary_lines()[0] and test in task.facts["test_part"]


def test_a_rare_class_may_be_missing_in_a_part(tmp_path):
    classes_in(tmp_path, train="img_train", val="img_val")
    fill(tmp_path / "img_train", {"owl": 2}, seed=9)
    assert task_of(tmp_path).classes == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    "names", [("test tubes", "train stations"), ("train", "test", "cat"), ("trainer", "tester"), ("eval", "dev")]
)
def test_classes_that_sound_like_parts_stay_classes(tmp_path, names):
    task = task_of(fill(tmp_path, dict.fromkeys(names, 4)))
    assert sorted(task.classes) == sorted(names)


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (("site1/train/cat", "site1/train/dog", "site2/train/cat", "site2/train/dog"), "which are the classes"),
        (("cat/2020/train", "cat/2020/test", "dog/2020/train", "dog/2020/test"), "at a depth where none is read"),
        (("train_cat", "test_cat", "train_dog", "test_dog"), "called as parts, beside other folders"),
        (("train_a/cat", "val_a/cat", "extra/cat"), "called as parts, beside other folders"),
        (("train/cat", "train/dog", "test"), "and no class folders: put them into some, or move it elsewhere"),
    ],
)
def test_folders_that_could_be_read_in_two_ways_are_refused(tmp_path, capsys, folders, says):
    fill(tmp_path, dict.fromkeys(folders, 3))
    with pytest.raises(DataError, match=says):
        task_of(tmp_path)
    code, out, err = command(capsys, "doctor", tmp_path)
    assert code != 0 and says in out + err


@pytest.mark.parametrize("names", [("trn", "tst"), ("fold0", "fold1"), ("prueba", "resto")])
def test_folders_with_the_same_classes_in_them_are_a_problem(tmp_path, capsys, names):
    classes_in(tmp_path, **dict(zip("ab", names, strict=True)))
    fill(tmp_path / names[0], {"owl": 2}, seed=9)
    code, out, _ = command(capsys, "doctor", tmp_path)
    assert code == 1 and "class folders hold folders of the same names" in out
    assert any("same names" in line and line.startswith("warning") for line in task_of(tmp_path).summary_lines())


def test_a_word_says_a_part_where_one_does():
    assert role_in_words("Images.Train.2019") == ("train", "images") and role_in_words("train_test") == (None, "")
    assert role_in_words("contrast")[0] is None and role_in_words("latest")[0] is None


# Tables and lists beside class folders.


def rows_of(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))


def write_table(root, name, columns, *, separator=","):
    lines = [separator.join(columns), *(separator.join(cells) for cells in zip(*columns.values(), strict=True))]
    (root / name).write_text("\n".join(lines))


@pytest.mark.parametrize("split", ["split", "Set Name", "tvt", "role", "in_test", "train_val_test"])
def test_a_table_that_says_the_parts_is_not_passed_over(tmp_path, split):
    names = rows_of(fill(tmp_path, {"cat": 6, "dog": 6}))
    values = ["test" if i % 3 == 0 else "train" for i in range(12)]
    if split == "in_test":
        values = ["1" if value == "test" else "0" for value in values]
    labels = [name.split("/")[0] for name in names]
    write_table(tmp_path, "labels.csv", {"file_name": names, "label": labels, split: values})
    with pytest.raises(DataError, match=r"labels\.csv, which says which part each image is of") as refused:
        task_of(tmp_path)
    words = dict(word.strip("'").split("=") for word in str(refused.value).split() if "data." in word and "=" in word)
    given = {key.removeprefix("data."): value.rstrip(",").strip("'") for key, value in words.items()}
    settings = {"table": "labels.csv", "split_column": split, **{k: v for k, v in given.items() if k == "image_column"}}
    assert sizes(task_of(tmp_path, **settings)) == [8, 0, 4, 0]
    (tmp_path / "labels.csv").rename(tmp_path / "metadata.csv")
    assert sizes(task_of(tmp_path)) == [8, 0, 4, 0]


def lines_of(names, form):
    number = {"cat": 0, "dog": 1}
    as_written = {
        "plain": lambda name: name,
        "numbered": lambda name: f"{name} {number[name.split('/')[0]]}",
        "without suffix": lambda name: name.rpartition(".")[0],
        "csv": lambda name: f"{name},{name.split('/')[0]}",
        "below": lambda name: f"./photos/{name}",
    }
    return "\n".join(as_written[form](name) for name in names)


@pytest.mark.parametrize("form", ["plain", "numbered", "without suffix", "csv", "below"])
@pytest.mark.parametrize(
    "files", [("train.txt", "test.txt"), ("meta/train.lst", "meta/val.lst"), ("a_train.csv", "a_test.csv")]
)
def test_lists_of_parts_beside_class_folders_are_not_passed_over(tmp_path, capsys, form, files):
    names = rows_of(fill(tmp_path, {"cat": 4, "dog": 4}))
    (tmp_path / "meta").mkdir()
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        (tmp_path / file).write_text(lines_of(part, form))
    with pytest.raises(DataError, match=r"called as the list of a part is, and is not read.*data\.name=lists"):
        task_of(tmp_path)
    assert command(capsys, "doctor", tmp_path)[0] != 0


def test_splits_in_json_and_numbers_of_images_are_not_passed_over(tmp_path):
    names = rows_of(fill(tmp_path, {"cat": 4, "dog": 4}))
    for file, text in (
        ("splits.json", json.dumps({"train": names[:5], "test": names[5:]})),
        ("train_test_split.txt", "\n".join(f"{i} {i % 2}" for i in range(8))),
        ("test.json", json.dumps(names[5:])),
    ):
        (tmp_path / file).write_text(text)
        with pytest.raises(DataError, match=f"{file}, which is called as the list of a part"):
            task_of(tmp_path)
        (tmp_path / file).unlink()


def test_other_texts_are_no_lists_of_parts(tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "train.txt").write_text("how these photos were made, and by whom")
    (tmp_path / "test.csv").write_text("time,loss\n1,2\n3,4")
    (tmp_path / "names.txt").write_text("\n".join(rows_of(tmp_path)))
    assert len(task_of(tmp_path).train) + len(task_of(tmp_path).test) == 8


def test_a_table_of_training_images_does_not_hide_a_test_folder(tmp_path):
    classes_in(tmp_path, train="train", test="test")
    names = [name for name in rows_of(tmp_path) if name.startswith("train/")]
    write_table(tmp_path, "metadata.csv", {"file_name": names, "label": [name.split("/")[1] for name in names]})
    with pytest.raises(DataError, match=r"metadata\.csv names no image of test, which holds 7: give them rows"):
        task_of(tmp_path)


def test_a_table_of_a_part_that_names_images_of_another_is_refused(tmp_path):
    classes_in(tmp_path, train="train", test="test")
    inside = [name.removeprefix("train/") for name in rows_of(tmp_path) if name.startswith("train/")]
    names = [*inside, "../test/cat/0.png", "../test/dog/0.png"]
    write_table(tmp_path / "train", "metadata.csv", {"file_name": names, "label": [n.split("/")[-2] for n in names]})
    with pytest.raises(DataError, match=r"in the test part and in the train part.*take it out of one"):
        task_of(tmp_path)


# One file in two parts.


def test_hard_links_are_said(tmp_path):
    classes_in(tmp_path, train="train")
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        os.link(tmp_path / "train" / name / "0.png", tmp_path / "test" / name / "again.png")
    task = task_of(tmp_path)
    assert len(task.facts["same_file"]) == 2
    assert any("one file under two names" in line for line in task.summary_lines())


def test_copies_in_a_class_of_two_are_in_one_part(tmp_path):
    fill(tmp_path, {"cat": 8, "dog": 1})
    shutil.copy(tmp_path / "dog" / "0.png", tmp_path / "dog" / "copy.png")
    task = task_of(tmp_path)
    assert not [name for name in task.test.ids if name.startswith("dog/")] and task.counts[1] == 2


def test_a_prompt_file_made_in_python_knows_its_training_images(tmp_path):
    fill(tmp_path / "photos", {"cat": 9, "dog": 6})
    task = task_of(tmp_path / "photos")
    model = lpt.tune(task, lpt.load_backbone("nano"), method="class_mean", batch_size=4)
    lpt.save_prompt(tmp_path / "a.safetensors", model, method="class_mean", counts=task.counts)
    said = []
    settings = {"data": {"name": "folder", "root": str(tmp_path / "photos")}}
    metrics = serve.evaluate_prompt(tmp_path / "a.safetensors", settings, say=said.append)
    assert metrics["trained_on_left_out"] == 0 and sum(metrics.get("test_counts", [])) in (
        0,
        3,
    )
    assert f"{len(task.test)} test images" in said[0]
    picture(77).save(tmp_path / "photos" / "cat" / "new.png")
    metrics = serve.evaluate_prompt(tmp_path / "a.safetensors", settings, say=said.append)
    assert metrics["trained_on_left_out"] == len(task.train)


# What a prompt file cannot hold is not trained.


@pytest.mark.parametrize("words", [["method.tuning=lora", "method.rank=5000"], ["method.bottleneck=4097"]])
def test_adapters_wider_than_a_prompt_file_holds_are_refused_before_training(tmp_path, capsys, words):
    fill(tmp_path / "photos", {"cat": 5, "dog": 5})
    given = ("backbone.name=nano", "method.name=fine_tune", *words, "--out", tmp_path / "run")
    code, _, err = command(capsys, "fit", tmp_path / "photos", *given)
    assert code == 2 and "4096" in err and not (tmp_path / "run").exists()


def test_folders_that_link_to_each_other_are_named(tmp_path):
    names = [f"c{i}" for i in range(9)]
    fill(tmp_path, dict.fromkeys(names, 1))
    for one in names:
        for other in names:
            if one != other:
                (tmp_path / one / other).symlink_to(tmp_path / other)
    with pytest.raises(DataError, match=r"is there under more than 200 names, one is c\d.*remove such links"):
        task_of(tmp_path)


def test_a_run_that_meets_a_broken_image_says_how_to_go_on(tmp_path, capsys):
    photos = fill(tmp_path / "photos", {"cat": 5, "dog": 5})
    for path in photos.rglob("*.png"):
        if path.name == "1.png":
            path.write_bytes(b"no image")
    words = ("backbone.name=nano", "method.name=class_mean", "train.device=cpu", "--out", tmp_path / "run")
    code, _, err = command(capsys, "fit", photos, *words)
    assert code == 2 and "1.png cannot be decoded" in err
    assert "lpt doctor names all such, data.on_error=skip continues without them" in err
    assert command(capsys, "fit", photos, *words, "data.on_error=skip", "--out", tmp_path / "again")[0] == 0


def test_a_run_on_a_split_that_was_cut_by_hand(tmp_path):
    fill(tmp_path / "photos", {"cat": 9, "dog": 6})
    config = {"backbone": {"name": "nano"}, "data": {"name": "folder", "root": str(tmp_path / "photos")}}
    run.train(resolve({**config, "method": {"name": "class_mean"}}), tmp_path / "run")
    task = task_of(tmp_path / "photos")
    for name in task.train.ids[:5]:  # some of the training images are moved into a test part
        target = tmp_path / "cut" / "test" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "photos" / name, target)
    for name in [*task.train.ids[5:], *task.test.ids]:
        target = tmp_path / "cut" / ("test" if name in task.test.ids else "train") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "photos" / name, target)
    settings = {"data": {"name": "folder", "root": str(tmp_path / "cut")}}
    metrics = serve.evaluate_prompt(tmp_path / "run" / "prompt.safetensors", settings)
    assert metrics["trained_on_left_out"] == 5
