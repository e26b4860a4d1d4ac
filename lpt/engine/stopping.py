"""A run that is asked to stop: by Ctrl-C, or by SIGTERM, which schedulers send before they kill."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """The run has saved what it has and ends; `code` is what a shell expects of that signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Stop:
    """`asked` is the signal that came, 0 before. While steps are running (`waits`) the first one only asks: the loop
    ends after its step, with a checkpoint. Otherwise, and at the second one, the run ends at once."""

    def __init__(self) -> None:
        self.asked, self.waits = 0, False

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        first, self.asked = not self.asked, number
        if not (first and self.waits):
            raise Stopped(number)

    @contextlib.contextmanager
    def while_steps_run(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over; in a thread other than the main one, which gets none, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
