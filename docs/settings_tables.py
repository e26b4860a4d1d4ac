"""Writes the settings table into the page of each method: `python docs/settings_tables.py` at the root."""

import re
from pathlib import Path

from lpt.methods.settings_table import settings_table

PAGES = Path(__file__).parent / "methods"
TABLE = re.compile(r"(<!-- settings: ([\w:]+) -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with its tables as the signatures of today have them."""
    return TABLE.sub(lambda match: match[1] + _table(match[2]) + match[3], page)


def _table(method: str) -> str:
    lines = ["", "| setting | type | default | description |", "|---|---|---|---|"]
    for row in settings_table(method):
        cells = (f"`{row.name}`", row.type, f"`{row.default}`", row.description)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
