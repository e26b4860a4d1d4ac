"""One label for every unlabeled image, or `unsure`: `lpt pseudo-label`.

An image is labeled where its probability reaches the threshold of its class, which is found on held-out images whose
labels are known (`lpt.serve.thresholds`). Within a class the unlabeled images are taken to look like the held-out ones;
how frequent each class is may differ, and is estimated.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lpt.data.loader import Workers
from lpt.data.longtail import GROUPS, shot_groups, usual_group_rule
from lpt.data.preprocess import File
from lpt.data.task import Files, Images
from lpt.data.walk import as_text
from lpt.engine.evaluate import predict_top
from lpt.engine.stopping import Stop
from lpt.errors import LptError
from lpt.files import read_tensors, to_bytes, write_atomic
from lpt.model.classifier import PromptedClassifier
from lpt.prompt_file import Header, read_prompt
from lpt.serve.evaluating import held_out_in, held_out_of, match_classes
from lpt.serve.opening import check_loading, open_prompt, workers_in
from lpt.serve.predicting import Answer
from lpt.serve.row_file import Row, RowFile, check_out
from lpt.serve.streaming import Say, Shard, file_sha256, images_of_job, row_of, row_schema, write_answers
from lpt.serve.thresholds import HeldOut, choose, class_shares, expected, weights

UNSURE = "unsure"
"""In the place of a label; `sure` distinguishes it from a class of that name."""
Prior = Literal["images", "held-out", "training"]
"""Where it is taken from how frequent each class is: estimated of the unlabeled images, or as it is elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What labels are to be like: the share of them that is right, by classes as frequent as `prior` says."""

    precision: float = 0.95
    prior: Prior = "images"
    held_out: Path | None = None
    """Class folders of images that the prompt file was not trained on; by default the held-out or test part of its
    data."""
    topk: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.precision < 1:
            raise LptError(f"--precision {self.precision:g}: give the share of labels that is to be right, as 0.95")
        if self.prior not in ("images", "held-out", "training"):
            raise LptError(f"--prior {self.prior}: give images, held-out or training")


def pseudo_label(
    prompt: Path,
    paths: Sequence[Path],
    out: Path,
    settings: dict[str, dict[str, Any]],
    *,
    wanted: Wanted | None = None,
    batch_size: int = 32,
    shard: Shard | None = None,
    resume: bool = False,
    say: Say = lambda text: None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Writes `out`, Parquet or JSON lines: for each image that `paths` lead to `path`, `label` (a class, or `unsure`),
    `sure`, and as in predictions `class`, `probability`, `margin`, the lists `classes` and `probabilities`, `task`, and
    `error`. Beside it `OUT.json` says the thresholds and what is to be expected, which is also returned.

    `settings` are the sections `data`, `backbone` and `train` of a config.
    """
    wanted, shard = wanted or Wanted(), shard or Shard()
    check_out(out, resume=resume)
    header, _ = read_prompt(prompt)
    loading = check_loading(settings, sections=("data", "backbone", "train"))
    workers = workers_in(settings)
    held_out, source = labeled_images(prompt, header, settings.get("data", {}), wanted.held_out, say)
    model, _ = open_prompt(prompt, **loading, at_once=batch_size)
    job = {
        "prompt": file_sha256(prompt),
        **images_of_job(paths, shard),
        "precision": wanted.precision,
        "prior": wanted.prior,
        "topk": wanted.topk,
        "held_out": held_out.digest,
    }
    import pyarrow as pa

    writing = RowFile(out, row_schema(wanted.topk, label=pa.string(), sure=pa.bool_()), job)
    labeling = Labeling(model, header, wanted, writing, held_out, source, workers)
    name = header.data.get("name")

    def row(file: File, answer: Answer) -> Row:
        row = row_of(file, answer, model.classes, wanted.topk, in_json=out.suffix == ".jsonl")
        return {**row, "task": name if isinstance(name, str) else None}

    write_answers(
        writing,
        model,
        paths,
        row,
        topk=max(2, wanted.topk),
        batch_size=batch_size,
        shard=shard,
        resume=resume,
        workers=workers,
        say=say,
        stop=stop or Stop(),
        at_start=labeling.judge_held_out,
        at_end=labeling.labels,
    )
    return json.loads(report_of(out).read_text())


def report_of(out: Path) -> Path:
    """Where it stands what is to be expected of the labels in `out`."""
    return out.with_name(f"{out.name}.json")


def labeled_images(
    prompt: Path, header: Header, data: Mapping[str, Any], folder: Path | None, say: Say
) -> tuple[Images | Files, str]:
    """(images of known class that were not trained on, labeled in the prompt file's order; what they are)."""
    if folder is None:
        task, source, is_sure = held_out_of(header, data)
    else:
        task, source, is_sure, trained_on = held_out_in(folder, header)
        if trained_on:
            say(f"warning: {trained_on} of the held-out images were trained on, and are left out")
    images, unmatched = match_classes(task, header.classes, prompt)
    if not is_sure:
        say(
            "warning: the prompt file does not say which images it was trained on: thresholds are right only if the "
            f"{source} images are none of them"
        )
    absent = len(header.classes) - len(images.labels.unique())
    if absent:
        say(f"warning: {absent} of {len(header.classes)} classes have no held-out image: their group's are taken")
    if unmatched["unknown_to_prompt"]:
        say(f"warning: {len(unmatched['unknown_to_prompt'])} classes are not in the prompt file, and are left out")
    say(f"thresholds are found on {len(images)} images that are {source}")
    return images, source


