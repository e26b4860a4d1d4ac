"""A finished run in its folder: what it was run on, how to run it again, its page and others beside it."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpt.data.task import Files, Images
from lpt.engine.history import History
from lpt.errors import LptError
from lpt.files import read_tensors, write_atomic
from lpt.report.audit import audit_of
from lpt.report.page import html
from lpt.report.quoting import shell_command
from lpt.report.search import search_of

Rows = dict[str, dict[str, Any]]
"""Reports by the name of their run."""

MOST_OTHERS = 3  # as many as there are line styles for them


def split_of(out: Path) -> dict[str, Any]:
    """`split.json` of the run in `out`, empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        split = json.loads((out / "split.json").read_text())
        return split if isinstance(split, dict) else {}
    return {}


def command_of(out: Path) -> str:
    """The command line that runs it again, into a folder of its own."""
    return shell_command("lpt", "train", str(out / "config.yaml"), "--out", f"{out}-again")


def write_page(out: Path, *, test: Images | Files | None = None, against: Sequence[Path] = ()) -> Rows:
    """Writes `report.html` from what a finished run has left in `out`, beside the runs in `against`.

    `test` holds the test images to show, None where they are not at hand. Returns the reports by name, that of `out`
    last. Raises LptError where a folder holds no finished run, or one on other classes.
    """
    report, classes = _read_run(out)
    if len(against) > MOST_OTHERS:
        raise LptError(f"{len(against)} runs are too many beside one: give up to {MOST_OTHERS}")
    own_name, *other_names = _run_names([out, *against])
    others: Rows = {}
    for name, folder in zip(other_names, against, strict=True):
        other, other_classes = _read_run(folder)
        if other_classes != classes:
            raise LptError(
                f"{folder} is a run on {len(other_classes)} other classes: only runs on the same can be compared"
            )
        others[name if other["data"] == report["data"] else f"{name} (another split)"] = other
    _write_html(out, report, classes, test, others)
    return {**others, own_name: report}


def _read_run(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(report, class names) of a finished run."""
    try:
        classes = json.loads((folder / "split.json").read_text())["classes"]
        return json.loads((folder / "report.json").read_text()), classes
    except (OSError, ValueError, KeyError):
        raise LptError(f"{folder} holds no finished run: report.json or split.json cannot be read") from None


def _run_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, with the one before where two runs would have one name."""
    paths = [folder.resolve() for folder in folders]
    uses = Counter(path.name for path in paths)
    return [path.name if uses[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths]


def _write_html(
    out: Path, report: Mapping[str, Any], classes: Sequence[str], test: Images | Files | None, others: Rows
) -> None:
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
            search=search_of(out),
            audit=audit_of(out),
        )
    except KeyError as error:
        raise LptError(f"{out} was written by another version of lpt: its report has no {error}") from None
    write_atomic(out / "report.html", text.encode())
