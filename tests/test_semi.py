"""Semi-supervised splits: totals and tails of the literature, the five shapes, and what the presets differ in."""

import numpy as np
import pytest
import torch

from lpt.data import load_task
from lpt.data.semi import semi_counts, shaped
from lpt.errors import DataError, LptError
from tests.support.cifar import parquet_folder

CONSISTENT = [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]


@pytest.mark.parametrize(
    ("classes", "largest", "gamma", "total", "tail"),
    [
        (10, 500, 100, 1236, 5), (10, 500, 150, 1162, 3), (10, 4000, 100, 9922, 40), (10, 4000, 150, 9329, 26),
        (10, 1500, 100, 3720, 15), (10, 1500, 150, 3496, 10), (10, 3000, 100, 7443, 30), (10, 3000, 150, 6996, 20),
        (100, 50, 10, 1911, 5), (100, 50, 20, 1545, 2), (100, 400, 10, 15_651, 40), (100, 400, 20, 12_719, 20),
        (100, 150, 10, 5835, 15), (100, 150, 20, 4741, 7), (100, 300, 10, 11_720, 30), (100, 300, 20, 9527, 15),
        (10, 150, 10, 609, 15), (10, 150, 20, 507, 7), (10, 450, 10, 1835, 45), (10, 450, 20, 1528, 22),
    ],
)  # fmt: skip
def test_totals_and_tails_are_the_published_ones_in_both_families(classes, largest, gamma, total, tail):
    counts = semi_counts(classes, largest, gamma)
    assert sum(counts) == total and counts[-1] == tail and counts[0] == largest
    assert counts == [int(largest * gamma ** (-k / (classes - 1)) + 1e-9) for k in range(classes)]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("consistent", CONSISTENT),
        ("uniform", [4000] * 10),
        ("reversed", CONSISTENT[::-1]),
        ("middle", [66, 185, 516, 1437, 4000, 2397, 861, 309, 111, 40]),
        ("head-tail", [2397, 861, 309, 111, 40, 66, 185, 516, 1437, 4000]),
    ],
)
def test_the_five_shapes(shape, wanted):
    assert semi_counts(10, 4000, 100) == CONSISTENT
    assert shaped(CONSISTENT, shape) == wanted
    assert shaped(CONSISTENT, "uniform", total=True) == [400] * 10  # USB's


@pytest.mark.parametrize("preset", ["acr", "simpro", "daso", "usb"])
def test_presets_differ_exactly_where_they_should(cifar100_root, preset):
    task = load_task("cifar100-semi", root=str(cifar100_root), preset=preset, gamma_l=20)
    labeled, unlabeled = set(task.train.ids), set(task.unlabeled.ids)
    assert len(labeled) == 1545 and task.counts.tolist() == semi_counts(100, 50, 20)
    if preset == "acr":
        assert labeled < unlabeled and len(unlabeled) == 1545 + 12_719
    else:
        assert labeled.isdisjoint(unlabeled) and len(unlabeled) == 12_719
    assert (task.val is not None) == (preset == "daso")
    if preset == "daso":
        assert torch.bincount(task.val.labels).tolist() == [50] * 100
        assert set(task.val.ids).isdisjoint(labeled | unlabeled)
    other = load_task("cifar100-semi", root=str(cifar100_root), preset=preset, gamma_l=20, seed=1)
    assert (set(other.train.ids) == labeled) == (preset in ("acr", "simpro"))
    assert task.facts["unlabeled_counts"] == torch.bincount(task.unlabeled.labels).tolist()


def test_a_mismatched_tail_and_more_than_there_is(cifar100_root):
    task = load_task("cifar100-semi", root=str(cifar100_root), gamma_u=20, shape="reversed", preset="simpro")
    found = np.bincount(task.unlabeled.labels.numpy())
    assert found.tolist() == semi_counts(100, 400, 20)[::-1] and "12719 unlabeled" in task.summary_lines()[0]
    hashes = {task.manifest()["sha256"], load_task("cifar100-semi", root=str(cifar100_root)).manifest()["sha256"]}
    assert len(hashes) == 2
    with pytest.raises(DataError, match=r"needs 50 labeled and 460 unlabeled images, 500 are there: lower data\.m1"):
        load_task("cifar100-semi", root=str(cifar100_root), m1=460)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n1": 0}, "data.n1: got 0; input should be greater than or equal to 1"),
        ({"m1": -3}, "data.m1: got -3"),
        ({"gamma_l": 0}, "data.gamma_l: got 0"),
        ({"gamma_u": 0}, "data.gamma_u: got 0"),
        ({"gamma_l": float("nan")}, "data.gamma_l: got nan"),
        ({"m1": 99, "shape": "uniform", "preset": "usb"}, "m1 99 in all .* each of 100 classes: use 100 or more"),
    ],
)
def test_counts_that_make_no_split_are_told_before_the_data_is_read(wrong, says):
    with pytest.raises(LptError, match=says):
        load_task("cifar100-semi", root="nowhere", **wrong)


def test_the_manifest_holds_the_unlabeled_counts(tmp_path):
    root = str(parquet_folder(tmp_path))
    manifest = load_task("cifar10-semi", root=root, n1=5, m1=9, gamma_l=4, preset="simpro").manifest()
    assert manifest["counts"] == semi_counts(10, 5, 4) and manifest["unlabeled_counts"] == semi_counts(10, 9, 4)
    assert manifest["parts"]["unlabeled"]["images"] == sum(semi_counts(10, 9, 4))
    with pytest.raises(DataError, match=r"needs 500 labeled and 4600 .* 5000 are there: lower data\.m1 \(now 4600"):
        load_task("cifar10-semi", root=root, m1=4600)


def test_images_held_out_are_no_others(cifar100_root):
    task = load_task("cifar100-semi", root=str(cifar100_root), val_per_class=50)
    assert torch.bincount(task.val.labels).tolist() == [50] * 100
    assert not set(task.val.ids) & {*task.train.ids, *task.unlabeled.ids}
    with pytest.raises(DataError, match="or hold out less than 51"):
        load_task("cifar100-semi", root=str(cifar100_root), val_per_class=51)
