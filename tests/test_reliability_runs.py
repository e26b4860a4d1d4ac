"""The quick forms of the reliability table's rows on kills, faults and determinism."""

import pytest

from benchmarks.reliability import determinism, faults, kills
from benchmarks.reliability.__main__ import line


@pytest.mark.parametrize("theme", [kills, faults, determinism], ids=lambda theme: theme.__name__.split(".")[-1])
def test_nothing_is_lost(theme):
    for row in theme.rows(quick=True):
        assert row.passed, line(row)
