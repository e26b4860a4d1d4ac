"""What a semi-supervised run thought of its unlabelled images: a table with a row for each pseudo-label, and what the
table says.

Shapes: rows [R] of one round, each with the image's number among the unlabelled, classes [C].
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpt.data.longtail import shot_groups
from lpt.errors import TrainingError, quoted
from lpt.files import write_atomic
from lpt.metrics import calibration_error

BINS = 10


def write_round(
    path: Path, noted: Mapping[str, Tensor], *, number: int, ids: Sequence[str], truth: Tensor, classes: Sequence[str]
) -> None:
    """Appends a round to the Parquet file at `path`, in place of what is there from its first step on.

    `noted` holds `rows`, `step`, `label`, `confidence`, `kept`, and of every head `NAME_label` and `NAME_confidence`.
    The file's columns: image, truth (null where unknown), round, step, label, confidence, kept, and those of the heads.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.array([*classes, None], dtype=object)  # the last, -1, is an unknown label
    columns = {
        "image": pa.array(np.array(ids, dtype=object)[noted["rows"].numpy()], pa.string()),
        "truth": pa.array(names[truth[noted["rows"]].numpy()], pa.string()),
        "round": pa.array(np.full(len(noted["rows"]), number), pa.int32()),
    }
    first = ["step", "label", "confidence", "kept"]
    for name in [*first, *sorted(noted.keys() - {*first, "rows"})]:  # notes from a checkpoint come in another order
        values = noted[name].numpy()
        columns[name] = pa.array(names[values], pa.string()) if name.endswith("label") else pa.array(values)
    table = pa.table(columns)
    if path.exists():
        before = _read(path)
        table = pa.concat_tables([before.filter(before["step"].to_numpy() < int(noted["step"].min())), table])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomic(path, buffer.getvalue())


def read_last_round(path: Path, classes: Sequence[str]) -> tuple[dict[str, Tensor], int]:
    """What `write_round` was given last, but for `rows`, with `truth` (-1 where unknown); and the round's number."""
    table = _read(path)
    rounds = table["round"].to_numpy()
    number = int(rounds.max())
    last = table.filter(rounds == number)
    place = {name: k for k, name in enumerate(classes)} | {None: -1}
    found = {}
    for name in last.column_names:
        if name == "truth" or name.endswith("label"):
            found[name] = torch.tensor([place[value] for value in last[name].to_pylist()])
        elif name not in ("image", "round"):
            found[name] = torch.from_numpy(last[name].to_numpy().copy())
    return found, number


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise TrainingError(f"{path} cannot be read ({quoted(error)}): delete it, what it held is lost") from None


def diagnose(noted: Mapping[str, Tensor], truth: Tensor, counts: Tensor, unlabelled: Tensor | None) -> dict[str, Any]:
    """Of one round: how many images are believed and, where the `truth` [R] is known (not -1), how rightly.

    `counts` [C] are of the labelled images: head and tail are their first and last third. `unlabelled` [C] are the true
    counts of the unlabelled images, None where they are not known. `precision`, `recall` and the false ones are of what
    is kept; recall also counts what is not. `kl` is of the kept labels' distribution against the true one.
    """
    label, confidence, kept = noted["label"], noted["confidence"].double(), noted["kept"]
    num_classes = len(counts)
    predicted = torch.bincount(label[kept], minlength=num_classes)
    found: dict[str, Any] = {
        "images": len(label),
        "kept": int(kept.sum()),
        "coverage": kept.double().mean().item(),
        "predicted": predicted.tolist(),
    }
    known = truth >= 0
    if not bool(known.any()):
        return found
    right = label == truth
    groups = shot_groups(counts, "thirds")
    head, tail = (torch.zeros(num_classes + 1, dtype=torch.bool) for _ in range(2))  # the last is the unknown one's
    head[groups["many"]] = True
    tail[groups["few"]] = True
    believed, false = kept & known, kept & known & ~right
    true_kept = torch.bincount(label[believed & right], minlength=num_classes).double()
    precision = true_kept / torch.bincount(label[believed], minlength=num_classes)
    recall = true_kept / torch.bincount(truth[known], minlength=num_classes)
    found |= {
        "precision": _share(right[believed]),
        "false_kept": int(false.sum()),
        "false_confidence": confidence[false].mean().item() if bool(false.any()) else None,
        "false_histogram": torch.histc(confidence[false], BINS, 0, 1).int().tolist(),
        "ece": calibration_error(confidence[known], right[known]),
        "tail_taken_for_head": _share(head[label[believed & tail[truth]]]),
        "head_taken_for_tail": _share(tail[label[believed & head[truth]]]),
        "per_class_precision": [None if np.isnan(x) else x for x in precision.tolist()],
        "per_class_recall": [None if np.isnan(x) else x for x in recall.tolist()],
    }
    for name in ("linear", "similarity"):
        if f"{name}_label" in noted:
            found[f"{name}_accuracy"] = _share((noted[f"{name}_label"] == truth)[known])
    if unlabelled is not None:
        p, q = ((n + 1e-6) / (n + 1e-6).sum() for n in (predicted.double(), unlabelled.double()))
        found |= {"kl": (p * (p / q).log()).sum().item(), "true": unlabelled.tolist()}
    return found


def _share(of: Tensor) -> float | None:
    return of.double().mean().item() if len(of) else None
