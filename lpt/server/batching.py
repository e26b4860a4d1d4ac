"""One queue for the questions of all requests, and one thread that asks the bank of tasks, many at a time."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lpt.serve.bank import Asked, TaskAnswer, TaskBank, Unrouted
from lpt.serve.router import Route
from lpt.server.limits import Refusal

log = logging.getLogger("lpt.server")
Observe = Callable[[int, float], None]
"""Is given the size of each batch, and the seconds that it took."""


class Answered(NamedTuple):
    """`answer` is a TaskAnswer, or the Route of an image without a task. It waited and was computed for so many
    seconds."""

    answer: Any
    waited: float
    computed: float


@dataclass(eq=False)
class _Question:
    asked: Asked | Unrouted
    topk: int
    future: "Future[Answered]" = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Whatever waits when the thread is free, up to a batch, goes through the backbone together, the oldest first.

    While more is on its way (`coming`), a batch that is not full waits for it, `wait` seconds at most. A question whose
    future is cancelled meanwhile is left out. Where a batch fails, each of its questions is asked alone: what is wrong
    with one task is no matter of the others.
    """

    def __init__(self, bank: TaskBank, *, wait: float = 0.005, observe: Observe = lambda size, seconds: None) -> None:
        self.bank, self.wait, self.observe = bank, wait, observe
        self._queue: deque[_Question] = deque()
        self._changed = threading.Condition()
        self._coming, self._ends = 0, False
        self._thread = threading.Thread(target=self._work, name="lpt answers", daemon=True)
        self._thread.start()

    def submit(self, asked: Asked | Unrouted, *, topk: int = 1) -> "Future[Answered]":
        question = _Question(asked, topk)
        with self._changed:
            if self._ends:
                raise RuntimeError("the server is stopping")
            self._queue.append(question)
            self._changed.notify()
        return question.future

    @contextmanager
    def coming(self, number: int) -> Iterator[None]:
        """Inside it so many questions are made ready."""
        with self._changed:
            self._coming += number
        try:
            yield
        finally:
            with self._changed:
                self._coming -= number
                self._changed.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        """Answers what waits, and ends."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            began = time.perf_counter()
            routes = [question for question in batch if isinstance(question.asked, Unrouted)]
            asks = [question for question in batch if isinstance(question.asked, Asked)]
            self._finish(routes, self._routes)
            self._finish(asks, self._answers)
            self.observe(len(batch), time.perf_counter() - began)

    def _next(self) -> list[_Question]:
        """The next batch; empty at the end."""
        size = self.bank.batch_size
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ends)
                self._changed.wait_for(lambda: len(self._queue) >= size or not self._coming, timeout=self.wait)
                taken = [self._queue.popleft() for _ in range(min(size, len(self._queue)))]
                if not taken and self._ends:
                    return []
            if batch := [question for question in taken if question.future.set_running_or_notify_cancel()]:
                return batch

    def _finish(self, questions: Sequence[_Question], answer: Callable[[Sequence[Any], int], Sequence[Any]]) -> None:
        if not questions:
            return
        began = time.perf_counter()
        try:
            answers = answer([question.asked for question in questions], max(question.topk for question in questions))
        except Exception as error:  # of a model from anyone it can be of any class
            if len(questions) == 1:
                log.error("a question could not be answered", exc_info=error)
                questions[0].future.set_exception(Refusal(500, "the model of this task fails on this image"))
                return
            for question in questions:
                self._finish([question], answer)
            return
        seconds = time.perf_counter() - began
        for question, one in zip(questions, answers, strict=True):
            if isinstance(one, TaskAnswer):
                one = first_of(one, question.topk)
            question.future.set_result(Answered(one, began - question.since, seconds))

    def _routes(self, asked: Sequence[Unrouted], topk: int) -> list[Route]:
        return self.bank.routed(asked)

    def _answers(self, asked: Sequence[Asked], topk: int) -> list[TaskAnswer]:
        return self.bank.answer(asked, topk=topk)


def first_of(answer: TaskAnswer, topk: int) -> TaskAnswer:
    """The same with its `topk` best classes."""
    return answer._replace(
        classes=answer.classes[:topk], probabilities=answer.probabilities[:topk], counts=answer.counts[:topk]
    )
