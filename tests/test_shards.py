"""WebDataset shards: what is in them, in which part, and what is wrong with them in one sentence."""

import io
import json
import tarfile

import pytest
import torch

import lpt
from lpt.data.preprocess import Preprocess
from lpt.data.shards import is_shard
from lpt.errors import DataError
from tests.support.command_line import lpt as command
from tests.support.pictures import picture


def encoded(i, kind="PNG"):
    buffer = io.BytesIO()
    picture(i).save(buffer, kind)
    return buffer.getvalue()


def shard(path, members):
    """A tar file with these (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(numbers, label=lambda i: str(i % 2), ending="cls"):
    """Images with their class behind them."""
    members = []
    for i in numbers:
        members.append((f"{i:04d}.png", encoded(i)))
        if ending:
            members.append((f"{i:04d}.{ending}", label(i).encode()))
    return members


def task_of(root, **settings):
    return lpt.load_task("folder", root=str(root), **settings)


def sizes(task):
    return [len(part) if part else 0 for part in (task.train, task.val, task.test, task.unlabeled)]


@pytest.mark.parametrize(
    ("label", "ending", "classes"),
    [
        (lambda i: str(i % 2), "cls", ("0", "1")),
        (lambda i: f" {['cat', 'owl'][i % 2]}\n", "cls.txt", ("cat", "owl")),
        (lambda i: json.dumps({"label": i % 2, "width": 60}), "json", ("0", "1")),
        (lambda i: json.dumps({"width": 60, "Category": ["Cat", "Owl"][i % 2]}), "JSON", ("Cat", "Owl")),
    ],
)
def test_a_folder_of_shards_and_one_alone(tmp_path, label, ending, classes, capsys):
    shard(tmp_path / "train-000000.tar", samples(range(6), label, ending))
    shard(tmp_path / "train-000001.tar", samples(range(6, 10), label, ending))
    shard(tmp_path / "val-000000.tar", samples(range(10, 14), label, ending))
    task = task_of(tmp_path)
    assert task.classes == classes and sizes(task) == [10, 0, 4, 0] and task.counts.tolist() == [5, 5]
    assert task.train.ids[0] == "train-000000/0000" and task.train.ids[9] == "train-000001/0009"  # in their order
    for i, file in enumerate(task.train.take(torch.arange(10))):
        assert file.content == encoded(i)
    assert Preprocess(size=8).cut(task.test.take(torch.arange(4))).shape == (4, 3, 8, 8)
    assert task.manifest() == task_of(tmp_path).manifest()
    alone = task_of(tmp_path / "train-000000.tar")
    assert sizes(alone) == [4, 0, 2, 0] and "split off" in alone.facts["test_part"]
    code, out, _ = command(capsys, "doctor", tmp_path)
    assert code == 0 and "10 training (train-000000.tar and 1 more)" in out


@pytest.mark.parametrize("names", ["classnames.txt", "classes.txt"])
def test_parts_in_folders_names_beside_and_what_belongs_to_no_image(tmp_path, names):
    shard(tmp_path / "train" / "0.tar", [*samples(range(6)), ("0000.txt", b"a caption"), ("0001.npy", b"numbers")])
    shard(tmp_path / "test" / "0.tar", samples(range(6, 10)))
    shard(tmp_path / "unlabeled" / "0.tar", [*samples(range(10, 13), ending=None), ("._0010.png", b"a sidecar")])
    (tmp_path / "assets").mkdir()
    picture(1).save(tmp_path / "assets" / "preview.png")
    (tmp_path / names).write_bytes("\ufeffred panda\r\nowl\r\n".encode())
    task = task_of(tmp_path)
    assert task.classes == ("red panda", "owl") and sizes(task) == [6, 0, 4, 3]
    assert task.facts["not_read"] == ["train/0.tar/0001.npy"] and task.facts["left_out"] == ["assets/preview.png"]
    assert "other_files" not in task.facts and task.unlabeled.labels.tolist() == [-1, -1, -1]
    (tmp_path / names).write_text("one name\n")
    with pytest.raises(DataError, match="have class 1, and the file of names beside them has 1 names"):
        task_of(tmp_path)


def test_the_class_in_another_key_of_the_json(tmp_path, capsys):
    shard(tmp_path / "a.tar", samples(range(8), lambda i: json.dumps({"kind": "ab"[i % 2]}), "json"))
    with pytest.raises(DataError, match=r"8 images without a class, .* set data\.label_column to its key"):
        task_of(tmp_path)
    assert task_of(tmp_path, label_column="kind").classes == ("a", "b")
    code, out, _ = command(capsys, "doctor", tmp_path / "a.tar", "data.label_column=kind")
    assert code == 0 and "6 training (a.tar), 2 test" in out


def cut_at(whole, member):
    return whole[: tarfile.open(fileobj=io.BytesIO(whole)).getmembers()[member].offset]


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: cut_at(whole, 4),
        lambda whole: cut_at(whole, 5)[:-700],
        lambda whole: cut_at(whole, 4) + b"garbage" * 300 + whole[len(cut_at(whole, 4)) :],
        lambda whole: whole + whole,
    ],
    ids=["after a file", "in a file", "in between", "two in one"],
)
def test_a_damaged_shard_is_named_and_nothing_in_it_is_lost(tmp_path, damage, capsys):
    shard(tmp_path / "train-0.tar", samples(range(6)))
    path = shard(tmp_path / "train-1.tar", samples(range(6, 12)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"shard train-1\.tar (is cut off or damaged after|cannot be read)"):
        task_of(tmp_path)
    code, _, error = command(capsys, "doctor", tmp_path)
    assert code == 2 and "train-1.tar" in error


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([*samples(range(4)), *samples(range(1))], "two images of one key, 0000"),
        ([*samples(range(3)), ("0003.png", encoded(3))], "1 images without a class, the first is a/0003"),
        ([*samples(range(3)), ("0004.json", b"{")], r"has 0004\.json, which is no JSON"),
        ([*samples(range(4), lambda i: '{"label": [1]}', "json")], r"have \[1\] as a class"),
    ],
)
def test_shards_that_do_not_hold_what_they_should(tmp_path, members, said):
    shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=said):
        task_of(tmp_path)


def test_a_backup_is_no_shard(tmp_path):
    backup = shard(tmp_path / "p" / "backup.tar", [("photos/0.png", encoded(0)), ("photos/1.png", encoded(1))])
    assert not is_shard(backup) and is_shard(backup, with_classes=False)
    with pytest.raises(DataError, match=r"no shard \(\.tar with images and their classes\): unpack backup\.tar there"):
        task_of(tmp_path / "p")
    (tmp_path / "p" / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"x\.tar\.gz is a file: unpack it, and give the folder"):
        task_of(tmp_path / "p" / "x.tar.gz")
