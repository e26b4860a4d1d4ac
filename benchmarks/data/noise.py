"""What the noise of a step costs, by the number of processes: 64 images a process of iNaturalist's 8,142 classes."""

from typing import Any

from benchmarks.data.turns import BEFORE, Pipeline, checkout, rate, rates, ratio


def noise(*, quick: bool) -> list[dict[str, Any]]:
    size: dict[str, Any] = {"rows": 64, "classes": 8142, "draws": 2 if quick else 80}
    with checkout() as old:
        measured = rates(
            {
                "one": Pipeline("noise", world=1, **size),
                "eight": Pipeline("noise", world=8, **size),
                "before": Pipeline("noise", world=8, source=old, **size),
            },
            turns=2 if quick else 15,
        )
    core = "a_core_second"
    return [
        {"ratio": ratio(measured, "one", "eight", of=core), "unit": "cost of a process at 8 processes, of that at 1"},
        {"ratio": ratio(measured, "eight", "before", of=core), "unit": f"times as fast as {BEFORE} at 8 processes"},
        {"value": round(1000 / rate(measured, "one", of=core), 2), "unit": "ms of a step and process at 1 process"},
        {"value": round(1000 / rate(measured, "eight", of=core), 2), "unit": "ms of a step and process at 8 processes"},
        {"value": round(1000 / rate(measured, "before", of=core), 2), "unit": f"ms of that at 8 processes, {BEFORE}"},
    ]
