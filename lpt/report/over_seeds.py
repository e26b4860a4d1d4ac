"""Rows of runs over seeds: their table with intervals, CSV, and the paired bootstrap between two of them.

Shapes: labels, predicted, difference [N], on the test part.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lpt.errors import LptError
from lpt.files import write_atomic
from lpt.report.quoting import for_spreadsheet
from lpt.report.suite_page import pareto_front, row_means, suite_html

Result = dict[str, Any]
"""A run's report, with its row's name under `method`."""

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
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t, two-sided 95 %, by number of seeds."""
DRAWS = 10_000
"""Of a bootstrap."""


def write(path: Path, name: str, settings: Mapping[str, Sequence[str]], results: Sequence[Result]) -> None:
    """The results of the suite `name` as JSON at `path`, and beside it as CSV, a line for each run, as the Markdown
    table, whose rows are the keys of `settings`: what each sets beyond its config, and as a page with what each row
    costs."""
    write_atomic(path, json.dumps(results, indent=1).encode())
    write_atomic(path.with_suffix(".html"), suite_html(name, settings, results).encode())
    write_atomic(path.with_suffix(".md"), table(name, settings, results).encode())
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    columns = ("method", "seed", *COLUMNS, *FACTS)
    lines.writerow(columns)
    for result in results:
        cells = [result.get(column) for column in columns]
        lines.writerow([for_spreadsheet(cell) if isinstance(cell, str) else cell for cell in cells])
    write_atomic(path.with_suffix(".csv"), buffer.getvalue().encode())


def table(name: str, settings: Mapping[str, Sequence[str]], results: Sequence[Result]) -> str:
    """Mean ± half width of the 95 % t-interval over seeds, per cent; the rows in the order of `settings`."""
    optional = {
        title: path
        for title, path in OPTIONAL_COLUMNS.items()
        if any(value_at(result, path) is not None for result in results)
    }
    has_work = any("cost" in result for result in results)
    header = ["method", "seeds", *COLUMNS, *optional, "parameters", "file, kB"]
    header += ["steps", "images", "TFLOPs", "seconds", "MiB"] if has_work else ["seconds"]
    lines = [f"# {name}", "", f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in settings:
        runs = [result for result in results if result["method"] == row]
        if runs:
            cells = [row, str(len(runs)), *_metric_cells(runs, optional), *_cost_cells(runs, has_work)]
            lines.append(f"| {' | '.join(cells)} |")
    front = [row.name for row in pareto_front(row_means(list(settings), results))]
    lines += ["", f"On the Pareto front of class mean, size of the file and seconds: {', '.join(front) or '-'}."]
    lines += ["", "What each row sets beyond its config:", ""]
    lines += [f"- **{row}**: {' '.join(words) or '-'}" for row, words in settings.items()]
    if results:
        latest = results[-1]
        versions = ", ".join(f"{package} {version}" for package, version in latest["versions"].items())
        commits = ", ".join(sorted({result["commit"] for result in results}))
        lines += ["", f"{latest['processor']}; {versions}; commits {commits}."]
    return "\n".join([*lines, ""])


def _metric_cells(runs: Sequence[Result], optional: Mapping[str, str]) -> list[str]:
    """One row of the table: COLUMNS, then `optional` (names to paths in a report), `-` where the row has none."""
    cells = [interval([100 * run[column] for run in runs if run[column] is not None]) for column in COLUMNS]
    for path in optional.values():
        values = [value_at(run, path) for run in runs]
        percents = [100 * value for value in values if value is not None]
        cells.append(interval(percents) if percents else "-")
    return cells


def _cost_cells(runs: Sequence[Result], has_work: bool) -> list[str]:
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


def value_at(report: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path of a report, None where there is none."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def interval(values: Sequence[float]) -> str:
    """Mean ± half width of the 95 % t-interval of the mean; the mean alone of a single value.

    >>> interval([1.0, 2.0, 3.0]), interval([1.0]), interval([])
    ('2.0 ± 2.5', '1.0', 'n/a')
    """
    if not values:
        return "n/a"
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    half = T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def compared(folders: Mapping[tuple[str, int], Path], one: str, other: str) -> str:
    """Paired bootstrap of the difference in class accuracy between two rows, in points. `folders` are those of the
    runs, by row and seed.

    Test images are drawn anew within classes, the same ones for both rows and all seeds that both have. Raises
    LptError where a run has left no predictions, and where the rows have no seed in common.
    """
    seeds = sorted(seed for row, seed in folders if row == one and (other, seed) in folders)
    if not seeds:
        raise LptError(f"{one} and {other} have no seed in common: run both rows with the same seeds first")
    differences = []  # for each seed, [N] of -1, 0 or 1
    _, labels = right_predictions(folders[one, seeds[0]])
    for seed in seeds:
        is_right, other_is_right = (right_predictions(folders[row, seed])[0] for row in (one, other))
        differences.append(is_right.astype(float) - other_is_right)
    low, middle, high = (100 * x for x in bootstrap(np.mean(differences, axis=0), labels))
    by_seed = ", ".join(f"{100 * class_mean(difference, labels):+.2f}" for difference in differences)
    return (
        f"{one} - {other}: class accuracy {middle:+.2f} points, 95 % of {DRAWS:,} paired bootstraps over test images "
        f"within {low:+.2f} and {high:+.2f}; by seed ({', '.join(map(str, seeds))}) {by_seed}"
    )


def right_predictions(run_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(whether each test image is classified rightly, its label), both [N]. Raises LptError."""
    file = run_folder / "predictions.safetensors"
    if not file.exists():
        raise LptError(f"{run_folder} holds no predictions: run that row again")
    predictions = load_file(file)
    return predictions["predicted"] == predictions["labels"], predictions["labels"]


def class_mean(values: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([values[labels == k].mean() for k in np.unique(labels)]))


def bootstrap(difference: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(2.5 % quantile, value, 97.5 % quantile) of the class mean of `difference` [N] under redrawn images."""
    rng = np.random.default_rng(seed)
    classes = [difference[labels == k] for k in np.unique(labels)]
    means = np.mean([rng.choice(c, (DRAWS, len(c))).mean(1) for c in classes], axis=0)
    return float(np.quantile(means, 0.025)), class_mean(difference, labels), float(np.quantile(means, 0.975))
