"""What a semi-supervised run thought of its unlabeled images: a table of pseudo-labels, and its diagnosis.

Shapes: rows [R] of one round, a pseudo-label each; classes [C].
"""

import io
import math
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
from lpt.report.quoting import for_spreadsheet

BINS = 10
"""Of the histogram of confidences, from 0 to 1."""

FIRST_COLUMNS = ("step", "label", "confidence", "kept")


def write_round(
    path: Path, noted: Mapping[str, Tensor], *, number: int, ids: Sequence[str], truth: Tensor, classes: Sequence[str]
) -> None:
    """Appends round `number` to the Parquet file at `path`, in place of what is there from its first step on.

    `noted` holds, each [R], `rows` (indices into the unlabeled images), `step`, `label`, `confidence`, `kept`, and of
    every head `NAME_label` and `NAME_confidence`. `ids` and `truth` are of all unlabeled images, -1 where unknown. The
    file's columns: image, truth (null where unknown), round, step, label, confidence, kept, and those of the heads.
    Names that a spreadsheet would take for formulas begin with an apostrophe there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.array(
        [*(for_spreadsheet(name) for name in classes), None], dtype=object
    )  # label -1 is the last entry: unknown
    images = [for_spreadsheet(ids[int(row)]) for row in noted["rows"]]
    columns = {
        "image": pa.array(images, pa.string()),
        "truth": pa.array(names[truth[noted["rows"]].numpy()], pa.string()),
        "round": pa.array(np.full(len(noted["rows"]), number), pa.int32()),
    }
    # Sorted, because a checkpoint gives back the heads' columns in another order
    for name in [*FIRST_COLUMNS, *sorted(noted.keys() - {*FIRST_COLUMNS, "rows"})]:
        values = noted[name].numpy()
        columns[name] = pa.array(names[values], pa.string()) if name.endswith("label") else pa.array(values)
    table = pa.table(columns)
    if path.exists():
        earlier = _read(path)  # a run that was killed has rows of steps that are now taken again
        table = pa.concat_tables([earlier.filter(earlier["step"].to_numpy() < int(noted["step"].min())), table])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomic(path, buffer.getvalue())


def read_last_round(path: Path, classes: Sequence[str]) -> tuple[dict[str, Tensor], int]:
    """What `write_round` was given last, but for `rows`, with `truth` (-1 where unknown); and the round's number."""
    table = _read(path)
    rounds = table["round"].to_numpy()
    number = int(rounds.max())
    last = table.filter(rounds == number)
    label_of: dict[str | None, int] = {name: k for k, name in enumerate(classes)}  # as lpt 0.1 wrote them
    label_of |= {for_spreadsheet(name): k for k, name in enumerate(classes)} | {None: -1}
    noted: dict[str, Tensor] = {}
    for name in last.column_names:
        if name == "truth" or name.endswith("label"):
            noted[name] = torch.tensor([label_of[class_name] for class_name in last[name].to_pylist()])
        elif name not in ("image", "round"):
            noted[name] = torch.from_numpy(last[name].to_numpy().copy())
    return noted, number


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise TrainingError(f"{path} cannot be read ({quoted(error)}): delete it, what it held is lost") from None


def diagnose(
    noted: Mapping[str, Tensor], truth: Tensor, counts: Tensor, unlabeled_counts: Tensor | None
) -> dict[str, Any]:
    """Of one round: how many images are believed and, where the `truth` [R] is known (not -1), how many rightly.

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
    """How many images of tail classes are taken for ones of head classes, and the other way round, as shares."""
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
