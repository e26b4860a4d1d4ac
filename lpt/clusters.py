"""Predictions on many machines: a class for `ray.data.Dataset.map_batches`, which loads its model once in each actor.

Nothing here imports Ray (extra `lpt[ray]`): any executor that makes an object and calls it with batches will do.
Training on several machines is `torchrun` or `accelerate launch` (docs/clusters.md).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lpt.data.preprocess import File
from lpt.data.walk import as_text
from lpt.errors import LptError, quoted
from lpt.serve.opening import open_prompt
from lpt.serve.predicting import answers
from lpt.serve.streaming import row_of, row_schema
from lpt.settings import Positive, checked_arguments


class Predictor:
    """A prompt file's predictions on batches of images, as a callable.

    A batch has a column `path`, of files that this machine can read, or `bytes` too, the encoded images themselves, as
    `ray.data.read_binary_files(..., include_paths=True)` gives them. What it becomes is a pyarrow table with a row for
    each image and the columns of `lpt predict --out`. An image that cannot be decoded is a row with its `error`.
    """

    def __init__(
        self,
        prompt: str | Path,
        *,
        weights: str | None = None,
        name: str | None = None,
        precision: str | None = None,
        device: str = "auto",
        topk: Positive | None = None,
        batch_size: Positive = 32,
    ) -> None:
        """`prompt` is a path that every machine sees; `weights`, `name`, `precision` and `device` are as in
        `lpt.serve.open_prompt`. `batch_size` images go through the model together, whatever a batch of Ray has."""
        checked_arguments(Predictor.__init__, topk=topk, batch_size=batch_size)
        self.model, header = open_prompt(
            prompt, weights=weights, name=name, precision=precision, device=device, at_once=batch_size
        )
        task = header.data.get("name")
        self.task = task if isinstance(task, str) else None
        self.topk, self.batch_size, self.schema = topk, batch_size, row_schema(topk)

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        columns = _columns(batch)
        number = len(next(iter(columns.values())))
        top = max(2, self.topk or 0)
        # Threads decode: a machine's other cores are those of other actors.
        answered = answers(self.model, _files(columns), number=number, topk=top, batch_size=self.batch_size, workers=0)
        rows = []
        for file, answer in answered:
            row = row_of(file, answer, self.model.classes, self.topk)
            rows.append({**row, "task": self.task})
        table = {name: [row.get(name) for row in rows] for name in self.schema.names}
        return pa.table(table, schema=self.schema)


def _columns(batch: Any) -> Mapping[str, Sequence[Any]]:
    """The columns of a batch, of NumPy arrays, pandas or pyarrow. Raises LptError where there is none to read."""
    names = list(getattr(batch, "column_names", None) or batch)
    if "path" not in names and "bytes" not in names:
        raise LptError(
            f"a batch has the columns {quoted(', '.join(map(str, names)), 80)}: give one that is called path, or bytes"
        )
    wanted = [name for name in ("path", "bytes") if name in names]
    return {name: column.to_pylist() if hasattr(column := batch[name], "to_pylist") else column for name in wanted}


def _files(columns: Mapping[str, Sequence[Any]]) -> Iterator[File]:
    paths, contents = columns.get("path"), columns.get("bytes")
    for i in range(len(columns["bytes" if paths is None else "path"])):
        path = None if paths is None else os.fspath(paths[i])
        name = f"image {i} of a batch" if path is None else as_text(path)
        if contents is not None:
            yield File(name, bytes(contents[i]))
        elif path is not None:
            yield File(name, Path(path))
