"""A finished run in its folder: what it was run on, how to run it again, its page and others beside it."""

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpt.data.task import Files, Images
from lpt.engine.history import History
from lpt.errors import LptError
from lpt.files import read_tensors, write_atomic
from lpt.report.page import html

Rows = dict[str, dict[str, Any]]


def split_of(out: Path) -> dict[str, Any]:
    """`split.json` of the run in `out`, empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out / "split.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def command_of(out: Path) -> str:
    """How to run it again."""
    return shlex.join(["lpt", "train", str(out / "config.yaml"), "--out", f"{out}-again"])


def write_page(out: Path, *, test: Images | Files | None = None, against: Sequence[Path] = ()) -> Rows:
    """`report.html` from what a finished run has left in `out`, beside the runs `against`; returns their reports by
    name, the run itself last.

    Raises LptError where a folder holds no finished run, or one on other classes.
    """

    def finished(folder: Path) -> tuple[dict[str, Any], list[str]]:
        try:
            classes = json.loads((folder / "split.json").read_text())["classes"]
            return json.loads((folder / "report.json").read_text()), classes
        except (OSError, ValueError, KeyError):
            raise LptError(f"{folder} holds no finished run: report.json or split.json cannot be read") from None

    report, classes = finished(out)
    if len(against) > 3:
        raise LptError(f"{len(against)} runs are too many beside one: give up to 3")

    def name(folder: Path) -> str:
        whole = folder.resolve()
        alone = sum(other.resolve().name == whole.name for other in (out, *against)) == 1
        return whole.name if alone else f"{whole.parent.name}/{whole.name}"

    others: Rows = {}
    for folder in against:
        other, theirs = finished(folder)
        if theirs != classes:
            raise LptError(f"{folder} is a run on {len(theirs)} other classes: only runs on the same can be compared")
        others[name(folder) if other["data"] == report["data"] else f"{name(folder)} (another split)"] = other
    try:
        predictions = read_tensors(out / "predictions.safetensors")[1]
    except ValueError as error:
        raise LptError(f"{out / 'predictions.safetensors'} cannot be read ({error})") from None
    try:
        text = html(
            report,
            classes=classes,
            predictions=predictions,
            history=History(out / "history.jsonl").lines,
            config=(out / "config.yaml").read_text(),
            command=command_of(out),
            test=test,
            against=others,
        )
    except KeyError as error:
        raise LptError(f"{out} was written by another version of lpt: its report has no {error}") from None
    write_atomic(out / "report.html", text.encode())
    return {**others, name(out): report}
