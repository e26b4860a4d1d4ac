"""Intervals, the table and the paired bootstrap of rows over seeds."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from lpt.errors import LptError
from lpt.report.over_seeds import bootstrap, class_mean, compared, interval


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
