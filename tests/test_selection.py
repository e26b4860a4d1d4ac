"""What others would have reported of a run that watches its test set."""

import statistics

import pytest

from lpt.engine.selection import watched


def line(accuracy, phase="semi"):
    looked = {"val": {}} if accuracy is None else {"test": {"class_accuracy": accuracy}}
    return {"phase": phase, "step": 1, **looked}


def test_a_run_that_did_not_look_reports_nothing():
    assert watched([]) is None and watched([line(None), line(None)]) is None


def test_the_last_twenty_evaluations_and_the_best_of_all():
    seen = [0.9, *(0.5 + 0.01 * ((7 * i) % 13) for i in range(24))]
    told = watched([line(None), *map(line, seen)])
    late = sorted(seen[-20:])
    assert told == {
        "evaluations": 25,
        "last": seen[-1],
        "mean20": pytest.approx(sum(late) / 20),
        "median20": pytest.approx((late[9] + late[10]) / 2),
        "best_on_test": 0.9,
    }


def test_fewer_evaluations_than_twenty_are_all_used_and_none_of_an_earlier_phase():
    assert watched([line(0.95, "phase1"), line(0.2), line(0.4), line(0.9)]) == {
        "evaluations": 3,
        "last": 0.9,
        "mean20": pytest.approx(0.5),
        "median20": statistics.median([0.2, 0.4, 0.9]),
        "best_on_test": 0.9,
    }
