"""A server that is killed under load, and one that strangers send anything to.

Hypothesis draws what they send: bodies, headers, images, JSON, paths and requests that are none. Every answer is to be
a refusal or an answer in JSON within seconds, and the server is to be as it was: alive, right, silent in its log,
and no larger than its limits say.
"""

import asyncio
import base64
import hashlib
import json
import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from benchmarks.reliability import damage
from benchmarks.reliability.damage import Choose
from benchmarks.reliability.row import Row
from benchmarks.serving import load
from benchmarks.serving.http import answers
from benchmarks.serving.libraries import fill
from lpt.model.backbones import load_backbone
from lpt.serve.bank import TaskBank

CLIENTS, IMAGES = 8, 4
LIMIT = 2**30
"""Bytes that the server may grow by: its bodies (128 MiB) in a few copies, and one large image."""
SECONDS = 45.0
"""Within which there is an answer: the server's own limit is 30, and others use the machine."""


def rows(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="lpt-serving-") as name:
        folder = Path(name) / "prompts"
        folder.mkdir()
        backbone = load_backbone("nano")
        names = [*fill(folder, backbone, "deep", 2), *fill(folder, backbone, "pool", 2)]
        images = load.photos(IMAGES)
        asked = load.questions(names, images)
        expected = answers(TaskBank(backbone, folder), names, images)
        return [
            killed(folder, asked, expected, kills=2 if quick else 20),
            hostile(folder, asked, expected, number=150 if quick else 2000),
        ]


Expected = dict[tuple[str, int], Any]


def right(reply: load.Reply, expected: Expected) -> bool:
    return reply.status == 200 and load.is_right(reply, [expected[reply.question.task, reply.question.image]])


# Kills.


