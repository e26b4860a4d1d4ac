"""A run that is asked to stop: by Ctrl-C, or by SIGTERM, which schedulers send before they kill."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """The run has saved what it has and ends; `code` is what a shell expects of that signal. Like KeyboardInterrupt no
    Exception: what forgives a damaged image must not forgive this."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Stop:
    """`asked` is the signal that came, 0 before. While steps are running (`waits`) it only asks: the loop ends after
    its step, with a checkpoint. Otherwise, and at a second Ctrl-C, the run ends at once (a launcher may pass on SIGTERM
    that everybody has already got)."""

    def __init__(self) -> None:
        self.asked, self.waits = 0, False

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        again, self.asked = bool(self.asked), number
        if not self.waits or (again and number == signal.SIGINT):
            raise Stopped(number)

    @contextlib.contextmanager
    def while_steps_run(self) -> Iterator[None]:
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.asked:  # after the loop had looked for the last time
            raise Stopped(self.asked)

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
