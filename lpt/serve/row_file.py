"""A long table written row by row, of which a kill takes nothing: whole parts, joined when all rows are there.

A Parquet file cannot be continued, since its index is written when it is closed, and of a text file nobody knows
whether it is whole. So rows go into parts, each written whole or not at all and named by its first row and how many it
has, in a folder `FILE.partial`; after the last one they are joined into `FILE`, which is there only when it is whole.
A resumed process continues after the last part. What is lost in a kill is the work since then, never a row.
"""

import contextlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lpt.engine.lock import locked
from lpt.errors import DiskError, LptError, quoted
from lpt.files import write_atomic

SUFFIXES = (".parquet", ".jsonl")
ROWS_A_PART = 2048
SECONDS_A_PART = 20.0
"""A part is written after so long with whatever rows there are: what a kill costs at most."""
PARTS_AT_ONCE = 4
"""Parts that are held together when they are joined: a group of rows of a Parquet file."""
_PART = re.compile(r"rows-(\d{12})-(\d+)-(\d+)\.(parquet|jsonl)")
"""First row, number of rows, and how many of them have an `error`."""

Row = Mapping[str, Any]


class RowFile:
    """The file at `path`: `rows` of it are written, `errors` of them with an `error`. `schema` is a pyarrow schema; a
    column that a row lacks is null in Parquet, and absent in a line of JSON. `job` says what is written, as JSON:
    another one cannot continue with it."""

    def __init__(self, path: Path, schema: Any, job: Mapping[str, Any]) -> None:
        self.path, self.schema, self.job = path, schema, job
        self.partial = partial_of(path)
        self.rows = self.errors = 0
        self._waiting: list[Row] = []
        self._since = time.monotonic()

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing more to write."""
        return self.path.exists()

    @contextlib.contextmanager
    def opened(self, *, resume: bool) -> Iterator["RowFile"]:
        """Takes the file for this process: new, or with `resume` where an earlier one has ended. Raises LptError for
        one that is there already, is of another job, or in use."""
        check_out(self.path, resume=resume)
        if self.is_whole:
            self._check_same_as(_job_of_parquet(self.path) if self.path.suffix == ".parquet" else None)
            shutil.rmtree(self.partial, ignore_errors=True)  # of a process that was killed when all was done
            yield self
            return
        try:
            with locked(self.partial):
                try:
                    self._open()
                    yield self
                finally:
                    if self.is_whole or not any(self.partial.glob("rows-*")):
                        shutil.rmtree(self.partial, ignore_errors=True)
        except OSError as error:
            if isinstance(error, DiskError):
                raise
            raise DiskError(self.path, error) from error

    def _open(self) -> None:
        job_file = self.partial / "job.json"
        if job_file.exists():
            try:
                self._check_same_as(json.loads(job_file.read_text()))
            except ValueError as error:
                if isinstance(error, LptError):
                    raise
                raise self._damaged("job.json is no JSON") from None
        else:
            write_atomic(job_file, json.dumps(self.job, indent=1).encode())
        for _, number, errors in self._parts():
            self.rows += number
            self.errors += errors

    def _check_same_as(self, job: Any) -> None:
        if job is None:
            return
        ours = json.loads(json.dumps(self.job))
        theirs = job if isinstance(job, dict) else {}
        names = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
        if names:
            raise LptError(
                f"--out {self.path} was begun with other settings ({quoted(', '.join(names))}): give those again, "
                f"another --out, or delete {self.partial if self.partial.exists() else self.path}"
            )

    def add(self, row: Row) -> None:
        """The next row, which a kill may take until `keep` or `flush` is called."""
        self._waiting.append(row)

    def keep(self) -> None:
        """Writes the rows so far, if there are many of them or the last ones were written long ago."""
        if len(self._waiting) >= ROWS_A_PART or time.monotonic() - self._since > SECONDS_A_PART:
            self.flush()

    def flush(self) -> None:
        """Writes what waits, as one part."""
        self._since = time.monotonic()
        if self._waiting:
            number, errors = len(self._waiting), sum(row.get("error") is not None for row in self._waiting)
            name = f"rows-{self.rows:012d}-{number}-{errors}{self.path.suffix}"
            write_atomic(self.partial / name, self._encoded(self._waiting))
            self.rows += number
            self.errors += errors
            self._waiting = []

    def finish(self, change: Callable[[Row], Row] | None = None) -> None:
        """Joins the parts, with `change` of each row: the file is there, and whole."""
        self.flush()
        temporary = self.partial / f".{self.path.name}.tmp"
        if self.path.suffix == ".parquet":
            self._join_parquet(temporary, change)
        else:
            with temporary.open("wb") as joined:
                for part, _, _ in self._parts():
                    joined.write(
                        self._encoded([change(row) for row in self._read(part)]) if change else part.read_bytes()
                    )
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def each(self) -> Iterator[Row]:
        """All rows that are in parts, in order."""
        for part, _, _ in self._parts():
            yield from self._read(part)

    def _join_parquet(self, path: Path, change: Callable[[Row], Row] | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self.schema.with_metadata({"lpt": json.dumps(self.job)})
        parts = [part for part, _, _ in self._parts()]
        with pq.ParquetWriter(path, schema) as writer:
            for i in range(0, len(parts), PARTS_AT_ONCE):
                tables = [self._read_table(part) for part in parts[i : i + PARTS_AT_ONCE]]
                if change:
                    tables = [self._table([change(row) for row in table.to_pylist()]) for table in tables]
                writer.write_table(pa.concat_tables(tables).cast(schema))

    def _read(self, part: Path) -> list[Row]:
        if self.path.suffix == ".parquet":
            return self._read_table(part).to_pylist()
        try:
            return [json.loads(line) for line in part.read_bytes().decode().split("\n")[:-1]]
        except ValueError as error:
            raise self._damaged(f"{part.name} cannot be read ({quoted(error)})") from None

    def _read_table(self, part: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(part).read()
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(f"{part.name} cannot be read ({quoted(error)})") from None

    def _encoded(self, rows: list[Row]) -> bytes:
        if self.path.suffix == ".parquet":
            import pyarrow.parquet as pq

            buffer = io.BytesIO()
            pq.write_table(self._table(rows), buffer)
            return buffer.getvalue()
        lines = [json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for row in rows]
        return "".join(line + "\n" for line in lines).encode()

    def _table(self, rows: list[Row]) -> Any:
        import pyarrow as pa

        columns = {name: [row.get(name) for row in rows] for name in self.schema.names}
        return pa.table(columns, schema=self.schema)

    def _parts(self) -> list[tuple[Path, int, int]]:
        """Every part, its number of rows and of errors, in order. Raises LptError where one is missing."""
        parts: list[tuple[Path, int, int]] = []
        total = 0
        for path in sorted(self.partial.glob("rows-*")):
            name = _PART.fullmatch(path.name)
            if name is None:
                continue
            if int(name[1]) != total:
                raise self._damaged(f"row {total} is missing before {path.name}")
            parts.append((path, int(name[2]), int(name[3])))
            total += int(name[2])
        return parts

    def _damaged(self, why: str) -> LptError:
        return LptError(f"--out {self.path} cannot be resumed: in {self.partial} {why}: delete it and begin again")


def partial_of(path: Path) -> Path:
    """The folder in which `path` is in the making."""
    return path.with_name(f"{path.name}.partial")


def check_out(path: Path, *, resume: bool) -> None:
    """Before anything is loaded: raises LptError where `path` cannot be written, or is there already."""
    if path.suffix not in SUFFIXES:
        raise LptError(f"--out {path}: give a name that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise LptError(f"--out {path} is a folder: give a file")
    if resume:
        return
    if path.exists():
        raise LptError(f"--out {path} is there already: give another name, or delete it")
    if (partial_of(path) / "job.json").exists():
        raise LptError(f"--out {path} has been begun: add --resume to continue it, or delete {partial_of(path)}")


def _job_of_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata.get(b"lpt", b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}
