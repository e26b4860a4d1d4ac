"""What there is: methods, backbones, datasets, losses, presets, configs and suites."""

from typing import Annotated

import typer

from lpt.commands.arguments import ConfigName
from lpt.commands.console import print, print_lines
from lpt.errors import LptError


def list_(
    what: Annotated[
        str | None, typer.Argument(help="methods, backbones, data, losses, presets, configs or suites")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="of backbones: all published weights by family, with size and licence")
    ] = False,
) -> None:
    """What there is."""
    from lpt.errors import did_you_mean
    from lpt.listing import tables

    lists = tables()
    if what is not None and what not in lists:
        raise LptError(f"there is no list of {what!r}: {', '.join(lists)}{did_you_mean(what, lists)}")
    if everything:
        if what != "backbones":
            raise LptError(f"--all is for backbones, not for {what or 'all lists'}: lpt list backbones --all")
        from lpt.model.backbones.catalogue import lines

        for line in lines():
            print(line)
        return
    for kind in [what] if what else lists:
        if what is None:
            print(f"{kind}:")
        for name, text in lists[kind].items():
            print(f"  {name}  {text}")


def config_(config: ConfigName) -> None:
    """The text of a config, to start one's own from: lpt config NAME > my.yaml."""
    from lpt.shipped import file_of

    print_lines(file_of("config", config).read_text(encoding="utf-8").rstrip("\n"))
