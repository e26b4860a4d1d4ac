"""Long-tailed prompt tuning: adapt a frozen ViT or CLIP to a long-tailed dataset, and predict with the resulting prompt
file.

Errors in settings or files are one sentence each, with exit code 2."""

import gc
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from lpt.commands import audit, data, library, listing, predicting, prompts, sharing, training
from lpt.commands.console import paragraphs, print
from lpt.commands.serve import serve
from lpt.errors import ConfigError, LptError, quoted, shortened

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lpt import __version__

        print(f"lpt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="show the version and exit")
    ] = False,
) -> None:
    """Options before any command."""


COMMANDS = {
    "train": training.train,
    "plan": training.plan,
    "fit": training.fit,
    "evaluate": predicting.evaluate,
    "predict": predicting.predict,
    "pseudo-label": predicting.pseudo_label,
    "edit": prompts.edit,
    "route": library.route,
    "serve": serve,
    "inspect": prompts.inspect,
    "soup": prompts.soup,
    "export": sharing.export,
    "push": sharing.push,
    "pull": sharing.pull,
    "report": training.report,
    "audit": audit.audit,
    "doctor": data.doctor,
    "pack": data.pack,
    "sweep": training.sweep,
    "list": listing.list_,
    "config": listing.config_,
}
"""In the order of `lpt --help`."""

for name, command in COMMANDS.items():
    app.command(name, help=paragraphs(command.__doc__ or ""))(command)
app.add_typer(library.library_app, name="library")


def main() -> None:
    """Entry point. People's mistakes end with code 2 and no traceback."""
    warnings.showwarning = _show_warning
    # While modules are imported little is garbage, and looking for it takes a fifth of the time.
    gc.set_threshold(50_000)
    try:
        app()
    except ConfigError as error:
        _fail(*error.mistakes)
    except LptError as error:
        _fail(str(error))
    except OSError as error:
        name = quoted(error.filename or "a file")
        _fail(f"{name}: {error.strerror or quoted(error)}; nothing more was written")


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """On one line, without the place in our code that people can do nothing about."""
    print(f"warning: {quoted(message, 1000)}", file=sys.stderr)


def _fail(*mistakes: str) -> NoReturn:
    lines = [shortened(" ".join(mistake.split("\n"))) for mistake in mistakes]
    if len(lines) == 1:
        print(f"error: {lines[0]}", file=sys.stderr)
    else:
        print(f"error: {len(lines)} mistakes:", file=sys.stderr)
        for line in lines:
            print(f"  {line}", file=sys.stderr)
    sys.exit(2)
