"""Pipelines in processes of their own, measured in turns; one of them may be the code of another commit."""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

Of = Literal["a_second", "a_core_second"]
ROOT = Path(__file__).parents[2]
BEFORE = "6d4ee50"
"""The commit that others are compared with."""


@contextlib.contextmanager
def checkout(commit: str = BEFORE) -> Iterator[Path]:
    """The files of a commit of this repository, for as long as it takes."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"commit {commit} is not in this clone, fetch it: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


class Rates(NamedTuple):
    """Images, or draws, in a second, and in a second of one core, which others on the machine hardly move."""

    a_second: float
    a_core_second: float


class Pipeline:
    """One of `pipelines.py`, in a process that waits for its turn; `source` is the checkout whose `lpt` it imports."""

    def __init__(self, name: str, *, source: Path = ROOT, **settings: object) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "pipelines.py"), name, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.name = name
        self.turn()  # what is made once is made

    def turn(self) -> Rates:
        """Of one turn."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        said = self.process.stdout.readline()
        if not said:
            raise SystemExit(f"pipeline {self.name} has ended: see what it said above")
        return Rates(**json.loads(said))

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def rates(pipelines: Mapping[str, Pipeline], turns: int) -> dict[str, list[Rates]]:
    """What each makes in a second, turn by turn; then they are ended."""
    measured: dict[str, list[Rates]] = {name: [] for name in pipelines}
    for number in range(turns):
        names = list(pipelines)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            measured[name].append(pipelines[name].turn())
    for pipeline in pipelines.values():
        pipeline.end()
    return measured


def ratio(measured: Mapping[str, list[Rates]], over: str, under: str, *, of: Of = "a_second") -> float:
    """The median of `over` ÷ `under`, of the same turns."""
    pairs = zip(measured[over], measured[under], strict=True)
    return round(statistics.median(getattr(a, of) / getattr(b, of) for a, b in pairs), 3)


def rate(measured: Mapping[str, list[Rates]], name: str, *, of: Of = "a_second") -> float:
    return round(statistics.median(getattr(one, of) for one in measured[name]), 1)
