"""What many tasks on one backbone cost, and how well images find theirs: a row for each comparison.

    python -m benchmarks.serving [--json FILE] [--only mixed-64,route] [--quick]

Forms of a batch are measured in turns in one process: what else the machine does slows all of them. With `--json` rows
are written when they are there, in place of those of the same check before. `--quick` is for tests.
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

MIXED = ("mixed-1", "mixed-8", "mixed-64", "mixed-200", "per-task-forward")
KINDS = ("mixed-8-pool", "mixed-64-pool", "mixed-8-lora", "mixed-64-lora", "lora-sub-batches-8", "lora-sub-batches-64",
         "mixed-methods")  # fmt: skip
GROUPS: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    tuple(f"{name}/{model}/{precision}" for name in names): (function, (model, precision))
    for names, function, cases in (
        (MIXED, "mixed:mixed", (("deit_tiny", "bf16"), ("deit_tiny", "fp32"), ("vit_base", "bf16"))),
        (KINDS, "mixed:kinds", (("deit_tiny", "fp32"),)),
        (("peft-mixed", "peft-mixed-64"), "mixed:peft_mixed", (("deit_tiny", "fp32"),)),
    )
    for model, precision in cases
}
GROUPS |= {
    ("memory-1000", "memory-1000-pool", "memory-1000-pool/budget"): ("memory:memory_1000", ()),
    ("route", "route-strangers"): ("route:route", ()),
    ("http-1", "http-8", "http-64"): ("http:http", ("deit_tiny", "fp32")),
    ("overload",): ("http:overload", ()),
    ("replace",): ("http:replace", ()),
}
"""Checks that are measured together: a function of a module of this package, and what it is given."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path)
    checks = [check for group in GROUPS for check in group]
    parser.add_argument("--only", nargs="+", default=[], help=f"checks, or how they begin: {', '.join(checks)}")
    parser.add_argument("--quick", action="store_true", help="fewer tasks, small images")
    given = parser.parse_args()
    wanted = [check for words in given.only for check in words.split(",") if check]
    if unknown := [word for word in wanted if not any(_is_meant(check, word) for check in checks)]:
        parser.error(f"there is no check {', '.join(unknown)}: {', '.join(checks)}")
    for group in GROUPS:
        chosen = [check for check in group if not wanted or any(_is_meant(check, word) for word in wanted)]
        if not chosen:
            continue
        rows = [row for row in rows_of(group, quick=given.quick) if row["check"] in chosen]
        for row in rows:
            print(line(row), flush=True)
        if given.json:
            before = json.loads(given.json.read_text()) if given.json.exists() else []
            others = [row for row in before if row["check"] not in chosen]
            write_atomic(given.json, json.dumps([*others, *rows], indent=1).encode())


def _is_meant(check: str, word: str) -> bool:
    """Whether `word` is the check, or whole parts of its beginning."""
    return check == word or check.startswith(f"{word}/")


def rows_of(group: tuple[str, ...], *, quick: bool) -> list[dict[str, Any]]:
    """The rows of checks that are measured together, with what it took and where it ran."""
    name, arguments = GROUPS[group]
    module, _, function = name.partition(":")
    began = time.perf_counter()
    rows = getattr(importlib.import_module(f"benchmarks.serving.{module}"), function)(*arguments, quick=quick)
    commit = subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True).stdout.strip()
    facts = {
        "seconds": round(time.perf_counter() - began, 1),
        "commit": commit,
        "cores": available_cores(),
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
    }
    return [{**row, **facts} for row in rows]


def line(row: dict[str, Any]) -> str:
    number = f"{row['ratio']:.3f} ×" if "ratio" in row else f"{row['value']:,.4g}"
    return f"{row['check']:32} {number:>10}  {row['unit']}  ({row['seconds']:.0f} s)"


if __name__ == "__main__":
    main()
