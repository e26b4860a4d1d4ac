import math
import subprocess
import sys

import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, recall_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from lpt.metrics import (
    brier_score,
    expected_calibration_error,
    geometric_mean,
    harmonic_mean,
    mean_of_present,
    negative_log_likelihood,
    per_class_accuracy,
    row_slices,
    scores,
    summarize,
)


def test_a_hand_worked_case():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3], [0.2, 0.2, 0.6]])
    labels = torch.tensor([0, 0, 1, 2, 2])
    report = summarize(probabilities, labels, torch.tensor([200, 50, 3]))
    # Right: rows 0, 1, 2 and 4; row 3 is a 2 predicted as a 0.
    assert report["accuracy"] == pytest.approx(4 / 5)
    assert report["per_class"] == pytest.approx([1.0, 1.0, 0.5])
    assert report["class_accuracy"] == pytest.approx(2.5 / 3)
    assert (report["many"], report["medium"], report["few"]) == pytest.approx((1.0, 1.0, 0.5))
    assert report["worst_class"] == pytest.approx(0.5)
    assert report["geometric_mean"] == pytest.approx(0.5 ** (1 / 3))
    assert report["harmonic_mean"] == pytest.approx(3 / (1 + 1 + 2))
    assert report["nll"] == pytest.approx(-math.log(0.7 * 0.5 * 0.8 * 0.3 * 0.6) / 5)
    # Rows: .09+.04+.01, .25+.09+.04, .01+.04+.01, .36+.01+.49, .04+.04+.16.
    assert report["brier"] == pytest.approx((0.14 + 0.38 + 0.06 + 0.86 + 0.24) / 5)
    # Confidences .7 .5 .8 .6 .6 in bins of 1/15: .6 ends the ninth, so its two rows (one right) share one bin.
    assert report["ece"] == pytest.approx((0.3 + 0.5 + 0.2 + abs(1 - 1.2)) / 5, abs=1e-6)
    assert report["group_rule"] == "lt20"
    assert report["group_sizes"] == {"many": 1, "medium": 1, "few": 1}


def random_case(name):
    generator = torch.Generator().manual_seed(7)
    num_classes, n = 6, 400
    probabilities = (3 * torch.randn(n, num_classes, generator=generator, dtype=torch.float64)).softmax(1)
    labels = torch.randint(num_classes, (n,), generator=generator)
    if name == "a class is absent":
        labels[labels == 4] = 1
    elif name == "one class only":
        labels[:] = 2
    elif name == "two classes":
        probabilities, labels = probabilities[:, :2] / probabilities[:, :2].sum(1, keepdim=True), labels % 2
    elif name == "one image":
        probabilities, labels = probabilities[:1], labels[:1]
    elif name == "ties":  # argmax takes the first of equal classes
        probabilities = (2 * torch.randint(3, (n, num_classes), generator=generator)).double().softmax(1)
    elif name == "no information":
        probabilities = torch.full((n, num_classes), 1 / num_classes, dtype=torch.float64)
    return probabilities, labels


CASES = pytest.mark.parametrize(
    "case", ["random", "a class is absent", "one class only", "two classes", "one image", "ties", "no information"]
)


@CASES
def test_metrics_agree_with_torchmetrics_and_scikit_learn(case):
    p, y = random_case(case)
    num_classes = p.shape[1]
    report = summarize(p, y, torch.full((num_classes,), 10))
    predicted = p.argmax(1)
    present = y.unique().tolist()

    def accuracy(average):
        return multiclass_accuracy(predicted, y, num_classes=num_classes, average=average)

    assert report["accuracy"] == pytest.approx(accuracy_score(y, predicted), abs=1e-6)
    assert report["accuracy"] == pytest.approx(accuracy("micro").item(), abs=1e-6)
    recall = recall_score(y, predicted, labels=present, average="macro", zero_division=0)
    assert report["class_accuracy"] == pytest.approx(recall, abs=1e-6)
    assert [report["per_class"][k] for k in present] == pytest.approx(accuracy("none")[present].tolist(), abs=1e-6)
    assert [k for k, a in enumerate(report["per_class"]) if a is not None] == present
    ece = multiclass_calibration_error(p, y, num_classes=num_classes, n_bins=15, norm="l1")
    assert report["ece"] == pytest.approx(ece.item(), abs=1e-6)
    assert report["nll"] == pytest.approx(log_loss(y, p, labels=range(num_classes)), abs=1e-6)
    brier = brier_score_loss(y.numpy(), p.numpy(), labels=list(range(num_classes)), scale_by_half=False)
    assert report["brier"] == pytest.approx(brier, abs=1e-6)


def no_nan(value):
    if isinstance(value, dict):
        return all(no_nan(v) for v in value.values())
    if isinstance(value, list):
        return all(no_nan(v) for v in value)
    return not (isinstance(value, float) and math.isnan(value))


