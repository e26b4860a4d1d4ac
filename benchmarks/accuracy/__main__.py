"""Runs the configs of a suite over seeds and writes one table.

    python -m benchmarks.accuracy --suite phase2 --seeds 0,1,2 data.root=... backbone.weights=...

Each row of `suites/NAME.yaml` is a config with overrides. A row that is in the results with the same config hash
is skipped, and every result is written when it is there, so a killed suite goes on where it was. Run folders stay in
`runs/accuracy/NAME`. A row with `phase1_of: ROW`, from which it differs in phase 2 alone, starts from that phase 1.
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lpt.config import load_config
from lpt.engine.checkpoint import load_checkpoint, save_checkpoint, write_whole

HERE = Path(__file__).parent
RUNS = Path("runs/accuracy")
COLUMNS = ("class_accuracy", "many", "medium", "few", "worst_class", "ece")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", required=True, choices=sorted(p.stem for p in (HERE / "suites").glob("*.yaml")))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="", help="only these rows, separated by commas")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every row, for example data.root=DIR")
    given = parser.parse_args()
    rows = yaml.safe_load((HERE / "suites" / f"{given.suite}.yaml").read_text())["rows"]
    wanted = [name for name in given.methods.split(",") if name]
    if unknown := set(wanted) - {row["method"] for row in rows}:
        parser.error(f"the suite has no row {', '.join(sorted(unknown))}")
    place = HERE / "results" / f"{given.suite}.json"
    results: list[dict[str, Any]] = json.loads(place.read_text()) if place.exists() else []
    for seed in map(int, given.seeds.split(",")):
        for row in rows:
            if wanted and row["method"] not in wanted:
                continue
            overrides = [*row.get("set", []), f"train.seed={seed}", *given.overrides]
            key = config_hash(row["config"], overrides)
            if any(done["config_hash"] == key for done in results):
                continue
            print(f"{row['method']}  seed {seed}", flush=True)
            folder = RUNS / given.suite
            out = folder / f"{row['method']}-seed{seed}-{key}"
            if "phase1_of" in row and not out.exists():
                of = next(other for other in rows if other["method"] == row["phase1_of"])
                theirs = [*of.get("set", []), f"train.seed={seed}", *given.overrides]
                source = folder / f"{of['method']}-seed{seed}-{config_hash(of['config'], theirs)}"
                share_phase1(source, out, row["config"], overrides)
            report = run(row["config"], overrides, out)
            results.append({**report, "method": row["method"], "setting": row.get("set", []), "config_hash": key})
            write_whole(place, json.dumps(results, indent=1).encode())
            write_whole(place.with_suffix(".md"), table(given.suite, rows, results).encode())
    write_whole(place.with_suffix(".md"), table(given.suite, rows, results).encode())
    print(place.with_suffix(".md").read_text())


def config_hash(config: str, overrides: list[str]) -> str:
    """Everything that moves a number; not where files lie."""
    resolved = load_config(config, overrides)
    return hashlib.sha256(resolved.run_hash("", "").encode()).hexdigest()[:12]


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
    write_whole(out / "config.yaml", ours.to_yaml().encode())


def phase1_settings(method: dict[str, Any]) -> dict[str, Any]:
    """Of two values for two phases, the first."""
    first = {k: v[0] if k in ("epochs", "lr") else v for k, v in method.items()}
    return {k: v for k, v in first.items() if k not in PHASE2}


def run(config: str, overrides: list[str], out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "lpt", "train", config, *overrides, "--out", str(out), "--resume"]
    subprocess.run(command, check=True)
    report = json.loads((out / "report.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {**report, "commit": commit, "processor": processor()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


def table(suite: str, rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """Mean ± half width of the 95 % t-interval over seeds, per cent; the rows of the suite in their order."""
    lines = [f"# {suite}", ""]
    lines += ["| method | seeds | " + " | ".join(COLUMNS) + " | parameters | file, kB | seconds |"]
    lines += ["|---|---:" + "|---:" * (len(COLUMNS) + 3) + "|"]
    for row in rows:
        found = [r for r in results if r["method"] == row["method"]]
        if not found:
            continue
        cells = [interval([100 * r[c] for r in found if r[c] is not None]) for c in COLUMNS]
        size, seconds = found[0]["prompt_bytes"] / 1000, statistics.mean(r["seconds"] for r in found)
        facts = [f"{found[0]['trainable_parameters']:,}", f"{size:.0f}", f"{seconds:.0f}"]
        lines.append(f"| {row['method']} | {len(found)} | " + " | ".join([*cells, *facts]) + " |")
    lines += ["", "What each row sets beyond its config:", ""]
    lines += [f"- **{row['method']}**: {' '.join(row.get('set', [])) or '-'}" for row in rows]
    if results:
        last = results[-1]
        versions = ", ".join(f"{k} {v}" for k, v in last["versions"].items())
        commits = ", ".join(sorted({r["commit"] for r in results}))
        lines += ["", f"{last['processor']}; {versions}; commits {commits}."]
    return "\n".join([*lines, ""])


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
