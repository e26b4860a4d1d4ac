"""How far `lpt fit`'s choice is from the best of its candidates, each trained in full and measured on the test set.

    python -m benchmarks.accuracy.fit --name digits --budget 1m data.name=digits-lt backbone.name=nano
    python -m benchmarks.accuracy.fit --name cifar100-lt --root DIR/cifar100 data.name=cifar100-lt backbone.weights=FILE
    python -m benchmarks.accuracy.fit --name natural --root runs/natural --natural-from DIR/cifar100 ...

For each seed the search runs as `lpt fit` runs it. Then every candidate of its plan, also those that the search has
dropped, is trained on all training images with the schedule that the plan gives it and evaluated on the test set, which
the search does not see. A row goes to `results/fit.json` as soon as it is there and is not computed again for the same
commit; a run that was killed continues. `results/fit.md` says what the choice gave away.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy import natural
from benchmarks.accuracy.__main__ import HERE
from lpt.data import load_task
from lpt.device import versions
from lpt.errors import printable
from lpt.files import write_atomic
from lpt.run import train
from lpt.search.bench import Bench
from lpt.search.budget import SearchPlan
from lpt.search.candidates import REFERENCE, Candidate
from lpt.search.fitting import Request, requested, searched
from lpt.sweep import processor, version_of_the_code

RUNS = Path("runs/fit")
NEAR, BELOW_PROBE = 0.5, 1.0
"""Points of the metric that the choice may be below the best candidate, and below the probe at the native size."""
MEASURED = ("class_accuracy", "few", "accuracy", "seconds", "prompt_bytes")
METRIC_KEYS = {"class_mean": "class_accuracy", "few": "few", "accuracy": "accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.fit", description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the dataset in the table")
    parser.add_argument("--root", help="a folder, as of lpt fit")
    parser.add_argument("--natural-from", metavar="CIFAR", help="make the folder --root from CIFAR-100 first")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--metric", default="class_mean", choices=METRIC_KEYS)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_args()
    if given.natural_from and not Path(given.root).exists():
        natural.make(Path(given.root), given.natural_from)
    path = HERE / "results" / "fit.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    commit = version_of_the_code()
    for seed in map(int, given.seeds.split(",")):
        request = requested(given.root, given.overrides, budget=given.budget, metric=given.metric, seed=seed)
        run_seed(request, rows, path, {"name": given.name, "seed": seed, "commit": commit})
    print(table(rows))


def run_seed(request: Request, rows: list[dict[str, Any]], path: Path, key: dict[str, Any]) -> None:
    """One search and, of each candidate, one whole run; a row of each to `rows` and to the file at `path`."""
    key = {**key, "budget": request.budget, "metric": request.metric}
    out = RUNS / f"{key['name']}-{request.budget:g}s-{request.metric}-seed{key['seed']}-{key['commit']}"
    search = searched(request, out, resume=True, say=say).search
    if search is None:
        raise SystemExit(f"{key['name']}: nothing was compared, so that there is nothing to measure")
    bench = Bench(request.sections, load_task(**request.sections["data"]), out / "search")
    plan = SearchPlan.from_json(json.loads((out / "search" / "plan.json").read_text()))
    held_out = {one["name"]: one for one in search["candidates"]}
    for candidate in plan.candidates:
        if any(row.items() >= {**key, "candidate": candidate.name}.items() for row in rows):
            continue
        row = {**key, **measured(bench, candidate, out / "candidates" / candidate.name)}
        row |= {"chosen": candidate.name == search["chosen"], "held_out": held_out[candidate.name].get("score")}
        rows[:] = [old for old in rows if not same_place(old, row)] + [row]
        write_atomic(path, json.dumps(rows, indent=1).encode())
        write_atomic(path.with_suffix(".md"), table(rows).encode())


def same_place(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are rows of one candidate on one dataset, of whatever commit."""
    return all(one[part] == other[part] for part in ("name", "seed", "budget", "metric", "candidate"))


def measured(bench: Bench, candidate: Candidate, out: Path) -> dict[str, Any]:
    """What a whole run of `candidate` comes to on the test set."""
    report = train(bench.config_of(candidate), out, resume=True, say=say)
    return {
        "candidate": candidate.name,
        "label": candidate.label,
        "method": candidate.settings,
        "image_size": candidate.image_size,
        **{name: report[name] for name in MEASURED},
        "processor": processor(),
        "versions": versions(),
    }


def say(line: str) -> None:
    print(printable(line), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each search: what was chosen, what was best, and what the choice gave away, in points."""
    lines = [
        "# fit",
        "",
        "| data | budget, s | seed | chosen | its test | best | its test | gives away | to the probe |",
    ]
    lines.append("|---|---:|---:|---|---:|---|---:|---:|---:|")
    searches = sorted({(row["name"], row["budget"], row["metric"], row["seed"]) for row in rows})
    lost, to_probe = [], []
    for name, budget, metric, seed in searches:
        of_search = [row for row in rows if (row["name"], row["budget"], row["metric"], row["seed"])
                     == (name, budget, metric, seed)]  # fmt: skip
        value = {row["candidate"]: 100 * (row[METRIC_KEYS[metric]] or 0.0) for row in of_search}
        chosen = next((row["candidate"] for row in of_search if row["chosen"]), None)
        if chosen is None or REFERENCE not in value:
            continue  # a search that is not measured to its end
        best = max(value, key=lambda one: value[one])
        lost.append(value[best] - value[chosen])
        to_probe.append(value[chosen] - value[REFERENCE])
        cells = [name, f"{budget:g}", str(seed), chosen, f"{value[chosen]:.1f}", best, f"{value[best]:.1f}"]
        lines.append(f"| {' | '.join([*cells, f'{lost[-1]:.1f}', f'{to_probe[-1]:+.1f}'])} |")
    near, kept = sum(one <= NEAR for one in lost), sum(one >= -BELOW_PROBE for one in to_probe)
    lines += [
        "",
        f"Within {NEAR} points of the best: {near} of {len(lost)} searches; not more than {BELOW_PROBE} below ",
    ]
    lines[-1] += f"the probe at the native size: {kept} of {len(lost)}."
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
