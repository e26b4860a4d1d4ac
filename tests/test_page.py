"""The report as people see it: one file, nothing from a network, every part there, names escaped."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_folder import as_files

from lpt import plots, run
from lpt.config import load_config
from lpt.data import Images
from lpt.errors import LptError
from lpt.page import html

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "run"
    small = ["method.epochs=[2, 1]", "method.pool_size=5", "data.val_per_class=2", "train.precision=fp32"]
    run.train(load_config(ROOT / "configs/digits_lt/lpt.yaml", small), out)
    return out


def test_it_is_one_file_without_network_or_script(finished):
    text = (finished / "report.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    outside = [u for u in re.findall(r'(?:src|href)="([^"]*)"', text) if not u.startswith(("data:", "#"))]
    assert outside == [] and "<script" not in text and "@import" not in text
    assert 'name="viewport"' in text and len(text) < 1_000_000


def test_every_part_is_there(finished):
    text, report = (finished / "report.html").read_text(), json.loads((finished / "report.json").read_text())
    for heading in (
        "Accuracy over class rank", "Many, medium, few", "Is its confidence right?", "The worst classes",
        "Which keys were chosen", "Training", "What was run, and how to run it again",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    for value in (report["class_accuracy"], report["few"]):
        assert f"{100 * value:.1f}" in text
    assert report["data"]["split_sha256"] in text and "config.yaml" in text and "pool_size: 5" in text
    assert "held out, few" in text  # there was a held-out part
    assert text.count("<figure>") > 5 and text.count("<svg") == 5


def test_the_stored_predictions_are_those_of_the_report(finished):
    made, report = load_file(finished / "predictions.safetensors"), json.loads((finished / "report.json").read_text())
    right = made["predicted"] == made["labels"]
    assert right.double().mean().item() == report["accuracy"]
    for k, accuracy in enumerate(report["per_class"]):
        assert right[made["labels"] == k].double().mean().item() == pytest.approx(accuracy)


def test_another_run_stands_beside_it(finished, tmp_path):
    copy, other = tmp_path / "mine", tmp_path / "the other"
    shutil.copytree(finished, copy)
    shutil.copytree(finished, other)
    page = copy / "report.html"
    rows = run.report_again(copy, against=[other])
    assert list(rows) == ["the other", "mine"] and rows["mine"] == json.loads((copy / "report.json").read_text())
    assert page.read_text().count("the other") >= 4  # one bar for each group, a line
    shutil.copytree(finished, tmp_path / "x" / "the other")
    assert len(run.report_again(copy, against=[other, tmp_path / "x" / "the other"])) == 3
    named = page.read_text()
    assert f"{tmp_path.name}/the other"[-31:] in named and "x/the other" in named  # two runs of one name stay two
    with pytest.raises(LptError, match="4 runs are too many"):
        run.report_again(copy, against=[other] * 4)
    split = json.loads((other / "split.json").read_text())
    (other / "split.json").write_text(json.dumps(split | {"classes": ["a", "b"]}))
    with pytest.raises(LptError, match="a run on 2 other classes"):
        run.report_again(copy, against=[other])
    with pytest.raises(LptError, match="holds no finished run"):
        run.report_again(tmp_path)
    (copy / "predictions.safetensors").write_bytes(b"x")
    with pytest.raises(LptError, match="cannot be read"):
        run.report_again(copy)


def test_without_the_images_it_says_so(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "mine")
    run.write_page(tmp_path / "mine")
    text = (tmp_path / "mine" / "report.html").read_text()
    assert "The images were not at hand." in text and "<figure>" not in text


def parts(finished):
    report, made = json.loads((finished / "report.json").read_text()), load_file(finished / "predictions.safetensors")
    classes = json.loads((finished / "split.json").read_text())["classes"]
    return dict(classes=classes, predictions=made, history=[], config="", command="lpt"), report


def test_names_are_text_and_not_markup(finished):
    arguments, report = parts(finished)
    arguments["classes"] = [f"<b>{k}</b>&" for k in range(10)]
    text = html(report, **arguments, against={"<i>x": report})
    assert "<b>0</b>&" not in text and "&lt;b&gt;" in text and "<i>x" not in text


def test_empty_groups_unseen_classes_and_thousands_of_them_are_drawn():
    per_class = [None if k % 7 == 0 else k / 3000 for k in range(3000)]
    counts = list(range(3000, 0, -1))
    assert plots.accuracy_by_rank(counts, per_class, "lt20", {}).startswith("<svg")
    assert "n/a" in plots.groups({"this run": {"class_accuracy": 0.5, "many": 0.5, "medium": None, "few": None}})


def test_files_give_thumbnails_and_a_broken_one_is_left_out(finished):
    arguments, report = parts(finished)
    labels = arguments["predictions"]["labels"]
    pixels = torch.zeros(len(labels), 3, 200, 150, dtype=torch.uint8)
    images = Images(pixels, labels, tuple(map(str, range(len(labels)))))
    whole = html(report, **arguments, test=as_files(images))
    broken = html(report, **arguments, test=replace(as_files(images), source=lambda i: b"no image"))
    assert whole.count("<figure>") > 5 and "<figure>" not in broken


def test_the_same_run_gives_the_same_page(finished):
    arguments, report = parts(finished)
    assert html(report, **arguments) == html(report, **arguments)


def test_a_report_of_another_version_is_told(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "mine")
    report = json.loads((finished / "report.json").read_text())
    del report["ece"]
    (tmp_path / "mine" / "report.json").write_text(json.dumps(report))
    with pytest.raises(LptError, match="another version of lpt: its report has no 'ece'"):
        run.report_again(tmp_path / "mine")


def test_names_that_matplotlib_reads_as_formulas_or_hides():
    row = {"class_accuracy": 0.5, "many": 0.5, "medium": 0.2, "few": 0.3}
    assert "frac" in plots.groups({"this run": row, r"$\frac$": row, "_mine": row})
    assert "mine" in plots.accuracy_by_rank([3, 1], [0.5, 0.2], "thirds", {"_mine": [0.4, 0.1]})
