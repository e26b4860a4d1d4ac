"""The command on a run's training images: audit."""

from pathlib import Path
from typing import Annotated

import typer

from lpt.commands.arguments import Overrides
from lpt.commands.console import print, print_lines
from lpt.errors import quoted

PRINTED = 10


def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run")],
    settings: Overrides = None,
) -> None:
    """List likely label errors and near-duplicates among a run's training images, rare classes first.

    Files go to RUN/audit: label_issues.csv, near_duplicates.csv, and label_studio.json to import into Label Studio;
    RUN/report.html gets a section. Needs 'lpt[audit]'; docs/audit.md says how it decides and how often it is right.
    """
    from lpt.audit.auditing import audit as audit_run
    from lpt.report.audit import group_table, sentence

    found = audit_run(run, settings or [])
    print_lines(group_table(found))
    for row in found["shown"][:PRINTED]:
        print(f"{quoted(row['image'])}  {quoted(row['label'], 60)}, perhaps {quoted(row['suggested'], 60)}")
    print(sentence(found))
    print(f"lists        {run / 'audit'}")
