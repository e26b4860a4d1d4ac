"""A folder of prompt files on a Ray Serve cluster: replicas of one bank of tasks, each of which answers in batches.

    serve run lpt.deployment:build library=/shared/prompts replicas=4

Only `build` imports Ray (extra `lpt[ray]`). The server of one machine, with its page, limits and token, is `lpt serve`.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lpt.errors import DataError, LptError, UnknownTask, require
from lpt.serve.bank import AUTO, Asked, HeldTask, TaskAnswer
from lpt.serve.opening import open_bank

LARGEST_IMAGE = 2**25
"""Bytes of a request's body."""
MOST_CLASSES = 1000
"""That are answered to one image."""
log = logging.getLogger("lpt.deployment")


class Deployment(BaseModel):
    """What `build` is told, by `serve run` as KEY=VALUE or in a Serve config as `args`."""

    model_config = ConfigDict(extra="forbid")

    library: Path
    """A folder of prompt files that every machine sees under this path."""
    weights: str | None = None
    """Of the backbone, a file that every machine sees; by default what the prompt files name."""
    name: str | None = None
    precision: str | None = None
    device: str = "auto"
    memory: int | None = Field(default=None, ge=1)
    """Bytes that the tasks of a replica may take beyond the backbone."""
    batch_size: int = Field(default=64, ge=1)
    wait: float = Field(default=0.01, ge=0)
    """Seconds that a batch which is not full waits for more."""
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    """Of each replica; a share of a GPU is allowed."""


class Replica:
    """One process's bank of tasks, asked by coroutines. `in_batches` is where many questions become one forward."""

    def __init__(self, settings: Deployment) -> None:
        self.bank = open_bank(
            settings.library,
            weights=settings.weights,
            name=settings.name,
            precision=settings.precision,
            device=settings.device,
            memory=settings.memory,
            batch_size=settings.batch_size,
        )

    async def predict(self, image: bytes, task: str, topk: int = 5) -> dict[str, Any]:
        """What `task`, or with `auto` the one that the image is routed to, says of an encoded image: the fields of
        `lpt.serve.bank.TaskAnswer`. Raises UnknownTask, and DataError for an image that cannot be decoded."""
        if not 1 <= topk <= MOST_CLASSES:
            raise DataError(f"topk is {topk}: ask for 1 to {MOST_CLASSES} classes")
        route, held = await asyncio.to_thread(self._task_of, image, task)
        if held is None:
            return TaskAnswer(None, route=route)._asdict()
        view = await asyncio.to_thread(held.view, image)
        answer: TaskAnswer = await self.in_batches(Asked(held, view))
        classes, probabilities, counts = (part[:topk] for part in (answer.classes, answer.probabilities, answer.counts))
        return answer._replace(classes=classes, probabilities=probabilities, counts=counts, route=route)._asdict()

    def _task_of(self, image: bytes, task: str) -> tuple[Any, HeldTask | None]:
        if task != AUTO:
            return None, self.bank.hold(task)[0]
        (route,) = self.bank.route([image])
        if isinstance(route, DataError):
            raise route
        return route, None if route.task is None else self.bank.hold(route.task)[0]

    async def in_batches(self, asked: Asked) -> TaskAnswer:
        """One question, which `build` has answered together with others."""
        (answer,) = await self.answers([asked])
        return answer

    async def answers(self, asked: Sequence[Asked]) -> list[TaskAnswer]:
        return await asyncio.to_thread(self.bank.answer, asked, topk=MOST_CLASSES)

    async def __call__(self, request: Any) -> Any:
        """POST /?task=NAME&topk=5 with an encoded image as the body. 404 for an unknown task, 422 for an image that
        cannot be decoded."""
        from starlette.responses import JSONResponse

        task, topk = request.query_params.get("task"), request.query_params.get("topk", "5")
        if request.method != "POST" or not task or not (topk.isascii() and topk.isdigit() and len(topk) < 5):
            return JSONResponse({"error": "POST an image to /?task=NAME&topk=5"}, status_code=400)
        image = bytearray()
        async for part in request.stream():
            image += part
            if len(image) > LARGEST_IMAGE:
                return JSONResponse({"error": f"the image is larger than {LARGEST_IMAGE:,} bytes"}, status_code=413)
        try:
            return JSONResponse(await self.predict(bytes(image), task, int(topk)))
        except UnknownTask as error:
            return JSONResponse({"error": str(error), "near": error.near}, status_code=404)
        except LptError as error:
            return JSONResponse({"error": str(error)}, status_code=422)

    def check_health(self) -> None:
        """Serve asks every few seconds: the time to look for files that are new, replaced or gone."""
        try:
            for line in self.bank.sync():
                log.info("%s", line)
        except LptError as error:  # a disk that is away for a moment: the tasks in memory go on
            log.warning("%s", error)


def build(settings: Deployment) -> Any:
    """The application for `ray.serve.run`. Raises NotInstalled without Ray."""
    require("ray", extra="ray", gives="lpt.deployment")
    from ray import serve  # pyright: ignore[reportMissingImports]

    class Tasks(Replica):
        @serve.batch(max_batch_size=settings.batch_size, batch_wait_timeout_s=settings.wait)
        async def in_batches(self, asked: list[Asked]) -> list[TaskAnswer]:  # type: ignore[override]
            return await self.answers(asked)

    deployment: Any = serve.deployment(
        Tasks,
        num_replicas=settings.replicas,
        max_ongoing_requests=3 * settings.batch_size,  # one batch is computed while the next one gathers
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return deployment.bind(settings)