@dataclass(frozen=True)
class Labeling:
    """From probabilities to labels, when the probabilities of all images are there."""

    model: PromptedClassifier
    header: Header
    wanted: Wanted
    writing: RowFile
    held_out: Images | Files
    source: str
    workers: Workers

    def judge_held_out(self) -> None:
        """What the model says of the held-out images, once: a resumed process finds it beside the rows."""
        file = self.writing.partial / "held_out.safetensors"
        if not file.exists():
            top = predict_top(self.model, self.held_out, workers=self.workers)
            content = {"predicted": top.classes[:, 0], "confidence": top.probabilities[:, 0], "truth": top.labels}
            write_atomic(file, to_bytes({name: values.contiguous() for name, values in content.items()}))

    def labels(self) -> Callable[[Row], Row]:
        """Chooses the thresholds and writes the report; what makes of a row one with its label."""
        names = [as_text(name) for name in self.model.classes]
        number_of = {name: k for k, name in enumerate(names)}
        pool = np.zeros(len(names), dtype=np.int64)
        for row in self.writing.each():
            if row.get("class") is not None:
                pool[number_of[row["class"]]] += 1
        held_out, shares = self._weighed(pool)
        group_of = self._groups()
        chosen = choose(held_out, group_of, self.wanted.precision)
        limits = chosen.thresholds
        labeled = np.zeros(len(names), dtype=np.int64)

        def label(row: Row) -> Row:
            if row.get("class") is None:
                return row
            is_sure = row["probability"] >= limits[number_of[row["class"]]]
            return {**row, "label": row["class"] if is_sure else UNSURE, "sure": bool(is_sure)}

        for row in map(label, self.writing.each()):
            if row.get("sure"):
                labeled[number_of[row["class"]]] += 1
        expected_of = partial(expected, held_out, chosen)
        report = self._report(chosen.thresholds, expected_of, shares, group_of, pool, labeled)
        write_atomic(report_of(self.writing.path), json.dumps(report, indent=1).encode())
        return label

    def _weighed(self, pool: np.ndarray) -> tuple[HeldOut, np.ndarray]:
        """(the held-out images, weighed for the classes to have the shares of `prior`; those shares [C])."""
        _, stored = read_tensors(self.writing.partial / "held_out.safetensors")
        predicted, truth = stored["predicted"].numpy(), stored["truth"].numpy()
        if self.wanted.prior == "images":
            shares = class_shares(predicted, truth, pool)
        elif self.wanted.prior == "training":
            counts = np.array(self.header.counts, dtype=float)
            shares = counts / counts.sum()
        else:
            present = np.bincount(truth, minlength=len(pool))
            shares = present / present.sum()
        if not shares[truth].any():
            raise LptError("--prior training: no held-out image is of a class with training images")
        return HeldOut(predicted, stored["confidence"].double().numpy(), truth, weights(truth, shares)), shares

    def _groups(self) -> np.ndarray:
        """The number of each class's group [C]."""
        counts = torch.tensor(self.header.counts)
        groups = shot_groups(counts, self.header.group_rule or usual_group_rule(counts))
        group_of = np.zeros(len(counts), dtype=np.int64)
        for number, name in enumerate(GROUPS):
            group_of[groups[name].numpy()] = number
        return group_of

    def _report(
        self,
        limits: np.ndarray,
        expected_of: Callable[[np.ndarray, int, int], dict[str, Any]],
        shares: np.ndarray,
        group_of: np.ndarray,
        pool: np.ndarray,
        labeled: np.ndarray,
    ) -> dict[str, Any]:
        groups: dict[str, Any] = {}
        for name in (*GROUPS, "all"):
            inside = group_of == GROUPS.index(name) if name in GROUPS else np.ones(len(group_of), dtype=bool)
            images, number = int(pool[inside].sum()), int(labeled[inside].sum())
            groups[name] = {
                "classes": int(inside.sum()),
                "images": images,
                "labeled": number,
                "coverage": number / images if images else None,
                "expected": expected_of(inside, images, number),
            }
        names = self.model.classes
        return {
            "precision": self.wanted.precision,
            "prior": self.wanted.prior,
            "held_out": {"images": len(self.held_out), "source": self.source},
            "rows": self.writing.rows,
            "errors": self.writing.errors,
            "unsure": int(pool.sum() - labeled.sum()),
            "groups": groups,
            "thresholds": {
                name: float(limit) if np.isfinite(limit) else None for name, limit in zip(names, limits, strict=True)
            },
            "class_shares": dict(zip(names, shares.tolist(), strict=True)),
            "labeled": dict(zip(names, labeled.tolist(), strict=True)),
        }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as text, a line for each group that has images."""
    lines = [
        f"{report['rows']} images: {report['groups']['all']['labeled']} labeled, {report['unsure']} unsure"
        + (f", {report['errors']} that cannot be read" if report["errors"] else ""),
        "of images predicted as classes with ..., per cent, in brackets 95 % intervals:",
    ]
    for name, group in report["groups"].items():
        if not group["classes"]:
            continue
        precision, coverage = (_percent(group["expected"][key]) for key in ("precision", "coverage"))
        share = "-" if group["coverage"] is None else f"{100 * group['coverage']:.1f}"
        lines.append(
            f"  {name:7}{group['labeled']} of {group['images']} labeled ({share}); expected: precision {precision}, "
            f"coverage {coverage}"
        )
    return lines


def _percent(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "unknown (no held-out image)"
    return f"{100 * interval['estimate']:.1f} ({100 * interval['low']:.1f} to {100 * interval['high']:.1f})"
