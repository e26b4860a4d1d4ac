"""The configs of a suite over seeds, each a run of its own, into one table: `lpt sweep`.

A suite is a YAML file of `rows`, each a config with overrides. A row whose result is there with the same config hash
and the same version of lpt is skipped, and every result is written as soon as it is there, so that a killed sweep goes
on where it was. A row may also have

- `phase1_of: ROW`: it differs from that row in phase 2 alone and starts from its phase 1;
- `seed_plus: K`: its own seed is K more, and its start that of the suite's seed, for soups;
- `soup_of: [ROW, ...]` in place of a config: the average of these rows' prompt files. Its work is theirs together;
- `arm: ARM`: `python -m MODULE CONFIG ... --arm ARM --out OUT` trains it, where the suite says `arms: MODULE`.

A suite with `measured: held_out` has metrics after the last epoch on held-out images and none on test images.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lpt.config import Config, load_config, read_yaml
from lpt.engine.checkpoint import load_checkpoint, save_checkpoint
from lpt.engine.history import History
from lpt.errors import ConfigError, LptError, did_you_mean
from lpt.files import write_atomic
from lpt.report.over_seeds import COLUMNS, WORK, Result, compared, write
from lpt.settings import validated
from lpt.shipped import PACKAGE, file_of

PHASE2 = ("pool_init", "pool_size", "topk", "key_init", "query_centering", "query_head", "beta", "prefix_blocks")
"""Settings of LPT that its phase 1 does not see."""


class Row(BaseModel):
    """A config and what the row sets beyond it, or a soup of others."""

    model_config = ConfigDict(extra="forbid")

    method: str = Field(pattern=r"^[\w+.-]+$", max_length=100)  # it is a part of a folder's name
    config: str = ""
    set: list[str] = []
    phase1_of: str | None = None
    seed_plus: int | None = None
    soup_of: list[str] = []
    arm: str | None = None

    def words(self, seed: int) -> list[str]:
        """The overrides of a run with the suite's `seed`."""
        own = [f"train.seed={seed + (self.seed_plus or 0)}"]
        if self.seed_plus is not None:
            own.append(f"train.start_seed={seed}")
        return [*self.set, *own]

    def said(self) -> list[str]:
        """What sets it apart from its config, for people."""
        others = {key: getattr(self, key) for key in ("arm", "phase1_of", "seed_plus", "soup_of")}
        return [*self.set, *(f"{key} {value}" for key, value in others.items() if value not in (None, []))]


class SuiteFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rows: list[Row] = Field(min_length=1)
    measured: Literal["test", "held_out"] = "test"
    arms: str | None = None


@dataclass(frozen=True)
class Suite:
    """A suite by name, where its results are, as JSON with tables beside it, and the folder of its runs."""

    name: str
    file: SuiteFile
    results_file: Path
    runs: Path

    @property
    def rows(self) -> Sequence[Row]:
        return self.file.rows

    def row(self, name: str) -> Row:
        """Raises LptError."""
        for row in self.rows:
            if row.method == name:
                return row
        known = [row.method for row in self.rows]
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise LptError(f"suite {self.name} has no row {name}{hint}")

    def results(self) -> list[Result]:
        if not self.results_file.exists():
            return []
        try:
            return json.loads(self.results_file.read_text())
        except ValueError:
            raise LptError(f"{self.results_file} is damaged: take it away, and its runs are looked at anew") from None

    def folder(self, method: str, seed: int, key: str, commit: str) -> Path:
        return self.runs / f"{method}-seed{seed}-{key}-{commit}"


