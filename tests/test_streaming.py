"""`lpt predict --out`: the answers of `predict_files`, for any number of images, across kills and shards."""

import json
import os
import signal

import pyarrow.parquet as pq
import pytest

from lpt.errors import DataError, LptError
from lpt.serve import open_prompt, predict_files, row_file, streaming
from lpt.serve.opening import check_loading, workers_in
from lpt.serve.predicting import Met, find_images
from lpt.serve.streaming import Shard, predict_to_file
from tests.support.command_line import lpt
from tests.support.pictures import fill, picture


@pytest.fixture
def photos(tmp_path):
    root = fill(tmp_path / "photos", {"a": 9, "b": 7, "=1+1": 4}, kind="jpg")
    (root / "a" / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    (root / "a" / "notes.txt").write_text("words")
    picture(3).save(root / os.fsdecode(b"b\xe9.png"))
    return root


@pytest.fixture
def prompt(finished):
    return finished / "prompt.safetensors"


def rows_of(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_row_for_each_image_says_what_predict_prints(prompt, photos, tmp_path, capsys, suffix):
    out = tmp_path / f"rows{suffix}"
    code, said, aside = lpt(capsys, "predict", prompt, photos, "--out", out, "--topk", 3, "--batch-size", 4)
    assert code == 0, aside
    assert said == f"{out}  22 rows, 1 of them of images that cannot be read\n"
    assert "22 images" in aside and "notes.txt" in aside and "broken.jpg cannot be decoded" in aside
    rows = {row["path"]: row for row in rows_of(out)}
    assert len(rows) == 22 and str(photos / "=1+1" / "0.jpg") in rows
    model, _ = open_prompt(prompt)
    for answer in predict_files(model, find_images([photos]).paths, topk=3):
        row = rows[answer["image"]]
        assert row["task"] == "digits-lt"
        if "error" in answer:
            assert row["error"] == answer["error"] and row.get("class") is None
            continue
        assert row.get("error") is None and row["classes"] == answer["classes"] and row["class"] == row["classes"][0]
        assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
        first, second, _ = row["probabilities"]
        assert row["probability"] == first and row["margin"] == pytest.approx(first - second, abs=1e-6)
    (strange,) = [row for row in rows.values() if row.get("path_bytes")]
    stored = strange["path_bytes"] if suffix == ".parquet" else bytes.fromhex(strange["path_bytes"])
    assert os.path.exists(stored)


def test_without_topk_there_are_no_lists(prompt, photos, tmp_path, capsys):
    lpt(capsys, "predict", prompt, photos / "b", photos / "a" / "0.jpg", "--out", tmp_path / "rows.parquet")
    names = ["path", "class", "probability", "margin", "task", "error", "path_bytes"]
    assert pq.read_schema(tmp_path / "rows.parquet").names == names
    assert len(rows_of(tmp_path / "rows.parquet")) == 8


def test_a_stopped_process_is_gone_on_with_among_the_same_images(prompt, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(row_file, "ROWS_A_PART", 5)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    words = ("predict", prompt, photos, "--batch-size", 2, "--out")
    assert lpt(capsys, *words, whole)[0] == 0
    row_of, number = streaming.row_of, iter(range(100))

    def stops(*given, **also):
        if next(number) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return row_of(*given, **also)

    monkeypatch.setattr(streaming, "row_of", stops)
    code, _, aside = lpt(capsys, *words, out)
    assert code == 128 + signal.SIGTERM and "the same command with --resume continues" in aside and not out.exists()
    picture(8).save(photos / "a" / "00.jpg")  # not there when the list was made
    assert "has been begun" in lpt(capsys, *words, out)[2]
    code, said, aside = lpt(capsys, *words, out, "--resume")
    assert code == 0 and "22 images, 8 of them done before" in aside and "1 of them of images" in said
    assert out.read_text() == whole.read_text()
    code, said, aside = lpt(capsys, *words, out, "--resume")
    assert code == 0 and not said and "is there, and whole" in aside


def test_shares_are_disjoint_and_whole_wherever_the_folder_lies(prompt, photos, tmp_path, capsys):
    names = []
    moved = tmp_path / "moved"
    for i in range(3):
        out = tmp_path / f"{i}.jsonl"
        root = photos if i < 2 else moved
        if i == 2:
            photos.rename(moved)
        assert lpt(capsys, "predict", prompt, root, "--out", out, "--shard", f"{i}/3")[0] == 0
        names += [os.path.relpath(row["path"], root) for row in rows_of(out)]
    assert len(names) == len(set(names)) == 22
    met = [Met(photos, ("a", f"{i}.jpg")) for i in range(2000)]
    for shards in (1, 2, 7):
        share = [{m for m in met if Shard(i, shards).holds(m)} for i in range(shards)]
        assert sum(map(len, share)) == 2000 and min(map(len, share)) > 0.8 * 2000 / shards
        assert share[0] == {m for m in met if Shard(shards, shards).holds(m)}
    assert str(Shard.parsed("0/4")) == str(Shard.parsed("4/4")) == "4/4"
    for text in ("5/4", "1", "a/b", "1/0", "-1/4", "1/4/2"):
        with pytest.raises(LptError, match="give a share of all"):
            Shard.parsed(text)


def test_mistakes_are_said_before_anything_is_loaded_or_written(prompt, photos, tmp_path, capsys, monkeypatch):
    for words, said in {
        (photos, "--out", tmp_path / "a.csv"): "ends in .parquet or .jsonl",
        (photos, "--resume"): "add --out",
        (photos, "--shard", "1/2"): "add --out",
        (photos, "--out", tmp_path / "a.jsonl", "--shard", "3/2"): "1/4, 2/4, 3/4 and 4/4",
        (photos, "--out", tmp_path / "a.jsonl", "--json", tmp_path / "b"): "two ways",
        (tmp_path / "none", "--out", tmp_path / "a.jsonl"): "does not exist",
        ("backbone.weights=x", "--out", tmp_path / "a.jsonl"): "no image is given",
    }.items():
        code, _, aside = lpt(capsys, "predict", prompt, *words)
        assert code == 2 and said in aside, words
    (tmp_path / "empty").mkdir()
    code, _, aside = lpt(capsys, "predict", prompt, tmp_path / "empty", "--out", tmp_path / "a.jsonl")
    assert code == 2 and "holds no image" in aside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "photos"]
    model, _ = open_prompt(prompt)
    with pytest.raises(DataError, match="does not exist"):
        predict_to_file(model, [tmp_path / "none"], tmp_path / "a.jsonl", prompt=prompt)


def test_a_relative_list_is_not_gone_on_with_from_another_folder(prompt, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(row_file, "ROWS_A_PART", 5)
    monkeypatch.chdir(tmp_path)
    row_of, number = streaming.row_of, iter(range(100))

    def fails(*given, **also):
        if next(number) == 7:
            raise OSError(28, "No space left on device")
        return row_of(*given, **also)

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "row_of", fails)
        code, _, aside = lpt(capsys, "predict", prompt, "photos", "--batch-size", 5, "--out", tmp_path / "rows.jsonl")
    assert code == 2 and "cannot be written (No space left on device)" in aside and "--resume" in aside
    monkeypatch.chdir(photos.parent.parent)
    aside = lpt(capsys, "predict", prompt, tmp_path / "photos", "--out", tmp_path / "rows.jsonl", "--resume")[2]
    assert "other settings (images, folder)" in aside
    monkeypatch.chdir(tmp_path)
    assert lpt(capsys, "predict", prompt, "photos", "--out", tmp_path / "rows.jsonl", "--resume")[0] == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 22


def test_workers_are_those_that_are_asked_for_and_change_nothing(prompt, photos, tmp_path, capsys, monkeypatch):
    from lpt.data import loader

    asked = []
    usual = loader.workers_of
    monkeypatch.setattr(loader, "workers_of", lambda wanted, images: asked.append(wanted) or usual(wanted, images))
    texts = []
    for workers in (0, 1):
        out = tmp_path / f"{workers}.jsonl"
        code, _, aside = lpt(capsys, "predict", prompt, photos, f"train.workers={workers}", "--out", out)
        assert code == 0, aside
        texts.append(out.read_text())
        assert lpt(capsys, "predict", prompt, photos, f"train.workers={workers}")[0] == 1  # one image is broken
    assert texts[0] == texts[1] and asked == [0, 0, 1, 1]
    code, _, aside = lpt(capsys, "predict", prompt, photos, "train.workers=-1")
    assert code == 2 and "train.workers" in aside
    assert {"workers"}.isdisjoint(check_loading({"train": {"workers": 3}}, sections=("train",)))
    assert workers_in({"train": {"workers": 3}}) == 3 and workers_in({}) == "auto"
