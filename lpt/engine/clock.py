"""Wall time of a phase: in all, and by what it was spent on."""

import time


class Clock:
    """Of this process's part of a phase."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.spent: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def total(self) -> float:
        return time.perf_counter() - self.start

    def charge(self, what: str) -> "Charge":
        """A context whose wall time is added to `spent[what]`."""
        return Charge(self, what)

    def due(self, what: str, seconds: float) -> bool:
        """Whether `seconds` have passed since this was last true of `what`, or since the clock was started."""
        now = time.perf_counter()
        if now - self._last.setdefault(what, self.start) < seconds:
            return False
        self._last[what] = now
        return True

    def left(self, done: int, more: int) -> float:
        """Seconds for `more` steps, if they take as long as the `done` ones have."""
        return self.total() / max(done, 1) * more

    def rate(self, images: int, done: int, more: int, loss: float) -> str:
        """Loss, images/s and time left, for people; a step has `images`."""
        speed = images * done / max(self.total(), 1e-9)
        return f"loss {loss:.3f}  {speed:.0f} images/s  {self.left(done, more):.0f} s left"


class Charge:
    """See `Clock.charge`."""

    def __init__(self, clock: Clock, what: str):
        self.clock, self.what = clock, what

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = self.clock.spent
        spent[self.what] = spent.get(self.what, 0.0) + time.perf_counter() - self.began
