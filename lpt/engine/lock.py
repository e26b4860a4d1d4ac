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
    holder_file = folder / "running.json"
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LptError(
            f"--out {folder} is in use{_held_by(holder_file)}: wait for it, or give another folder"
        ) from None
    try:
        for half_written in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):  # of nobody who lives
            half_written.unlink(missing_ok=True)
        holder = {"process": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(" ", "seconds")}
        write_atomic(holder_file, json.dumps(holder).encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that fails has been reported, or will be
            holder_file.unlink(missing_ok=True)
        lock.release()


def _held_by(holder_file: Path) -> str:
    try:
        holder = json.loads(holder_file.read_text())
        return f" by process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return " by another process"
