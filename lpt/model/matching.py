"""Which group prompts an image gets: those whose keys have the largest cosine with its query.

Training matches in torch, where keys move and gradients are needed. FAISS serves inference over many keys and finds the
k-means start. An index is built in memory from the keys of a prompt file, and never read from disk.

Shapes: queries [B D], keys [K D], similarity [B k], ids [B k].
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.errors import LptError

FEW_KEYS = 256
"""Up to which all keys are compared with all."""


def match(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The `topk` keys of largest cosine, ties to the smallest index. → (similarity [B k], ids [B k]).

    Selection is per image and hard; gradients reach the keys through the similarities alone.
    """
    unit_queries = F.normalize(queries.float(), dim=1, eps=1e-12)
    unit_keys = F.normalize(keys.float(), dim=1, eps=1e-12)
    scores = _scores(unit_queries.detach(), unit_keys.detach())
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    return (unit_queries @ unit_keys.T).gather(1, ids), ids


def _scores(unit_queries: Tensor, unit_keys: Tensor) -> Tensor:
    """The cosines [B K]. Equal keys score equally to the bit, which columns of one matrix product need not: each has
    the score of the first that it is equal to."""
    if len(unit_keys) > FEW_KEYS and not torch.compiler.is_compiling():  # a graph wants sizes that it knows
        distinct, column = unit_keys.unique(dim=0, return_inverse=True)
        return (unit_queries @ distinct.T)[:, column]
    # `unique` waits for a GPU, since its result may have any size; this is done in every step of a training.
    equal = [(rows[:, None] == unit_keys).all(2) for rows in unit_keys.split(FEW_KEYS)]
    first = torch.cat(equal).to(torch.uint8).argmax(1)
    return (unit_queries @ unit_keys.T)[:, first]


class EachKeys(NamedTuple):
    """The keys of several pools, each image's own: unit rows [B K D], zeros where a pool has fewer, `first` [B K], the
    place of the first key that each is equal to, and `there` [B K], whether there is one."""

    unit: Tensor
    first: Tensor
    there: Tensor


class PoolKeys(NamedTuple):
    """The keys of one pool as `match_each` takes them: unit rows [K D], and the first that each is equal to [K]."""

    unit: Tensor
    first: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> "PoolKeys":
        unit = F.normalize(keys.float(), dim=1, eps=1e-12)
        return cls(unit, (unit[:, None] == unit).all(2).to(torch.uint8).argmax(1))


def each_keys(pools: Sequence[PoolKeys]) -> EachKeys:
    """The keys of B pools, one for each image, side by side."""
    sizes = torch.tensor([len(pool.first) for pool in pools], device=pools[0].first.device)
    there = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
    unit, first = (nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in zip(*pools, strict=True))
    return EachKeys(unit, first, there)


def match_each(queries: Tensor, keys: EachKeys, topk: int) -> tuple[Tensor, Tensor]:
    """As `match`, each query among the keys of its own pool, without gradients. No pool has less than `topk` keys."""
    unit_queries = F.normalize(queries.float(), dim=1, eps=1e-12)
    cosines = (keys.unit @ unit_queries[:, :, None])[:, :, 0]
    scores = cosines.gather(1, keys.first).masked_fill(~keys.there, -torch.inf)
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    return cosines.gather(1, ids), ids


class KeyIndex:
    """An exact flat inner-product index over unit keys; it finds the same ids as `match`.

    For prompt libraries of thousands of keys: at a pool's 20 to 100 it is no faster.
    """

    def __init__(self, keys: Tensor):
        import faiss

        self.keys = F.normalize(keys.detach().float().cpu(), dim=1, eps=1e-12)
        self.index = faiss.IndexFlatIP(self.keys.shape[1])
        self.index.add(self.keys.numpy())  # type: ignore[call-arg]

    def match(self, queries: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """As the function `match`, on the CPU and without gradients."""
        unit_queries = F.normalize(queries.detach().float().cpu(), dim=1, eps=1e-12)
        neighbours = min(topk + 1, len(self.keys))  # one more, to see whether the last place is a tie
        scores, rows = self.index.search(unit_queries.numpy(), neighbours)  # type: ignore[call-arg]
        similarity, ids = torch.from_numpy(scores), torch.from_numpy(rows)
        tied = (similarity[:, :-1] - similarity[:, 1:] < 1e-6).any(1)
        similarity, ids = similarity[:, :topk].clone(), ids[:, :topk].clone()
        if tied.any():  # FAISS has no rule for scores that are equal up to rounding; `match` has
            similarity[tied], ids[tied] = match(unit_queries[tied], self.keys, topk)
        return similarity, ids


def kmeans_keys(queries: Tensor, num_keys: int, *, seed: int) -> Tensor:
    """Spherical k-means centers of the training queries, unit rows, by FAISS. [N D] → [K D].

    Raises LptError for fewer queries than keys.
    """
    import faiss

    if len(queries) < num_keys:
        raise LptError(
            f"{num_keys} keys cannot start from the queries of {len(queries)} images: use a smaller pool_size"
        )
    unit = F.normalize(queries.detach().float().cpu(), dim=1, eps=1e-12).numpy()
    kmeans = faiss.Kmeans(
        unit.shape[1],
        num_keys,
        niter=25,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, math.ceil(len(unit) / num_keys)),  # no subsampling
    )
    kmeans.train(np.ascontiguousarray(unit))
    return torch.from_numpy(np.array(kmeans.centroids))


def key_usage(ids: Tensor, num_keys: int) -> dict[str, object]:
    """How the pool is used: selections of each key, the perplexity exp(H) of their shares in 1..K, and how many keys
    are dead (below 1 % of all selections). ids [N k].

    >>> key_usage(torch.tensor([[0, 1], [0, 1]]), 4)["perplexity"]
    2.0
    """
    selections = torch.bincount(ids.flatten(), minlength=num_keys).double()
    shares = selections / selections.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum().item()
    return {
        "selections": [int(n) for n in selections],
        "perplexity": round(math.exp(entropy), 4),
        "dead_keys": int((shares < 0.01).sum()),
    }


def class_keys(ids: Tensor, labels: Tensor, num_classes: int, num_keys: int) -> list[int]:
    """The key that each class's images chose most often, -1 for a class without images. ids [N k], labels [N].

    >>> class_keys(torch.tensor([[2, 0], [2, 1], [0, 1]]), torch.tensor([0, 0, 2]), 3, 4)
    [2, -1, 0]
    """
    selections = torch.zeros(num_classes, num_keys, dtype=torch.long)
    selections.index_put_((labels[:, None].expand_as(ids), ids), torch.ones_like(ids), accumulate=True)
    favorites = selections.argmax(1)
    favorites[selections.sum(1) == 0] = -1
    return favorites.tolist()
