"""Runs that are killed at random moments and go on with --resume end in the same bits; Ctrl-C and SIGTERM save first.

Kills fall uniformly over what is left of a run, some within its first seconds, some while it writes its results.
"""

import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.reliability.row import Row
from benchmarks.reliability.runs import (
    Plan,
    broken,
    deit_plan,
    differences,
    ended,
    finished,
    half_written,
    lpt_plan,
    started,
    step_of,
    two_stage_plan,
    ulfine_plan,
)

START = 5.0
"""Seconds that a process takes before it trains, about: what a kill costs besides."""
KINDS = ("left", "end", "left", "first", "left")
"""When kills fall, in turn: within what is left of the run, while it writes results, within its first seconds."""
OFTEN = "train.checkpoint_seconds=0.3"


class Undisturbed(NamedTuple):
    """A run that nothing happened to: what others are compared with, its seconds, and those of writing results."""

    folder: Path
    seconds: float
    writing: float


class Beaten(NamedTuple):
    """What became of a run under kills; `half` is the largest number of temporary files there at any time."""

    survived: int
    ends: int
    runs: int
    different: list[str]
    amiss: list[str]
    half: int


def rows(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="lpt-kills-") as made:
        folder = Path(made)
        if quick:
            return of_plan(ulfine_plan(folder, steps=8), folder, kills=2, asked=())
        plans = {lpt_plan(2, 2): 24, ulfine_plan(folder): 20, two_stage_plan(folder): 20}
        if deit := deit_plan():
            plans[deit] = 6
        both = (signal.SIGTERM, signal.SIGINT)
        return [row for plan, kills in plans.items() for row in of_plan(plan, folder, kills=kills, asked=both)]


def of_plan(plan: Plan, folder: Path, *, kills: int, asked: Sequence[signal.Signals]) -> list[Row]:
    """A row for `kills` of `plan`, and one for the signals in `asked` if there are any."""
    began, whole = time.perf_counter(), undisturbed(plan, folder)
    beaten = beat(plan, folder / f"{plan.name} killed", whole, kills=kills, chance=random.Random(kills))
    note = (
        f"{beaten.ends} of them while results were written; {beaten.runs} runs to their end, equal to an undisturbed "
        f"one but for times where nothing else is said; at most {beaten.half} temporary files left"
    )
    wrong = [*beaten.amiss, *beaten.different]
    seconds = time.perf_counter() - began
    killed = Row(f"SIGKILL, {plan.name}", kills, beaten.survived, len(wrong), seconds, "; ".join([note, *wrong]))
    if not asked:
        return [killed]
    began = time.perf_counter()
    wrong = [text for number in asked if (text := stop(plan, folder / f"{plan.name} {number.name}", whole, number))]
    note = "; ".join(wrong) or "it saved after its step, exit code 128 + signal, resumed to the same results"
    names, good = " and ".join(number.name for number in asked), len(asked) - len(wrong)
    return [killed, Row(f"{names}, {plan.name}", len(asked), good, len(wrong), time.perf_counter() - began, note)]


def undisturbed(plan: Plan, folder: Path) -> Undisturbed:
    """Runs `plan` once, in `folder` under its own name."""
    out, began = folder / plan.name, time.perf_counter()
    finished(plan.with_(OFTEN), out)
    seconds = time.perf_counter() - began
    first, last = ((out / name).stat().st_mtime for name in ("prompt.safetensors", "report.html"))
    return Undisturbed(out, seconds, last - first)


def beat(plan: Plan, out: Path, whole: Undisturbed, *, kills: int, chance: random.Random) -> Beaten:
    """Runs `plan` until it has been killed `kills` times, and then to its end. A run that ends before is compared and
    followed by another."""
    done, survived, ends, run, half, left = 0, 0, 0, 0, 0, whole.seconds
    different: list[str] = []
    amiss: list[str] = []
    place = out.with_name(f"{out.name} {run}")
    while True:
        kind = KINDS[done % len(KINDS)] if done < kills else ""
        before = _written_at(place)
        began, process = time.perf_counter(), started(plan.with_(OFTEN), place, resume=place.exists())
        if kind == "end":
            while process.poll() is None and _written_at(place) == before:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, whole.writing))
        elif kind:
            until = began + chance.uniform(0, START if kind == "first" else left)
            while process.poll() is None and time.perf_counter() < until:
                time.sleep(0.01)
        killed = bool(kind) and process.poll() is None
        if killed:
            process.kill()
        end = ended(process)
        if killed and end.code == -signal.SIGKILL:
            done += 1
            ends += kind == "end"
            left = max(START, left - max(0.0, time.perf_counter() - began - START))
            half = max(half, half_written(place))
            found = broken(place) if place.exists() else []
            survived += not found
            amiss += found
            continue
        run += 1
        if end.code:
            survived -= 1  # the kill before was not survived after all
            amiss.append(f"went on to exit code {end.code}: {end.err.strip().splitlines()[-1]}")
        else:
            different += [f"{name} differs" for name in differences(whole.folder, place)]
            half = max(half, half_written(place))
        if done >= kills:
            return Beaten(survived, ends, run, different, amiss, half)
        place, left = out.with_name(f"{out.name} {run}"), whole.seconds


def _written_at(out: Path) -> int:
    """When the prompt file was written, the first of the results; 0 before."""
    place = out / "prompt.safetensors"
    return place.stat().st_mtime_ns if place.exists() else 0


def stop(plan: Plan, out: Path, whole: Undisturbed, number: signal.Signals) -> str:
    """Sends a signal after the first epoch, in a run that saves only when it must; returns what was amiss, or nothing.

    The step after which the loop ends is asked for in tests of the loop; here it is no earlier than what the history
    tells of, and the resumed run says that it goes on from there.
    """
    process = started(plan.with_("train.checkpoint_seconds=1e9"), out)
    while process.poll() is None and not ((out / "history.jsonl").exists() and (out / "history.jsonl").stat().st_size):
        time.sleep(0.01)
    time.sleep(0.25)
    process.send_signal(number)
    end = ended(process)
    if end.code != 128 + number:
        return f"{number.name}: exit code {end.code}"
    if "the same command with --resume --out" not in end.err or "Traceback" in end.err:
        return f"{number.name}: it said {end.err!r}"
    if found := broken(out):
        return f"{number.name}: {found[0]}"
    phases = [path for path in (out / "checkpoints").glob("*.safetensors") if "-" not in path.stem]
    if not phases:
        return f"{number.name}: there is no checkpoint"
    newest = max(phases, key=lambda path: path.stat().st_mtime_ns)
    there = (f"{newest.stem}: goes on at step {step_of(newest)} of", f"{newest.stem}: finished before")
    again = finished(plan.with_(OFTEN), out, resume=True)
    if not any(text in again.out for text in there):
        return f"{number.name}: the resumed run does not say {there[0]!r}"
    if found := differences(whole.folder, out):
        return f"{number.name}: {', '.join(found)} differ"
    return ""
