"""Intervals, the table and the paired bootstrap of rows over seeds."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from lpt.errors import LptError
from lpt.report.over_seeds import bootstrap, class_mean, compared, interval
from lpt.report.suite_page import pareto_front, row_means, suite_html


def test_two_rows_are_compared_by_a_paired_bootstrap(tmp_path):
    labels, rng = np.repeat(np.arange(4), 50), np.random.default_rng(0)
    folders = {}
    for seed in (0, 1):
        for name, chance in (("good", 0.9), ("bad", 0.5)):
            predicted = np.where(rng.random(200) < chance, labels, (labels + 1) % 4)
            folders[name, seed] = place = tmp_path / f"{name}{seed}"
            place.mkdir()
            save_file({"labels": labels, "predicted": predicted}, place / "predictions.safetensors")
    said = compared(folders, "good", "bad")
    low, high = map(float, re.search(r"within ([+-][\d.]+) and ([+-][\d.]+)", said).groups())
    assert 25 < low < 40 < high < 55 and "by seed (0, 1)" in said
    same = compared(folders, "good", "good")
    assert "+0.00 points" in same and "within +0.00 and +0.00" in same
    with pytest.raises(LptError, match="no seed in common"):
        compared({("good", 0): tmp_path / "good0", ("bad", 1): tmp_path / "bad1"}, "good", "bad")
    (tmp_path / "bad1" / "predictions.safetensors").unlink()
    with pytest.raises(LptError, match="bad1 holds no predictions"):
        compared(folders, "good", "bad")


def test_the_bootstrap_covers_a_known_interval():
    rng = np.random.default_rng(1)
    values, labels = rng.choice([-1.0, 0.0, 1.0], 4000), np.repeat(np.arange(4), 1000)
    low, middle, high = bootstrap(values, labels)
    half = 1.96 * values.std() / 4000**0.5
    assert middle == pytest.approx(values.mean()) and high - low == pytest.approx(2 * half, rel=0.1)


def test_the_class_mean_weighs_classes_and_not_images():
    assert class_mean(np.array([1.0, 1, 1, 0]), np.array([0, 0, 0, 1])) == 0.5


def test_intervals_are_student_ts():
    assert interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 · 1 / √3
    assert interval([1.0]) == "1.0" and interval([]) == "n/a"


def a_run(method, seed, class_accuracy, kilobytes, seconds, few=0.5):
    return {
        **{"method": method, "seed": seed, "class_accuracy": class_accuracy, "few": few},
        **{"prompt_bytes": 1000 * kilobytes, "seconds": seconds},
    }


def test_the_front_holds_what_no_other_row_beats():
    rng = np.random.default_rng(4)
    runs = [a_run(f"row{k}", 0, *(rng.integers(1, 9, 3) / (10, 1, 1))) for k in range(40)]
    rows = row_means([f"row{k}" for k in range(40)], runs)
    on_front = {row.name for row in pareto_front(rows)}
    for one in runs:
        beaten = False
        for other in runs:
            better = other["class_accuracy"] >= one["class_accuracy"] and other["prompt_bytes"] <= one["prompt_bytes"]
            better = better and other["seconds"] <= one["seconds"]
            same = all(other[key] == one[key] for key in ("class_accuracy", "prompt_bytes", "seconds"))
            beaten = beaten or (better and not same)
        assert (one["method"] in on_front) == (not beaten)
    assert 1 < len(on_front) < 40


def test_the_page_of_a_suite_says_what_accuracy_costs():
    runs = [a_run("lora", seed, 0.6 + seed / 100, 200, 400) for seed in range(3)]
    runs += [a_run("<probe>", 0, 0.5, 40, 10, few=None), a_run("full", 0, 0.55, 11_000, 500)]
    settings = {"lora": ["method.tuning=lora"], "<probe>": [], "full": [], "not run": []}
    page = suite_html("a suite", settings, runs)
    assert "seconds: lora, &lt;probe&gt;.<" in page and "<probe>" not in page and "not run" not in page
    row = page[page.index('<th scope="row">lora') :]
    row = row[: row.index("</tr>")]
    assert [re.sub("<.*?>", "", cell) for cell in row.split("<td>")[1:]] == ["3", "61.0", "50.0", "200", "400", "yes"]
    assert page.count('role="img"') == 2 and "lora: 61.0 % at 200" in page and "full: 55.0 % at 11,000" in page
    assert "n/a" in page
