"""The table of all classes on `report.html`, which a click on a heading sorts.

Shapes: counts, per_class [C]; labels, predicted [N], in the order of the test part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lpt.data.longtail import shot_groups
from lpt.report.markdown import percent
from lpt.report.quoting import for_html

HEADINGS = ("class", "group", "training images", "test images", "accuracy, %", "predicted as")

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const heading = button.closest("th"), table = heading.closest("table"), column = heading.cellIndex;
  const up = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => isNaN(a) || isNaN(b) ? String(a).localeCompare(b) : a - b;
  const rows = [...table.tBodies[0].rows].sort((a, b) => up * order(value(a), value(b)));
  table.tBodies[0].append(...rows);
});
"""
"""The only one of a page: it moves rows."""


def class_table(
    counts: Sequence[int],
    per_class: Sequence[float | None],
    group_rule: str,
    classes: Sequence[str],
    labels: Tensor,
    predicted: Tensor,
) -> str:
    """A row for each class, from most to fewest training images."""
    group_of = {k: name for name, members in shot_groups(counts, group_rule).items() for k in members.tolist()}
    test_counts = torch.bincount(labels, minlength=len(classes)).tolist()
    taken_for = _most_taken_for(labels, predicted, len(classes))
    rows = []
    for k in sorted(range(len(classes)), key=lambda k: -counts[k]):
        accuracy = per_class[k]
        confusion = ""
        if k in taken_for:
            other, number = taken_for[k]
            confusion = f"{for_html(classes[other])} {100 * number / test_counts[k]:.0f} %"
        rows.append(
            f'<tr><th scope="row">{for_html(classes[k])}</th><td>{group_of[k]}</td><td>{counts[k]}</td>'
            f'<td>{test_counts[k]}</td><td data-value="{-1 if accuracy is None else round(accuracy, 6)}">'
            f"{percent(accuracy)}</td><td>{confusion}</td></tr>"
        )
    heads = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in HEADINGS)
    body = "\n".join(rows)
    return (
        f"<details><summary>all {len(classes)} classes; a click on a heading sorts</summary>"
        f'<table class="classes"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></details>'
        f"<script>{SCRIPT}</script>"
    )


def _most_taken_for(labels: Tensor, predicted: Tensor, num_classes: int) -> Mapping[int, tuple[int, int]]:
    """Class → (the class that its mistakes are most often predicted as, how many of them), of classes with mistakes.

    >>> _most_taken_for(torch.tensor([0, 0, 0, 1]), torch.tensor([2, 2, 1, 1]), 3)
    {0: (2, 2)}
    """
    wrong = labels != predicted
    pairs, numbers = (labels[wrong] * num_classes + predicted[wrong]).unique(return_counts=True)
    found: dict[int, Any] = {}
    for pair, number in zip(pairs.tolist(), numbers.tolist(), strict=True):
        label, other = divmod(pair, num_classes)
        if label not in found or number > found[label][1]:
            found[label] = (other, number)
    return found
