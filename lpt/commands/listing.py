"""Lists of methods, backbones, datasets, losses, presets, configs and suites."""

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lpt.commands.arguments import ConfigName, named_things
from lpt.commands.console import print, print_lines
from lpt.errors import LptError

WIDEST_NAME = 24


def list_(
    what: Annotated[
        str | None,
        typer.Argument(
            help="methods, backbones, data, losses, presets, configs or suites",
            autocompletion=named_things("lists"),
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Argument(
            metavar="METHOD",
            help="after `methods`: the settings of this method",
            autocompletion=named_things("methods"),
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="of backbones: all published weights by family, with size and license")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List what is available: methods (and their settings), backbones, datasets, losses, presets, configs, suites."""
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
    elif method is not None:
        if what != "methods":
            raise LptError(f"settings are listed of methods, not of {what}: lpt list methods {method}")
        _print_settings(method, as_json)
    elif as_json:
        print_lines(json.dumps(lists[what] if what else lists, indent=1, ensure_ascii=False))
    else:
        _print_lists({what: lists[what]} if what else lists, headed=what is None)


def _print_lists(lists: Mapping[str, Mapping[str, str]], *, headed: bool) -> None:
    for kind, table in lists.items():
        if headed:
            print(f"{kind}:")
        width = min(max(map(len, table)), WIDEST_NAME)
        for name, text in table.items():
            _print_entry(name.ljust(width), text, indent=width + 4)


def _print_settings(method: str, as_json: bool) -> None:
    from lpt.methods.settings_table import settings_table

    rows = settings_table(method)
    if as_json:
        return print_lines(json.dumps([row._asdict() for row in rows], indent=1, ensure_ascii=False))
    for row in rows:
        _print_entry(f"{row.name}={row.default}", f"({row.type})", indent=6)
        if row.description:
            _print_entry("", row.description, indent=6)


def _print_entry(name: str, text: str, *, indent: int) -> None:
    """One entry of a list: on a terminal in lines as wide as it is, elsewhere on one line."""
    width: Any = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    first = f"  {name}  " if name else " " * indent
    if len(first) > indent and len(first) + len(text) > width:
        print(first.rstrip())
        first = " " * indent
    wrapper = textwrap.TextWrapper(
        max(width, 40),
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    for line in wrapper.wrap(text):
        print(line)


def config_(config: ConfigName) -> None:
    """Print a config, as a start for your own: lpt config NAME > my.yaml."""
    from lpt.shipped import file_of

    print_lines(file_of("config", config).read_text(encoding="utf-8").rstrip("\n"))
