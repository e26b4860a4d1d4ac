"""Predictions of a model on a set of images, collected once; metrics are functions of them.

Shapes: logits [N C], labels [N], ids [N k], features [N D'].
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.data.longtail import usual_group_rule
from lpt.data.task import Files, Images, Task
from lpt.engine.processes import all_agree, all_gather_rows, rank_and_world
from lpt.errors import DataError
from lpt.files import read_tensors, to_bytes, write_atomic
from lpt.metrics import summarize
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import FusedHead
from lpt.model.matching import key_usage

ALONE = ("accuracy", "class_accuracy", "many", "medium", "few", "worst_class", "geometric_mean", "harmonic_mean", "ece")
"""What is said of a head by itself."""


class Predictions(NamedTuple):
    """`opinions` are the logits of each head by itself, where there are two."""

    logits: Tensor
    labels: Tensor
    ids: Tensor | None
    opinions: Mapping[str, Tensor] = MappingProxyType({})


class PrefixCache:
    """What the evaluations of one phase share: tokens at the first block with group prompts, and the query.

    Both depend on the test view and on the frozen shared prompt alone, so that every evaluation after the first
    runs one tail. Holds the first batches that fit into `limit` bytes of main memory; the others are computed
    again every time. Nothing is kept while the shared prompt trains.
    """

    def __init__(self, limit: int = 2 * 2**30):
        self.limit, self.bytes = limit, 0
        self._whose: tuple[object, object] = (None, None)
        self._state: tuple[object, ...] = ()
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def get(self, model: PromptedClassifier, images: Images | Files, part: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tokens [B P+N D], query [B D']) of rows `part` of `images`; no query where nothing is kept."""
        state = model.prefix_state
        if state is None:
            return model.prefix(_views(model, images, part)), None
        whose = (model, images)
        state = (*state, model.backbone.preprocess)
        if state != self._state or any(a is not b for a, b in zip(whose, self._whose, strict=True)):
            self._whose, self._state, self.bytes = whose, state, 0
            self._kept.clear()
        rows = (int(part[0]), len(part))
        if rows not in self._kept:
            tokens = model.prefix(_views(model, images, part))
            found = (tokens, model.query(tokens))
            if self.bytes + (size := sum(t.nbytes for t in found)) > self.limit:
                return found
            self._kept[rows] = (found[0].cpu(), found[1].cpu())
            self.bytes += size
        tokens, query = self._kept[rows]
        device = next(model.parameters()).device
        return tokens.to(device), query.to(device)


@torch.no_grad()
def predict(
    model: PromptedClassifier,
    images: Images | Files,
    *,
    batch_size: int = 128,
    cache: PrefixCache | None = None,
    folder: Path | None = None,
) -> Predictions:
    """Clean predictions, in order: the test view, no noise, no margin, no dropout. On several processes each
    predicts its share and all get the whole. Leaves the model in eval mode. Raises DataError for an image file that
    cannot be decoded.

    `cache` and `folder` save what earlier calls have computed: prefixes of a model with a pool in memory, `features`
    of one without in files.
    """
    model.eval()
    if folder and model.pool is None:
        found = features(model, images, folder=folder, batch_size=batch_size).to(next(model.parameters()).device)
        opinions = {name: logits.cpu() for name, logits in _opinions(model, found).items()}
        return Predictions(model.classify(found).float().cpu(), images.labels, None, opinions)
    cache = cache or PrefixCache(limit=0)
    logits, ids, opinions = [], [], {}
    for part in _mine(images).split(batch_size):
        tokens, query = cache.get(model, images, part)
        output = model.tail(tokens, query=query)
        logits.append(output.logits.float())
        if output.ids is not None:
            ids.append(output.ids)
        for name, of in _opinions(model, output.feature).items():
            opinions.setdefault(name, []).append(of)
    return Predictions(
        all_gather_rows(torch.cat(logits), len(images)).cpu(),
        images.labels,
        all_gather_rows(torch.cat(ids), len(images)).cpu() if ids else None,
        {name: all_gather_rows(torch.cat(of), len(images)).cpu() for name, of in opinions.items()},
    )


def _opinions(model: PromptedClassifier, feature: Tensor) -> dict[str, Tensor]:
    if not isinstance(model.head, FusedHead):
        return {}
    return dict(zip(("linear", "similarity"), model.head.both(feature), strict=True))


