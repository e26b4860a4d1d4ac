"""The metrics of a model as a mapping that notebooks show as a table.

Shapes: counts [C].
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from lpt.errors import quoted

COLUMNS = ("accuracy", "class_accuracy", "many", "medium", "few", "worst_class", "ece")
COLUMN_NAMES = {"accuracy": "all", "class_accuracy": "class mean", "worst_class": "worst class", "ece": "ECE"}
WORST_SHOWN = 10


def percent(value: float | None) -> str:
    """One decimal; an empty group is n/a, never NaN.

    >>> percent(0.6789), percent(None)
    ('67.9', 'n/a')
    """
    return "n/a" if value is None else f"{100 * value:.1f}"


class Report(dict[str, Any]):
    """The metrics of `report.json` by name, as fractions; a notebook shows them in per cent, by group, with the worst
    classes below. It is a `dict`, and is written as one; `classes` and `counts` [C] are beside its entries.

    >>> import lpt
    >>> report = lpt.Report({"accuracy": 0.5, "few": None}, classes=("cat", "dog"))
    >>> report["accuracy"], report == {"accuracy": 0.5, "few": None}, "50.0" in report._repr_html_()
    (0.5, True, True)
    """

    def __init__(self, metrics: Mapping[str, Any], *, classes: Sequence[str] = (), counts: Sequence[int] = ()) -> None:
        super().__init__(metrics)
        self.classes, self.counts = tuple(classes), tuple(counts)

    def _repr_html_(self) -> str:
        present = [name for name in COLUMNS if name in self]
        head = "".join(f'<th scope="col">{html.escape(COLUMN_NAMES.get(name, name))}</th>' for name in present)
        cells = "".join(f"<td>{percent(self[name])}</td>" for name in present)
        parts = [f"<table><thead><tr>{head}</tr></thead><tbody><tr>{cells}</tr></tbody></table>"]
        if sizes := self.get("group_sizes"):
            groups = ", ".join(f"{number} {name}" for name, number in sizes.items())
            rule = html.escape(str(self.get("group_rule")))
            parts.append(f"<p>Per cent. Groups by training count ({rule}): {groups} classes.</p>")
        return "".join([*parts, self._worst_classes()])

    def _worst_classes(self) -> str:
        of_class = self.get("per_class", ())
        if not self.classes or len(of_class) != len(self.classes):
            return ""
        ranked = sorted((accuracy, k) for k, accuracy in enumerate(of_class) if accuracy is not None)
        rows = []
        for accuracy, k in ranked[:WORST_SHOWN]:
            images = f"<td>{self.counts[k]}</td>" if self.counts else ""
            rows.append(
                f'<tr><th scope="row">{html.escape(quoted(self.classes[k], 80))}</th><td>{percent(accuracy)}</td>'
                f"{images}</tr>"
            )
        images = '<th scope="col">training images</th>' if self.counts else ""
        head = f'<tr><th scope="col">class</th><th scope="col">accuracy, %</th>{images}</tr>'
        return (
            f"<details><summary>the worst classes</summary><table><thead>{head}</thead>"
            f"<tbody>{''.join(rows)}</tbody></table></details>"
        )
