"""The benchmarks of packs and of long lists, as they are run, on little."""

import importlib

import pytest

from benchmarks.data import packed
from benchmarks.data.__main__ import CHECKS, rows_of


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_is_a_function(check):
    module, _, function = CHECKS[check].partition(":")
    assert callable(getattr(importlib.import_module(f"benchmarks.data.{module}"), function))


def test_rows_say_what_and_where_they_were_measured():
    (of_probabilities, of_logits) = rows_of("metrics-memory", quick=True)
    assert of_probabilities["ratio"] < 2.5 > of_logits["ratio"]  # with one fp64 copy of all it would be 3
    assert {"check", "ratio", "unit", "seconds", "commit", "cores", "versions"} <= set(of_logits)


def test_packs_are_compared_with_their_files():
    rows = packed.packed(quick=True)
    assert [row["unit"] for row in rows if "ratio" in row] == [
        "training views/s of a pack against its files, warm",
        "training views/s of a pack against its files, cold",
    ]
    assert all(row.get("ratio", row.get("value")) > 0 for row in rows)


def test_long_lists_have_as_many_rows_as_were_published():
    from lpt.data.lists import PUBLISHED

    for published in PUBLISHED.values():
        counts = packed._counts(published, 1)
        assert (len(counts), sum(counts)) == (published.classes, published.train) and min(counts) >= published.smallest
    rows = packed.startup_lists(quick=True)
    assert len(rows) == 6 and all(row["value"] >= 0 for row in rows)
