"""`lpt audit`: a run's training images looked at once more; lists, an import for Label Studio, a section of the page.

Shapes: features [N D], labels [N].
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from torch import Tensor

from lpt.audit.confidences import FOLDS, REPEATS, held_out_probabilities
from lpt.audit.copies import Pair, near_duplicates
from lpt.audit.labels import Suspicion, suspicions
from lpt.config import load_config_of_run
from lpt.data.longtail import GROUPS, shot_groups
from lpt.data.task import Files, Images, Task
from lpt.data.walk import as_text
from lpt.engine.evaluate import features
from lpt.errors import LptError, require
from lpt.files import write_atomic
from lpt.model.classifier import bare_classifier
from lpt.report.audit import FINDINGS, FOLDER
from lpt.report.finished import split_of, write_page
from lpt.report.quoting import for_spreadsheet
from lpt.report.thumbnails import thumbnail
from lpt.setup import Setup

SHOWN_OF_A_GROUP = 12
PAIRS_SHOWN = 12
LABEL_STUDIO_SIDE = 512
"""Pixels of an image that has no file, in Label Studio's import."""
LOCAL_FILES = "/data/local-files/?d="
"""Where Label Studio serves files of its LOCAL_FILES_DOCUMENT_ROOT from."""


class Audit(NamedTuple):
    """Of N training images: what is thought of each label; pairs that are nearly one picture, from a cosine on."""

    suspicion: Suspicion
    pairs: list[Pair]
    cosine: float


def audited(found: Tensor, labels: Tensor, num_classes: int, *, seed: int = 0) -> Audit:
    """The audit of images with features [N D] and labels [N]. Raises NotInstalled without cleanlab."""
    probabilities = held_out_probabilities(found, labels, num_classes, seed=seed)
    return Audit(suspicions(probabilities, labels), *near_duplicates(found))


