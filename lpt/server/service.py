"""From the body of a request to its answers: parsed and decoded in threads, asked in batches."""

import asyncio
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor

from lpt.data.preprocess import Preprocess, available_cores
from lpt.errors import DataError, LptError, UnknownTask
from lpt.serve.bank import AUTO, Asked, HeldTask, Routers, TaskAnswer, TaskBank, Unrouted, view_kind, view_of
from lpt.serve.router import Route
from lpt.server.batching import Answered, Batcher
from lpt.server.bodies import Asking, asking
from lpt.server.limits import Limits, Place, Refusal, Room
from lpt.server.metrics import Metrics

RATE_MEMORY = 0.9
"""Of the rate of answers, which is an average over about ten batches."""


class Prepared(NamedTuple):
    """A request whose tasks are held: what happens to their files from now on is no matter of it."""

    asking: Asking
    held: dict[str, HeldTask]
    routers: Routers


class Service:
    """A bank of tasks that answers requests."""

    def __init__(self, bank: TaskBank, limits: Limits | None = None, *, wait: float = 0.005) -> None:
        """`wait`: see `Batcher`."""
        self.bank, self.limits = bank, limits or Limits()
        self.room, self.metrics = Room(self.limits), Metrics()
        self.batcher = Batcher(bank, wait=wait, observe=self._observe)
        self._threads = ThreadPoolExecutor(available_cores(), thread_name_prefix="lpt images")
        self.metrics.gauge("lpt_tasks", "Tasks that are served.", lambda: len(bank))
        self.metrics.gauge("lpt_task_bytes", "Memory of the tasks that are loaded.", lambda: bank.bytes)
        self.metrics.gauge("lpt_waiting", "Images that wait for a batch.", lambda: self.batcher.waiting)
        self.metrics.gauge("lpt_in_flight", "Images that wait or are being answered.", lambda: self.room.questions)

    def _observe(self, size: int, seconds: float) -> None:
        self.metrics.batch.observe(size)
        self.metrics.batch_seconds.observe(seconds)
        rate = size / max(seconds, 1e-6)
        self.room.rate = RATE_MEMORY * self.room.rate + (1 - RATE_MEMORY) * rate if self.room.rate else rate

    def close(self) -> None:
        self.batcher.close()
        self._threads.shutdown()

    async def answers(self, content_type: str, body: bytes, place: Place) -> tuple[int, dict[str, Any]]:
        """(HTTP status, what is sent as JSON). Raises Refusal where nothing is answered."""
        began = time.perf_counter()
        prepared = await self._in_thread(self._prepare, content_type, body)
        place.ask(len(prepared.asking.questions))
        numbers: dict[int, list[int]] = {}
        for k, (i, _) in enumerate(prepared.asking.questions):
            numbers.setdefault(i, []).append(k)
        answered = await asyncio.gather(*(self._about(prepared, i, rows) for i, rows in numbers.items()))
        found = dict(pair for pairs in answered for pair in pairs)
        results = [found[k][0] for k in range(len(found))]
        for result in results:
            self.metrics.questions.labels(str(result["status"])).inc()
        times = {
            "waiting": round(1000 * max(waited for _, waited, _ in found.values()), 2),
            "computing": round(1000 * max(computed for *_, computed in found.values()), 2),
            "whole": round(1000 * (time.perf_counter() - began), 2),
        }
        statuses = {result["status"] for result in results}
        # A request of which something was answered is answered; what was not says so itself.
        status = 200 if 200 in statuses else min(statuses)
        return status, {"results": results, "milliseconds": times}

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _prepare(self, content_type: str, body: bytes) -> Prepared:
        """Raises Refusal."""
        asked = asking(content_type, body, self.limits)
        names = list(dict.fromkeys(task for _, task in asked.questions))
        by_name = [name for name in names if name != AUTO]
        held = dict(zip(by_name, self._hold(by_name), strict=True))
        routers: Routers = ()
        if AUTO in names:
            try:
                routers = self.bank.routers()
            except LptError as error:
                raise Refusal(404, str(error)) from None
        return Prepared(asked, held, routers)

    def _hold(self, names: Sequence[str]) -> list[HeldTask]:
        """Raises Refusal."""
        try:
            return self.bank.hold(names)
        except UnknownTask as error:
            raise Refusal(404, str(error), near=error.near) from None
        except LptError:  # its file has been damaged since it was dropped from memory
            raise Refusal(503, "the file of a task cannot be read now: try again", retry_after=5) from None

    async def _about(
        self, prepared: Prepared, i: int, rows: Sequence[int]
    ) -> list[tuple[int, tuple[dict[str, Any], float, float]]]:
        """(number of a question, (its result, seconds that it waited, and was computed)) of all about image `i`."""
        asked = prepared.asking
        tasks = [asked.questions[k][1] for k in rows]
        wanted = [prepared.held[task].preprocess for task in tasks if task != AUTO]
        if AUTO in tasks:
            wanted += [preprocess for preprocess, _ in prepared.routers]
        with self.batcher.coming(len(rows)):
            views = await self._in_thread(views_of, asked.images[i], asked.names[i], wanted)
        if isinstance(views, LptError):
            return [(k, (error_of(task, views), 0.0, 0.0)) for k, task in zip(rows, tasks, strict=True)]
        each = [self._one(prepared, views, task) for task in tasks]
        return list(zip(rows, await asyncio.gather(*each), strict=True))

    async def _one(
        self, prepared: Prepared, views: dict[Hashable, Tensor], task: str
    ) -> tuple[dict[str, Any], float, float]:
        waited = computed = 0.0
        route: Route | None = None
        topk = prepared.asking.topk
        try:
            if task == AUTO:
                each = tuple(views[view_kind(preprocess)] for preprocess, _ in prepared.routers)
                route, waited, computed = await self._batched(Unrouted(prepared.routers, each), topk)
                assert route is not None
                if route.task is None:
                    return result_of(TaskAnswer(None, route=route)), waited, computed
                (held,) = await self._in_thread(self._hold, [route.task])
            else:
                held = prepared.held[task]
            if view_kind(held.preprocess) not in views:  # replaced since it was routed to
                raise Refusal(503, "the task that was found has just changed: try again")
            answer, more, seconds = await self._batched(Asked(held, views[view_kind(held.preprocess)]), topk)
        except LptError as error:
            return error_of(task, error, status=503), waited, computed
        return result_of(answer._replace(route=route)), waited + more, computed + seconds

    async def _batched(self, asked: Asked | Unrouted, topk: int) -> Answered:
        return await asyncio.wrap_future(self.batcher.submit(asked, topk=topk))


