"""What can stand in for LPT's query, found on training images: a linear map of earlier tokens, or one choice for all.

Shapes: summaries [N S] of the tokens that the first block with group prompts gets, queries [N D'], ids [N k].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lpt.data.loader import Workers
from lpt.data.task import Files, Images
from lpt.engine.evaluate import views_ahead
from lpt.engine.processes import all_gather_rows, all_reduce_sum, rank_and_world
from lpt.model.classifier import PromptedClassifier
from lpt.model.prompts import mapped, summarized, summary_width

MOST_FITTED, MOST_COUNTED = 10_000, 4_000
"""Of more images, so many are looked at, drawn by chance: several for each number of a map, or for a common choice."""
BATCH = 128
RIDGES = tuple(10.0**k for k in range(-6, 3))
"""λ, as a share of the mean eigenvalue of the summaries' covariance."""


@torch.no_grad()
def fit_query_map(model: PromptedClassifier, images: Images | Files, *, workers: Workers = "auto") -> Tensor:
    """The map [D' S+1] from summaries of the tokens of block `prefix_blocks` to the feature under the shared prompt;
    its last column is added.

    Ridge regression in closed form on the test views of `images`, W = (X̃ᵀX̃ + λI)⁻¹ X̃ᵀỸ with X̃ and Ỹ centered; λ is
    the one of RIDGES with the least generalized cross-validation (Golub 1979). Ours: LPT's query is that feature
    itself.
    """
    backbone, device = model.backbone, next(model.parameters()).device
    width, feature_width = summary_width(backbone.width, backbone.prefix), backbone.feature_width
    shapes = ((), (width,), (feature_width,), (width, width), (width, feature_width), ())
    sums = [torch.zeros(shape, dtype=torch.double) for shape in shapes]
    for tokens in _prefixes(model, images, MOST_FITTED, workers):
        x = summarized(tokens, backbone.prefix).double().cpu()
        y = model.shared_feature(tokens).double().cpu()
        moments = (torch.tensor(len(x)), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())
        for total, moment in zip(sums, moments, strict=True):
            total += moment
    n, x_sum, y_sum, xx, xy, yy = (all_reduce_sum(total.to(device)).cpu() for total in sums)
    x_mean, y_mean = x_sum / n, y_sum / n
    weight = ridge(
        xx - n * x_mean.outer(x_mean), xy - n * x_mean.outer(y_mean), yy - n * y_mean.square().sum(), n=int(n)
    )
    return torch.cat([weight, (y_mean - weight @ x_mean)[:, None]], dim=1).float()


def ridge(xx: Tensor, xy: Tensor, yy: Tensor, *, n: int) -> Tensor:
    """Wᵀ [D' S] from the centered moments X̃ᵀX̃ [S S], X̃ᵀỸ [S D'] and ‖Ỹ‖² of `n` rows.

    With eigenvalues e and eigenvectors V of X̃ᵀX̃, C = VᵀX̃ᵀỸ: W = V (e + λ)⁻¹ C, degrees of freedom 1 + Σ e / (e + λ),
    residual ‖Ỹ‖² - Σ ‖C_j‖² (e_j + 2λ) / (e_j + λ)², and GCV(λ) = residual / (n - freedom)².
    """
    eigenvalues, vectors = torch.linalg.eigh(xx)
    e, rotated = eigenvalues.clamp(min=0), vectors.T @ xy
    powers, unit = rotated.square().sum(1), e.mean().clamp(min=1e-12)
    best, chosen = float("inf"), RIDGES[-1] * unit
    for candidate in (share * unit for share in RIDGES):
        freedom = 1 + (e / (e + candidate)).sum()
        residual = yy - (powers * (e + 2 * candidate) / (e + candidate).square()).sum()
        score = (residual / (n - freedom) ** 2).item() if freedom < n else float("inf")
        if score < best:
            best, chosen = score, candidate
    return (vectors @ (rotated / (e + chosen)[:, None])).T


@torch.no_grad()
def most_chosen(
    model: PromptedClassifier, images: Images | Files, *, workers: Workers = "auto"
) -> tuple[Tensor, float]:
    """(the group prompts [k] that most test views of `images` choose together, in ascending order; the share of images
    that does). Of sets chosen equally often the first in order."""
    assert model.pool is not None
    parts = [_chosen(model, tokens) for tokens in _prefixes(model, images, MOST_COUNTED, workers)]
    number, device = min(len(images), MOST_COUNTED), next(model.parameters()).device
    local = torch.cat(parts) if parts else torch.zeros(0, model.pool.topk, dtype=torch.long, device=device)
    ids = all_gather_rows(local, number).cpu().sort(dim=1).values
    sets, times = ids.unique(dim=0, return_counts=True)  # in lexicographic order
    first = int(times.argmax())
    return sets[first], times[first].item() / number


@torch.no_grad()
def agreement(
    model: PromptedClassifier, query_map: Tensor, images: Images | Files, *, workers: Workers = "auto"
) -> float:
    """The share of test views of `images` to which queries by `query_map` [D' S+1] give the group prompts that the
    feature under the shared prompt gives them."""
    query_map = query_map.to(next(model.parameters()).device)
    same = seen = 0
    for tokens in _prefixes(model, images, MOST_COUNTED, workers):
        early = mapped(tokens, query_map, model.backbone.prefix)
        chosen = [model.match(query)[1].sort(dim=1).values for query in (early, model.shared_feature(tokens))]
        same += int((chosen[0] == chosen[1]).all(1).sum())
        seen += len(tokens)
    counts = all_reduce_sum(torch.tensor([same, seen], device=query_map.device))
    return (counts[0] / counts[1]).item()


def _chosen(model: PromptedClassifier, tokens: Tensor) -> Tensor:
    """The group prompts [B k] that images choose, from the prefix's tokens."""
    assert model.pool is not None
    if not model.needs_query:
        return torch.arange(model.pool.topk, device=tokens.device).expand(len(tokens), -1)
    return model.match(model.query(tokens))[1]


def _prefixes(model: PromptedClassifier, images: Images | Files, most: int, workers: Workers) -> Iterator[Tensor]:
    """The tokens [B P+N D] at the first block with group prompts, of this process's share of at most so many images."""
    rank, world = rank_and_world()
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most].sort().values
    batches = [batch for batch in rows[rank::world].split(BATCH) if len(batch)]
    with views_ahead(model, images, batches, workers=workers) as ahead:
        for views in ahead:
            yield model.prefix(views)
