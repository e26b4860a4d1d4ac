"""What one client may ask of a server, and what all of them may ask at once."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lpt.errors import LptError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Sizes are in bytes, times in seconds. A question is an image and a task that is asked about it."""

    body: int = 16 * MIB
    """Of one request."""
    bodies: int = 128 * MIB
    """Of all requests that are being answered."""
    questions: int = 32
    """Of one request."""
    queue: int = 256
    """Questions that wait or are being answered; the next request is refused."""
    seconds: float = 30.0
    """For a request, from its headers to its answer."""


class Refusal(LptError):
    """A request that is not answered: its HTTP status, and why in one sentence."""

    def __init__(self, status: int, message: str, *, near: tuple[str, ...] = (), retry_after: int | None = None):
        super().__init__(message)
        self.status, self.near, self.retry_after = status, near, retry_after


class Place:
    """What one request takes of the room for all; of the event loop's thread alone, as `Room` is."""

    def __init__(self, room: "Room") -> None:
        self.room, self.questions, self.bytes = room, 0, 0

    def ask(self, questions: int) -> None:
        """From now on the request has so many questions. Raises Refusal (429)."""
        more = questions - self.questions
        # A request that is alone may have as many as a request may have.
        if self.room.questions + more > self.room.limits.queue and self.room.questions > self.questions:
            raise self.room.busy(f"{self.room.questions} questions wait")
        self.room.questions += more
        self.questions = questions

    def hold(self, size: int) -> None:
        """So many bytes more have come of its body. Raises Refusal (413, 429)."""
        limits = self.room.limits
        self.bytes += size
        self.room.bytes += size
        if self.bytes > limits.body:
            raise Refusal(413, f"the body is larger than {limits.body:,} bytes: send fewer or smaller images")
        if self.room.bytes > limits.bodies:
            raise self.room.busy("too much is being uploaded")


class Room:
    """How much is being answered."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.questions, self.bytes = limits, 0, 0
        self.rate = 0.0
        """Questions answered in a second, lately."""

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Of a request, for as long as it is answered. Raises Refusal (429) where there is none."""
        place = Place(self)
        try:
            place.ask(1)
            yield place
        finally:
            self.questions -= place.questions
            self.bytes -= place.bytes

    def busy(self, why: str) -> Refusal:
        seconds = math.ceil(self.questions / self.rate) if self.rate else 1
        seconds = min(max(seconds, 1), 60)
        return Refusal(429, f"the server is busy ({why}): try again in {seconds} s", retry_after=seconds)
