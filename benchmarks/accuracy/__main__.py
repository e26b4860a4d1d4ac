"""Runs the configs of a suite over seeds and writes one table.

    python -m benchmarks.accuracy --suite phase2 --seeds 0,1,2 data.root=... backbone.weights=...
    python -m benchmarks.accuracy --suite phase2 --compare lpt-4+2 phase1-6

Each row of `suites/NAME.yaml` is a config with overrides. A row whose result is there with the same config hash and the
same commit of the package is skipped, and every result is written as soon as it is there, so a killed suite goes on
where it was. Runs stay in `runs/accuracy/NAME`. `--jobs N` runs N at a time, each with its share of the cores.
A row may also have

- `phase1_of: ROW`: it differs from that row in phase 2 alone and starts from its phase 1;
- `arm: ARM`: it is an arm of `benchmarks.accuracy.fair`, which `lpt train` has no settings for;
- `seed_plus: K`: its own seed is K more, and its start that of the suite's seed, for soups;
- `soup_of: [ROW, ...]` in place of a config: the average of these rows' prompt files. Its work is theirs together.

A suite with `measured: held_out` tells metrics after the last epoch on held-out images and none on test images: rates
are chosen there.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from lpt.config import Config, load_config
from lpt.engine.checkpoint import load_checkpoint, save_checkpoint
from lpt.files import write_atomic
from lpt.report.quoting import for_spreadsheet

HERE = Path(__file__).parent
RUNS = Path("runs/accuracy")
COLUMNS = ("accuracy", "class_accuracy", "many", "medium", "few", "worst_class", "ece")
FACTS = ("trainable_parameters", "prompt_bytes", "seconds", "commit")
OPTIONAL_COLUMNS = {
    "kept": "pseudo_labels.coverage",
    "right of them": "pseudo_labels.precision",
    "wrong ones' confidence": "pseudo_labels.false_confidence",
    "linear head": "heads.linear.class_accuracy",
    "similarity": "heads.similarity.class_accuracy",
    "five crops": "five_crops.class_accuracy",
    "five crops, few": "five_crops.few",
    "prompted pass": "passes.prompted.class_accuracy",
    "masked": "passes.head masked.class_accuracy",
    "masked mean": "passes.mean masked.class_accuracy",
}
"""Shown where any row has them, by path in a report: pseudo-labels of the last round, each head of a fused one."""
WORK = ("steps", "images", "flops")
"""Of a report's `cost`: seconds alone depend on the machine."""
# Student's t, two-sided 95 %, by number of seeds
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
DRAWS = 10_000
"""Of a bootstrap."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=sorted(p.stem for p in (HERE / "suites").glob("*.yaml")))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="", help="only these rows, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--compare", nargs=2, metavar="ROW", help="only compare two rows that have been run")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every row, for example data.root=DIR")
    given = parser.parse_args()
    told = yaml.safe_load((HERE / "suites" / f"{given.suite}.yaml").read_text())
    rows, given.held_out = told["rows"], told.get("measured") == "held_out"
    wanted = [name for name in given.methods.split(",") if name]
    if unknown := {*wanted, *(given.compare or [])} - {row["method"] for row in rows}:
        parser.error(f"the suite has no row {', '.join(sorted(unknown))}")
    path = HERE / "results" / f"{given.suite}.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if given.compare:
        print(compared(given.suite, results, *given.compare))
        return
    suite = Suite(given, rows, results, path)
    chosen_rows = [row for row in rows if not wanted or row["method"] in wanted]
    for seed in map(int, given.seeds.split(",")):
        for wave in waves(chosen_rows):
            with ThreadPoolExecutor(given.jobs) as pool:
                list(pool.map(partial(suite.run_row, seed=seed), wave))
    write(path, given.suite, rows, results)
    print(path.with_suffix(".md").read_text())


def waves(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that need no other, rows that start from another's phase 1, and soups of both."""
    return [
        [row for row in rows if "phase1_of" not in row and "soup_of" not in row],
        [row for row in rows if "phase1_of" in row],
        [row for row in rows if "soup_of" in row],
    ]


