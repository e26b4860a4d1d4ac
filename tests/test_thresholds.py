"""Thresholds by counting, and what they promise of images that they were not chosen on."""

import math

import numpy as np
import pytest

from lpt.serve.thresholds import HeldOut, choose, class_shares, expected, interval, thresholds, weights


def made(rng, number_of_each, *, noise=1.6):
    """(predicted, confidence, truth) of a model that is sure of what it says, and likes the first classes."""
    classes = len(number_of_each)
    truth = np.repeat(np.arange(classes), number_of_each)
    logits = 6.0 * np.eye(classes)[truth] + noise * rng.normal(size=(len(truth), classes))
    probabilities = np.exp(logits + np.linspace(1.2, -0.5, classes))
    probabilities /= probabilities.sum(1, keepdims=True)
    return probabilities.argmax(1), probabilities.max(1), truth


def plain(predicted, confidence, truth, *, shares=None):
    return HeldOut(predicted, confidence, truth, np.ones(len(truth)) if shares is None else weights(truth, shares))


def test_a_threshold_is_the_smallest_with_which_own_and_group_images_are_right_often_enough():
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.2, 3, 60)
    held_out = HeldOut(rng.integers(0, 4, 60), rng.choice(np.linspace(0.3, 1, 15), 60), rng.integers(0, 4, 60), weight)
    held_out.truth[held_out.confidence > 0.6] = held_out.predicted[held_out.confidence > 0.6]
    group_of, wanted = np.array([0, 0, 2, 2]), np.array([0.8, 0.9, 0.7])

    def share(rows):
        w = held_out.weight[rows]
        return (held_out.is_right[rows] @ w / w.sum(), w.sum() ** 2 / (w @ w)) if rows.any() else (0.0, 0.0)

    for k, found in enumerate(thresholds(held_out, group_of, wanted)):
        in_group = group_of[held_out.predicted] == group_of[k]
        enough = []
        for step in np.unique(held_out.confidence[in_group]):
            own, images = share((held_out.predicted == k) & (held_out.confidence >= step))
            of_group, others = share(in_group & (held_out.confidence >= step))
            of_group *= others / (others + 1)
            if (images * own + 10 * of_group) / (images + 10) >= wanted[group_of[k]]:
                enough.append(step)
        assert found == min(enough, default=math.inf)


def test_classes_without_held_out_images_have_the_threshold_of_their_group_and_bad_ones_none():
    rng = np.random.default_rng(1)
    predicted = np.repeat([0, 1], 200)
    truth = np.where(rng.random(400) < np.where(predicted == 0, 0.99, 0.3), predicted, 2)
    found = thresholds(plain(predicted, np.full(400, 0.9), truth), np.array([0, 1, 0]), np.array([0.9, 0.9, 0.9]))
    assert found[0] == found[2] == 0.9 and found[1] == math.inf
    nothing = plain(*3 * [np.empty(0, dtype=int)])
    assert class_shares(nothing.predicted, nothing.truth, np.array([3, 0, 1])).sum() == pytest.approx(1)


@pytest.mark.parametrize("each", [10, 20, 50])
def test_what_is_expected_is_what_comes_of_images_with_other_frequencies(each):
    rng, classes = np.random.default_rng(each), 60
    group_of = np.repeat([0, 1, 2], 20)
    long_tail = np.array([int(400 * 20 ** (-k / (classes - 1))) for k in range(classes)])
    predicted, confidence, truth = made(rng, np.full(classes, each))
    pool, sure, right = made(rng, long_tail)
    shares = class_shares(predicted, truth, np.bincount(pool, minlength=classes))
    # Much nearer than what is held out, where each class is as frequent.
    off = np.abs(shares - long_tail / long_tail.sum()).sum()
    assert off < 0.3 * np.abs(1 / classes - long_tail / long_tail.sum()).sum()
    held_out = plain(predicted, confidence, truth, shares=shares)
    chosen = choose(held_out, group_of, 0.95)
    is_sure = sure >= chosen.thresholds[pool]
    for classes in (group_of == 0, group_of == 1, group_of == 2, group_of >= 0):
        inside = classes[pool]
        found = expected(held_out, chosen, classes, int(inside.sum()), int((inside & is_sure).sum()))
        assert found["precision"]["estimate"] >= 0.95 and found["held_out_kept"] <= found["held_out_images"]
        precision, coverage = (pool == right)[inside & is_sure].mean(), is_sure[inside].mean()
        assert found["precision"]["low"] - 0.01 < precision < found["precision"]["high"] + 0.01
        assert found["coverage"]["low"] - 0.06 < coverage < found["coverage"]["high"] + 0.06


def test_a_group_of_nothing_is_unknown_and_an_unreachable_precision_labels_nothing():
    predicted, confidence, truth = made(np.random.default_rng(2), np.full(6, 10), noise=8)
    held_out, group_of = plain(predicted, confidence, truth), np.array([0, 0, 0, 2, 2, 2])
    chosen = choose(held_out, group_of, 0.9999)
    assert np.isinf(chosen.thresholds).all() and not chosen.kept.any()
    nothing = {"precision": None, "coverage": None, "held_out_images": 0, "held_out_kept": 0}
    assert expected(held_out, chosen, group_of == 1, 5, 0) == nothing
    found = expected(held_out, chosen, group_of >= 0, 5, 0)
    assert found["precision"] is None and found["coverage"]["estimate"] == 0


def test_wilsons_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    for share, images in ((0.95, 40), (0.5, 20), (0.99, 200)):
        hits = 0
        for _ in range(400):
            found = interval(rng.random(images) < share, np.ones(images))
            hits += found["low"] <= share <= found["high"]
        assert 0.91 <= hits / 400 <= 0.99
    same = interval(np.array([True, False]).repeat(5), np.ones(10))
    assert interval(np.array([True, False]).repeat(5), np.full(10, 7.0)) == pytest.approx(same)
    wide = interval(np.array([True, False, True, False, True, False]), np.array([9.0, 9.0, 1.0, 1.0, 1.0, 1.0]))
    assert wide["estimate"] == pytest.approx(11 / 22) and wide["high"] - wide["low"] > same["high"] - same["low"]
    assert interval(np.empty(0), np.empty(0)) is None
    few = interval(np.arange(100) < 95, np.ones(100), among=20)  # of twenty others chance decides more
    assert few["low"] < interval(np.arange(100) < 95, np.ones(100))["low"] and few["estimate"] == 0.95
