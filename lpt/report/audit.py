"""What `lpt audit` found, as a section of the page and as lines for the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpt.report.markdown import aligned_table
from lpt.report.quoting import for_html
from lpt.report.thumbnails import figure

FOLDER, FINDINGS = "audit", "audit.json"
"""Beside a run."""


def audit_of(out: Path) -> dict[str, Any] | None:
    """What the audit of the run in `out` found, None where there is none that can be read."""
    try:
        found = json.loads((out / FOLDER / FINDINGS).read_text())
        return found if isinstance(found, dict) and "label_issues" in found else None
    except (OSError, ValueError):
        return None


def group_table(found: Mapping[str, Any]) -> str:
    """A Markdown table: of each group its images and how many labels are probably wrong."""
    rows = [[name, f"{group['images']:,}", f"{group['issues']:,}"] for name, group in found["groups"].items()]
    return aligned_table(["", "training images", "labels to look at"], rows)


def sentence(found: Mapping[str, Any]) -> str:
    """Both findings in one sentence."""
    return (
        f"{found['label_issues']:,} of {found['images']:,} labels are probably wrong, and {found['near_duplicates']:,} "
        f"pairs of images are nearly the same picture (cosine from {found['cosine']:.4f} on), "
        f"{found['under_two_classes']:,} of them under two classes."
    )


def audit_html(found: Mapping[str, Any]) -> str:
    """The body of the section: the numbers, the worst labels of each group, the pairs under two classes first."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in ("group", "training images", "labels to look at"))
    rows = "".join(
        f'<tr><th scope="row">{for_html(name)}</th><td>{group["images"]:,}</td><td>{group["issues"]:,}</td></tr>'
        for name, group in found["groups"].items()
    )
    parts = [f"<p>{for_html(sentence(found))}</p><table><tr>{head}</tr>{rows}</table>"]
    for name in found["groups"]:
        shown = [one for one in found["shown"] if one["group"] == name]
        figures = "".join(
            figure(one["png"], f"labeled {one['label']}", f"{one['label']} → {one['suggested']}?") for one in shown
        )
        if figures:
            parts.append(f'<div class="class"><header><b>{for_html(name)}</b></header><div>{figures}</div></div>')
    pairs = "".join(
        figure(png, f"labeled {label}", label)
        for pair in found["pairs"]
        for png, label in zip(pair["pngs"], pair["labels"], strict=True)
    )
    if pairs:
        heading = "<header><b>nearly the same picture</b><span>side by side</span></header>"
        parts.append(f'<div class="class">{heading}<div>{pairs}</div></div>')
    return "".join(parts)
