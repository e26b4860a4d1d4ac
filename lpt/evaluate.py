"""Predictions of a model on a set of images, collected once; metrics are functions of them.

Shapes: logits [N C], labels [N], ids [N k].
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.classifier import PromptedClassifier
from lpt.data.task import Images
from lpt.matching import key_usage
from lpt.metrics import summarise


class Predictions(NamedTuple):
    logits: Tensor
    labels: Tensor
    ids: Tensor | None


@torch.no_grad()
def predict(model: PromptedClassifier, images: Images, *, batch_size: int = 128) -> Predictions:
    """Clean predictions, in order: the test view, no noise, no margin, no dropout. On several processes each
    predicts its share and all get the whole. Leaves the model in eval mode."""
    model.eval()
    rank, world = _place()
    mine = torch.arange(len(images))[rank::world]
    logits, ids = [], []
    for views in _views(model, images, mine, batch_size):
        output = model(views)
        logits.append(output.logits.float().cpu())
        if output.ids is not None:
            ids.append(output.ids.cpu())
    return Predictions(
        _gathered(torch.cat(logits), len(images), world),
        images.labels,
        _gathered(torch.cat(ids), len(images), world) if ids else None,
    )


@torch.no_grad()
def queries(model: PromptedClassifier, images: Images, *, batch_size: int = 128) -> Tensor:
    """The queries [N D'] of the test views of `images`, for key starts and class means."""
    rank, world = _place()
    mine = torch.arange(len(images))[rank::world]
    found = [model.query(model.prefix(views)).cpu() for views in _views(model, images, mine, batch_size)]
    return _gathered(torch.cat(found), len(images), world)


def evaluate(
    model: PromptedClassifier,
    images: Images,
    counts: Tensor,
    *,
    group_rule: str = "lt20",
    batch_size: int = 128,
) -> dict[str, Any]:
    """The metrics of `report.json` for `images`, with groups by the training `counts` [C]."""
    predictions = predict(model, images, batch_size=batch_size)
    metrics = summarise(model.probabilities(predictions.logits), predictions.labels, counts, group_rule=group_rule)
    if predictions.ids is not None and model.pool is not None:
        metrics["key_usage"] = key_usage(predictions.ids, len(model.pool.keys))
    return metrics


def _views(model: PromptedClassifier, images: Images, indices: Tensor, batch_size: int) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    backbone = model.backbone
    for part in indices.split(batch_size):
        pixels = images.take(part).to(device, non_blocking=True)
        yield backbone.preprocess.test(pixels, dtype=backbone.dtype)


def _place() -> tuple[int, int]:
    """(rank, world size)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _gathered(mine: Tensor, total: int, world: int) -> Tensor:
    """Interleaves the shares of all processes again: row i was predicted by process i mod w."""
    if world == 1:
        return mine
    rows = -(-total // world)
    padded = torch.zeros(rows, *mine.shape[1:], dtype=mine.dtype)
    padded[: len(mine)] = mine
    shares = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(shares, padded)
    return torch.stack(shares, dim=1).flatten(0, 1)[:total]
