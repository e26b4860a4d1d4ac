"""Runs that are killed at random moments and continue with --resume end in the same bits; Ctrl-C and SIGTERM save
first.

Most kills fall within a phase, soon or late after a checkpoint; some while a process starts, some while it writes its
results. Each life of a run has to continue where the checkpoints of the one before it had been.
"""

import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

from benchmarks.reliability.row import Row
from benchmarks.reliability.runs import (
    Plan,
    broken,
    deit_plan,
    differences,
    ended,
    finished,
    forgot,
    half_written,
    lpt_plan,
    saved,
    started,
    two_stage_plan,
    ulfine_plan,
)

KINDS = ("phase", "phase", "end", "phase", "start", "phase", "phase")
"""When kills fall, in turn: within a phase, while results are written, before the first checkpoint of a process."""
OFTEN = "train.checkpoint_seconds=0.3"


class Undisturbed(NamedTuple):
    """A run that nothing happened to: what others are compared with, the seconds until its first checkpoint, from there
    to its results, and those of writing them."""

    folder: Path
    starting: float
    training: float
    writing: float


class Beaten(NamedTuple):
    """What became of a run under kills; `where` they fell, by what was saved; `half` is the largest number of temporary
    files there at any time."""

    survived: int
    where: Counter[str]
    runs: int
    different: list[str]
    amiss: list[str]
    half: int


def rows(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="lpt-kills-") as made:
        folder = Path(made)
        if quick:
            return of_plan(ulfine_plan(folder, steps=16), folder, kills=2, asked=())
        plans = {lpt_plan(2, 2): 24, ulfine_plan(folder): 20, two_stage_plan(folder): 20}
        if deit := deit_plan():
            plans[deit] = 6
        both = (signal.SIGTERM, signal.SIGINT)
        return [row for plan, kills in plans.items() for row in of_plan(plan, folder, kills=kills, asked=both)]


def of_plan(plan: Plan, folder: Path, *, kills: int, asked: Sequence[signal.Signals]) -> list[Row]:
    """A row for `kills` of `plan`, and one for the signals in `asked` if there are any."""
    began, whole = time.perf_counter(), undisturbed(plan, folder)
    beaten = beat(plan, folder / f"{plan.name} killed", whole, kills=kills, chance=random.Random(kills))
    fell = ", ".join(f"{number} {where}" for where, number in beaten.where.most_common())
    note = (
        f"{fell}; {beaten.runs} runs to their end, equal to an undisturbed one but for times where nothing else is "
        f"said; at most {beaten.half} temporary files left"
    )
    wrong = [*beaten.amiss, *beaten.different]
    if 2 * beaten.where["within a phase"] < kills:
        wrong.append("less than half of the kills fell within a phase")
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
    out, began = folder / plan.name, time.time()
    process = started(plan.with_(OFTEN), out)
    while process.poll() is None and not saved(out):
        time.sleep(0.01)
    first = time.time()
    end = ended(process)
    assert end.code == 0, f"{plan.name} ended with {end.code}: {end.out}{end.err}"
    wrote, last = ((out / name).stat().st_mtime for name in ("prompt.safetensors", "report.html"))
    return Undisturbed(out, first - began, wrote - first, last - wrote)


def beat(plan: Plan, out: Path, whole: Undisturbed, *, kills: int, chance: random.Random) -> Beaten:
    """Runs `plan` until it has been killed `kills` times, and then to its end. A run that ends before is compared and
    followed by another."""
    done, survived, run, half = 0, 0, 0, 0
    where = Counter[str]()
    different: list[str] = []
    amiss: list[str] = []
    place = out.with_name(f"{out.name} {run}")
    while True:
        kind, before, results = KINDS[done % len(KINDS)] if done < kills else "", saved(place), _written_at(place)
        process = started(plan.with_(OFTEN), place, resume=place.exists())
        if kind == "start":
            _wait(process, chance.uniform(0, whole.starting))
        elif kind:
            while process.poll() is None and (
                saved(place) == before if kind == "phase" else _written_at(place) == results
            ):
                time.sleep(0.002)
            _wait(process, chance.uniform(0, whole.training / 4 if kind == "phase" else whole.writing))
        if kind:
            process.kill()
        end, after = ended(process), saved(place)
        if after != before or not end.code:  # it trained, or ended: it must have read what was there
            amiss += forgot(before, end.out)
        half = max(half, half_written(place))
        if end.code == -signal.SIGKILL:
            done += 1
            fell = (
                "within a phase" if any(not finished for _, finished in after.values()) else "between phases or after"
            )
            fell = "before a checkpoint" if after == before else fell
            where["while results were written" if _written_at(place) != results else fell] += 1
            found = broken(place) if place.exists() else []
            survived += not found
            amiss += found
            continue
        run += 1
        if end.code:
            survived -= 1  # the kill before was not survived after all
            amiss.append(f"continued to exit code {end.code}: {end.err.strip().splitlines()[-1]}")
        else:
            different += [f"{name} differs" for name in differences(whole.folder, place)]
        if done >= kills:
            return Beaten(survived, where, run, different, amiss, half)
        place = out.with_name(f"{out.name} {run}")


def _wait(process: Popen[str], seconds: float) -> None:
    until = time.perf_counter() + seconds
    while process.poll() is None and time.perf_counter() < until:
        time.sleep(0.002)


def _written_at(out: Path) -> int:
    """When the prompt file was written, the first of the results; 0 before."""
    place = out / "prompt.safetensors"
    return place.stat().st_mtime_ns if place.exists() else 0


def stop(plan: Plan, out: Path, whole: Undisturbed, number: signal.Signals) -> str:
    """Sends a signal after the first epoch, in a run that saves only when it must; returns what was amiss, or nothing.

    The step after which the loop ends is asked for in tests of the loop; here it is no earlier than what the history
    tells of, and the resumed run says that it continues from there.
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
    if not (before := saved(out)):
        return f"{number.name}: there is no checkpoint"
    if found := forgot(before, finished(plan.with_(OFTEN), out, resume=True).out):
        return f"{number.name}: {found[0]}"
    if found := differences(whole.folder, out):
        return f"{number.name}: {', '.join(found)} differ"
    return ""
