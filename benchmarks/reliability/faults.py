"""What goes wrong around a run: a full disk, a folder that cannot be written, data that vanishes, a process of two that
dies, a clock that runs backwards, a second run in the same folder.

Each time a run ends with one sentence and exit code 2, what it saved last is whole, and once the fault is gone it goes
on to the results of a run that nothing happened to.
"""

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.reliability.row import Row
from benchmarks.reliability.runs import (
    Ended,
    Plan,
    broken,
    differences,
    ended,
    finished,
    forgot,
    half_written,
    lpt_plan,
    saved,
    started,
    ulfine_plan,
)

OFTEN = "train.checkpoint_seconds=0.2"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lpt")
BOUND = 60.0
"""Seconds within which a process has to notice that the other one is gone."""
BACKWARDS = """
import os, pathlib, time
began, now, replace = time.time(), time.time, pathlib.Path.replace
time.time = lambda: 2 * began - now() - 86400
def earlier(path, target):
    done = replace(path, target)
    os.utime(target, (time.time(), time.time()))
    return done
pathlib.Path.replace = earlier
from lpt.cli import main
main()
"""
"""A process whose clock runs backwards: what it writes later looks older."""


def rows(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="lpt-faults-") as made:
        folder = Path(made)
        plan, whole = lpt_plan(1, 1).with_(OFTEN), folder / "undisturbed"
        if quick:
            plan = ulfine_plan(folder, steps=4)
        finished(plan, whole)
        checks: dict[str, Callable[[], Iterator[str]]] = {
            "two runs in one folder": partial(two_runs, plan, folder, whole)
        }
        if not quick:
            files, whole_files = ulfine_plan(folder).with_(OFTEN), folder / "undisturbed files"
            finished(files, whole_files)
            checks |= {
                "two runs that start together": partial(two_together, plan, folder, whole),
                "full disk": partial(full_disk, plan, folder, whole),
                "read-only folder": partial(read_only, plan, folder, whole),
                "vanished data": partial(vanished_data, files, folder, whole_files),
                "one of two processes killed": partial(one_of_two, plan, folder),
                "clock set back": partial(clock_set_back, plan, folder, whole),
            }
        return [checked(name, check) for name, check in checks.items()]


def checked(name: str, check: Callable[[], Iterator[str]]) -> Row:
    """A row of what `check` yields: for each thing tried what was wrong, or nothing; a note starts with `note: `."""
    began, tried, wrong, notes = time.perf_counter(), 0, [], []
    for text in check():
        if text.startswith("note: "):
            notes.append(text.removeprefix("note: "))
            continue
        tried += 1
        wrong += [text] if text else []
    seconds = time.perf_counter() - began
    return Row(name, tried, tried - len(wrong), len(wrong), seconds, "; ".join([*notes, *wrong]))


def _refused(end: Ended, *words: str) -> str:
    """What is wrong with how a run ended that should have named `words` in one sentence."""
    if not end.sentence or any(word not in end.sentence for word in words):
        return f"exit code {end.code} and {end.err.strip()[-300:]!r}"
    return ""


def _goes_on(plan: Plan, out: Path, whole: Path, **how: object) -> str:
    """Whether the run in `out` is whole as far as it went, and ends as `whole` did."""
    if found := broken(out):
        return found[0]
    before = saved(out)
    end = ended(started(plan, out, resume=True, **how))
    if end.code:
        return f"resumed, it ended with {end.code}: {end.err.strip()[-300:]}"
    if found := forgot(before, end.out):
        return found[0]
    if half_written(out):
        return f"{half_written(out)} temporary files left"
    return ", ".join(f"{name} differs" for name in differences(whole, out))


def _until(there: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits for something, or for the end of the process that would bring it about."""
    while process.poll() is None and not there():
        time.sleep(0.01)


# Disks.


@contextlib.contextmanager
def _mounted(place: Path, *words: str) -> Iterator[None]:
    """Raises OSError where this may not mount anything."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *words, str(place)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def full_disk(plan: Plan, folder: Path, whole: Path) -> Iterator[str]:
    """Disks on which the run fills up at its start, at its features, within its phases and at its results."""
    try:
        for kilobytes in (12, 120, 560, 800):
            place = folder / f"disk of {kilobytes} kB"
            with _mounted(place, "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"):
                end = ended(started(plan, place / "run"))
                yield _refused(end, str(place), "No space left on device") or _bigger(plan, place, whole)
        yield "note: tmpfs of 12 to 800 kB, made larger for the resumed run"
    except OSError as error:
        yield f"note: NOT a full disk, none can be mounted here ({error}); files end at a limit instead"
        for kilobytes in (10, 100, 200):
            out = folder / f"files of {kilobytes} kB"
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))
            end = ended(started(plan, out, preexec_fn=limit))
            yield _refused(end, str(out), "File too large") or _goes_on(plan, out, whole)


