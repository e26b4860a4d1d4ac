"""A server as a process: its socket, its log, its token, and its end."""

import asyncio
import copy
import os
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from lpt.errors import LptError, quoted
from lpt.server.guard import is_local

TOKEN_VARIABLE = "LPT_SERVE_TOKEN"
GRACE = 60
"""Seconds that requests have to be answered after the server was asked to stop."""
MOST_CONNECTIONS = 1000
"""At a time; others get 503."""
HEADER_SECONDS = 10


def token_of(file: Path | None) -> str | None:
    """What clients must bring, from a file or from the environment: a command line is seen by all. Raises LptError."""
    if file is None:
        text, place = os.environ.get(TOKEN_VARIABLE, ""), f"environment variable {TOKEN_VARIABLE}"
        if not text:
            return None
    else:
        place = f"--token-file {quoted(str(file))}"
        try:
            text = file.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            raise LptError(f"{place} cannot be read as ASCII text: give a file with one word in it") from None
    if not text.isascii() or not text.isprintable() or " " in text or len(text) < 8:
        raise LptError(f"{place} holds no token: give one word of 8 printable ASCII letters or more")
    return text


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at the address. Raises LptError where there is no such address, or somebody has it."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise LptError(f"--host {quoted(host, 80)} is no address ({why}): give one of this machine") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        why = (error.strerror or str(error)).lower()
        raise LptError(f"--host {quoted(host, 80)} --port {port}: {why}; choose another port") from None
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    host = listening.getsockname()[0]
    return is_local(f"[{host}]" if ":" in host else host)


class Connection(H11Protocol):
    """One whose headers do not come, or that goes on sending what was answered long ago, is closed."""

    _seen: Any = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Closes a connection without a request since it was looked at before."""
        if self.cycle is None or (self.cycle.response_complete and self.cycle is self._seen):
            self.transport.abort()
            return
        self._seen = self.cycle
        self._timer = self.loop.call_later(HEADER_SECONDS, self._look)


def run(app: Any, listening: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C. Requests that have begun are answered first; then this process ends with code
    0."""
    logs = copy.deepcopy(LOGGING_CONFIG)
    logs["loggers"]["lpt.server"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    logs["loggers"]["python_multipart"] = {"level": "CRITICAL"}  # what is wrong with a form is for who has sent it
    logs["loggers"]["uvicorn"]["level"] = logs["loggers"]["uvicorn.error"]["level"] = "ERROR"
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=logs,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # uvicorn raises the signal again at the end
    uvicorn.Server(config).run(sockets=[listening])


def _leave(number: int, frame: object) -> None:
    raise SystemExit(0)
