"""What a semi-supervised run thought of its unlabeled images: a table of pseudo-labels, and its diagnosis.

Shapes: rows [R] of one round, a pseudo-label each; classes [C].
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lpt.data.longtail import shot_groups
from lpt.errors import TrainingError, quoted
from lpt.files import atomic_file
from lpt.metrics import calibration_error
from lpt.report.quoting import for_spreadsheet

BINS = 10
"""Of the histogram of confidences, from 0 to 1."""

ROWS_AT_ONCE = 2**16
FIRST_COLUMNS = ("step", "label", "confidence", "kept")


def write_round(
    folder: Path, noted: Mapping[str, Tensor], *, number: int, ids: Sequence[str], truth: Tensor, classes: Sequence[str]
) -> None:
    """Writes round `number` as a Parquet file of its own into `folder`, whose files read as one dataset, in place of
    what is there of it and of later ones: a run that was killed takes their steps again.

    `noted` holds, each [R], `rows` (indices into the unlabeled images), `step`, `label`, `confidence`, `kept`, and of
    every head `NAME_label` and `NAME_confidence`. `ids` and `truth` are of all unlabeled images, -1 where unknown. The
    columns: image, truth (null where unknown), round, step, label, confidence, kept, and those of the heads. Names that
    a spreadsheet would take for formulas begin with an apostrophe there.
    """
    _split_old_file(folder, before=number)
    for path in _rounds(folder):
        if _number_of(path) > number:
            path.unlink()
    _write(_file_of(folder, number), _tables(noted, number, ids, truth, classes))


def _tables(
    noted: Mapping[str, Tensor], number: int, ids: Sequence[str], truth: Tensor, classes: Sequence[str]
) -> Iterator[Any]:
    """The rows of a round, some at a time: names take many times the memory of what they are noted by."""
    import pyarrow as pa

    names = pa.array([*(for_spreadsheet(name) for name in classes), None], pa.string())  # label -1 is the last: unknown
    # Sorted, because a checkpoint gives back the heads' columns in another order
    columns = [*FIRST_COLUMNS, *sorted(noted.keys() - {*FIRST_COLUMNS, "rows"})]
    for start in range(0, max(1, len(noted["rows"])), ROWS_AT_ONCE):
        part = {name: values[start : start + ROWS_AT_ONCE] for name, values in noted.items()}

        def named(labels: Tensor) -> Any:
            return names.take(pa.array((labels % len(names)).numpy()))

        table = {
            "image": pa.array([for_spreadsheet(ids[int(row)]) for row in part["rows"].tolist()], pa.string()),
            "truth": named(truth[part["rows"]]),
            "round": pa.array(np.full(len(part["rows"]), number), pa.int32()),
        }
        for name in columns:
            table[name] = named(part[name]) if name.endswith("label") else pa.array(part[name].numpy())
        yield pa.table(table)


def _write(path: Path, tables: Iterable[Any]) -> None:
    """A Parquet file with a group of rows for each of `tables`, whole or not at all."""
    import pyarrow.parquet as pq

    with atomic_file(path) as file:
        writer = None
        for table in tables:
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.parquet"), key=_number_of)


def _file_of(folder: Path, number: int) -> Path:
    return folder / f"round-{number:05d}.parquet"


def _number_of(path: Path) -> int:
    digits = path.stem.removeprefix("round-")
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def old_file(folder: Path) -> Path:
    """Where runs of before have all rounds in one file."""
    return folder.with_name(f"{folder.name}.parquet")


def _split_old_file(folder: Path, *, before: int) -> None:
    """Makes of the one file that a run had when it was begun a file for each round `before` this one."""
    path = old_file(folder)
    if not path.is_file():
        return
    table = _read(path)
    rounds = table["round"].to_numpy()
    for number in np.unique(rounds[rounds < before]).tolist():
        _write(_file_of(folder, number), [table.filter(rounds == number)])
    path.unlink()


def read_last_round(folder: Path, classes: Sequence[str]) -> tuple[dict[str, Tensor], int] | None:
    """What `write_round` was given last, but for `rows`, with `truth` (-1 where unknown); and the round's number. None
    where there is no round; of a run of before its one file is read."""
    if rounds := _rounds(folder):
        last = _read(rounds[-1])
        number = _number_of(rounds[-1])
    elif old_file(folder).is_file():
        table = _read(old_file(folder))
        numbers = table["round"].to_numpy()
        number = int(numbers.max())
        last = table.filter(numbers == number)
    else:
        return None
    noted: dict[str, Tensor] = {}
    for name in last.column_names:
        if name == "truth" or name.endswith("label"):
            noted[name] = _labels(last[name], classes)
        elif name not in ("image", "round"):
            noted[name] = torch.from_numpy(last[name].to_numpy().copy())
    return noted, number


def _labels(column: Any, classes: Sequence[str]) -> Tensor:
    """The classes [R] that a column names, -1 where it is null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pa.array([*map(for_spreadsheet, classes), *classes], pa.string())  # the second as lpt 0.1 wrote them
    index = cast(Any, pc).index_in(column, value_set=names)
    if index.null_count > column.null_count:
        raise TrainingError(f"pseudo-labels name a class that is none of the {len(classes)}: delete them")
    labels = index.fill_null(-1).to_numpy()
    return torch.from_numpy(np.where(labels < 0, -1, labels % len(classes)).astype(np.int64))


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise TrainingError(f"{path} cannot be read ({quoted(error)}): delete it, what it held is lost") from None


