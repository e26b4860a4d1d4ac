"""The whole model: a frozen backbone, prompts put into its blocks, and a head.

Shapes: images [B 3 H W], tokens [B P+N D], query and feature [B D'], logits [B C], ids [B k].
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lpt.model.backbones.base import Backbone, KeyValue, Prompt
from lpt.model.heads import Calibration, CosineHead, Head
from lpt.model.matching import KeyIndex, match
from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt

MIN_KEYS_FOR_INDEX = 10_000
"""Keys from which a FAISS index beats a matrix product for few queries (LPT spec: none at a pool's 20 to 100)."""


class Output(NamedTuple):
    """`similarity` and `ids` [B k] say which group prompts an image got; None without a pool."""

    logits: Tensor
    feature: Tensor
    similarity: Tensor | None = None
    ids: Tensor | None = None


class PromptedClassifier(nn.Module):
    """`classes` names the rows of the head. What trains are prompts, keys and head, and of the backbone only what
    `lpt.model.adapters` has put there or thawed (`backbone.learned`).

    `calibration` scales and shifts the head's logits. `query_head` (ours, not LPT's) is the head of phase 1, kept for
    the query: in eval mode the two passes that LPT needs anyway both give an opinion, and the logits are their mean.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        classes: tuple[str, ...],
        shared: DeepPrompt | ShallowPrompt | None = None,
        pool: PromptPool | None = None,
        query_head: CosineHead | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.shared, self.pool, self.classes = backbone, head, shared, pool, classes
        self.query_head, self.calibration = query_head, calibration
        self._constant: tuple[tuple[object, ...], list[KeyValue]] | None = None
        self._index: tuple[tuple[object, ...], KeyIndex] | None = None

    # One forward, in three parts. LPT's query pass and prompted pass are the same up to the first block with
    # group prompts, so that prefix runs once; the two tails start from its tokens.

    def forward(self, images: Tensor, *, feature_mask: Tensor | None = None) -> Output:
        """`feature_mask` [B D'] multiplies the feature before the head: dropout with its mask as an argument."""
        return self.tail(self.prefix(images), feature_mask=feature_mask)

    def prefix(self, images: Tensor) -> Tensor:
        """Embedding and the blocks that see the shared prompt only."""
        with self._precision():
            tokens = self.backbone.embed(images)
            if isinstance(self.shared, ShallowPrompt):
                tokens = self.shared.appended(tokens)
            for i in range(self._prefix_blocks):
                tokens = self.backbone.block(i, tokens, self._shared(i), keep=self._keep(i))
        return tokens

    @torch.no_grad()
    def query(self, tokens: Tensor) -> Tensor:
        """The feature under the shared prompt alone, from the prefix's tokens; never with a gradient."""
        return self._finish(tokens, None)

    def tail(self, tokens: Tensor, *, query: Tensor | None = None, feature_mask: Tensor | None = None) -> Output:
        """The rest of the blocks, with each image's own group prompts where there is a pool."""
        similarity = ids = group = None
        if self.pool is not None:
            query = self.query(tokens) if query is None else query
            similarity, ids = self._match(query - self.pool.centre, self.pool)
            group = self.pool.ensemble(ids)
        feature = self._finish(tokens, group)
        logits = self.head(feature if feature_mask is None else feature * feature_mask)
        if self.query_head is not None and query is not None and not self.training:
            logits = (logits + self.query_head(query)) / 2
        return Output(self._calibrated(logits), feature, similarity, ids)

    def feature(self, images: Tensor) -> Tensor:
        """[B 3 H W] → [B D'] under the shared prompt alone, with a gradient where something learns."""
        return self._finish(self.prefix(images), None)

    def classify(self, feature: Tensor) -> Tensor:
        """Head and calibration: [B D'] → logits [B C]."""
        return self._calibrated(self.head(feature))

    def _calibrated(self, logits: Tensor) -> Tensor:
        return logits if self.calibration is None else self.calibration(logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax(scale · logits) [B C], the scale being the head's (1 for a linear one)."""
        return (self.head.scale * logits).softmax(dim=1)

    def _match(self, query: Tensor, pool: PromptPool) -> tuple[Tensor, Tensor]:
        """In torch, where keys may train; through an exact FAISS index for pools so large that it pays."""
        if len(pool.keys) < MIN_KEYS_FOR_INDEX or (pool.keys.requires_grad and torch.is_grad_enabled()):
            return match(query, pool.keys, pool.topk)
        key = (pool.keys._version, pool.keys.data_ptr())
        if self._index is None or self._index[0] != key:
            self._index = (key, KeyIndex(pool.keys))
        similarity, ids = self._index[1].match(query, pool.topk)
        return similarity.to(query.device), ids.to(query.device)

    def _finish(self, tokens: Tensor, group: Tensor | None) -> Tensor:
        with self._precision():
            for i in range(self._prefix_blocks, self.backbone.depth):
                prompts = self._shared(i)
                if group is not None:
                    prompts = [*prompts, group[:, i - self._prefix_blocks]]
                tokens = self.backbone.block(i, tokens, prompts, keep=self._keep(i))
            if isinstance(self.shared, ShallowPrompt):
                tokens = self.shared.removed(tokens)
            return self.backbone.pool(tokens)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        """Learned parts of a backbone are kept in fp32 beside frozen ones in bf16: autocast brings them together."""
        dtype, learned = self.backbone.dtype, bool(self.backbone.learned)
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype) if learned and dtype != torch.float32 else contextlib.nullcontext()

    @property
    def prefix_state(self) -> tuple[object, ...] | None:
        """Equal as long as an image's prefix tokens and query are; None without a pool and while they can change."""
        if self.pool is None or (self.shared is not None and self.shared.tokens.requires_grad):
            return None
        return (self._prefix_blocks, self.backbone.dtype, *self._shared_version)

    @property
    def _shared_version(self) -> tuple[object, ...]:
        """Any write to the shared prompt raises its tensor's version."""
        if self.shared is None:
            return ()
        tokens = self.shared.tokens
        return (tokens._version, tokens.data_ptr(), tokens.device)

    @property
    def _prefix_blocks(self) -> int:
        return 0 if self.pool is None else self.pool.prefix_blocks

    def _keep(self, i: int) -> int | None:
        """In the last block only the tokens that pooling reads are worth computing."""
        return self.backbone.reads if i == self.backbone.depth - 1 else None

    def _shared(self, i: int) -> list[Prompt]:
        """The shared prompt of block `i`; as constant keys and values where it does not train."""
        if not isinstance(self.shared, DeepPrompt):
            return []
        tokens = self.shared.tokens
        if tokens.requires_grad and torch.is_grad_enabled():
            return [tokens[i]]
        return [self._constants(tokens)[i]]

    @torch.no_grad()
    def _constants(self, tokens: Tensor) -> list[KeyValue]:
        key = (*self._shared_version, self.backbone.dtype)  # a stale constant has another key
        if self._constant is None or self._constant[0] != key:
            self._constant = (key, [self.backbone.keys_values(j, of.detach()) for j, of in enumerate(tokens)])
        return self._constant[1]

    # What trains, and what is stored.

    def only_train(self, *names: str) -> "PromptedClassifier":
        """Exactly the parameters whose name starts with one of `names` train; everything else is frozen."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(names) and self._is_ours(name))
        unmatched = [n for n in names if not any(p.startswith(n) for p, _ in self.named_parameters())]
        assert not unmatched, f"no parameter is called {unmatched}"
        if isinstance(self.shared, DeepPrompt) and not self.shared.tokens.requires_grad:
            with self._precision():  # now, so that no step of a run that was resumed has more work than it had before
                self._constants(self.shared.tokens)
        return self

    def _is_ours(self, name: str) -> bool:
        return not name.startswith("backbone.") or name.removeprefix("backbone.") in self.backbone.learned

    def learned_state(self) -> dict[str, Tensor]:
        """Everything but the frozen backbone, by name: what a checkpoint and a prompt file hold."""
        return {k: v for k, v in self.state_dict().items() if self._is_ours(k)}

    @torch.no_grad()
    def load_learned_state(self, tensors: dict[str, Tensor]) -> None:
        """Copies in place, so that optimisers keep their parameters."""
        mine = self.learned_state()
        assert mine.keys() == tensors.keys(), sorted(mine.keys() ^ tensors.keys())
        for name, value in tensors.items():
            mine[name].copy_(value)

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Rounds what is stored to `dtype`'s values, so that a file in `dtype` reloads to the same bits."""
        for value in self.learned_state().values():
            value.copy_(value.to(dtype))

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that a phase may train: all but the backbone's frozen ones. Buffers are none."""
        return sum(p.numel() for name, p in self.named_parameters() if self._is_ours(name))
