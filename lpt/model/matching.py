"""Which group prompts an image gets: cosine of its query with the keys.

Shapes: queries [B D], keys [K D], similarity [B k], ids [B k]. Training matches in torch, where keys move and
gradients are needed. FAISS serves inference over many keys and finds the k-means start; the keys in a prompt
file are the truth, an index is built from them in memory and never read from disk.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.errors import LptError


def match(queries: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The `topk` keys of largest cosine, ties to the smallest index. → (similarity [B k], ids [B k]).

    Selection is per image and hard; gradients reach the keys through the similarities alone.
    """
    unit = F.normalize(queries.float(), dim=1, eps=1e-12)
    unit_keys = F.normalize(keys.float(), dim=1, eps=1e-12)
    # Equal keys must score equally to the bit, which columns of one matrix product need not: score each once.
    distinct, which = unit_keys.detach().unique(dim=0, return_inverse=True)
    scores = (unit.detach() @ distinct.T)[:, which]
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    return (unit @ unit_keys.T).gather(1, ids), ids


class KeyIndex:
    """An exact flat inner-product index over unit keys; the same ids as `match`.

    At a pool's 20 to 100 keys it gives no speed; it is for prompt libraries of thousands of keys.
    """

    def __init__(self, keys: Tensor):
        import faiss

        self.keys = F.normalize(keys.detach().float().cpu(), dim=1, eps=1e-12)
        self.index = faiss.IndexFlatIP(self.keys.shape[1])
        self.index.add(self.keys.numpy())  # type: ignore[call-arg]

    def match(self, queries: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """As the function `match`, which settles scores that are equal up to rounding."""
        unit = F.normalize(queries.detach().float().cpu(), dim=1, eps=1e-12)
        more = min(topk + 1, len(self.keys))
        similarity, ids = map(torch.from_numpy, self.index.search(unit.numpy(), more))  # type: ignore[call-arg]
        tied = (similarity[:, :-1] - similarity[:, 1:] < 1e-6).any(1)
        similarity, ids = similarity[:, :topk].clone(), ids[:, :topk].clone()
        if tied.any():
            similarity[tied], ids[tied] = match(unit[tied], self.keys, topk)
        return similarity, ids


def kmeans_keys(queries: Tensor, num_keys: int, *, seed: int) -> Tensor:
    """Spherical k-means centres of the training queries, unit rows. [N D] → [K D] (FAISS). Raises LptError."""
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
        max_points_per_centroid=max(256, math.ceil(len(unit) / num_keys)),
    )
    kmeans.train(np.ascontiguousarray(unit))
    return torch.from_numpy(np.array(kmeans.centroids))


def key_usage(ids: Tensor, num_keys: int) -> dict[str, object]:
    """How the pool is used: selections per key, perplexity exp(H) in 1..K, and dead keys (< 1 % of selections).

    >>> key_usage(torch.tensor([[0, 1], [0, 1]]), 4)["perplexity"]
    2.0
    """
    selections = torch.bincount(ids.flatten(), minlength=num_keys).double()
    share = selections / selections.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum().item()
    return {
        "selections": [int(n) for n in selections],
        "perplexity": round(math.exp(entropy), 4),
        "dead_keys": int((share < 0.01).sum()),
    }


def class_keys(ids: Tensor, labels: Tensor, num_classes: int, num_keys: int) -> list[int]:
    """The key that each class's images chose most often, -1 for a class that was not seen. ids [N k], labels [N].

    >>> class_keys(torch.tensor([[2, 0], [2, 1], [0, 1]]), torch.tensor([0, 0, 2]), 3, 4)
    [2, -1, 0]
    """
    table = torch.zeros(num_classes, num_keys, dtype=torch.long)
    table.index_put_((labels[:, None].expand_as(ids), ids), torch.ones_like(ids), accumulate=True)
    best = table.argmax(1)
    best[table.sum(1) == 0] = -1
    return best.tolist()
