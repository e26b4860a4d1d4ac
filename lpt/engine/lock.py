"""One run in a folder at a time."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from lpt.errors import LptError
from lpt.files import write_atomic


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process. The system lets go of it when the process ends, however it does; on a
    disk without such locks (some network file systems) a killed process leaves `.lock`, to be deleted by hand if it ran
    on another machine. What killed processes had half written there is removed first.

    Raises LptError that names the process which holds it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "running.json"
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LptError(f"--out {folder} is in use{_by_whom(told)}: wait for it, or give another folder") from None
    try:
        for half in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):  # of nobody who lives
            half.unlink(missing_ok=True)
        mine = {"process": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(" ", "seconds")}
        write_atomic(told, json.dumps(mine).encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that fails has been told of, or will be
            told.unlink(missing_ok=True)
        lock.release()


def _by_whom(told: Path) -> str:
    try:
        other = json.loads(told.read_text())
        return f" by process {other['process']} on {other['host']} since {other['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return " by another process"