def diagnose(
    noted: Mapping[str, Tensor], truth: Tensor, counts: Tensor, unlabeled_counts: Tensor | None
) -> dict[str, Any]:
    """Of one round: how many pseudo-labels are kept and, where the `truth` [R] is known (not -1), how many rightly.

    `counts` [C] are of the labeled images: head and tail are their first and last third. `unlabeled_counts` [C] are the
    true counts of the unlabeled images, None where they are not known. `precision` and the numbers of false ones are of
    the kept pseudo-labels; `per_class_recall` is the share of all images of a class that are kept with its label. `kl`
    is KL(kept labels || truth) of the distributions over classes, in nats.
    """
    label, confidence, is_kept = noted["label"], noted["confidence"].double(), noted["kept"]
    predicted_counts = torch.bincount(label[is_kept], minlength=len(counts))
    diagnosis: dict[str, Any] = {
        "images": len(label),
        "kept": int(is_kept.sum()),
        "coverage": is_kept.double().mean().item(),
        "predicted": predicted_counts.tolist(),
    }
    is_known = truth >= 0
    if not bool(is_known.any()):
        return diagnosis
    is_right = label == truth
    kept_and_known = is_kept & is_known
    false_confidence = confidence[kept_and_known & ~is_right]
    diagnosis |= {
        "precision": _share(is_right[kept_and_known]),
        "false_kept": len(false_confidence),
        "false_confidence": false_confidence.mean().item() if len(false_confidence) else None,
        "false_histogram": torch.histc(false_confidence, BINS, 0, 1).int().tolist(),
        "ece": calibration_error(confidence[is_known], is_right[is_known]),
        **_swaps(label[kept_and_known], truth[kept_and_known], counts),
        **_per_class(label, truth, kept_and_known, len(counts)),
    }
    for name in ("linear", "similarity"):
        if f"{name}_label" in noted:
            diagnosis[f"{name}_accuracy"] = _share((noted[f"{name}_label"] == truth)[is_known])
    if unlabeled_counts is not None:
        kept_share, true_share = _distribution(predicted_counts), _distribution(unlabeled_counts)
        diagnosis["kl"] = (kept_share * (kept_share / true_share).log()).sum().item()
        diagnosis["true"] = unlabeled_counts.tolist()
    return diagnosis


def _swaps(label: Tensor, truth: Tensor, counts: Tensor) -> dict[str, float | None]:
    """How many images of tail classes are predicted as ones of head classes, and the other way round, as shares."""
    groups = shot_groups(counts, "thirds")
    is_head, is_tail = torch.zeros(len(counts), dtype=torch.bool), torch.zeros(len(counts), dtype=torch.bool)
    is_head[groups["many"]] = True
    is_tail[groups["few"]] = True
    return {
        "tail_taken_for_head": _share(is_head[label[is_tail[truth]]]),
        "head_taken_for_tail": _share(is_tail[label[is_head[truth]]]),
    }


def _per_class(label: Tensor, truth: Tensor, kept_and_known: Tensor, num_classes: int) -> dict[str, list[float | None]]:
    """Precision and recall [C] of the kept pseudo-labels, None for classes without any to count."""
    right = torch.bincount(label[kept_and_known & (label == truth)], minlength=num_classes).double()
    precision = right / torch.bincount(label[kept_and_known], minlength=num_classes)
    recall = right / torch.bincount(truth[truth >= 0], minlength=num_classes)
    return {"per_class_precision": _none_for_nan(precision), "per_class_recall": _none_for_nan(recall)}


def _none_for_nan(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _distribution(counts: Tensor) -> Tensor:
    smoothed = counts.double() + 1e-6  # the divergence is finite also where a class has no image
    return smoothed / smoothed.sum()


def _share(is_so: Tensor) -> float | None:
    """How many are true, None of none."""
    return is_so.double().mean().item() if len(is_so) else None
