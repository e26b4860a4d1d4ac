"""A server as a process, and clients that load it: in turn, or at a rate whatever it answers.

Requests are bytes made before, over connections that stay open: on few cores every millisecond of a client is missing
to the server.
"""

import asyncio
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image, ImageFilter

from benchmarks.data.turns import ROOT


class Question(NamedTuple):
    """An HTTP request, and by what its answer is known to be right."""

    raw: bytes
    task: str
    image: int


class Reply(NamedTuple):
    """`status` is 0 where the connection broke. `began` is of the machine's clock."""

    question: Question
    status: int
    content: Any
    began: float
    seconds: float
    headers: str = ""


@contextlib.contextmanager
def serving(folder: Path, *words: str, stderr: Path | None = None, **around: str) -> Iterator[tuple[Any, int]]:
    """(`lpt serve` as a process, its port). At the end it is asked to stop."""
    process, port = start(folder, *words, stderr=stderr, **around)
    try:
        yield process, port
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def start(
    folder: Path, *words: str, port: int = 0, stderr: Path | None = None, **around: str
) -> tuple["subprocess.Popen[str]", int]:
    command = [sys.executable, "-m", "lpt", "serve", str(folder), "--port", str(port), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **around}
    with (stderr or Path(os.devnull)).open("a") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    line = process.stdout.readline() if process.stdout else ""
    if " at http://" not in line:
        raise RuntimeError(f"lpt serve did not start: {line}")
    return process, int(line.rstrip("/\n").rpartition(":")[2])


def photos(number: int, *, size: tuple[int, int] = (320, 240)) -> list[bytes]:
    """JPEGs of soft noise, as large as thumbnails of photos are."""
    draw, found = np.random.default_rng(0), []
    for _ in range(number):
        noise = Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize(size)
        buffer = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(2)).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def questions(tasks: Sequence[str], images: Sequence[bytes], *, topk: int = 3) -> list[Question]:
    """One for each task and image, as a form."""
    found = []
    for task in tasks:
        for number, image in enumerate(images):
            fields = "".join(
                f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                for name, value in (("tasks", task), ("topk", topk))
            )
            file = '--x\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n'
            body = f"{fields}{file}".encode() + image + b"\r\n--x--\r\n"
            found.append(Question(post(body, "multipart/form-data; boundary=x"), task, number))
    return found


def post(body: bytes, kind: str) -> bytes:
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection:
    """Kept open from request to request, and made anew where it broke."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, question: Question) -> Reply:
        began = time.time()
        try:
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self.streams
            writer.write(question.raw)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length: ")[2].split("\r\n")[0])
            content = json.loads(await reader.readexactly(length))
            return Reply(question, int(head.split()[1]), content, began, time.time() - began, head)
        except (OSError, EOFError, ValueError) as error:
            self.close()
            return Reply(question, 0, str(error), began, time.time() - began)

    def close(self) -> None:
        if self.streams:
            self.streams[1].close()
        self.streams = None


def in_turn(port: int, asked: Sequence[Question], *, clients: int, seconds: float) -> list[Reply]:
    """So many clients, each of which asks again as soon as it has an answer."""

    async def client(number: int, replies: list[Reply], end: float) -> None:
        draw, connection = random.Random(number), Connection(port)
        while time.time() < end:
            replies.append(await connection.ask(draw.choice(asked)))
            if not replies[-1].status:
                await asyncio.sleep(0.05)
        connection.close()

    async def all_of_them() -> list[Reply]:
        replies: list[Reply] = []
        end = time.time() + seconds
        await asyncio.gather(*(client(number, replies, end) for number in range(clients)))
        return replies

    return asyncio.run(all_of_them())


def at_rate(
    port: int, asked: Sequence[Question], *, rate: float, seconds: float, watch: Callable[[], None] = lambda: None
) -> list[Reply]:
    """`rate` requests a second, whatever becomes of those before; `watch` is called every half second."""

    async def one(connection: Connection, question: Question, idle: list[Connection], replies: list[Reply]) -> None:
        replies.append(await connection.ask(question))
        idle.append(connection)

    async def all_of_them() -> list[Reply]:
        draw, idle, replies, sent = random.Random(0), list[Connection](), list[Reply](), list[asyncio.Task[None]]()
        began, watched = time.time(), 0.0
        for number in range(int(rate * seconds)):
            if (ahead := began + number / rate - time.time()) > 0:
                await asyncio.sleep(ahead)
            if time.time() - watched > 0.5:
                watch()
                watched = time.time()
                sent = [task for task in sent if not task.done()]
            connection = idle.pop() if idle else Connection(port)
            sent.append(asyncio.create_task(one(connection, draw.choice(asked), idle, replies)))
        await asyncio.gather(*sent)
        for connection in idle:
            connection.close()
        return replies

    return asyncio.run(all_of_them())


def memory_of(process: Any) -> int:
    """Bytes of its resident set."""
    return psutil.Process(process.pid).memory_info().rss


def times(replies: Sequence[Reply]) -> dict[str, float]:
    """Percentiles of the answers in milliseconds."""
    seconds = sorted(reply.seconds for reply in replies if reply.status == 200)
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{k}_ms": round(1000 * cuts[k - 1], 1) for k in (50, 95, 99)}


def is_right(reply: Reply, expected: Sequence[Any]) -> bool:
    """Whether it is one of the `expected` answers (TaskAnswer): the same classes with the same probabilities."""
    (result,) = reply.content["results"]
    given = [(one["name"], one["probability"]) for one in result["classes"]]
    return any(
        all(
            name == wanted and abs(p - probability) < 2e-3
            for (name, p), wanted, probability in zip(given, answer.classes, answer.probabilities, strict=True)
        )
        for answer in expected
    )
