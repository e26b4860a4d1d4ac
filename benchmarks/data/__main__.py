"""How fast images come and predictions go: a row for each comparison.

    python -m benchmarks.data [--json FILE] [--only decode-train,overlap] [--quick]

What is compared runs in turns, in processes that stay: what else the machine does slows all of them. With `--json` a
check's rows are written when they are there, in place of those of the same check before. `--quick` is for tests.
"""

import argparse
import importlib
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from lpt.data.preprocess import available_cores
from lpt.device import versions
from lpt.files import write_atomic

CHECKS = {
    "decode-train": "views:decode_train",
    "decode-test": "views:decode_test",
    "strong-views": "views:strong_views",
    "packed": "packed:packed",
    "overlap": "overlap:overlap",
    "noise-8": "noise:noise",
    "metrics-memory": "metrics:metrics_memory",
    "predict-memory": "predict:predict_memory",
    "startup-help": "startup:startup_help",
    "startup-predict": "startup:startup_predict",
    "startup-lists": "packed:startup_lists",
}
"""A function of a module of this package for each check: `quick` -> rows, each with `ratio` or `value`, and `unit`."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--only", nargs="+", default=list(CHECKS), help=f"checks: {', '.join(CHECKS)}")
    parser.add_argument("--quick", action="store_true", help="fewer images and turns")
    given = parser.parse_args()
    chosen = [check for words in given.only for check in words.split(",") if check]
    if unknown := sorted(set(chosen) - set(CHECKS)):
        parser.error(f"there is no check {', '.join(unknown)}: {', '.join(CHECKS)}")
    for check in chosen:
        rows = rows_of(check, quick=given.quick)
        for row in rows:
            print(line(row), flush=True)
        if given.json:
            before = json.loads(given.json.read_text()) if given.json.exists() else []
            others = [row for row in before if row["check"] != check]
            write_atomic(given.json, json.dumps([*others, *rows], indent=1).encode())


def rows_of(check: str, *, quick: bool) -> list[dict[str, Any]]:
    """The rows of a check, with what it took and where it ran."""
    module, _, function = CHECKS[check].partition(":")
    began = time.perf_counter()
    measured = getattr(importlib.import_module(f"benchmarks.data.{module}"), function)(quick=quick)
    facts = {
        "seconds": round(time.perf_counter() - began, 1),
        "commit": _commit(),
        "cores": available_cores(),
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
    }
    return [{"check": check, **row, **facts} for row in measured]


def line(row: dict[str, Any]) -> str:
    number = f"{row['ratio']:.2f} ×" if "ratio" in row else f"{row['value']:,.4g}"
    return f"{row['check']:16} {number:>12}  {row['unit']}  ({row['seconds']:.0f} s)"


def _commit() -> str:
    return subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