def _bigger(plan: Plan, place: Path, whole: Path) -> str:
    found = broken(place)
    _remount(place, "size=64m")
    return found[0] if found else _goes_on(plan, place / "run", whole)


def read_only(plan: Plan, folder: Path, whole: Path) -> Iterator[str]:
    """A place that is read-only from the start, and checkpoints that become so within a phase."""
    yield _refused(ended(started(plan, Path("/proc/version/run"))), "/proc/version")
    try:
        with _mounted(folder / "read only", "-t", "tmpfs", "-o", "ro", "tmpfs"):
            end = ended(started(plan, folder / "read only" / "run"))
            yield _refused(end, "Read-only file system")
        out = folder / "read only later"
        checkpoints = out / "checkpoints"
        with _mounted(checkpoints, "--bind", str(checkpoints)):
            process = started(plan, out, resume=True)
            _until(partial(saved, out), process)
            frozen = ["mount", "-o", "remount,bind,ro", str(checkpoints)]
            while process.poll() is None and subprocess.run(frozen, capture_output=True).returncode:
                time.sleep(0.01)  # busy while a checkpoint is being written
            yield _refused(ended(process), str(checkpoints), "Read-only file system", "what was there before is intact")
        yield _goes_on(plan, out, whole)
    except OSError as error:
        yield f"note: NOT a read-only disk, nothing can be mounted here ({error}): only a path below a file was tried"


# Data.


def vanished_data(plan: Plan, folder: Path, whole: Path) -> Iterator[str]:
    """The folder of images goes within the run; is still away when it is resumed; and comes back."""
    out, photos, away = folder / "data away", folder / "photos", folder / "photos away"
    process = started(plan, out)
    _until(partial(saved, out), process)
    photos.rename(away)
    try:
        yield _refused(ended(process), str(photos))
        yield _refused(ended(started(plan, out, resume=True)), str(photos), "does not exist")
    finally:
        away.rename(photos)
    yield _goes_on(plan, out, whole)


# Processes.


def two_runs(plan: Plan, folder: Path, whole: Path) -> Iterator[str]:
    """A second run in a folder where one is at work is told which; what is there already is not begun again."""
    out = folder / "two runs"
    first = started(plan, out)
    _until((out / "running.json").exists, first)
    first.send_signal(signal.SIGSTOP)  # so that it does not end before the second has started
    yield _refused(ended(started(plan, out, resume=True)), f"is in use by process {first.pid} on")
    first.send_signal(signal.SIGCONT)
    yield f"the first ended with {end.code}" if (end := ended(first)).code else ", ".join(differences(whole, out))
    yield _refused(ended(started(plan, out)), "already holds a run")


def two_together(plan: Plan, folder: Path, whole: Path) -> Iterator[str]:
    """Two that start in one new folder: either may win."""
    out = folder / "two together"
    both = [ended(process) for process in [started(plan, out), started(plan, out)]]
    won, lost = sorted(both, key=lambda end: end.code)
    yield f"both ended with {won.code}" if won.code else ", ".join(differences(whole, out))
    yield "" if "is in use by process" in lost.sentence or "already holds a run" in lost.sentence else lost.err[-300:]


def one_of_two(plan: Plan, folder: Path) -> Iterator[str]:
    """Either of two processes is killed within a phase; the other has to notice."""
    whole = folder / "undisturbed two"
    finished(plan, whole, first=TWO)
    longest = 0.0
    for which in (0, 1):
        out = folder / f"process {which} killed"
        process = started(plan, out, first=TWO)
        _until(partial(saved, out), process)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        began = time.perf_counter()
        os.kill(int(workers[which]), signal.SIGKILL)
        end = ended(process)
        longest = max(longest, time.perf_counter() - began)
        said = [line for line in end.err.splitlines() if line.startswith("error: ")]
        good = end.code and said and "another of the 2 processes has ended" in said[0]
        late = "" if longest < BOUND else f"the other ended after {longest:.0f} s only"
        yield late if good else f"exit code {end.code} and {end.err[-300:]!r}"
        yield _goes_on(plan, out, whole, first=TWO)
    yield f"note: the other process ended within {longest:.1f} s"


def clock_set_back(plan: Plan, folder: Path, whole: Path) -> Iterator[str]:
    """Killed in its second phase under a clock that runs backwards, a run continues in that phase all the same."""
    out = folder / "clock"
    process = started(plan, out, first=("-c", BACKWARDS))
    _until((out / "checkpoints" / "phase2.safetensors").exists, process)
    process.kill()
    ended(process)
    older, newer = ((out / "checkpoints" / f"{name}.safetensors").stat().st_mtime_ns for name in ("phase2", "phase1"))
    yield "" if older < newer else "the clock did not run backwards"
    process = started(plan, out, resume=True, first=("-c", BACKWARDS))
    end = ended(process)
    yield "" if "phase1: finished before" in end.out and "phase2: continues at step" in end.out else end.out + end.err
    yield ", ".join(f"{name} differs" for name in differences(whole, out)) if not end.code else end.err[-300:]
