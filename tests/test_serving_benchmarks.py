"""The benchmarks of many tasks on one backbone, as they are run, on little."""

import importlib

import pytest

from benchmarks.serving.__main__ import GROUPS, line, rows_of


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