class Suite:
    """Rows of a suite, what is there of their results, and the file at `path` that is written after every run."""

    def __init__(
        self, given: argparse.Namespace, rows: list[dict[str, Any]], results: list[dict[str, Any]], path: Path
    ):
        self.given, self.rows, self.results, self.path = given, rows, results, path
        self.commit = commit_of_the_package()
        self.writing = Lock()

    def overrides(self, row: dict[str, Any], seed: int) -> list[str]:
        own = [f"train.seed={seed + row.get('seed_plus', 0)}"]
        if "seed_plus" in row:
            own.append(f"train.start_seed={seed}")
        return [*row.get("set", []), *own, *self.given.overrides]

    def key(self, row: dict[str, Any], seed: int) -> str:
        """Of everything that moves a number of this row."""
        if "soup_of" in row:
            parts = [self.key(self.row_called(name), seed) for name in row["soup_of"]]
            return hashlib.sha256("+".join(parts).encode()).hexdigest()[:12]
        key = config_hash(row["config"], self.overrides(row, seed))
        return hashlib.sha256(f"{key} {row['arm']}".encode()).hexdigest()[:12] if "arm" in row else key

    def row_called(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["method"] == name)

    def folder(self, row: dict[str, Any], seed: int) -> Path:
        return folder(self.given.suite, row["method"], seed, self.key(row, seed), self.commit)

    def run_row(self, row: dict[str, Any], *, seed: int) -> None:
        """Runs one row with one seed, unless its result is there."""
        overrides, key = self.overrides(row, seed), self.key(row, seed)
        if any(result["config_hash"] == key and result["commit"] == self.commit for result in self.results):
            return
        print(f"{row['method']}  seed {seed}", flush=True)
        out = self.folder(row, seed)
        if "phase1_of" in row and not out.exists():
            share_phase1(self.folder(self.row_called(row["phase1_of"]), seed), out, row["config"], overrides)
        threads = max(1, (os.cpu_count() or 1) // self.given.jobs)
        if "soup_of" in row:
            sources = [self.folder(self.row_called(name), seed) for name in row["soup_of"]]
            report = run_soup(sources, out, self.given.overrides, threads=threads)
        else:
            arm = {"arm": row["arm"]} if "arm" in row else {}
            report = run(row["config"], overrides, out, threads=threads, **arm)
        if self.given.held_out:
            report = measured_on_held_out(report, out)
        facts = {"method": row["method"], "setting": row.get("set", []), "config_hash": key, "commit": self.commit}
        facts["seed"] = seed
        with self.writing:
            self.results[:] = [
                result for result in self.results if (result["method"], result["seed"]) != (row["method"], seed)
            ]
            self.results.append({**report, **facts})
            write(self.path, self.given.suite, self.rows, self.results)


def folder(suite: str, method: str, seed: int, key: str, commit: str) -> Path:
    return RUNS / suite / f"{method}-seed{seed}-{key}-{commit}"


def commit_of_the_package() -> str:
    """The last commit that touched what a run executes, with `-dirty` where it has been changed since."""
    package = ["--", "lpt", "pyproject.toml", "constraints.txt"]
    log = subprocess.run(["git", "log", "-1", "--format=%h", *package], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", *package], capture_output=True, text=True).stdout.strip()
    return f"{log}-dirty" if changed else log


def write(path: Path, suite: str, rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    """The results as JSON at `path`, and beside it as CSV, a line for each run, and as the Markdown table."""
    write_atomic(path, json.dumps(results, indent=1).encode())
    write_atomic(path.with_suffix(".md"), table(suite, rows, results).encode())
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    columns = ("method", "seed", *COLUMNS, *FACTS)
    lines.writerow(columns)
    for result in results:
        cells = [result.get(column) for column in columns]
        lines.writerow([for_spreadsheet(cell) if isinstance(cell, str) else cell for cell in cells])
    write_atomic(path.with_suffix(".csv"), buffer.getvalue().encode())


def compared(suite: str, results: list[dict[str, Any]], one: str, other: str) -> str:
    """Paired bootstrap of the difference in class accuracy between two rows, in points.

    Test images are drawn anew within classes, the same ones for both rows and all seeds that both have.
    """
    folders = {
        (r["method"], r["seed"]): folder(suite, r["method"], r["seed"], r["config_hash"], r["commit"]) for r in results
    }
    seeds = sorted(seed for name, seed in folders if name == one and (other, seed) in folders)
    pairs = [(folders[one, seed], folders[other, seed]) for seed in seeds]
    for path in (path for pair in pairs for path in pair):
        if not (path / "predictions.safetensors").exists():
            sys.exit(f"{path} holds no predictions: run that row again")
    if not seeds:
        sys.exit(f"{one} and {other} have no seed in common")
    differences = []  # for each seed, [N] of -1, 0 or 1
    for path, other_path in pairs:
        is_right, labels = right_predictions(path)
        other_is_right, _ = right_predictions(other_path)
        differences.append(is_right.astype(float) - other_is_right)
    low, middle, high = (100 * x for x in bootstrap(np.mean(differences, axis=0), labels))
    by_seed = ", ".join(f"{100 * class_mean(difference, labels):+.2f}" for difference in differences)
    return (
        f"{one} - {other}: class accuracy {middle:+.2f} points, 95 % of {DRAWS:,} paired bootstraps over test images "
        f"within {low:+.2f} and {high:+.2f}; by seed ({', '.join(map(str, seeds))}) {by_seed}"
    )


def right_predictions(run_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(whether each test image is classified rightly, its label), both [N]."""
    predictions = load_file(run_folder / "predictions.safetensors")
    return predictions["predicted"] == predictions["labels"], predictions["labels"]


def class_mean(values: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([values[labels == k].mean() for k in np.unique(labels)]))


def bootstrap(difference: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(2.5 % quantile, value, 97.5 % quantile) of the class mean of `difference` [N] under redrawn images."""
    rng = np.random.default_rng(seed)
    classes = [difference[labels == k] for k in np.unique(labels)]
    means = np.mean([rng.choice(c, (DRAWS, len(c))).mean(1) for c in classes], axis=0)
    return float(np.quantile(means, 0.025)), class_mean(difference, labels), float(np.quantile(means, 0.975))


def config_hash(config: str, overrides: list[str]) -> str:
    """Of everything that moves a number, weights and prototypes by their content; not of where files lie."""
    resolved = load_config(config, overrides)
    digest = hashlib.sha256(resolved.run_hash("", "").encode())  # without the split: no data is read here
    for path in (resolved.backbone.weights, resolved.prototypes.weights):
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest() if path else b"")
    return digest.hexdigest()[:12]


PHASE2 = ("pool_init", "pool_size", "topk", "key_init", "query_centering", "query_head", "beta", "prefix_blocks")
"""Settings of LPT that its phase 1 does not see."""


def share_phase1(source: Path, out: Path, config: str, overrides: list[str]) -> None:
    """Makes `out` a run whose phase 1 is done: the checkpoint that the run in `source` had at that point."""
    if not (source / "report.json").exists():
        sys.exit(f"{source} has to be run first: its phase 1 is to be shared")
    report = json.loads((source / "report.json").read_text())
    source_config, own_config = load_config(source / "config.yaml"), load_config(config, overrides)
    assert of_phase1(source_config) == of_phase1(own_config), f"{source} and {config} {overrides} differ in phase 1"
    # A checkpoint is bound to its run's settings, split and weights; only the settings are others here
    identity = (report["data"]["split_sha256"], f"{report['backbone']['fingerprint']} in {report['precision']}")
    checkpoint = Path("checkpoints") / "phase1.safetensors"
    state = load_checkpoint(source / checkpoint, run_hash=source_config.run_hash(*identity))
    assert state is not None and state.finished, f"{source / checkpoint} is not a finished phase"
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


def run(
    config: str, overrides: list[str], out: Path, *, threads: int | None = None, arm: str | None = None
) -> dict[str, Any]:
    """The report of `lpt train`, or of an arm, in a process of its own, and the processor that it ran on."""
    if arm is None:
        words = ["lpt", "train", config, *overrides, "--out", str(out), "--resume"]
    else:
        words = ["benchmarks.accuracy.fair", config, *overrides, "--arm", arm, "--out", str(out)]
    in_process(words, threads)
    return {**json.loads((out / "report.json").read_text()), "processor": processor()}


def in_process(words: list[str], threads: int | None) -> None:
    """`python -m` of these words, with so many threads."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    subprocess.run([sys.executable, "-m", *words], check=True, env=environment)


def run_soup(sources: list[Path], out: Path, overrides: list[str], *, threads: int | None = None) -> dict[str, Any]:
    """The report of the soup of finished runs: its metrics, and the work of all of them together."""
    for source in sources:
        if not (source / "report.json").exists():
            sys.exit(f"{source} has to be run first: its prompt file is a part of a soup")
    out.mkdir(parents=True, exist_ok=True)
    prompt, metrics = out / "prompt.safetensors", out / "metrics.json"
    files = [str(source / "prompt.safetensors") for source in sources]
    in_process(["lpt", "soup", *files, "--out", str(prompt)], threads)
    kept = [text for text in overrides if text.startswith(("data.root=", "backbone.weights=", "train.device="))]
    in_process(["lpt", "evaluate", str(prompt), *kept, "--json", str(metrics)], threads)
    reports = [json.loads((source / "report.json").read_text()) for source in sources]
    together = {
        "cost": {key: sum(report["cost"][key] for report in reports) for key in WORK},
        "seconds": sum(report["seconds"] for report in reports),
        "peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports),
        "trainable_parameters": reports[0]["trainable_parameters"],
        "prompt_bytes": prompt.stat().st_size,
        "processor": processor(),
    }
    report = {**json.loads(metrics.read_text()), **together}
    write_atomic(out / "report.json", json.dumps(report, indent=1).encode())
    return report


FACTS_OF_A_RUN = ("described", "seed", "data", "cost", "seconds", "peak_memory_bytes", "trainable_parameters")
"""And sizes, versions and processor: what is known of a run beside its metrics."""


def measured_on_held_out(report: dict[str, Any], out: Path) -> dict[str, Any]:
    """The report, with metrics after the last epoch on held-out images in place of all that it says of test ones."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    measured = [line["val"] for line in lines if "val" in line]
    if not measured:
        sys.exit(f"{out} has no held-out images: set data.val_per_class")
    kept = {key: report[key] for key in (*FACTS_OF_A_RUN, "prompt_bytes", "versions", "processor")}
    return {**kept, **dict.fromkeys(COLUMNS), **measured[-1]}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def table(suite: str, rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """Mean ± half width of the 95 % t-interval over seeds, per cent; the rows of the suite in their order."""
    optional = {
        name: path
        for name, path in OPTIONAL_COLUMNS.items()
        if any(value_at(result, path) is not None for result in results)
    }
    has_work = any("cost" in result for result in results)
    header = ["method", "seeds", *COLUMNS, *optional, "parameters", "file, kB"]
    header += ["steps", "images", "TFLOPs", "seconds", "MiB"] if has_work else ["seconds"]
    lines = [f"# {suite}", "", f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in rows:
        runs = [result for result in results if result["method"] == row["method"]]
        if runs:
            cells = [row["method"], str(len(runs)), *metric_cells(runs, optional), *cost_cells(runs, has_work)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What each row sets beyond its config:", ""]
    for row in rows:
        others = [f"{key} {row[key]}" for key in ("arm", "phase1_of", "seed_plus", "soup_of") if key in row]
        lines.append(f"- **{row['method']}**: {' '.join([*row.get('set', []), *others]) or '-'}")
    if results:
        latest = results[-1]
        versions = ", ".join(f"{package} {version}" for package, version in latest["versions"].items())
        commits = ", ".join(sorted({result["commit"] for result in results}))
        lines += ["", f"{latest['processor']}; {versions}; commits {commits}."]
    return "\n".join([*lines, ""])


def metric_cells(runs: list[dict[str, Any]], optional: dict[str, str]) -> list[str]:
    """One row of the table: COLUMNS, then `optional` (names to paths in a report), `-` where the row has none."""
    cells = [interval([100 * run[column] for run in runs if run[column] is not None]) for column in COLUMNS]
    for path in optional.values():
        values = [value_at(run, path) for run in runs]
        percents = [100 * value for value in values if value is not None]
        cells.append(interval(percents) if percents else "-")
    return cells


def cost_cells(runs: list[dict[str, Any]], has_work: bool) -> list[str]:
    """One row of the table: sizes and work, which all seeds have in common, then the means of seconds and memory."""
    cells = [f"{runs[0]['trainable_parameters']:,}", f"{runs[0]['prompt_bytes'] / 1000:.0f}"]
    seconds = f"{statistics.mean(run['seconds'] for run in runs):.0f}"
    if not has_work:
        return [*cells, seconds]
    for key in WORK:
        value = value_at(runs[0], f"cost.{key}")
        if value is None:
            cells.append("-")
        else:
            cells.append(f"{value / 1e12:.1f}" if key == "flops" else f"{value:,}")
    return [*cells, seconds, f"{statistics.mean(run['peak_memory_bytes'] for run in runs) / 2**20:.0f}"]


def value_at(report: dict[str, Any], path: str) -> float | None:
    """The number at a dotted path of a report, None where there is none."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def interval(values: list[float]) -> str:
    """Mean ± half width of the 95 % t-interval of the mean; the mean alone of a single value."""
    if not values:
        return "n/a"
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    half = T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
