"""What `lpt fit` compared before it trained: a table for the terminal and `report.md`, a section of the page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpt.report.markdown import aligned_table, percent
from lpt.report.quoting import for_html, for_markdown

COLUMNS = ("held out, %", "few", "s to train", "file, kB", "ms an image", "")


def search_of(out: Path) -> dict[str, Any] | None:
    """The search beside the run in `out`, None where there is none that can be read."""
    try:
        found = json.loads((out / "search.json").read_text())
        return found if isinstance(found, dict) and "candidates" in found else None
    except (OSError, ValueError):
        return None


def search_rows(search: Mapping[str, Any]) -> list[list[str]]:
    """The cells of each candidate, its name first."""
    rows: list[list[str]] = []
    for one in search["candidates"]:
        name = f"{one['label']}, {one['image_size']} px"
        if one["failed"]:
            rows.append([name, "failed", *("" for _ in COLUMNS[1:])])
            continue
        low, high = one["interval"]
        note = "taken" if one["chosen"] else "" if one["share"] == 1 else f"dropped after {one['share']:.0%}"
        rows.append(
            [
                name,
                f"{percent(one['score'])} ({percent(low)} to {percent(high)})",
                percent(one["few"]),
                f"{one['seconds']:.0f}",
                f"{one['bytes'] / 1000:,.0f}",
                f"{one['ms']:.1f}",
                note,
            ]
        )
    return rows


def search_table(search: Mapping[str, Any]) -> str:
    """A Markdown table of the candidates."""
    rows = [[for_markdown(row[0]), *row[1:]] for row in search_rows(search)]
    return aligned_table(["", *_columns(search)], rows)


def _columns(search: Mapping[str, Any]) -> list[str]:
    return [f"{search['metric'].replace('_', ' ')} {COLUMNS[0]}", *COLUMNS[1:]]


def search_lines(search: Mapping[str, Any]) -> list[str]:
    """The lines of `report.md`."""
    lines = ["## What was compared", "", f"{for_markdown(search['held_out'])}.", "", search_table(search), ""]
    lines.append(for_markdown(search["why"]))
    lines += [f"Not tried: {for_markdown(label)}: {for_markdown(why)}." for label, why in search["left_out"]]
    return [*lines, ""]


def search_html(search: Mapping[str, Any]) -> tuple[str, str]:
    """(the body of a section of the page, the note above it)."""
    head = "".join(f'<th scope="col">{for_html(cell)}</th>' for cell in ["", *_columns(search)])
    rows = "".join(f"<tr>{''.join(f'<td>{for_html(cell)}</td>' for cell in row)}</tr>" for row in search_rows(search))
    left_out = "".join(f"<br>not tried: {for_html(label)}: {for_html(why)}" for label, why in search["left_out"])
    note = f"{search['why']} {search['held_out']}; 95 % intervals; the test set had no part in it."
    return f"<table><tr>{head}</tr>{rows}</table><p class=quiet>{left_out}</p>", note