@CASES
@pytest.mark.parametrize("rule", ["lt20", "le20", "thirds"])
def test_a_report_never_says_nan(case, rule):
    p, y = random_case(case)
    assert no_nan(summarize(p, y, torch.full((p.shape[1],), 10), group_rule=rule))


def test_empty_groups_are_none():
    p, y = random_case("random")
    report = summarize(p, y, torch.full((6,), 10))
    assert report["many"] is None and report["medium"] is None and report["few"] is not None
    assert report["group_sizes"] == {"many": 0, "medium": 0, "few": 6}


def test_a_group_whose_classes_have_no_test_image_is_none():
    report = summarize(torch.eye(3), torch.arange(3).clamp(max=1), torch.tensor([500, 50, 5]))
    assert report["few"] is None and report["per_class"][2] is None
    assert report["group_sizes"]["few"] == 1


def test_the_group_rule_decides_a_class_of_twenty():
    p, y = random_case("random")
    counts = torch.tensor([500, 500, 50, 50, 20, 20])
    assert summarize(p, y, counts)["few"] is None
    assert summarize(p, y, counts, group_rule="le20")["few"] is not None


def test_per_class_accuracy_is_nan_where_there_is_no_test_image():
    accuracy = per_class_accuracy(torch.tensor([0, 2, 2]), torch.tensor([0, 0, 2]), 4)
    assert accuracy[[0, 2]].tolist() == [0.5, 1.0] and accuracy[[1, 3]].isnan().all()
    assert mean_of_present(accuracy) == 0.75
    assert mean_of_present(torch.full((3,), math.nan)) is None


def test_the_calibration_error_of_a_calibrated_toy_is_zero():
    rows, labels = [], []
    for confidence in (0.6, 0.7, 0.75, 0.9):
        rows += [[confidence, 1 - confidence]] * 100
        labels += [0] * round(100 * confidence) + [1] * (100 - round(100 * confidence))
    assert expected_calibration_error(torch.tensor(rows), torch.tensor(labels)) == pytest.approx(0, abs=1e-6)


def test_the_calibration_error_of_certain_mistakes_is_one():
    assert expected_calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(1)
    assert expected_calibration_error(torch.eye(3), torch.arange(3)) == pytest.approx(0)


def test_the_number_of_bins_matters():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    y = torch.tensor([1, 0])
    assert expected_calibration_error(p, y, bins=1) == pytest.approx(0.25)
    assert expected_calibration_error(p, y, bins=15) == pytest.approx((0.9 + 0.4) / 2)


def test_a_certain_mistake_has_a_finite_log_likelihood():
    assert math.isfinite(negative_log_likelihood(torch.eye(2), torch.tensor([1, 0])))
    assert brier_score(torch.eye(2), torch.tensor([1, 0])) == 2.0


def test_geometric_and_harmonic_means():
    accuracies = torch.tensor([0.25, 1.0, math.nan, 0.5], dtype=torch.float64)
    assert geometric_mean(accuracies) == pytest.approx(0.125 ** (1 / 3))
    assert harmonic_mean(accuracies) == pytest.approx(3 / (4 + 1 + 2))
    zero = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert geometric_mean(zero) == 0.0
    assert harmonic_mean(zero) == pytest.approx(2 / (1e5 + 1))  # protocols spec 10: LIFT's floor of 1e-5
    assert harmonic_mean(zero, floor=0.01) == pytest.approx(2 / 101)
    nothing = torch.full((2,), math.nan)
    assert geometric_mean(nothing) is None and harmonic_mean(nothing) is None


def test_metrics_of_parts_are_those_of_the_whole(monkeypatch):
    p, y = random_case("random")
    counts = torch.tensor([300, 200, 50, 30, 9, 4])
    whole = summarize(p.float(), y, counts)
    monkeypatch.setattr("lpt.metrics.NUMBERS_AT_ONCE", 7 * 6)
    assert len(list(row_slices(*p.shape))) == 58 and summarize(p.float(), y, counts) == whole
    assert torch.equal(p, random_case("random")[0])  # double precision is not written into
    assert [len(column) for column in scores(p[:0], y[:0])] == [0, 0, 0, 0]
    monkeypatch.setattr("lpt.metrics.NUMBERS_AT_ONCE", 1)  # less than a row
    assert summarize(p.float(), y, counts) == whole


MEASURED = """
import resource, sys, torch
from lpt.metrics import summarize
probabilities = torch.full((4000, 8142), 1 / 8142)
labels = torch.arange(4000)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
summarize(probabilities[:300], labels[:300], torch.ones(8142, dtype=torch.long))
before = peak()
summarize(probabilities, labels, torch.ones(8142, dtype=torch.long))
print((peak() - before) / probabilities.nbytes)
"""


def test_metrics_take_no_copy_of_what_they_are_about():
    share = float(subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True).stdout)
    assert share < 0.3  # in double precision a copy would be 2
