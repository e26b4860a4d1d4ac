"""How far work is: a bar in notebooks, on a terminal where it is asked for, and nothing elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

SECONDS_BETWEEN = 0.2
"""Of two pictures of a bar in a notebook, each of which is a message to the browser."""


def in_notebook() -> bool:
    """Whether what is printed is seen in a notebook: Jupyter, Colab, VS Code, Databricks."""
    if "IPython" not in sys.modules:  # looked at first: rich takes its time to load
        return False
    from rich.console import Console

    return Console().is_jupyter


class Bar:
    """Shows the phase, steps and rates of what runs inside `with`, by rich. `wanted` None is: in notebooks; True: on a
    terminal, too; False: nowhere.

    A notebook's bar is an output that is replaced, which needs no widgets, and stays in the notebook when it is saved.
    """

    def __init__(self, wanted: bool | None = None) -> None:
        self.is_live = wanted is not False and not in_notebook() and bool(wanted) and sys.stdout.isatty()
        self.is_output = wanted is not False and in_notebook()
        self.rich: Any = None
        self._output: Any = None
        self._task: Any = None
        self._phase, self._shown_at = "", 0.0

    def __enter__(self) -> Self:
        if self.is_live or self.is_output:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.rich = Progress(*columns, TextColumn("{task.fields[rates]}"), transient=True)
            if self.is_live:
                self.rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_live:
            self.rich.stop()
        elif self.is_output:
            self._draw()

    def show(self, phase: str, step: int, steps: int, rates: str = "") -> None:
        """`step` of `steps` of `phase` are done; `rates` is text beside the bar."""
        if not self.rich:
            return
        if phase != self._phase:
            if self._task is not None and self.is_live:
                self.rich.remove_task(self._task)
            self._task, self._phase = self.rich.add_task(phase, total=steps, rates=""), phase
        self.rich.update(self._task, completed=step, total=steps, rates=rates)
        if self.is_output and (step == steps or time.monotonic() - self._shown_at >= SECONDS_BETWEEN):
            self._draw()

    def _draw(self) -> None:
        """The bars of all phases until now, in place of the last picture of them."""
        if not self.rich.tasks:
            return
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        picture = self.rich.make_tasks_table(self.rich.tasks)
        if self._output is None:
            self._output = display(picture, display_id=True)
        else:
            self._output.update(picture)
        self._shown_at = time.monotonic()
