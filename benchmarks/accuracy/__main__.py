"""Runs the configs of a suite over seeds and writes one table.

    python -m benchmarks.accuracy --suite phase2 --seeds 0,1,2 data.root=... backbone.weights=...
    python -m benchmarks.accuracy --suite phase2 --compare lpt-4+2 phase1-6

Each row of `suites/NAME.yaml` is a config with overrides. A row whose result is there with the same config hash and the
same commit of the package is skipped, and every result is written when it is there, so a killed suite goes on where it
was. Runs stay in `runs/accuracy/NAME`. A row with `phase1_of: ROW`, from which it differs in phase 2 alone, starts
from that phase 1. `--jobs N` runs N at a time, each with its share of the cores.
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
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from lpt.config import load_config
from lpt.engine.checkpoint import load_checkpoint, save_checkpoint, write_atomic
from lpt.report.quoting import for_spreadsheet

HERE = Path(__file__).parent
RUNS = Path("runs/accuracy")
COLUMNS = ("accuracy", "class_accuracy", "many", "medium", "few", "worst_class", "ece")
FACTS = ("trainable_parameters", "prompt_bytes", "seconds", "commit")
# Shown where a row has them: pseudo-labels of the last round, the heads of a fused one, and the work, not only its time
MORE = {
    "kept": "pseudo_labels.coverage",
    "right of them": "pseudo_labels.precision",
    "wrong ones' confidence": "pseudo_labels.false_confidence",
    "linear head": "heads.linear.class_accuracy",
    "similarity": "heads.similarity.class_accuracy",
}
# Student's t, two-sided, by number of seeds
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
DRAWS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=sorted(p.stem for p in (HERE / "suites").glob("*.yaml")))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="", help="only these rows, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--compare", nargs=2, metavar="ROW", help="only compare two rows that have been run")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every row, for example data.root=DIR")
    given = parser.parse_args()
    rows = yaml.safe_load((HERE / "suites" / f"{given.suite}.yaml").read_text())["rows"]
    wanted = [name for name in given.methods.split(",") if name]
    if unknown := {*wanted, *(given.compare or [])} - {row["method"] for row in rows}:
        parser.error(f"the suite has no row {', '.join(sorted(unknown))}")
    place = HERE / "results" / f"{given.suite}.json"
    results: list[dict[str, Any]] = json.loads(place.read_text()) if place.exists() else []
    if given.compare:
        print(compared(given.suite, results, *given.compare))
        return
    commit, writing = commit_of_the_package(), Lock()

    def overrides_of(row: dict[str, Any], seed: int) -> list[str]:
        return [*row.get("set", []), f"train.seed={seed}", *given.overrides]

    def one(row: dict[str, Any], seed: int) -> None:
        overrides = overrides_of(row, seed)
        key = config_hash(row["config"], overrides)
        if any(done["config_hash"] == key and done["commit"] == commit for done in results):
            return
        print(f"{row['method']}  seed {seed}", flush=True)
        out = folder(given.suite, row["method"], seed, key, commit)
        if "phase1_of" in row and not out.exists():
            of = next(other for other in rows if other["method"] == row["phase1_of"])
            theirs = overrides_of(of, seed)
            source = folder(given.suite, of["method"], seed, config_hash(of["config"], theirs), commit)
            share_phase1(source, out, row["config"], overrides)
        report = run(row["config"], overrides, out, threads=max(1, (os.cpu_count() or 1) // given.jobs))
        facts = {"method": row["method"], "setting": row.get("set", []), "config_hash": key, "commit": commit}
        with writing:
            results[:] = [done for done in results if (done["method"], done["seed"]) != (row["method"], seed)]
            results.append({**report, **facts})
            write(place, given.suite, rows, results)

    todo = [row for row in rows if not wanted or row["method"] in wanted]
    for seed in map(int, given.seeds.split(",")):
        for wave in (False, True):  # rows that start from another row's phase 1 come after it
            with ThreadPoolExecutor(given.jobs) as pool:
                list(pool.map(lambda row, seed=seed: one(row, seed), [r for r in todo if ("phase1_of" in r) == wave]))
    write(place, given.suite, rows, results)
    print(place.with_suffix(".md").read_text())


def folder(suite: str, method: str, seed: int, key: str, commit: str) -> Path:
    return RUNS / suite / f"{method}-seed{seed}-{key}-{commit}"


def commit_of_the_package() -> str:
    """The last commit that touched what a run executes, with `-dirty` where it has been changed since."""
    package = ["--", "lpt", "pyproject.toml", "constraints.txt"]
    log = subprocess.run(["git", "log", "-1", "--format=%h", *package], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", *package], capture_output=True, text=True).stdout.strip()
    return f"{log}-dirty" if changed else log


def write(place: Path, suite: str, rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    write_atomic(place, json.dumps(results, indent=1).encode())
    write_atomic(place.with_suffix(".md"), table(suite, rows, results).encode())
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["method", "seed", *COLUMNS, *FACTS])
    for r in results:
        cells = [r["method"], r["seed"], *(r.get(column) for column in (*COLUMNS, *FACTS))]
        lines.writerow([for_spreadsheet(cell) if isinstance(cell, str) else cell for cell in cells])
    write_atomic(place.with_suffix(".csv"), out.getvalue().encode())


def compared(suite: str, results: list[dict[str, Any]], one: str, other: str) -> str:
    """Paired bootstrap of the difference in class accuracy, in points: test images are drawn anew, within classes and
    the same for both rows and all seeds that both have."""
    of = {
        (r["method"], r["seed"]): folder(suite, r["method"], r["seed"], r["config_hash"], r["commit"]) for r in results
    }
    seeds = sorted({seed for name, seed in of if name == one} & {seed for name, seed in of if name == other})
    paths = [(of[one, seed], of[other, seed]) for seed in seeds]
    if absent := [path for pair in paths for path in pair if not (path / "predictions.safetensors").exists()]:
        sys.exit(f"{absent[0]} holds no predictions: run that row again")
    if not seeds:
        sys.exit(f"{one} and {other} have no seed in common")
    right = []
    for pair in paths:
        a, b = (load_file(path / "predictions.safetensors") for path in pair)
        right.append([found["predicted"] == found["labels"] for found in (a, b)])
        labels = a["labels"]
    difference = np.mean([a.astype(float) - b for a, b in right], axis=0)  # mean over seeds, by test image
    low, middle, high = (100 * x for x in bootstrap(difference, labels))
    by_seed = ", ".join(f"{100 * class_mean(a.astype(float) - b, labels):+.2f}" for a, b in right)
    return (
        f"{one} - {other}: class accuracy {middle:+.2f} points, 95 % of {DRAWS:,} paired bootstraps over test images "
        f"within {low:+.2f} and {high:+.2f}; by seed ({', '.join(map(str, seeds))}) {by_seed}"
    )


def class_mean(values: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([values[labels == k].mean() for k in np.unique(labels)]))


def bootstrap(difference: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(2.5 % quantile, value, 97.5 % quantile) of the class mean of `difference` [N] under redrawn images."""
    rng = np.random.default_rng(seed)
    classes = [difference[labels == k] for k in np.unique(labels)]
    means = np.mean([rng.choice(c, (DRAWS, len(c))).mean(1) for c in classes], axis=0)
    return float(np.quantile(means, 0.025)), class_mean(difference, labels), float(np.quantile(means, 0.975))


