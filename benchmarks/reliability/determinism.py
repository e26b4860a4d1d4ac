"""The same seed, settings and machine give the same results, wherever a run lies and is started from; a split's hash
depends on neither the order of files on the disk nor the working directory."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.row import Row
from benchmarks.reliability.runs import (
    Plan,
    differences,
    digits_as_files,
    finished,
    lpt_plan,
    two_stage_plan,
    ulfine_plan,
)
from lpt.data import load_task


def rows(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="lpt-same-") as made:
        folder = Path(made).resolve()
        if quick:
            return [same_again([ulfine_plan(folder, steps=4)], folder), same_hash(folder)]
        plans = [lpt_plan(1, 1), two_stage_plan(folder), ulfine_plan(folder)]
        return [same_again(plans, folder), same_hash(folder), threads(lpt_plan(1, 1), folder)]


def same_again(plans: list[Plan], folder: Path) -> Row:
    """Each plan twice: from the checkout with absolute paths, and from where its files lie with relative ones."""
    began, different = time.perf_counter(), []
    for plan in plans:
        finished(plan, folder / plan.name)
        (folder / "elsewhere").mkdir(exist_ok=True)
        moved = [f"data.{key}=../{place}" for key, place in (("root", "photos"), ("unlabeled", "more"))]
        again = plan.with_(*moved) if plan.name == "ULFine" else plan
        finished(again, Path(plan.name), cwd=folder / "elsewhere")
        if found := differences(folder / plan.name, folder / "elsewhere" / plan.name):
            different.append(f"{plan.name}: {', '.join(found)} differ")
    names = ", ".join(plan.name for plan in plans)
    note = f"{names}: twice, in two folders, from two working directories, with absolute and relative paths"
    good, seconds = len(plans) - len(different), time.perf_counter() - began
    return Row("the same run again", len(plans), good, len(different), seconds, "; ".join([note, *different]))


def same_hash(folder: Path) -> Row:
    """The split of the same images by another order of the directory, another order of writing, a relative root, a root
    through a link, and a table with absolute paths."""
    began, different = time.perf_counter(), []
    digits_as_files(folder)
    photos = folder / "photos"

    def hashed(root: str | Path) -> str:
        settings: dict[str, Any] = {"val_per_class": 1, "unlabeled": str(Path(root).parent / "more")}
        return load_task("folder", root=str(root), **settings).manifest()["sha256"]

    whole = hashed(photos)
    with _reversed_directories():
        found = {"another order of the directory": hashed(photos)}
    for name in ("photos", "more"):
        for path in sorted((folder / name).rglob("*.png"), reverse=True):
            copy = folder / "copied" / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    found["another order of writing"] = hashed(folder / "copied" / "photos")
    (folder / "link").symlink_to(folder / "copied")
    found["a link"] = hashed(folder / "link" / "photos")
    with contextlib.chdir(folder):
        found["a relative root"] = hashed("photos")
    with contextlib.chdir(photos):
        found["a relative root from inside"] = hashed("../photos")
    different = [f"{name} changes it" for name, value in found.items() if value != whole]
    files = sorted(photos.rglob("*.png"))
    lines = "".join(json.dumps({"file_name": str(path), "label": path.parent.name}) + "\n" for path in files)
    (photos / "metadata.jsonl").write_text(lines)
    listed = hashed(photos)
    with contextlib.chdir(folder):
        found["a table with absolute paths"] = hashed("photos")
    (photos / "metadata.jsonl").unlink()
    if found["a table with absolute paths"] != listed:
        different.append("a table with absolute paths and a relative root change it")
    note, seconds = "; ".join([*found, *different]), time.perf_counter() - began
    return Row("the same split hash", len(found), len(found) - len(different), len(different), seconds, note)


@contextlib.contextmanager
def _reversed_directories() -> Iterator[None]:
    """Directories that list their entries from the last name to the first."""
    scandir, listdir = os.scandir, os.listdir

    class Backwards(list[Any]):
        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def __next__(self) -> Any:
            if not self:
                raise StopIteration
            return self.pop(0)

        def close(self) -> None:
            pass

    def backwards(*place: Any) -> Backwards:
        with scandir(*place) as entries:
            return Backwards(sorted(entries, key=lambda entry: entry.name, reverse=True))

    os.scandir, os.listdir = backwards, lambda *place: sorted(listdir(*place), reverse=True)
    try:
        yield
    finally:
        os.scandir, os.listdir = scandir, listdir


def threads(plan: Plan, folder: Path) -> Row:
    """Two threads in fp32, twice: the promise is for the same machine and settings. One thread is told in the note."""
    began, places = time.perf_counter(), []
    for name, number in (("one thread", "1"), ("two threads", "2"), ("two threads again", "2")):
        places.append(folder / name)
        finished(plan.with_("train.precision=fp32"), places[-1], environment={"OMP_NUM_THREADS": number})
    found, between = differences(places[1], places[2]), differences(places[0], places[1])
    note = f"twice with two threads: {', '.join(found)} differ" if found else "twice with two threads: the same bits"
    wrong = f"; with one thread, which nobody promises, others in {', '.join(between)}" if between else ""
    good, seconds = int(not found), time.perf_counter() - began
    return Row("the same with two threads, fp32", 1, good, 1 - good, seconds, note + wrong)
