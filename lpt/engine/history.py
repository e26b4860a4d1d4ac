"""Measurements as JSON lines, one object a line, each with the phase and step it belongs to."""

import json
from pathlib import Path
from typing import Any

from lpt.errors import DiskError


class History:
    """Append-only `history.jsonl`. With no path it only keeps the lines in memory."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Takes over what is in the file, up to a line that is none: a kill may cut the last one, and what follows is
        written again on resume."""
        self.lines = []
        if self.path is None or not self.path.exists():
            return
        for text in self.path.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            self.lines.append(line)

    def write(self, **values: Any) -> None:
        """Adds a line. Raises DiskError where it cannot be written; a line that was cut is dropped on resume."""
        self.lines.append(values)
        if self.path is not None:
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:
                raise DiskError(self.path, error) from error

    def rewind(self, phase: str, step: int) -> None:
        """Drop what a killed run wrote about `phase` after `step`, so that a resumed run writes it once."""
        keep = [line for line in self.lines if line.get("phase") != phase or line.get("step", 0) <= step]
        if len(keep) == len(self.lines) and (self.path is None or not self.path.exists()):
            return
        self.lines = keep
        if self.path is not None:
            fresh = self.path.with_name(f".{self.path.name}.tmp")
            try:
                fresh.write_text("".join(json.dumps(line) + "\n" for line in keep))
                fresh.replace(self.path)
            except OSError as error:
                raise DiskError(self.path, error) from error
