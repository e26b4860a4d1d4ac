import pytest
import torch

from lpt.data.longtail import GROUPS, count_fingerprint, long_tail, shot_groups
from lpt.errors import DataError

# Protocols spec section 2: IF, training images, smallest class, groups (few < 20 | few <= 20), count fingerprint.
CIFAR100 = [
    (10, 19_573, 50, (69, 31, 0), (69, 31, 0), "7f990766cbb5e57b"),
    (50, 12_608, 10, (41, 41, 18), (41, 40, 19), "8f43f6eb10ed026f"),
    (100, 10_847, 5, (35, 35, 30), (35, 34, 31), "a86899e02756da51"),
    (200, 9_502, 2, (30, 31, 39), (30, 30, 40), "7b521240327ba674"),
]
CIFAR10 = [
    (10, 20_431, 500, "b6c08295628c1c63"),
    (50, 13_996, 100, "f802a0b00f5b6be0"),
    (100, 12_406, 50, "720e505b6ae0ca4f"),
    (200, 11_203, 25, "18a6f3435ffa1c78"),
]


def sizes(counts, rule):
    return tuple(len(classes) for classes in shot_groups(counts, rule).values())


@pytest.mark.parametrize(("factor", "total", "smallest", "lt20", "le20", "fingerprint"), CIFAR100)
def test_cifar100_lt_is_the_published_tail(factor, total, smallest, lt20, le20, fingerprint):
    counts = long_tail(100, 500, factor)
    assert (len(counts), sum(counts), counts[0], counts[-1]) == (100, total, 500, smallest)
    assert counts == sorted(counts, reverse=True)
    assert sizes(counts, "lt20") == lt20 and sizes(counts, "le20") == le20
    assert sizes(counts, "thirds") == (33, 34, 33)
    assert count_fingerprint(counts) == fingerprint


@pytest.mark.parametrize(("factor", "total", "smallest", "fingerprint"), CIFAR10)
def test_cifar10_lt_is_the_published_tail(factor, total, smallest, fingerprint):
    counts = long_tail(10, 5000, factor)
    assert (len(counts), sum(counts), counts[0], counts[-1]) == (10, total, 5000, smallest)
    assert sizes(counts, "lt20")[2] == sizes(counts, "le20")[2] == 0
    assert sizes(counts, "thirds") == (3, 4, 3)
    assert count_fingerprint(counts) == fingerprint


def test_an_imbalance_factor_of_one_is_balanced():
    assert long_tail(4, 30, 1) == [30] * 4
    assert long_tail(1, 30, 10) == [30]


@pytest.mark.parametrize("factor", [0, -3, float("nan")])
def test_an_imbalance_factor_that_is_not_positive_is_refused(factor):
    with pytest.raises(DataError, match="is not positive: it is n_max / n_min, for example 100"):
        long_tail(10, 100, factor)


def test_a_factor_below_one_is_its_inverse():
    assert long_tail(100, 500, 0.02) == long_tail(100, 500, 50)


@pytest.mark.parametrize(("classes", "wanted"), [(10, [60] * 5 + [6] * 5), (5, [60] * 3 + [6] * 2)])
def test_a_step_has_two_levels(classes, wanted):
    assert long_tail(classes, 60, 10, "step") == wanted


@pytest.mark.parametrize(("rule", "few"), [("lt20", [4, 5]), ("le20", [3, 4, 5])])
def test_groups_split_at_the_boundaries_of_the_rule(rule, few):
    groups = shot_groups([500, 101, 100, 20, 19, 0], rule)
    assert tuple(groups) == GROUPS
    assert groups["many"].tolist() == [0, 1]
    assert groups["few"].tolist() == few
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(6))


def test_thirds_go_by_rank_and_ties_keep_label_order():
    groups = shot_groups(torch.tensor([5, 9, 5, 7, 5, 1, 9]), "thirds")
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "many": [1, 6],
        "medium": [0, 2, 3],
        "few": [4, 5],
    }


def test_thirds_of_two_classes_leave_the_ends_empty():
    assert sizes([5, 3], "thirds") == (0, 2, 0)


def test_an_unknown_rule_is_refused():
    with pytest.raises(DataError, match="unknown group rule 'halves': use lt20, le20 or thirds"):
        shot_groups([1, 2], "halves")


def test_a_fingerprint_ignores_the_order_of_classes_and_sees_every_count():
    assert count_fingerprint([3, 1, 2]) == count_fingerprint(torch.tensor([1, 2, 3]).tolist())
    assert count_fingerprint([3, 2, 1]) != count_fingerprint([3, 2, 2])
    assert count_fingerprint([32, 1]) != count_fingerprint([3, 21])
