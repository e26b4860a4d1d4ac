"""The benchmarks of many tasks on one backbone, as they are run, on little."""

import importlib

import pytest

from benchmarks.serving.__main__ import GROUPS, line, rows_of
from benchmarks.serving.load import Question, Reply, is_right, times
from lpt.serve.bank import TaskAnswer


def test_every_check_is_a_function():
    names = [check for group in GROUPS for check in group]
    assert len(names) == len(set(names)) and {"memory-1000", "route", "mixed-64/deit_tiny/bf16"} <= set(names)
    for name, _ in GROUPS.values():
        module, _, function = name.partition(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.serving.{module}"), function))


@pytest.mark.parametrize("check", ["mixed-8/deit_tiny/fp32", "peft-mixed/deit_tiny/fp32"])
def test_rows_are_those_that_were_asked_for(check):
    (group,) = (group for group in GROUPS if check in group)
    rows = rows_of(group, quick=True)
    assert {row["check"] for row in rows} == set(group)
    for row in rows:
        assert 0.01 < row["ratio"] < 10 and {"unit", "seconds", "commit", "threads"} <= set(row) and line(row)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["http-64", "overload", "replace"])
def test_a_server_under_load_answers_rightly(check):
    (group,) = (group for group in GROUPS if check in group)
    rows = rows_of(group, quick=True)
    assert {row["check"] for row in rows} == set(group)
    for row in rows:
        assert not row.get("problems") and line(row)
        assert row["value"] == {"overload": 1, "replace": 0}[check] if "value" in row else row["ratio"] > 0


def test_an_answer_is_right_if_it_is_one_of_those_expected():
    answers = [TaskAnswer("a", ("x", "y"), (0.6, 0.4), (1, 2)), TaskAnswer("a", ("y", "x"), (0.7, 0.3), (2, 1))]

    def reply(*pairs):
        classes = [{"name": name, "probability": p} for name, p in pairs]
        return Reply(Question(b"", "a", 0), 200, {"results": [{"classes": classes}]}, 0.0, 0.1)

    assert is_right(reply(("x", 0.6), ("y", 0.4)), answers) and is_right(reply(("y", 0.7), ("x", 0.3)), answers)
    assert not is_right(reply(("x", 0.7), ("y", 0.3)), answers) and not is_right(reply(("y", 0.7), ("z", 0.3)), answers)
    replies = [reply()._replace(seconds=k / 1000) for k in range(1, 102)]
    assert times(replies) == {"p50_ms": 51.0, "p95_ms": 96.0, "p99_ms": 100.0}
    assert times([reply()._replace(status=429)] * 5) == {}
