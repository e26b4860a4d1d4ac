"""What commands print: lines fit for a terminal, and the progress of a run."""

import builtins
import sys
from typing import Any, TextIO

from lpt.errors import printable


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


class Progress:
    """A bar with rates and time left on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None
        self.phase = ""

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self.bar = Progress(*columns, TextColumn("{task.fields[rates]}"), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(printable(text), markup=False, highlight=False)
        else:
            print(text, flush=True)

    def show(self, phase: str, step: int, steps: int, rates: str) -> None:
        if not self.bar:
            return
        if phase != self.phase:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task, self.phase = self.bar.add_task(phase, total=steps, rates=""), phase
        self.bar.update(self.task, completed=step, rates=rates)