def config_hash(config: str, overrides: list[str]) -> str:
    """Everything that moves a number, weights and prototypes by their content; not where files lie."""
    resolved = load_config(config, overrides)
    digest = hashlib.sha256(resolved.run_hash("", "").encode())
    for path in (resolved.backbone.weights, resolved.prototypes.weights):
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest() if path else b"")
    return digest.hexdigest()[:12]


PHASE2 = ("pool_init", "pool_size", "topk", "key_init", "query_centering", "query_head", "beta", "prefix_blocks")
"""Settings of LPT that its phase 1 does not see."""


def share_phase1(source: Path, out: Path, config: str, overrides: list[str]) -> None:
    """Makes `out` a run whose phase 1 is done: the checkpoint that the run in `source` had at that point."""
    if not (source / "report.json").exists():
        sys.exit(f"{source} has to be run first: its phase 1 is to be shared")
    report, theirs, ours = (
        json.loads((source / "report.json").read_text()),
        load_config(source / "config.yaml"),
        load_config(config, overrides),
    )
    seen = [{**c.model_dump(), "method": phase1_settings(c.method)} for c in (theirs, ours)]
    assert seen[0] == seen[1], f"{source} and {config} {overrides} differ in phase 1"
    identity = (report["data"]["split_sha256"], f"{report['backbone']['fingerprint']} in {report['precision']}")
    place = Path("checkpoints") / "phase1.safetensors"
    state = load_checkpoint(source / place, run_hash=theirs.run_hash(*identity))
    assert state is not None and state.finished, f"{source / place} is not a finished phase"
    save_checkpoint(out / place, state, run_hash=ours.run_hash(*identity))
    write_atomic(out / "config.yaml", ours.to_yaml().encode())


