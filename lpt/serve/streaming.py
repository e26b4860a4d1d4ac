"""A prompt file's predictions on any number of images, into a file that a kill leaves whole: `lpt predict --out`.

Beside the parts of a `RowFile` lies the list of images, written once: what is added to a folder meanwhile is not looked
at, and a resumed process takes the same images in the same order. Memory does not grow with the number of images.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lpt.data.loader import Workers
from lpt.data.preprocess import File
from lpt.data.walk import as_text
from lpt.engine.stopping import Stop
from lpt.errors import DiskError, LptError, quoted
from lpt.files import local_file
from lpt.model.classifier import PromptedClassifier
from lpt.serve.predicting import Answer, Met, answers, as_file, meet_images, said_of
from lpt.serve.row_file import Row, RowFile
from lpt.terms import Ensemble

Say = Callable[[str], None]
ERRORS_SAID = 20
"""Images that cannot be read, of which each is a row, and which are named while the others continue."""


class Shard(NamedTuple):
    """The `number`-th of `shards` shares of the images. Which one an image is in depends on nothing but its path below
    the folder that was asked for: shares of several machines are disjoint and whole, wherever the folder lies there and
    whatever is added to it meanwhile."""

    number: int = 1
    shards: int = 1

    @classmethod
    def parsed(cls, text: str) -> "Shard":
        """Of `i/n`; i goes from 1 to n, or from 0 to n - 1 as some schedulers count: 0 is n. Raises LptError."""
        given = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if given is None or not 0 <= int(given[1]) <= int(given[2]) > 0:
            raise LptError(f"--shard {quoted(text, 40)}: give a share of all, for example 1/4, 2/4, 3/4 and 4/4")
        return cls(int(given[1]), int(given[2]))

    def holds(self, met: Met) -> bool:
        name = "/".join(met.name).encode(errors="surrogateescape")
        return zlib.crc32(name) % self.shards == self.number % self.shards

    def __str__(self) -> str:
        return f"{self.number % self.shards or self.shards}/{self.shards}"


class Written(NamedTuple):
    """What is in the file: its rows, and how many of them are of images that cannot be read; nothing where it was
    whole before."""

    rows: int
    errors: int


def predict_to_file(
    model: PromptedClassifier,
    paths: Sequence[Path],
    out: Path,
    *,
    prompt: Path,
    task: str | None = None,
    topk: int | None = None,
    batch_size: int = 32,
    shard: Shard | None = None,
    resume: bool = False,
    workers: Workers = "auto",
    tta: Ensemble = "none",
    say: Say = lambda text: None,
    stop: Stop | None = None,
) -> Written:
    """Writes `out`, Parquet or JSON lines by its suffix: a row for each image, with `path`, `class`, `probability`,
    `margin` (to the second class), `task`, with `topk` the lists `classes` and `probabilities`, and `error` where there
    is one. `prompt` is the file that `model` came from.

    Paths are written as they are, whatever a spreadsheet would take them for: these files are for programs. One that is
    no UTF-8 has its bytes in `path_bytes` (in hexadecimal in JSON). Rows are in the order of the folders.
    """
    job = {
        "prompt": file_sha256(prompt),
        "topk": topk,
        **images_of_job(paths, shard or Shard()),
        **({} if tta == "none" else {"tta": tta}),
    }

    def row(file: File, answer: Answer) -> Row:
        return {**row_of(file, answer, model.classes, topk, in_json=out.suffix == ".jsonl"), "task": task}

    writing = RowFile(out, row_schema(topk), job)
    return write_answers(
        writing,
        model,
        paths,
        row,
        topk=max(2, topk or 0),
        batch_size=batch_size,
        shard=shard or Shard(),
        resume=resume,
        workers=workers,
        tta=tta,
        say=say,
        stop=stop or Stop(),
    )


def write_answers(
    writing: RowFile,
    model: PromptedClassifier,
    paths: Sequence[Path],
    row: Callable[[File, Answer], Row],
    *,
    topk: int,
    batch_size: int,
    shard: Shard,
    resume: bool,
    workers: Workers,
    say: Say,
    stop: Stop,
    tta: Ensemble = "none",
    at_start: Callable[[], None] = lambda: None,
    at_end: Callable[[], Callable[[Row], Row] | None] = lambda: None,
) -> Written:
    """A row for each image that `paths` lead to, in the file that `writing` is; continues after the rows that it has.
    `at_start` is called before the model sees them; when all rows are there they become what the function that `at_end`
    returns makes of them."""
    with writing.opened(resume=resume):
        if writing.is_whole:
            say(f"{writing.path} is there, and whole")
            return Written(0, 0)
        images = ImageList(writing.partial / "images")
        if not images.exists():
            for line in images.write(paths, shard):
                say(line)
        at_start()
        before = writing.rows
        say(f"{images.number} images" + (f", {before} of them done before" if before else ""))
        errors = 0
        with stop.while_steps_run():
            answered = answers(
                model,
                images.read(after=before),
                number=images.number - before,
                topk=topk,
                batch_size=batch_size,
                workers=workers,
                tta=tta,
            )
            for number, (file, answer) in enumerate(answered, start=1):
                writing.add(row(file, answer))
                errors += answer.error is not None
                if answer.error is not None and errors <= ERRORS_SAID:
                    more = "; others are rows of the file, and not said" if errors == ERRORS_SAID else ""
                    say(f"error: {quoted(answer.error, 4096)}{more}")
                # Parts end with batches: the last bits of an answer depend on which images it was given with.
                if number % batch_size == 0:
                    writing.keep()
                    if stop.asked:
                        break
            writing.flush()
        writing.finish(at_end())
        return Written(writing.rows, writing.errors)


class ImageList:
    """Paths of images, in a file that is written once: each ends with a zero byte, which no path holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0

    def exists(self) -> bool:
        if not self.path.exists():
            return False
        self.number = sum(1 for _ in self._names())
        return True

    def write(self, paths: Sequence[Path], shard: Shard) -> list[str]:
        """Writes the images of `shard`; what there is to say of other files."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        left_out: dict[str, list[str]] = {}
        try:
            with temporary.open("wb") as file:
                for met in meet_images(paths, left_out):
                    if shard.holds(met):
                        file.write(os.fsencode(met.path) + b"\0")
                        self.number += 1
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise DiskError(self.path, error) from error
        return said_of(left_out)

    def read(self, *, after: int = 0) -> Iterator[File]:
        """The images but for the first `after`."""
        for i, name in enumerate(self._names()):
            if i >= after:
                yield as_file(Path(os.fsdecode(name)))

    def _names(self) -> Iterator[bytes]:
        rest = b""
        with self.path.open("rb") as file:
            while block := file.read(2**16):
                *names, rest = (rest + block).split(b"\0")
                yield from names


def images_of_job(paths: Sequence[Path], shard: Shard) -> dict[str, Any]:
    """What of a job its images depend on; where they are relative, on the folder that they are relative to."""
    relative = not all(path.is_absolute() for path in paths)
    return {
        "images": [as_text(str(path)) for path in paths],
        "folder": as_text(os.getcwd()) if relative else None,
        "shard": str(shard),
    }


def file_sha256(path: Path) -> str:
    with local_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_schema(topk: int | None, **more: Any) -> Any:
    """The columns of predictions, and `more` by their types."""
    import pyarrow as pa

    lists = {} if topk is None else {"classes": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32())}
    return pa.schema(
        {
            "path": pa.string(),
            "class": pa.string(),
            "probability": pa.float32(),
            "margin": pa.float32(),
            **more,
            **lists,
            "task": pa.string(),
            "error": pa.string(),
            "path_bytes": pa.binary(),
        }
    )


def row_of(
    file: File, answer: Answer, classes: Sequence[str], topk: int | None, *, in_json: bool = False
) -> dict[str, Any]:
    """One image's row. `answer` has two classes or more."""
    row: dict[str, Any] = {"path": file.name}
    name = os.fsencode(file.content) if isinstance(file.content, str | Path) else b""
    if name and name != file.name.encode():
        row["path_bytes"] = name.hex() if in_json else name
    if answer.error is not None:
        return {**row, "error": as_text(answer.error)}
    names = [as_text(classes[k]) for k in answer.classes]
    first, second = answer.probabilities[:2]
    row |= {"class": names[0], "probability": first, "margin": first - second}
    if topk is not None:
        row |= {"classes": names[:topk], "probabilities": list(answer.probabilities[:topk])}
    return row