def killed(folder: Path, asked: list[load.Question], expected: Expected, *, kills: int) -> Row:
    """SIGKILL at random moments under load; the same command starts it again on the same port."""
    began, chance, wrong, survived, answered = time.perf_counter(), random.Random(kills), list[str](), 0, 0
    before, recovery = hashes(folder), list[float]()
    errors = folder.parent / "kills.txt"
    words = ("train.precision=fp32",)
    process, port = load.start(folder, *words, stderr=errors)
    try:
        for _ in range(kills):
            replies = list[load.Reply]()
            loading = threading.Thread(
                target=lambda replies=replies, port=port: replies.extend(
                    load.in_turn(port, asked, clients=CLIENTS, seconds=4)
                )
            )
            loading.start()
            time.sleep(chance.uniform(0.5, 3))
            process.send_signal(signal.SIGKILL)
            fell = time.perf_counter()
            process.wait()
            process, port = load.start(folder, *words, port=port, stderr=errors)
            recovery.append(time.perf_counter() - fell)
            loading.join()
            replies += load.in_turn(port, asked, clients=CLIENTS, seconds=0.5)
            good = [right(reply, expected) for reply in replies if reply.status]
            answered += len(good)
            wrong += [f"{good.count(False)} wrong answers"] * (not all(good))
            survived += bool(good) and bool(replies[-1].status) and hashes(folder) == before
    finally:
        process.kill()
    if server_log := errors.read_text():
        wrong.append(f"the log says {server_log[:200]}")
    note = (
        f"{answered} answers were right, before and after; {CLIENTS} clients; ready again within "
        f"{max(recovery):.1f} s, start-up included; no file of the folder has changed"
    )
    return Row(
        "SIGKILL, lpt serve", kills, survived, len(wrong), time.perf_counter() - began, "; ".join([note, *wrong])
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# Strangers.


def hostile(folder: Path, asked: list[load.Question], expected: Expected, *, number: int) -> Row:
    began, problems, outcomes = time.perf_counter(), list[str](), Counter[str]()
    errors = folder.parent / "hostile.txt"
    senders = Senders([path.stem for path in sorted(folder.iterdir())])
    before = hashes(folder)
    with load.serving(folder, "train.precision=fp32", stderr=errors) as (process, port):
        load.in_turn(port, asked, clients=CLIENTS, seconds=1)
        start, tried = load.memory_of(process), 0
        most = [start]

        @hypothesis.settings(
            max_examples=number,
            database=None,
            derandomize=True,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(st.data())
        def attempt(data: st.DataObject) -> None:
            nonlocal tried
            choose = Choose(data.draw)
            kind = choose.one(senders.kinds)
            raw = senders.kinds[kind](choose)
            if tried == number:
                return
            tried += 1
            outcome, problem = sent(port, raw, PATIENCE.get(kind, SHORT))
            outcomes[outcome] += 1
            most.append(load.memory_of(process))
            if not problem and tried % 20 == 0:
                reply = asyncio.run(load.Connection(port).ask(asked[tried // 20 % len(asked)]))
                problem = "" if right(reply, expected) else f"after it the server answers {reply.status}"
            if problem:
                problems.append(f"{kind}: {problem} ({', '.join(choose.words)[:150]})")

        while tried < number:  # hypothesis may find that there is nothing new
            attempt()
        alive = process.poll() is None
        grown = max(most) - start
    server_log = errors.read_text()
    wrong = [] if alive else ["the server has ended"]
    wrong += [f"it grew by {grown / 1e6:.0f} MB"] * (grown > LIMIT)
    wrong += [f"its log says {server_log[-300:]}"] * bool(server_log)
    wrong += ["a file of the folder has changed"] * (hashes(folder) != before)
    note = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    note += f"; memory grew by {grown / 1e6:.0f} MB at most, {LIMIT / 1e6:.0f} are allowed"
    lost, seconds = len(wrong) + len(problems), time.perf_counter() - began
    text = "; ".join([note, *wrong, *problems[:20]])
    return Row("hostile requests, lpt serve", tried, tried - len(problems), lost, seconds, text)


def sent(port: int, raw: bytes, patience: float) -> tuple[str, str]:
    """(status, problem) of bytes that somebody sends, and after `patience` seconds without an answer sends no more."""
    began, response = time.perf_counter(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        try:
            connection.sendall(raw)
        except OSError:  # it was refused before it had sent all
            connection.settimeout(SECONDS)
        try:
            while not whole(response) and (part := received(connection)):
                response += part
        except TimeoutError:
            return "no answer", f"no end of its answer within {SECONDS:.0f} s"
        except OSError:
            pass
    seconds = time.perf_counter() - began
    if not response:
        return "closed", "" if seconds < SECONDS else "closed late"
    head, _, body = response.partition(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    if not status.isdigit() or not 200 <= int(status) < 500:
        return status, f"status {status}: {body[:150]!r}"
    if b"Traceback" in response or b"/prompts/" in response:
        return status, f"it tells what is inside: {body[:150]!r}"
    if b"application/json" in head and b"HTTP/1." not in body and not raw.startswith(b"HEAD"):
        try:
            content = json.loads(body)
        except ValueError:
            return status, f"no JSON: {body[:100]!r}"
        if int(status) >= 400 and "results" not in content and len(content.get("error", "")) not in range(1, 1000):
            return status, f"no sentence: {body[:100]!r}"
    return status, ""


def received(connection: socket.socket) -> bytes:
    """What comes next. Raises TimeoutError where nothing does, though it has been told that nothing more is sent."""
    try:
        return connection.recv(65536)
    except TimeoutError:
        if connection.gettimeout() == SECONDS:
            raise
    connection.settimeout(SECONDS)
    connection.shutdown(socket.SHUT_WR)
    return connection.recv(65536)


def whole(response: bytes) -> bool:
    """Whether it is an answer to its end."""
    head, blank, body = response.lower().partition(b"\r\n\r\n")
    length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
    return bool(blank) and length.isdigit() and len(body) >= int(length)


PATIENCE = {"image": SECONDS, "bomb": SECONDS, "json": SECONDS, "task": SECONDS}
"""Seconds by kind; what may break off gets `SHORT`."""
SHORT = 1.0


class Senders:
    """What a stranger sends, by kind: functions of `Choose` that return bytes."""

    def __init__(self, tasks: list[str]) -> None:
        self.tasks = tasks
        self.images, self.bombs = damage.image_files(), dict[str, bytes]()
        self.kinds = {
            "image": self.image,
            "bomb": self.bomb,
            "json": self.json,
            "form": self.form,
            "task": self.task,
            "headers": self.headers,
            "path": self.path,
            "bytes": self.bytes,
            "length": self.length,
        }

    def _json(self, images: list[bytes], tasks: Any, **more: Any) -> bytes:
        coded = [base64.b64encode(image).decode() for image in images]
        return json.dumps({"images": coded, "tasks": tasks, **more}).encode()

    def _form(self, images: list[bytes], tasks: list[str]) -> bytes:
        parts = [b'name="tasks"\r\n\r\n' + task.encode("utf-8", "replace") for task in tasks]
        parts += [b'name="images"; filename="a.jpg"\r\n\r\n' + image for image in images]
        head = b"--x\r\nContent-Disposition: form-data; "
        return b"".join(head + part + b"\r\n" for part in parts) + b"--x--\r\n"

    def image(self, choose: Choose) -> bytes:
        image = damage.damaged_bytes(self.images[choose.one(self.images)], choose)
        task = choose.one([*self.tasks, "auto"])
        if choose.rarely(2):
            return load.post(self._json([image], task), "application/json")
        return load.post(self._form([image], [task]), "multipart/form-data; boundary=x")

    def bomb(self, choose: Choose) -> bytes:
        self.bombs = self.bombs or damage.bombs()
        name = choose.one([name for name, content in self.bombs.items() if len(content) < 12 * 2**20])
        return load.post(self._form([self.bombs[name]], [self.tasks[0]]), "multipart/form-data; boundary=x")

    def json(self, choose: Choose) -> bytes:
        tree = json.loads(self._json([self.images["JPEG RGB"]], choose.one([self.tasks[0], self.tasks]), topk=3))
        text = damage.json_text(tree, choose)
        return load.post(text.encode("utf-8", "surrogatepass"), "application/json")

    def form(self, choose: Choose) -> bytes:
        body = damage.damaged_bytes(self._form([self.images["JPEG RGB"]] * 2, self.tasks[:2]), choose)
        boundary = choose.one(["x", "x", "x", "", "y", "x" * 300, '"x', "x\t; boundary=y"])
        return load.post(body, f"multipart/form-data; boundary={boundary}")

    def task(self, choose: Choose) -> bytes:
        name = choose(st.sampled_from([word for word in damage.WORDS if word != "\ud800"]) | st.text(max_size=50))
        tasks = choose.one([[name], [name] * 30, [self.tasks[0], name]])
        every = {"every_task": choose.one([True, False, "true", 1])}
        return load.post(self._json([self.images["JPEG RGB"]], tasks, **every), "application/json")

    def headers(self, choose: Choose) -> bytes:
        names = ["Host", "Content-Type", "Content-Length", "Transfer-Encoding", "Authorization", "Expect", "Connection"]
        names += ["Upgrade", "X-Forwarded-For", "Range", "Cookie", "Sec-Fetch-Site", "Content-Encoding", "Origin"]
        words = [
            "",
            "a",
            "chunked",
            "100-continue",
            "upgrade",
            "websocket",
            "gzip",
            "Bearer x",
            "bytes=0-",
            "cross-site",
        ]
        words += [
            "x" * 70_000,
            "-1",
            "99999999999999999999",
            "1e3",
            "\x00",
            "é",
            "multipart/form-data",
            "keep-alive, close",
        ]
        words += ["h2c", "0", "application/json; charset=utf-7", "evil.example", "localhost", "[::1", "../.."]
        lines = [f"{choose.one(names)}: {choose.one(words)}" for _ in range(choose.number(1, 5))]
        first = choose.one(["POST /v1/predict", "GET /v1/tasks", "GET /", "POST /v1/tasks", "PUT /v1/predict"])
        host = choose.one(["Host: localhost", ""])
        head = "\r\n".join([f"{first} HTTP/1.1", *([host] if host else []), *lines, ""]).encode("latin-1", "replace")
        return head + choose.one([b"\r\n", b"\r\n{}", b"\r\n5\r\nhello\r\n0\r\n\r\n", b""])

    def path(self, choose: Choose) -> bytes:
        steps = ["..", "%2e%2e", "etc", "passwd", "v1", "tasks", "predict", "%00", "~root", "C:", "prompts", "\\", "//"]
        steps += [self.tasks[0], f"{self.tasks[0]}.safetensors", "%ff", "page.html", "x" * 5000, "http:", "?a=b", "#"]
        path = "/".join(choose.one(steps) for _ in range(choose.number(1, 6)))
        method = choose.one(["GET", "GET", "HEAD", "POST", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
        return f"{method} {choose.one(['/', '/v1/tasks/', ''])}{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(
            "latin-1"
        )

    def bytes(self, choose: Choose) -> bytes:
        request = load.post(self._form([self.images["JPEG RGB"]], [self.tasks[0]]), "multipart/form-data; boundary=x")
        return choose.one([damage.damaged_bytes(request, choose), choose(st.binary(max_size=300)), request + request])

    def length(self, choose: Choose) -> bytes:
        body = b"x" * choose.one([0, 1, 1000, 2**20, 17 * 2**20])
        claimed = choose.one([len(body), len(body) + 1, max(0, len(body) - 1), 0, 2**24, 2**24 + 1, 10**30])
        kind = choose.one(["application/json", "multipart/form-data; boundary=x", "text/plain"])
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {claimed}\r\n\r\n"
        )
        return head.encode() + body
