"""Does it lose work? Kills, faults, hostile files, bad numbers, several processes, long lists, a server: one table.

    python -m benchmarks.reliability [--json FILE] [--only kills,faults] [--quick]

`--quick` is what the tests run: a few kills, fewer files, fewer steps. With `--json` a theme's rows are written when
they are there, in place of those of the same theme before.
"""

import argparse
import importlib
import json
import platform
import subprocess
from pathlib import Path

from benchmarks.reliability.row import Row
from lpt.device import versions
from lpt.files import write_atomic

THEMES = ("kills", "faults", "hostile", "numbers", "processes", "large", "determinism", "answers", "serving")
"""Modules of this package; each has `rows(quick) -> list[Row]`."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--only", default=",".join(THEMES), help=f"themes, separated by commas: {', '.join(THEMES)}")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    chosen = [theme for theme in given.only.split(",") if theme]
    if unknown := sorted(set(chosen) - set(THEMES)):
        parser.error(f"there is no theme {', '.join(unknown)}: {', '.join(THEMES)}")
    commit = subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True).stdout.strip()
    facts = {"commit": commit, "machine": platform.processor() or platform.machine(), "versions": versions()}
    for theme in chosen:
        found = importlib.import_module(f"benchmarks.reliability.{theme}").rows(quick=given.quick)
        for row in found:
            print(line(row), flush=True)
        if given.json:
            before = json.loads(given.json.read_text()) if given.json.exists() else []
            kept = [row for row in before if row["theme"] != theme]
            fresh = [{"theme": theme, **row._asdict(), "passed": row.passed, **facts} for row in found]
            write_atomic(given.json, json.dumps([*kept, *fresh], indent=1).encode())


def line(row: Row) -> str:
    said = "pass" if row.passed else "FAIL"
    return (
        f"{said}  {row.check}: {row.survived} of {row.tried} survived, {row.lost} lost, {row.seconds:.0f} s  {row.note}"
    )


if __name__ == "__main__":
    main()
