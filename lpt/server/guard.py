"""What stands before every path: who may ask, what is counted, and headers of every answer."""

import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lpt.server.metrics import Metrics

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]
OPEN = ("/", "/healthz", "/readyz", "/openapi.json")
"""Paths without secrets, which need no token: a browser cannot send one before it has the page."""
PATHS = (*OPEN, "/metrics", "/v1/predict", "/v1/tasks", "/v1/tasks/{task}")
"""As they are counted: a client may ask for any number of others."""
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """An ASGI application around another one.

    With a token, whoever does not bring it gets 401. Without one, and where `local` says that the server listens on
    this machine alone, requests are to call it by an address of this machine: a web page that a browser has open could
    otherwise reach it under a name of its own.
    """

    def __init__(self, app: Application, *, metrics: Metrics, token: str | None, local: bool) -> None:
        self.app, self.metrics, self.local = app, metrics, local
        self.expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, path = time.perf_counter(), counted_as(scope["path"])

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
                self.metrics.requests.labels(path, str(message["status"])).inc()
                self.metrics.seconds.labels(path).observe(time.perf_counter() - began)
            await send(message)

        refusal = self._refusal(scope, dict(scope["headers"]))
        if refusal is None:
            return await self.app(scope, receive, noted)
        status, sentence = refusal
        body = json.dumps({"error": sentence}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await noted({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Message, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """(status, why) of a request that is not let in."""
        if self.expected is None:
            if self.local and not is_local(headers.get(b"host", b"").decode("latin-1")):
                return 421, "the server is called by a name that is not this machine's: use localhost, or set a token"
        elif scope["path"] not in OPEN and not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            return 401, "the token is missing or wrong: send the header Authorization: Bearer TOKEN"
        if scope["path"] not in OPEN and headers.get(b"sec-fetch-site", b"") in (b"cross-site", b"same-site"):
            return 403, "a page of another site asks: only the server's own page may"
        return None


def counted_as(path: str) -> str:
    """A path as metrics have it."""
    if path.startswith("/v1/tasks/"):
        return PATHS[-1]
    return path if path in PATHS else "other"


def is_local(host: str) -> bool:
    """Whether a Host header, with or without a port, is an address or the name of this machine.

    >>> is_local("localhost:8000"), is_local("[::1]:80"), is_local("127.0.0.1"), is_local("evil.example:8000")
    (True, True, True, False)
    """
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
