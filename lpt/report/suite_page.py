"""A suite's rows as a page: what each costs and what it reaches, and which of them no other row beats.

A row is on the Pareto front when no other one has a class mean at least as high with a file at most as large in at
most as many seconds, and is better in one of the three. Everything is a mean over the row's seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lpt.errors import NotInstalled
from lpt.report import plots
from lpt.report.page import STYLE
from lpt.report.quoting import for_html

HEAD = ("", "seeds", "class mean, %", "few, %", "file, kB", "seconds", "front")


@dataclass(frozen=True)
class RowMean:
    """A row of a suite, as a mean over its seeds."""

    name: str
    seeds: int
    class_accuracy: float
    few: float | None
    prompt_bytes: float
    seconds: float

    def beats(self, other: "RowMean") -> bool:
        """Whether it is nowhere worse and somewhere better, by class mean, size of the file and seconds."""
        mine, theirs = self._lower_is_better(), other._lower_is_better()
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    def _lower_is_better(self) -> tuple[float, float, float]:
        return -self.class_accuracy, self.prompt_bytes, self.seconds


def row_means(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[RowMean]:
    """The rows of `names` that have results, highest class mean first."""
    means = []
    for name in names:
        runs = [result for result in results if result["method"] == name and result["class_accuracy"] is not None]
        if runs:
            few = [run["few"] for run in runs if run["few"] is not None]
            numbers = (statistics.mean(run[key] for run in runs) for key in ("prompt_bytes", "seconds"))
            mean = statistics.mean(run["class_accuracy"] for run in runs)
            means.append(RowMean(name, len(runs), mean, statistics.mean(few) if few else None, *numbers))
    return sorted(means, key=lambda row: -row.class_accuracy)


def pareto_front(rows: Sequence[RowMean]) -> list[RowMean]:
    """The rows that no other one beats, in the order of `rows`."""
    return [row for row in rows if not any(other.beats(row) for other in rows)]


def suite_html(name: str, settings: Mapping[str, Sequence[str]], results: Sequence[Mapping[str, Any]]) -> str:
    """The text of the page of the suite `name`; the keys of `settings` are its rows, with what each sets."""
    rows = row_means(list(settings), results)
    front = pareto_front(rows)
    drawings = "".join(_drawn(rows, *axis) for axis in (("prompt_bytes", "file, kB"), ("seconds", "seconds")))
    head = "".join(f'<th scope="col">{cell}</th>' for cell in HEAD)
    lines = "".join(_line(row, settings[row.name], row in front) for row in rows)
    title = for_html(name)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n<h1>{title}</h1>"
        f"<section><h2>What accuracy costs</h2><p class=quiet>{for_html(_note(front))}</p>{drawings}</section>"
        f"<section><h2>All rows</h2><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></section>"
        "\n</main></body></html>\n"
    )


def _note(front: Sequence[RowMean]) -> str:
    names = ", ".join(row.name for row in front)
    return f"On the Pareto front of class mean, size of the prompt file and seconds: {names}."


def _drawn(rows: Sequence[RowMean], key: str, label: str) -> str:
    unit = 1000 if key == "prompt_bytes" else 1
    if not rows:
        return ""
    points = {row.name: (getattr(row, key) / unit, 100 * row.class_accuracy) for row in rows}
    try:
        return plots.cost_of_accuracy(points, label)
    except NotInstalled as error:
        return f'<p class="quiet">{for_html(error)}</p>'


def _line(row: RowMean, setting: Sequence[str], on_front: bool) -> str:
    few = "n/a" if row.few is None else f"{100 * row.few:.1f}"
    cells = [str(row.seeds), f"{100 * row.class_accuracy:.1f}", few]
    cells += [f"{row.prompt_bytes / 1000:,.0f}", f"{row.seconds:,.0f}", "yes" if on_front else ""]
    name = f"{for_html(row.name)}<br><span class=quiet>{for_html(' '.join(setting))}</span>"
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
