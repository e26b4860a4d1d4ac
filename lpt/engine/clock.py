"""Wall time of a phase: in all, and by what it was spent on."""

import time
from collections.abc import Mapping


class Clock:
    """Of this process's part of a phase, and of what earlier, killed processes have spent on it: `before` seconds in
    all, `spent` by what on."""

    def __init__(self, *, before: float = 0.0, spent: Mapping[str, float] | None = None) -> None:
        self.start, self.before = time.perf_counter(), before
        self.spent: dict[str, float] = dict(spent or {})
        self._last: dict[str, float] = {}

    def total(self) -> float:
        """Seconds of this process."""
        return time.perf_counter() - self.start

    def whole(self) -> float:
        """Seconds of all processes, one after the other."""
        return self.before + self.total()

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
        """Seconds for `more` steps, if they take as long as the `done` ones of the phase have."""
        return self.whole() / max(done, 1) * more

    def speed(self, images: int) -> float:
        """Images/s of this process, which has seen so many."""
        return images / max(self.total(), 1e-9)

    def rate(self, images: int, left: float, loss: float) -> str:
        """Loss, images/s and seconds `left`, for people; this process has seen `images`."""
        return f"loss {loss:.3f}  {self.speed(images):.0f} images/s  {left:.0f} s left"


class Charge:
    """See `Clock.charge`."""

    def __init__(self, clock: Clock, what: str):
        self.clock, self.what = clock, what

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = self.clock.spent
        spent[self.what] = spent.get(self.what, 0.0) + time.perf_counter() - self.began
