"""What LPT's retrieval is worth: the answers that the same prefix tokens get with other group prompts, or with none.

Shapes: tokens [B P+N D], query [B D'], ids [n k], labels [N], predicted classes [N].
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpt.model.classifier import Output, PromptedClassifier

MOST_IMAGES = 10_000
"""Of more, so many are looked at, the same number of each class where it has as many."""
NOT_LOOKED_AT = -1


@dataclass(frozen=True)
class Arms:
    """Called beside an evaluation's batches: the class that each of some answers says, by the name of the answer.

    `retrieved` is the prompted pass alone (`fixed` where all images have the same prompts anyway), `constant` the one
    with the group prompts `constant` for every image, `random` with others for each image, by chance; `none` is phase
    1's answer, and `both` the mean of that and of `retrieved`. Two of these five are what the evaluation has computed
    already, where the query is a full one. Images in no row of `rows` [n] are NOT_LOOKED_AT.
    """

    constant: Tensor
    """[k]"""
    rows: Tensor
    random: Tensor
    """[n k], in the order of `rows`."""
    phase1: nn.Module
    """The head that phase 1 has left."""

    @classmethod
    def of(cls, model: PromptedClassifier, labels: Tensor, *, constant: Tensor, seed: int) -> "Arms | None":
        """For images with these labels; None for a model without group prompts, or without a head of phase 1."""
        pool = model.pool
        if pool is None or (model.query_head is None and model.phase1_head is None):
            return None
        rows, generator = sampled(labels, seed=seed), torch.Generator().manual_seed(seed)
        random = torch.rand(len(rows), len(pool.keys), generator=generator).argsort(dim=1)[:, : pool.topk]
        return cls(constant, rows, random, _phase1_head(model))

    def __call__(
        self, model: PromptedClassifier, rows: Tensor, tokens: Tensor, query: Tensor | None, output: Output
    ) -> dict[str, Tensor]:
        """The classes [B] that the answers to `rows` [B] say; `output` is the evaluation's own."""
        pool, device = model.pool, tokens.device
        assert pool is not None
        place = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        here = (self.rows[place] == rows).nonzero().flatten()
        place, here = place[here], here.to(device)
        retrieves = pool.query != "none"
        names = ("retrieved", "constant", "random", "none", "both") if retrieves else ("fixed", "none", "both")
        answers = {name: torch.full((len(rows),), NOT_LOOKED_AT, device=device) for name in names}
        if len(here) == 0:
            return answers
        some = tokens[here]
        shared = query[here] if pool.query == "full" and query is not None else model.shared_feature(some)
        prompted, before = model.head(output.feature[here]), self.phase1(shared)
        logits = {names[0]: prompted, "none": before, "both": (prompted + before) / 2}
        if retrieves:
            same_for_all = self.constant.to(device).expand(len(here), -1)
            logits["constant"] = model.head(model.tail_feature(some, same_for_all))
            logits["random"] = model.head(model.tail_feature(some, self.random[place].to(device)))
        for name, values in logits.items():
            answers[name][here] = (values if model.calibration is None else model.calibration(values)).argmax(1)
        return answers


def sampled(labels: Tensor, *, seed: int) -> Tensor:
    """Rows [n] of the images that are looked at, in order: all, or of each of C classes MOST_IMAGES / C, and at least
    two, drawn by chance."""
    if len(labels) <= MOST_IMAGES:
        return torch.arange(len(labels))
    each = max(2, MOST_IMAGES // len(labels.unique()))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[rank < each].sort().values


def _phase1_head(model: PromptedClassifier) -> nn.Module:
    if model.query_head is not None:
        return model.query_head
    head = copy.deepcopy(model.head)
    assert model.phase1_head is not None
    head.load_state_dict({**head.state_dict(), "weight": model.phase1_head})
    return head


def looked_at(answers: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(the answers [n], the labels [n]) of the images that were looked at, of those of all [N]."""
    seen = next(iter(answers.values())) != NOT_LOOKED_AT
    return {name: classes[seen] for name, classes in answers.items()}, labels[seen]
