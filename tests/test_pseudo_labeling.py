"""`lpt pseudo-label`: one label for each image, or unsure, right as often as it says."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lpt import run
from lpt.config import resolve
from lpt.errors import LptError
from lpt.prompt_file import read_prompt
from lpt.serve import row_file, streaming
from lpt.serve.pseudo_labeling import Wanted, labeled_images, pseudo_label, report_of
from tests.support.command_line import lpt

NAMES = tuple("abcdefghij")


def write_digits(folder, rows_of_class):
    """Digits as image files in class folders: rows `rows_of_class(k, number)` of class k, in an order drawn once, since
    those of a writer follow each other."""
    pixels, labels = load_digits(return_X_y=True)
    for k, name in enumerate(NAMES):
        own = np.random.default_rng(k).permutation(np.flatnonzero(labels == k))
        for row in own[rows_of_class(k, len(own))]:
            path = folder / name / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            gray = Image.fromarray((pixels[row].reshape(8, 8) * 255 / 16).astype(np.uint8))
            gray.resize((32, 32), Image.Resampling.NEAREST).save(path)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prompt file trained on a long tail of digits, others with labels, and many more to be labeled."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "photos", lambda k, n: slice(0, 36 - 3 * k))
    write_digits(folder / "others", lambda k, n: slice(40, 60))
    write_digits(folder / "pool", lambda k, n: slice(60, 170 - 8 * k))
    (folder / "pool" / "a" / "broken.png").write_bytes(b"no image")
    config = {
        "backbone": {"name": "nano", "flip": False},
        "data": {"name": "folder", "root": str(folder / "photos")},
        "method": {"name": "linear_probe", "epochs": 60, "optimizer": "adamw", "lr": 0.01},
        "train": {"batch_size": 16, "precision": "fp32"},
    }
    run.train(resolve(config), folder / "run")
    return SimpleNamespace(folder=folder, prompt=folder / "run" / "prompt.safetensors", pool=folder / "pool")


def rows_of(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_each_image_has_one_row_whose_label_is_right_as_often_as_expected(made, tmp_path, capsys, suffix):
    out = tmp_path / f"labels{suffix}"
    words = ("pseudo-label", made.prompt, made.pool, "--out", out, "--held-out", made.folder / "others")
    code, said, aside = lpt(capsys, *words, "--precision", 0.9, "--topk", 3)
    assert code == 0, aside
    assert "thresholds are found on 200 images that are given as held out" in aside
    report, rows = json.loads(report_of(out).read_text()), rows_of(out)
    assert len(rows) == len({row["path"] for row in rows}) == report["rows"] == sum(1 for _ in made.pool.rglob("*.png"))
    kinds = {"label": 0, "unsure": 0, "error": 0}
    right = 0
    for row in rows:
        if row.get("error"):
            kinds["error"] += 1
            assert row.get("label") is row.get("sure") is row.get("class") is None
            continue
        limit = report["thresholds"][row["class"]]
        assert row["sure"] == (limit is not None and row["probability"] >= limit)
        assert row["label"] == (row["class"] if row["sure"] else "unsure")
        assert len(row["classes"]) == len(row["probabilities"]) == 3 and row["classes"][0] == row["class"]
        assert row["margin"] == pytest.approx(row["probabilities"][0] - row["probabilities"][1], abs=1e-6)
        kinds["label" if row["sure"] else "unsure"] += 1
        right += row["sure"] and row["label"] == os.path.basename(os.path.dirname(row["path"]))
    total = report["groups"]["all"]
    assert kinds == {"label": total["labeled"], "unsure": report["unsure"], "error": 1} and report["errors"] == 1
    assert f"{kinds['label']} labeled, {kinds['unsure']} unsure, 1 that cannot be read" in said
    expected = total["expected"]["precision"]
    assert expected["low"] - 0.02 <= right / kinds["label"] <= expected["high"] + 0.02 and kinds["label"] > 100
    assert sum(group["labeled"] for name, group in report["groups"].items() if name != "all") == total["labeled"]
    assert [name in said for name in ("many", "medium", "few", "all")] == [True] * 4


def test_a_killed_process_ends_in_the_same_labels(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(row_file, "ROWS_A_PART", 100)
    words = ("pseudo-label", made.prompt, made.pool, "--held-out", made.folder / "others", "--out")
    assert lpt(capsys, *words, tmp_path / "whole.jsonl")[0] == 0
    for i, patched in enumerate(("row_of", "finish")):
        out = tmp_path / f"{i}.jsonl"
        with monkeypatch.context() as patch:
            if patched == "row_of":  # among the images

                def stops(*given, numbers=iter(range(10**6)), **also):  # noqa: B008 - one for all calls
                    if next(numbers) == 250:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return streaming.row_of(*given, **also)

                patch.setattr("lpt.serve.pseudo_labeling.row_of", stops)
            else:  # when the report is written, and labels are not

                def dies(self, change):
                    raise KeyboardInterrupt

                patch.setattr(row_file.RowFile, "finish", dies)
            try:
                code = lpt(capsys, *words, out)[0]
            except KeyboardInterrupt:
                code = 1
        assert code and not out.exists()
        assert "other settings (precision)" in lpt(capsys, *words, out, "--resume", "--precision", 0.8)[2]
        code, said, aside = lpt(capsys, *words, out, "--resume")
        assert code == 0, aside
        assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
        assert report_of(out).read_text() == report_of(tmp_path / "whole.jsonl").read_text()
        assert lpt(capsys, *words, out, "--resume")[:2] == (0, said)


def test_held_out_images_are_none_that_were_trained_on(made, tmp_path):
    said = []
    header = read_prompt(made.prompt).header

    def found(data, folder=None):
        said.clear()
        images, source = labeled_images(made.prompt, header, data, folder, said.append)
        return len(images), source, " ".join(said)

    trained = sum(header.counts)
    everything = sum(36 - 3 * k for k in range(10))
    own = {"root": str(made.folder / "photos")}
    assert found(own)[:2] == (everything - trained, "test images of folder")  # its data: what was split off
    assert found(own, made.folder / "photos")[0] == everything - trained
    write_digits(tmp_path / "mixed", lambda k, n: slice(20 - k, 50))  # some of them
    number, source, text = found(own, tmp_path / "mixed")
    left_out = sum(20 + k + 10 for k in range(10)) - number
    assert source == "given as held out" and 0 < left_out < trained
    assert f"{left_out} of the held-out images were trained on, and are left out" in text and "does not say" not in text
    header = header.model_copy(update={"trained_on": None})
    assert "does not say which images it was trained on" in found(own, tmp_path / "mixed")[2]


def test_mistakes_are_said_before_anything_is_written(made, tmp_path, capsys):
    out = tmp_path / "labels.parquet"
    (tmp_path / "empty").mkdir()
    for words, said in {
        (made.pool, "--precision", 1): "give the share of labels that is to be right",
        (made.pool, "--prior", "flat"): "give images, held-out or training",
        (made.pool, "--held-out", tmp_path / "none"): "none",
        (made.pool,): "data.root is missing",
        (tmp_path / "none", "--held-out", made.folder / "others"): "does not exist",
        (tmp_path / "empty", "--held-out", made.folder / "others"): "holds no image",
        (made.pool, "method.lr=1", "--held-out", made.folder / "others"): "method.lr=1 does not exist",
    }.items():
        code, _, aside = lpt(capsys, "pseudo-label", made.prompt, *words, "--out", out)
        assert code == 2 and said in aside, (words, aside)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("prior", ["held-out", "training"])
def test_frequencies_of_classes_can_be_given(made, tmp_path, prior):
    wanted = Wanted(precision=0.9, prior=prior, held_out=made.folder / "others")
    report = pseudo_label(made.prompt, [made.pool], tmp_path / "labels.parquet", {}, wanted=wanted)
    header = read_prompt(made.prompt).header
    counts = np.array(header.counts) if prior == "training" else np.full(10, 20)
    assert list(report["class_shares"].values()) == pytest.approx((counts / counts.sum()).tolist())
    with pytest.raises(LptError, match="is there already"):
        pseudo_label(made.prompt, [made.pool], tmp_path / "labels.parquet", {}, wanted=wanted)
