"""What commands print: lines fit for a terminal, and the progress of a run."""

import builtins
import sys
from typing import TextIO

from lpt.errors import printable
from lpt.progress import Bar


def print(line: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Every line of every command, in place of Python's own `print`: classes and files may be called anything, and what
    they are called neither moves the cursor nor begins a line."""
    builtins.print(printable(line), file=file, flush=flush)


def print_lines(text: str) -> None:
    """A table or a config, whose line breaks are its own."""
    for line in text.split("\n"):
        print(line)


def paragraphs(docstring: str) -> str:
    """The docstring of a command with a line for each paragraph, which the terminal breaks where it is full."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))


def print_at_once(text: str) -> None:
    print(text, flush=True)


def print_aside(text: str) -> None:
    print(text, file=sys.stderr)


class Progress(Bar):
    """A bar with rates and time left on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        super().__init__(wanted=True)

    def say(self, text: str) -> None:
        if self.is_live:
            self.rich.console.print(printable(text), markup=False, highlight=False)
        else:
            print(text, flush=True)
