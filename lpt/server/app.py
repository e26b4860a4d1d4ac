"""The paths of the server: predictions, tasks, health, metrics, and the page."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lpt.errors import UnknownTask, short
from lpt.serve.bank import TaskBank
from lpt.server.bodies import FORM, JSON, Fields, PredictBody
from lpt.server.guard import Guard
from lpt.server.limits import Limits, Place, Refusal
from lpt.server.service import Service
from lpt.server.watching import ClosedFolder, Watcher


class JsonResponse(Response):
    """In ASCII: names may hold what is no UTF-8."""

    media_type = JSON

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


METRICS_KIND = "text/plain; version=0.0.4; charset=utf-8"


class Mistake(BaseModel):
    """Why a request, or a part of it, is not answered; `near` are tasks of like names."""

    error: str
    near: list[str] = []


class ClassAnswer(BaseModel):
    name: str
    probability: float
    count: int
    """Training images of the class."""


class GroupPrompt(BaseModel):
    number: int
    similarity: float | None


class RouteAnswer(BaseModel):
    """The task whose class mean is nearest, if the score is no less than the threshold."""

    task: str | None
    nearest: str
    score: float | None
    threshold: float


class Result(BaseModel):
    """The answer about one image; or a status other than 200, and an `error`."""

    status: int
    task: str | None
    error: str | None = None
    classes: list[ClassAnswer] = []
    group_prompts: list[GroupPrompt] = []
    route: RouteAnswer | None = None


class Results(BaseModel):
    """In the order of the images, and of the tasks about each where every task was asked."""

    results: list[Result]
    milliseconds: dict[str, float]


class TaskFacts(BaseModel):
    """`routable`: auto may find it. `images` are training images."""

    name: str
    classes: int
    images: int
    method: str
    accuracy: float | None
    routable: bool


class Tasks(BaseModel):
    """`refused`: why each prompt file that is not served is not, by its name."""

    backbone: str
    tasks: list[TaskFacts]
    refused: dict[str, str]


class TaskClass(BaseModel):
    name: str
    count: int


class TaskDetail(TaskFacts):
    """With the names of all classes."""

    class_list: list[TaskClass]


def create_app(
    bank: TaskBank,
    folder: ClosedFolder,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    local: bool = True,
    watch_seconds: float = 1.0,
) -> FastAPI:
    """The server of a bank whose files are those of `folder`. `token` and `local`: see `Guard`."""
    service = Service(bank, limits)
    watcher = Watcher(bank, folder, seconds=watch_seconds)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watcher.start()
        yield
        watcher.close()
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    # The usual pages of documentation load their scripts from elsewhere: the description itself is at /openapi.json.
    app = FastAPI(title="lpt", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan, version="1")
    app.add_middleware(Guard, metrics=service.metrics, token=token, local=local)
    app.state.service, app.state.watcher = service, watcher
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _no_such_path)
    _add_predictions(app, service)
    _add_tasks(app, bank, watcher)
    _add_health(app, service)
    return app


BODY = {
    "required": True,
    "content": {
        JSON: {"schema": PredictBody.model_json_schema()},
        FORM: {
            "schema": {
                "type": "object",
                "required": ["images", "tasks"],
                "properties": {
                    "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    **Fields.model_json_schema()["properties"],
                },
            }
        },
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Mistake, "description": "the request cannot be read"},
    401: {"model": Mistake, "description": "the token is missing or wrong"},
    404: {"model": Mistake, "description": "there is no such task; `near` are others of like names"},
    408: {"model": Mistake, "description": "the body did not come in time"},
    413: {"model": Mistake, "description": "the request is too large"},
    415: {"model": Mistake, "description": "the body is neither a form nor JSON"},
    422: {"model": Results, "description": "no image could be answered; of several, some answered is 200"},
    429: {"model": Mistake, "description": "the server is busy: Retry-After says for how long"},
    504: {"model": Mistake, "description": "there was no answer in time"},
}


def _add_predictions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/predict", responses={200: {"model": Results}, **ERRORS}, openapi_extra={"requestBody": BODY})
    async def predict(request: Request) -> Response:
        """What tasks say of images: probabilities of the best classes, and the group prompts that each image got."""
        read = False
        with service.room.place() as place:
            try:
                async with asyncio.timeout(service.limits.seconds):
                    body = await _body(request, place)
                    read = True
                    kind = request.headers.get("content-type", "")
                    status, content = await service.answers(kind, body, place)
            except TimeoutError:
                seconds = f"{service.limits.seconds:g} s"
                if not read:
                    raise Refusal(408, f"the body did not come within {seconds}") from None
                raise Refusal(504, f"there was no answer within {seconds}: try again later", retry_after=5) from None
        times = content["milliseconds"]
        timing = ", ".join(f"{name};dur={value}" for name, value in times.items())
        return JsonResponse(content, status_code=status, headers={"server-timing": timing})


async def _body(request: Request, place: Place) -> bytes:
    """Raises Refusal (400, 413, 429)."""
    length = request.headers.get("content-length", "0")
    limits = place.room.limits
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > limits.body):
        raise Refusal(413, f"the body is larger than {limits.body:,} bytes: send fewer or smaller images")
    parts = bytearray()
    try:
        async for chunk in request.stream():
            place.hold(len(chunk))
            parts += chunk
    except ClientDisconnect:
        raise Refusal(400, "the body breaks off before its end") from None
    return bytes(parts)


def _add_tasks(app: FastAPI, bank: TaskBank, watcher: Watcher) -> None:
    def facts(name: str) -> dict[str, Any]:
        """Raises UnknownTask."""
        header = bank.header(name)
        return {
            "name": name,
            "classes": len(header.classes),
            "images": sum(header.counts),
            "method": short(header.method, 100),
            "accuracy": header.metrics.get("accuracy"),
            "routable": bank.routable(name),
        }

    @app.get("/v1/tasks", responses={200: {"model": Tasks}})
    def tasks() -> Response:
        """The tasks by name, and files that are not served."""
        found = []
        for name in bank.tasks:
            with contextlib.suppress(UnknownTask):  # removed meanwhile
                found.append(facts(name))
        return JsonResponse({"backbone": bank.backbone.name, "tasks": found, "refused": watcher.refused()})

    @app.get("/v1/tasks/{task}", responses={200: {"model": TaskDetail}, 404: {"model": Mistake}})
    def task_detail(task: str) -> Response:
        """One task, with its classes and how many training images each had."""
        try:
            header, known = bank.header(task), facts(task)
        except UnknownTask as error:
            raise Refusal(404, str(error), near=error.near) from None
        pairs = zip(header.classes, header.counts, strict=True)
        return JsonResponse({**known, "class_list": [{"name": short(name), "count": count} for name, count in pairs]})


def _add_health(app: FastAPI, service: Service) -> None:
    page = files("lpt.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = content_policy(page)

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 as long as the process can answer."""
        alive = service.batcher.alive
        return JsonResponse({"alive": alive}, status_code=200 if alive else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 where there is a task to ask, and room for a request."""
        ready = service.batcher.alive and len(service.bank) > 0 and service.room.questions < service.limits.queue
        return JsonResponse({"ready": ready, "tasks": len(service.bank)}, status_code=200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """As Prometheus reads them."""
        return Response(service.metrics.text(), media_type=METRICS_KIND)


def content_policy(page: str) -> str:
    """What a browser lets the page do: run the script and the style that are in it, and ask this server."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _refused(request: Request, error: Any) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    content = {"error": str(error)} | ({"near": list(error.near)} if error.near else {})
    return JsonResponse(content, status_code=error.status, headers=headers)


async def _no_such_path(request: Request, error: Any) -> Response:
    sentence = {404: "there is no such path: / is the page, /openapi.json says what there is"}.get(error.status_code)
    return JsonResponse(
        {"error": sentence or str(error.detail)}, status_code=error.status_code, headers=getattr(error, "headers", None)
    )
