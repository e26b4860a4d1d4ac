"""The report as people see it: one file, nothing from a network, every part there, names escaped."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lpt.data import Images
from lpt.report import plots
from lpt.report.page import html
from tests.support.pictures import as_files


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
    assert "n/a" in plots.accuracy_by_group(
        {"this run": {"class_accuracy": 0.5, "many": 0.5, "medium": None, "few": None}}
    )


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


def test_names_that_matplotlib_reads_as_formulas_or_hides():
    row = {"class_accuracy": 0.5, "many": 0.5, "medium": 0.2, "few": 0.3}
    assert "frac" in plots.accuracy_by_group({"this run": row, r"$\frac$": row, "_mine": row})
    assert "mine" in plots.accuracy_by_rank([3, 1], [0.5, 0.2], "thirds", {"_mine": [0.4, 0.1]})