@torch.no_grad()
def features(
    model: PromptedClassifier, images: Images | Files, *, folder: Path | None = None, batch_size: int = 128
) -> Tensor:
    """The features [N D'] of the test views under the shared prompt, if there is one (LPT's queries).

    What trains a head alone, its class means, and the start of the keys need them once. With a `folder` they are
    kept there, in a file named by a hash over all they depend on: the backbone's weights, precision and device,
    torch's version, the view, the prompt and the images (pixels; of files sizes and times of writing; of those in lists
    nothing but their paths). Others have another name: a stale file is never read.
    """
    place = folder / f"features-{_identity(model, images)}.safetensors" if folder else None
    kept = _kept(place) if place else None
    if place and all_agree(kept is not None):
        assert kept is not None
        return kept
    found = [model.query(model.prefix(_views(model, images, part))) for part in _mine(images).split(batch_size)]
    whole = all_gather_rows(torch.cat(found), len(images)).cpu()
    if place and rank_and_world()[0] == 0:
        write_atomic(place, to_bytes({"features": whole}))
    return whole


def evaluate(
    model: PromptedClassifier,
    data: Task | Images | Files,
    counts: Tensor | None = None,
    *,
    group_rule: str | None = None,
    batch_size: int = 128,
    cache: PrefixCache | None = None,
) -> dict[str, Any]:
    """The metrics of `report.json` on the test set of a task, or on images of its classes.

    many, medium and few are groups by the training counts [C] and the group rule of the task; with images give the
    `counts`, and the rule is that of the task which the model was tuned for, unless `group_rule` names another. Raises
    DataError for a file that is no image, and for images without counts.
    """
    if isinstance(data, Task):
        images, counts, rule = data.test, data.counts if counts is None else counts, data.group_rule
    elif counts is None:
        raise DataError("evaluate needs the training counts of the classes beside images: give a task, or task.counts")
    else:
        images, rule = data, model.group_rule or usual_group_rule(counts)
    predictions = predict(model, images, batch_size=batch_size, cache=cache)
    return measure(model, predictions, counts, group_rule=group_rule or rule)


def measure(
    model: PromptedClassifier, predictions: Predictions, counts: Tensor, *, group_rule: str = "lt20"
) -> dict[str, Any]:
    """The metrics of predictions that `model` has made."""
    labels, opinions = predictions.labels, predictions.opinions
    metrics = summarize(model.probabilities(predictions.logits), labels, counts, group_rule=group_rule)
    if predictions.opinions:  # each head alone: the ablation of their fusion
        alone = {name: summarize(z.softmax(1), labels, counts, group_rule=group_rule) for name, z in opinions.items()}
        metrics["heads"] = {name: {key: of[key] for key in ALONE} for name, of in alone.items()}
    if predictions.ids is not None and model.pool is not None:
        metrics["key_usage"] = key_usage(predictions.ids, len(model.pool.keys))
    return metrics


def _kept(place: Path) -> Tensor | None:
    """The features in a file, None where there is none, or one that is cut off or damaged: it is written again."""
    try:
        return read_tensors(place)[1]["features"] if place.exists() else None
    except (KeyError, ValueError):
        return None


def _views(model: PromptedClassifier, images: Images | Files, part: Tensor) -> Tensor:
    device, backbone, found = next(model.parameters()).device, model.backbone, images.take(part)
    if isinstance(found, Tensor):
        return backbone.preprocess.test(found.to(device, non_blocking=True), dtype=backbone.dtype)
    return backbone.preprocess.normalized(backbone.preprocess.cut(found).to(device), dtype=backbone.dtype)


def _identity(model: PromptedClassifier, images: Images | Files) -> str:
    digest = hashlib.sha256(images.digest.encode())
    backbone = model.backbone
    where = next(model.parameters()).device.type
    facts = (backbone.fingerprint, backbone.dtype, where, torch.__version__, backbone.preprocess.test_view)
    digest.update(repr(facts).encode())
    digest.update(f"{backbone.name} {type(model.shared).__name__}".encode())
    for name, value in sorted(model.learned_state().items()):
        if name.startswith(("shared.", "backbone.")):
            digest.update(f"{name}{tuple(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


def _mine(images: Images | Files) -> Tensor:
    """The rows that this process predicts; the first where there are fewer than processes, which nobody gathers."""
    rank, world = rank_and_world()
    mine = torch.arange(len(images))[rank::world]
    return mine if len(mine) else torch.zeros(1, dtype=torch.long)