def audit(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Audits the training images of the run in the folder `run`, and writes lists, findings and the page there; returns
    the findings. `overrides` are `key=value` settings of its config, for data or weights that lie elsewhere now.

    Raises LptError where there is no run, or where its images are others than they were, NotInstalled without cleanlab.
    """
    require("cleanlab", extra="audit", gives="lpt audit")
    if not (run / "config.yaml").is_file():
        raise LptError(f"{run} holds no run: give the folder of one, which has a config.yaml")
    setup = Setup(load_config_of_run(run / "config.yaml", overrides))
    task, settings = setup.task, setup.config.train
    if split_of(run).get("sha256", setup.manifest["sha256"]) != setup.manifest["sha256"]:
        raise LptError(f"{run} is a run on other images than there are now: set data.root to where they are")
    cache = Path(settings.feature_cache) if settings.feature_cache else None
    bare = bare_classifier(setup.backbone, task.classes)
    found = features(bare, task.train, folder=cache, workers=settings.workers)
    result = audited(found, task.train.labels, len(task.classes), seed=settings.seed)
    rows = _rows(task, result.suspicion)
    (run / FOLDER).mkdir(exist_ok=True)
    write_atomic(run / FOLDER / "label_issues.csv", _csv(rows))
    pairs = [_pair(task, pair) for pair in result.pairs]
    pairs.sort(key=lambda pair: pair["class_1"] == pair["class_2"])  # stable: the nearest first
    write_atomic(run / FOLDER / "near_duplicates.csv", _csv(pairs))
    write_atomic(run / FOLDER / "label_studio.json", json.dumps(_label_studio(task, rows), indent=1).encode())
    write_atomic(run / FOLDER / "label_studio.xml", _labeling_interface(task.classes).encode())
    findings = _findings(task, result, rows, pairs, backbone=setup.backbone.name)
    write_atomic(run / FOLDER / FINDINGS, json.dumps(findings).encode())
    if (run / "report.json").exists():
        write_page(run, test=task.test)
    return findings


def _rows(task: Task, suspicion: Suspicion) -> list[dict[str, Any]]:
    """Images whose label is probably wrong, those of rare classes first: of five images one wrong one is a fifth."""
    group_of = {int(k): name for name, ks in shot_groups(task.counts, task.group_rule).items() for k in ks}
    order = [name for name in reversed(GROUPS)]
    labels, counts = task.train.labels.tolist(), task.counts.tolist()
    rows = [
        {
            "image": as_text(task.train.ids[i]),
            "label": task.classes[labels[i]],
            "suggested": task.classes[int(suspicion.suggested[i])],
            "quality": round(float(suspicion.quality[i]), 6),
            "group": group_of[labels[i]],
            "training_images": counts[labels[i]],
            "row": i,
        }
        for i in np.flatnonzero(suspicion.is_issue).tolist()
    ]
    return sorted(rows, key=lambda row: (order.index(row["group"]), row["quality"], row["row"]))


def _pair(task: Task, pair: Pair) -> dict[str, Any]:
    images = task.train
    first, second = (task.classes[int(images.labels[row])] for row in (pair.first, pair.second))
    return {
        "image_1": as_text(images.ids[pair.first]),
        "class_1": first,
        "image_2": as_text(images.ids[pair.second]),
        "class_2": second,
        "cosine": round(pair.cosine, 6),
        "row_1": pair.first,
        "row_2": pair.second,
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A table whose cells no spreadsheet takes for formulas; its columns are those of the first row."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: for_spreadsheet(v) if isinstance(v, str) else v for k, v in row.items()})
    return text.getvalue().encode()


def _label_studio(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Label Studio's import: each image with its label, and the suggested class as a prediction. Files are named by
    their path below data.root, which is to be Label Studio's LOCAL_FILES_DOCUMENT_ROOT; others are in it."""
    return [
        {
            "data": {"image": _address(task.train, row["row"]), "id": row["image"], "label": row["label"]},
            "predictions": [
                {
                    "model_version": "lpt audit",
                    "score": round(1 - row["quality"], 6),
                    "result": [
                        {
                            "from_name": "class",
                            "to_name": "image",
                            "type": "choices",
                            "value": {"choices": [row["suggested"]]},
                        }
                    ],
                }
            ],
        }
        for row in rows
    ]


def _address(images: Images | Files, row: int) -> str:
    if isinstance(images, Files) and isinstance(images.source(row), str | Path):
        return LOCAL_FILES + quote(as_text(images.ids[row]))
    return f"data:image/png;base64,{thumbnail(images, row, side=LABEL_STUDIO_SIDE) or ''}"


def _labeling_interface(classes: Sequence[str]) -> str:
    """Label Studio's labeling interface for these classes."""
    from xml.sax.saxutils import quoteattr

    choices = "\n".join(f"    <Choice value={quoteattr(as_text(name))}/>" for name in classes)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n  <Text name="was" value="$label"/>\n'
        f'  <Choices name="class" toName="image" choice="single" showInline="true">\n{choices}\n  </Choices>\n</View>\n'
    )


def _findings(
    task: Task, result: Audit, rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], *, backbone: str
) -> dict[str, Any]:
    """The numbers, and what the page shows."""
    groups = shot_groups(task.counts, task.group_rule)
    names = [name for name in reversed(GROUPS) if len(groups[name])]
    shown = [row for name in names for row in [row for row in rows if row["group"] == name][:SHOWN_OF_A_GROUP]]
    return {
        "how": f"Features of {backbone} without prompts; confidences of {FOLDS} folds, {REPEATS} times over, by linear "
        "discriminants that count every class alike; label errors by cleanlab; neighbors by FAISS.",
        "images": len(task.train),
        "label_issues": len(rows),
        "groups": {
            name: {
                "images": int(task.counts[groups[name]].sum()),
                "issues": sum(row["group"] == name for row in rows),
            }
            for name in names
        },
        "near_duplicates": len(pairs),
        "under_two_classes": sum(pair["class_1"] != pair["class_2"] for pair in pairs),
        "cosine": result.cosine,
        "shown": [{**row, "png": thumbnail(task.train, row["row"])} for row in shown],
        "pairs": [
            {
                "labels": [pair["class_1"], pair["class_2"]],
                "pngs": [thumbnail(task.train, pair[key]) for key in ("row_1", "row_2")],
            }
            for pair in pairs[:PAIRS_SHOWN]
        ],
    }
