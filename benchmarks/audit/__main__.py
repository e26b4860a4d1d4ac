"""Plants 5 % wrong labels in CIFAR-100-LT, and says how many of them an audit finds among many, medium and few.

    python -m benchmarks.audit [--seeds 0,1,2] [--json FILE] [--features DIR] [--data DIR] [--weights FILE] [--quick]

Three ways, on the same features of the frozen backbone. `plain` ranks by the confidence of a cross-validated linear
probe in the label, and lists as many images as were planted; `cleanlab` is cleanlab's own list from these confidences;
`audit` is what `lpt audit` does. A ranking is measured by its average precision and by the share of planted errors
among as many images of the group as were planted there, precision and recall at once; a list by both. Each seed draws
another long tail and other errors. What the audit does was chosen on the tail of seed 3, and not on these.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lpt
from lpt.audit.confidences import agreed, discriminants, probe
from lpt.audit.labels import CERTAIN, Suspicion, suspicions
from lpt.data.longtail import shot_groups
from lpt.data.preprocess import available_cores
from lpt.device import versions
from lpt.engine.evaluate import features
from lpt.files import write_atomic
from lpt.model.classifier import bare_classifier

WRONG = 0.05
KINDS = ("same counts", "any class")
"""Wrong labels are exchanged among the images, at least one of each class, so that counts stay; or drawn from all
classes alike, which gives a rare class about as many wrong images as it has right ones."""
SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS = SHARED / "weights/deit_tiny_patch16_224.fp16.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--features", metavar="DIR", type=Path, help="where features are kept for the next time")
    parser.add_argument("--data", metavar="DIR", default=str(SHARED / "data/cifar100"))
    parser.add_argument("--weights", metavar="FILE", default=str(WEIGHTS))
    parser.add_argument("--quick", action="store_true", help="digits and nano, one seed, for tests")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in [0] if given.quick else [int(word) for word in given.seeds.split(",")]:
        began = time.perf_counter()
        of_images, labels, classes, rule = _subject(given, seed)
        for kind in KINDS:
            rows += [
                {"seed": seed, "kind": kind, **row} for row in measured(of_images, labels, classes, rule, kind, seed)
            ]
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    print(table(rows))
    if given.json:
        commit = subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True).stdout.strip()
        machine = f"{available_cores()} cores, {platform.processor() or platform.machine()}"
        facts = {"commit": commit, "machine": machine, "versions": versions()}
        write_atomic(given.json, json.dumps({**facts, "rows": rows}, indent=1).encode())


def _subject(given: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor, int, str]:
    """(features, right labels, classes, group rule) of a long tail."""
    if given.quick:
        task, backbone = lpt.load_task("digits-lt", seed=seed), lpt.load_backbone("nano")
    else:
        task = lpt.load_task("cifar100-lt", root=given.data, seed=seed)
        backbone = lpt.load_backbone("timm:deit_tiny_patch16_224", weights=given.weights, image_size=112)
        backbone = backbone.to(torch.bfloat16)
    of_images = features(bare_classifier(backbone, task.classes), task.train, folder=given.features)
    return of_images, task.train.labels, len(task.classes), task.group_rule


def planted(labels: Tensor, num_classes: int, kind: str, seed: int) -> tuple[Tensor, np.ndarray]:
    """(labels [N] of which some are wrong, which are [N])."""
    rng, right = np.random.default_rng((seed, 29)), labels.numpy()
    if kind == "any class":
        chosen = rng.permutation(len(right))[: round(WRONG * len(right))]
        new = (right[chosen] + rng.integers(1, num_classes, len(chosen))) % num_classes
    else:
        parts = [rng.permutation(np.flatnonzero(right == k)) for k in range(num_classes)]
        chosen = np.concatenate([rows[: max(1, round(WRONG * len(rows)))] for rows in parts])
        assert np.bincount(right[chosen]).max() <= len(chosen) / 2, "no exchange makes all of them wrong"
        new = rng.permutation(right[chosen])
        while (same := np.flatnonzero(new == right[chosen])).size:  # each is exchanged with any other
            others = rng.integers(len(chosen), size=len(same))
            for i, j in zip(same, others, strict=True):
                new[i], new[j] = new[j], new[i]
    wrong = np.zeros(len(right), dtype=bool)
    wrong[chosen] = True
    changed = right.copy()
    changed[chosen] = new
    return torch.from_numpy(changed), wrong


def measured(
    of_images: Tensor, right: Tensor, num_classes: int, rule: str, kind: str, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each way and group. Groups are of the labels as they are after planting: nobody knows better."""
    labels, wrong = planted(right, num_classes, kind, seed)
    counts = torch.bincount(labels, minlength=num_classes)
    group_of = np.empty(num_classes, dtype=object)
    for name, classes in shot_groups(counts, rule).items():
        group_of[classes.numpy()] = name
    plain = probe(of_images, labels, num_classes, seed=seed)
    both = agreed(plain, discriminants(of_images, labels, num_classes, seed=seed))
    own = plain.gather(1, labels[:, None]).squeeze(1).numpy()
    ways: dict[str, Callable[[], Suspicion]] = {
        "plain": lambda: Suspicion(own < np.sort(own)[wrong.sum()], own, own),
        "cleanlab": lambda: suspicions(plain, labels, certain=float(num_classes)),
        "audit": lambda: suspicions(both, labels, certain=CERTAIN),
    }
    for way, ask in ways.items():
        suspicion = ask()
        for group in ("many", "medium", "few", "all"):
            here = np.full(len(wrong), True) if group == "all" else group_of[labels.numpy()] == group
            yield {"way": way, "group": group, **scored(suspicion, wrong, here)}


def scored(suspicion: Suspicion, wrong: np.ndarray, here: np.ndarray) -> dict[str, Any]:
    """The numbers of one group."""
    order = np.argsort(suspicion.quality[here], kind="stable")
    hits, listed = wrong[here][order], suspicion.is_issue[here]
    number = int(hits.sum())
    precisions = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return {
        "images": int(here.sum()),
        "planted": number,
        "at_planted": float(hits[:number].mean()) if number else None,
        "average_precision": float(precisions[hits].mean()) if number else None,
        "listed": int(listed.sum()),
        "precision": float(wrong[here][listed].mean()) if listed.any() else None,
        "recall": float(listed[wrong[here]].mean()) if number else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, with their standard deviation, as Markdown."""
    lines = ["| errors | group (planted of images) | way | at planted | AP | listed | precision | recall |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for group in ("many", "medium", "few", "all"):
            for way in ("plain", "cleanlab", "audit"):
                over_seeds = [row for row in rows if (row["kind"], row["group"], row["way"]) == (kind, group, way)]
                if not over_seeds:
                    continue
                size = f"{_mean(over_seeds, 'planted'):.0f} of {_mean(over_seeds, 'images'):.0f}"
                cells = [_percent(over_seeds, key) for key in ("at_planted", "average_precision")]
                cells += [
                    f"{_mean(over_seeds, 'listed'):.0f}",
                    *(_percent(over_seeds, key) for key in ("precision", "recall")),
                ]
                lines.append(f"| {kind} | {group} ({size}) | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _percent(rows: list[Mapping[str, Any]], key: str) -> str:
    values = [100 * row[key] for row in rows if row[key] is not None]
    if not values:
        return "n/a"
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