def phase1_settings(method: dict[str, Any]) -> dict[str, Any]:
    """Of two values for two phases, the first."""
    first = {k: v[0] if k in ("epochs", "lr") else v for k, v in method.items()}
    return {k: v for k, v in first.items() if k not in PHASE2}


def run(config: str, overrides: list[str], out: Path, *, threads: int | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "lpt", "train", config, *overrides, "--out", str(out), "--resume"]
    subprocess.run(command, check=True, env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})})
    return {**json.loads((out / "report.json").read_text()), "processor": processor()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def table(suite: str, rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """Mean ± half width of the 95 % t-interval over seeds, per cent; the rows of the suite in their order."""
    more = {name: path for name, path in MORE.items() if any(value_at(r, path) is not None for r in results)}
    work = {key: f"cost.{key}" for key in ("steps", "images", "flops") if any("cost" in r for r in results)}
    heads = [
        *COLUMNS,
        *more,
        "parameters",
        "file, kB",
        *("TFLOPs" if w == "flops" else w for w in work),
        "seconds",
    ]
    lines = [f"# {suite}", "", "| method | seeds | " + " | ".join([*heads, "MiB"] if work else heads) + " |"]
    lines += ["|---|---:" + "|---:" * (len(heads) + bool(work)) + "|"]
    for row in rows:
        found = [r for r in results if r["method"] == row["method"]]
        if not found:
            continue
        cells = [interval([100 * r[c] for r in found if r[c] is not None]) for c in COLUMNS]
        for path in more.values():
            known = [100 * value for r in found if (value := value_at(r, path)) is not None]
            cells.append(interval(known) if known else "-")
        size, seconds = found[0]["prompt_bytes"] / 1000, statistics.mean(r["seconds"] for r in found)
        facts = [f"{found[0]['trainable_parameters']:,}", f"{size:.0f}"]
        for key, path in work.items():
            value = value_at(found[0], path)
            facts.append("-" if value is None else f"{value / 1e12:.1f}" if key == "flops" else f"{value:,}")
        facts.append(f"{seconds:.0f}")
        if work:
            facts.append(f"{statistics.mean(r['peak_memory_bytes'] for r in found) / 2**20:.0f}")
        lines.append(f"| {row['method']} | {len(found)} | " + " | ".join([*cells, *facts]) + " |")
    lines += ["", "What each row sets beyond its config:", ""]
    lines += [f"- **{row['method']}**: {' '.join(row.get('set', [])) or '-'}" for row in rows]
    if results:
        last = results[-1]
        versions = ", ".join(f"{k} {v}" for k, v in last["versions"].items())
        commits = ", ".join(sorted({r["commit"] for r in results}))
        lines += ["", f"{last['processor']}; {versions}; commits {commits}."]
    return "\n".join([*lines, ""])


def value_at(report: dict[str, Any], path: str) -> float | None:
    """The number at a dotted path of a report, None where there is none."""
    found: Any = report
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def interval(values: list[float]) -> str:
    if not values:
        return "n/a"
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    half = T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