def load_suite(given: str | Path, *, results: Path | None = None, runs: Path | None = None) -> Suite:
    """The suite at the path `given`, or that of this name which comes with lpt, each config of which is there.

    Raises ConfigError with every mistake at once.
    """
    file = file_of("suite", given)
    content, mistakes = validated("suite", SuiteFile, read_yaml("suite", file))
    if mistakes:
        raise ConfigError(mistakes)
    said = SuiteFile.model_validate(content)
    names = [row.method for row in said.rows]
    mistakes += [f"suite.rows: {name} stands there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for row in said.rows:
        mistakes += [f"suite.rows.{row.method}{mistake}" for mistake in _mistakes_of(row, names, said)]
    if mistakes:
        raise ConfigError(mistakes)
    place = Path("runs/sweeps") / file.stem
    return Suite(file.stem, said, results or place / "results.json", runs or place)


def _mistakes_of(row: Row, names: Sequence[str], suite: SuiteFile) -> Iterator[str]:
    for key, others in (("phase1_of", [row.phase1_of] if row.phase1_of else []), ("soup_of", row.soup_of)):
        yield from (f".{key}: there is no row {other}" for other in others if other not in names)
    if row.arm and not suite.arms:
        yield f".arm: the suite has no `arms`, the module that trains {row.arm}"
    if row.soup_of and (row.config or row.set):
        yield ": a soup has no config of its own"
    if not row.soup_of:
        if not row.config:
            yield ".config is missing"
            return
        try:
            load_config(row.config, row.words(0))
        except ConfigError as error:
            yield from (f": {mistake}" for mistake in error.mistakes)


def sweep(
    suite: Suite,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = (),
    jobs: int = 1,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Runs the rows `methods` of a suite, all of them by default, with each of the seeds, `jobs` at a time; returns the
    table, which is also written. `overrides` are for every row. Raises LptError where a run fails."""
    chosen = [suite.row(name) for name in methods] or list(suite.rows)
    running = Running(suite, suite.results(), list(overrides), version_of_the_code(), jobs, say)
    for seed in seeds:
        for wave in waves(chosen):
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(partial(running.run_row, seed=seed), wave))
    running.write()
    return suite.results_file.with_suffix(".md").read_text()


def waves(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that need no other, rows that start from another's phase 1, and soups of both."""
    return [
        [row for row in rows if not row.phase1_of and not row.soup_of],
        [row for row in rows if row.phase1_of],
        [row for row in rows if row.soup_of],
    ]


def compare(suite: Suite, one: str, other: str) -> str:
    """Two rows of a suite that have been run, by a paired bootstrap over test images. Raises LptError."""
    wanted = [suite.row(name).method for name in (one, other)]
    folders = {}
    for result in suite.results():
        key = result["method"], result["seed"]
        folders[key] = suite.folder(*key, result["config_hash"], result["commit"])
    return compared(folders, *wanted)


@dataclass
class Running:
    """A suite at work: what is there of its results, written after every run."""

    suite: Suite
    results: list[Result]
    overrides: list[str]
    commit: str
    jobs: int
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self._writing = Lock()

    def write(self) -> None:
        settings = {row.method: row.said() for row in self.suite.rows}
        self.suite.results_file.parent.mkdir(parents=True, exist_ok=True)
        write(self.suite.results_file, self.suite.name, settings, self.results)

    def key(self, row: Row, seed: int) -> str:
        """Of everything that moves a number of this row."""
        if row.soup_of:
            parts = [self.key(self.suite.row(name), seed) for name in row.soup_of]
            return hashlib.sha256("+".join(parts).encode()).hexdigest()[:12]
        key = config_hash(row.config, [*row.words(seed), *self.overrides])
        return hashlib.sha256(f"{key} {row.arm}".encode()).hexdigest()[:12] if row.arm else key

    def folder(self, row: Row, seed: int) -> Path:
        return self.suite.folder(row.method, seed, self.key(row, seed), self.commit)

    def run_row(self, row: Row, *, seed: int) -> None:
        """Runs one row with one seed, unless its result is there."""
        key = self.key(row, seed)
        if any(result["config_hash"] == key and result["commit"] == self.commit for result in self.results):
            return
        self.say(f"{row.method}  seed {seed}")
        report = self.report_of(row, seed)
        facts = {"method": row.method, "setting": row.set, "config_hash": key, "commit": self.commit, "seed": seed}
        with self._writing:
            others = [one for one in self.results if (one["method"], one["seed"]) != (row.method, seed)]
            self.results[:] = [*others, {**report, **facts}]
            self.write()

    def report_of(self, row: Row, seed: int) -> Result:
        """Of the run, which may have been begun before."""
        out, words = self.folder(row, seed), [*row.words(seed), *self.overrides]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        if row.phase1_of and not out.exists():
            share_phase1(self.folder(self.suite.row(row.phase1_of), seed), out, row.config, words)
        if row.soup_of:
            sources = [self.folder(self.suite.row(name), seed) for name in row.soup_of]
            report = run_soup(sources, out, self.overrides, threads=threads)
        elif row.arm:
            assert self.suite.file.arms is not None
            in_process([self.suite.file.arms, row.config, *words, "--arm", row.arm, "--out", str(out)], threads, out)
            report = report_in(out)
        else:
            report = run(row.config, words, out, threads=threads)
        return measured_on_held_out(report, out) if self.suite.file.measured == "held_out" else report


def version_of_the_code() -> str:
    """In a checkout the last commit that touched what a run executes, with `-dirty` where it has been changed since;
    else the version of lpt."""
    checkout = PACKAGE.parent
    if not (checkout / ".git").exists():
        return f"v{version('lpt')}"
    package = ["--", "lpt", "pyproject.toml", "constraints.txt"]
    log, changed = (
        subprocess.run(["git", *words, *package], capture_output=True, text=True, cwd=checkout).stdout.strip()
        for words in (["log", "-1", "--format=%h"], ["status", "--porcelain"])
    )
    return f"{log}-dirty" if changed else log


def config_hash(config: str, overrides: Sequence[str]) -> str:
    """Of everything that moves a number, weights and prototypes by their content; not of where files lie."""
    resolved = load_config(config, overrides)
    digest = hashlib.sha256(resolved.run_hash("", "").encode())  # without the split: no data is read here
    for path in (resolved.backbone.weights, resolved.prototypes.weights):
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest() if path else b"")
    return digest.hexdigest()[:12]


def share_phase1(source: Path, out: Path, config: str, overrides: Sequence[str]) -> None:
    """Makes `out` a run whose phase 1 is done: the checkpoint that the run in `source` had at that point. Raises
    LptError where there is none, or it is of another phase 1."""
    if not (source / "report.json").exists():
        raise LptError(f"{source} has to be run first: its phase 1 is to be shared")
    report = json.loads((source / "report.json").read_text())
    source_config, own_config = load_config(source / "config.yaml"), load_config(config, overrides)
    if of_phase1(source_config) != of_phase1(own_config):
        raise LptError(f"{source} and {config} {' '.join(overrides)} differ in phase 1: leave phase1_of out")
    # A checkpoint is bound to its run's settings, split and weights; only the settings are others here
    identity = (report["data"]["split_sha256"], f"{report['backbone']['fingerprint']} in {report['precision']}")
    checkpoint = Path("checkpoints") / "phase1.safetensors"
    state = load_checkpoint(source / checkpoint, run_hash=source_config.run_hash(*identity))
    if state is None or not state.finished:
        raise LptError(f"{source / checkpoint} is not a finished phase: run that row again")
    save_checkpoint(out / checkpoint, state, run_hash=own_config.run_hash(*identity))
    write_atomic(out / "config.yaml", own_config.to_yaml().encode())


def of_phase1(config: Config) -> dict[str, Any]:
    """The settings that LPT's phase 1 depends on."""
    method = {}
    for key, value in config.method.items():
        if key in ("epochs", "lr"):
            method[key] = value[0]  # of two values for two phases, the first
        elif key not in PHASE2:
            method[key] = value
    return {**config.model_dump(), "method": method}


def run(config: str, overrides: Sequence[str], out: Path, *, threads: int | None = None) -> Result:
    """The report of `lpt train` in a process of its own, and the processor that it ran on. Raises LptError where it
    fails, with the reason printed."""
    in_process(["lpt", "train", config, *overrides, "--out", str(out), "--resume"], threads, out)
    return report_in(out)


def in_process(words: Sequence[str], threads: int | None, out: Path) -> None:
    """`python -m` of these words, with so many threads. Raises LptError where it fails, with the reason printed."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    code = subprocess.run([sys.executable, "-m", *words], env=environment).returncode
    if code:
        raise LptError(
            f"the run in {out} ended with exit code {code}, with the reason above; the same command resumes there"
        )


def report_in(out: Path) -> Result:
    return {**json.loads((out / "report.json").read_text()), "processor": processor()}


def run_soup(sources: Sequence[Path], out: Path, overrides: Sequence[str], *, threads: int | None = None) -> Result:
    """The report of the soup of finished runs: its metrics, and the work of all of them together. Raises LptError."""
    for source in sources:
        if not (source / "report.json").exists():
            raise LptError(f"{source} has to be run first: its prompt file is a part of a soup")
    out.mkdir(parents=True, exist_ok=True)
    prompt, metrics = out / "prompt.safetensors", out / "metrics.json"
    files = [str(source / "prompt.safetensors") for source in sources]
    in_process(["lpt", "soup", *files, "--out", str(prompt)], threads, out)
    places = [text for text in overrides if text.startswith(("data.root=", "backbone.weights=", "train.device="))]
    in_process(["lpt", "evaluate", str(prompt), *places, "--json", str(metrics)], threads, out)
    reports = [json.loads((source / "report.json").read_text()) for source in sources]
    together = {
        "cost": {key: sum(report["cost"][key] for report in reports) for key in WORK},
        "seconds": sum(report["seconds"] for report in reports),
        "peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports),
        "trainable_parameters": reports[0]["trainable_parameters"],
        "prompt_bytes": prompt.stat().st_size,
    }
    write_atomic(out / "report.json", json.dumps({**json.loads(metrics.read_text()), **together}, indent=1).encode())
    return report_in(out)


FACTS_OF_A_RUN = ("described", "seed", "data", "cost", "seconds", "peak_memory_bytes", "trainable_parameters")
"""And sizes, versions and processor: what is known of a run beside its metrics."""


def measured_on_held_out(report: Result, out: Path) -> Result:
    """The report, with metrics after the last epoch on held-out images in place of all that it says of test ones.
    Raises LptError where there are none."""
    measured = [line["val"] for line in History(out / "history.jsonl").lines if "val" in line]
    if not measured:
        raise LptError(f"{out} has no held-out images: set data.val_per_class")
    kept = {key: report[key] for key in (*FACTS_OF_A_RUN, "prompt_bytes", "versions", "processor")}
    return {**kept, **dict.fromkeys(COLUMNS), **measured[-1]}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()