def views_of(image: bytes | Refusal, name: str, wanted: Sequence[Preprocess]) -> dict[Hashable, Tensor] | LptError:
    """An image's views [3 S S], each kind once; or what is wrong with the image."""
    if isinstance(image, Refusal):
        return image
    views: dict[Hashable, Tensor] = {}
    try:
        for preprocess in wanted:
            if view_kind(preprocess) not in views:
                views[view_kind(preprocess)] = view_of(preprocess, image, name)
    except DataError as error:
        return error
    return views


def result_of(answer: TaskAnswer) -> dict[str, Any]:
    """An answer as it is sent."""
    route = answer.route and {**answer.route._asdict(), "score": finite(answer.route.score)}
    if answer.error is not None:
        return {"status": 422, "task": answer.task, "error": answer.error}
    classes = zip(answer.classes, answer.probabilities, answer.counts, strict=True)
    prompts = zip(answer.group_prompts, answer.similarity, strict=True)
    return {
        "status": 200,
        "task": answer.task,
        "classes": [{"name": name, "probability": p, "count": count} for name, p, count in classes],
        "group_prompts": [{"number": number, "similarity": finite(cosine)} for number, cosine in prompts],
        "route": route,
    }


def finite(number: float) -> float | None:
    """JSON has no other numbers."""
    return number if abs(number) < float("inf") else None


def error_of(task: str, error: LptError, *, status: int = 422) -> dict[str, Any]:
    if isinstance(error, Refusal):
        status = error.status
    return {"status": status, "task": None if task == AUTO else task, "error": str(error)}
