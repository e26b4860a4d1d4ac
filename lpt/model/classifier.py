"""The whole model: a frozen backbone, prompts put into its blocks, and a head.

Shapes: images [B 3 H W], tokens [B P+N D], query and feature [B D'], logits [B C], similarity and ids [B k].
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lpt.data.loader import Workers
from lpt.data.task import Task
from lpt.model.backbones.base import Backbone, KeyValue, Prompt
from lpt.model.heads import Calibration, CosineHead, Head, LinearHead
from lpt.model.kept import Kept, version
from lpt.model.matching import KeyIndex, match
from lpt.model.predicting import Predicted, Transform, predicted
from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt
from lpt.model.task_means import TaskMeans

MIN_KEYS_FOR_INDEX = 10_000
"""Keys from which a FAISS index beats a matrix product for few queries. A pool of LPT has 20 to 100 keys."""


class Output(NamedTuple):
    """`similarity` and `ids` [B k] say which group prompts an image got; None without a pool."""

    logits: Tensor
    feature: Tensor
    similarity: Tensor | None = None
    ids: Tensor | None = None


class PromptedClassifier(nn.Module):
    """A backbone with a shared prompt, a pool of group prompts (Dong 2023, LPT) and a head; prompts are optional.

    LPT's query is a pass of its own through the blocks after the prefix; a pool whose `query` is early or none spares
    it (ours), and the answer is then that of the prompted pass alone.

    `classes` names the rows of the head, `calibration` scales and shifts its logits. What trains are prompts, keys and
    head, and of the backbone only what `lpt.model.adapters` has put there or thawed (`backbone.learned`).

    `query_head` (ours, not LPT's) is the head of phase 1, kept for the query. LPT needs a pass for the query and one
    with group prompts anyway: in eval mode the logits are the mean of what both say, where the query is a full one.

    >>> import lpt
    >>> model = lpt.model(lpt.load_task("digits-lt"), lpt.load_backbone("nano"))
    >>> type(model).__name__, len(model.classes)
    ('PromptedClassifier', 10)
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
        self.group_rule: str | None = None
        """How the task that the model was tuned for tells many, medium and few apart; None where it is not known."""
        self.trained_on: Task | None = None
        """That task, of which a prompt file remembers the training images; None where it is not known."""
        self.phase1_head: Tensor | None = None
        """The rows [C D'] of the head as LPT's phase 1 left it, for who asks what phase 2 has bought; in no file."""
        self.task_means: TaskMeans | None = None
        """Where its task lies among the features of the bare backbone; None where it is not known."""
        self._learned = [p for name, p in backbone.named_parameters() if name in backbone.learned]
        self._shared_answers, self._fixed_answers = Kept[list[KeyValue]](), Kept[list[KeyValue]]()
        self._index = Kept[KeyIndex]()

    # One forward, in three parts. LPT's query pass and prompted pass are the same up to the first block with
    # group prompts, so that prefix runs once; the two tails start from its tokens.

    def forward(self, images: Tensor, *, feature_mask: Tensor | None = None) -> Output:
        """`feature_mask` [B D'] multiplies the feature before the head: dropout with its mask as an argument."""
        return self.tail(self.prefix(images), feature_mask=feature_mask)

    def prefix(self, images: Tensor) -> Tensor:
        """Embedding, and the blocks that see the shared prompt only. [B 3 H W] → [B P+N D], and a shallow prompt."""
        with self._autocast():
            tokens = self.backbone.embed(images)
            if isinstance(self.shared, ShallowPrompt):
                tokens = self.shared.appended(tokens)
            for i in range(self._prefix_blocks):
                tokens = self.backbone.block(i, tokens, self._shared_prompt(i), keep=self._tokens_needed(i))
        return tokens

    @torch.no_grad()
    def query(self, tokens: Tensor) -> Tensor:
        """What an image's group prompts are chosen by [B D'], from the prefix's tokens; never with a gradient: the
        feature under the shared prompt alone, or an early query."""
        if self.pool is not None and self.pool.query == "early":
            return self.pool.early_query(tokens, self.backbone.prefix)
        return self._after_prefix(tokens, None)

    @property
    def needs_query(self) -> bool:
        """Whether group prompts are chosen for each image."""
        return self.pool is not None and self.pool.query != "none"

    @torch.no_grad()
    def shared_feature(self, tokens: Tensor) -> Tensor:
        """The feature [B D'] under the shared prompt alone, whatever the query is, from the prefix's tokens."""
        return self._after_prefix(tokens, None)

    def tail(self, tokens: Tensor, *, query: Tensor | None = None, feature_mask: Tensor | None = None) -> Output:
        """The rest of the blocks, with each image's own group prompts where there is a pool; then the head.

        `tokens` are the prefix's; `query` saves its computation where it is known.
        """
        similarity = ids = group = None
        if self.pool is not None and self.pool.query == "none":
            group = self._fixed_prompts(self.pool)
        elif self.pool is not None:
            query = self.query(tokens) if query is None else query
            similarity, ids = self.match(query)
            group = _by_block(self.pool.ensemble(ids))
        feature = self._after_prefix(tokens, group)
        logits = self.head(feature if feature_mask is None else feature * feature_mask)
        if self.query_head is not None and query is not None and not self.training:
            logits = (logits + self.query_head(query)) / 2
        return Output(self._calibrated(logits), feature, similarity, ids)

    @torch.no_grad()
    def tail_feature(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The feature [B D'] with the group prompts `ids` [B k], whatever the query would choose."""
        assert self.pool is not None
        return self._after_prefix(tokens, _by_block(self.pool.ensemble(ids)))

    def feature(self, images: Tensor) -> Tensor:
        """[B 3 H W] → [B D'] under the shared prompt alone, with a gradient where something is trainable."""
        return self._after_prefix(self.prefix(images), None)

    def classify(self, feature: Tensor) -> Tensor:
        """Head and calibration: [B D'] → logits [B C]."""
        return self._calibrated(self.head(feature))

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax(scale · logits) [B C], the scale being the head's (1 for a linear one)."""
        return (self.head.scale * logits).softmax(dim=1)

    # What it says of images in any form.

    def predict(self, images: Any, *, batch_size: int = 64, workers: Workers = "auto") -> Predicted:
        """(classes by name, labels [N], probabilities [N C]) of N images, in their order.

        `images` are one or a list of PIL images, paths, encoded bytes, arrays [h w 3] or tensors [3 h w]; pixels
        [N 3 h w] uint8; `lpt.Images`; a dataset of these; or a DataLoader whose batches are views [B 3 S S], alone or
        first in a tuple, as `transform` makes them. Training mode is left as it was. Raises DataError, with its name,
        for an image that cannot be decoded or is none, TrainingError where an answer is not finite.

        >>> import lpt
        >>> task = lpt.load_task("digits-lt")
        >>> model = lpt.model(task, lpt.load_backbone("nano"))  # as it is before training
        >>> answer = model.predict(task.test.pixels[:2])
        >>> answer.labels.shape, answer.probabilities.shape, set(answer.classes) <= set(task.classes)
        (torch.Size([2]), torch.Size([2, 10]), True)
        """
        return predicted(self, images, batch_size=batch_size, workers=workers)

    @property
    def transform(self) -> Transform:
        """The test view [3 S S] of one image, normalized: for a loader of one's own.

        >>> import lpt
        >>> from PIL import Image
        >>> model = lpt.model(lpt.load_task("digits-lt"), lpt.load_backbone("nano"))
        >>> model.transform(Image.new("RGB", (60, 40))).shape
        torch.Size([3, 32, 32])
        """
        return Transform(self.backbone.preprocess)

    @property
    def prefix_state(self) -> tuple[object, ...] | None:
        """While it is equal, prefix tokens and query of an image stay what they are: both may be cached.

        None where there is nothing to cache: without a pool, or while the shared prompt or the backbone trains.
        """
        before = self._learned if self.shared is None else [self.shared.tokens, *self._learned]
        if self.pool is None or any(value.requires_grad for value in before):
            return None
        query = () if self.pool.query_map is None else version(self.pool.query_map)
        return (self._prefix_blocks, self.backbone.dtype, self.pool.query, *query, *self._shared_version)

    @property
    def is_bare(self) -> bool:
        """Whether its features are the backbone's own: nothing has been learned in front of the head."""
        return self.shared is None and self.pool is None and not self.backbone.learned

    def _calibrated(self, logits: Tensor) -> Tensor:
        return logits if self.calibration is None else self.calibration(logits)

    def match(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(similarity, ids) [B k] of the group prompts that queries [B D'] choose: in torch where keys may train, else
        through an exact FAISS index if the pool is large."""
        pool = self.pool
        assert pool is not None
        query = query - pool.centre
        keys_train = pool.keys.requires_grad and torch.is_grad_enabled()
        if len(pool.keys) < MIN_KEYS_FOR_INDEX or keys_train or torch.compiler.is_compiling():
            return match(query, pool.keys, pool.topk)
        index = self._index.of([pool.keys], lambda: KeyIndex(pool.keys))
        similarity, ids = index.match(query, pool.topk)
        return similarity.to(query.device), ids.to(query.device)

    def _after_prefix(self, tokens: Tensor, group: Sequence[Prompt] | None) -> Tensor:
        """The blocks after the prefix and pooling; `group` are the group prompts of each of these blocks."""
        with self._autocast():
            for i in range(self._prefix_blocks, self.backbone.depth):
                prompts = self._shared_prompt(i)
                if group is not None:
                    prompts = [*prompts, group[i - self._prefix_blocks]]
                tokens = self.backbone.block(i, tokens, prompts, keep=self._tokens_needed(i))
            if isinstance(self.shared, ShallowPrompt):
                tokens = self.shared.removed(tokens)
            return self.backbone.pool(tokens)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """Learned parts of a backbone are kept in fp32 beside frozen ones in bf16: autocast brings them together."""
        dtype = self.backbone.dtype
        if not self.backbone.learned or dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(next(self.parameters()).device.type, dtype)

    @property
    def _prefix_blocks(self) -> int:
        return 0 if self.pool is None else self.pool.prefix_blocks

    def _tokens_needed(self, i: int) -> int | None:
        """How many leading tokens block `i` must return, None for all: the last one serves pooling only."""
        return self.backbone.reads if i == self.backbone.depth - 1 else None

    # The shared prompt of a block. Where it does not train, its keys and values are computed once.

    def _shared_prompt(self, i: int) -> list[Prompt]:
        if not isinstance(self.shared, DeepPrompt):
            return []
        tokens = self.shared.tokens
        return [tokens[i]] if self._may_change(tokens) else [self._shared_keys_values(tokens)[i]]

    def _may_change(self, tokens: Tensor) -> bool:
        """Whether keys and values of `tokens` must be made anew: while they train, and in a graph that is traced."""
        trains = torch.is_grad_enabled() and any(value.requires_grad for value in (tokens, *self._learned))
        return trains or torch.compiler.is_compiling()

    @torch.no_grad()
    def _shared_keys_values(self, tokens: Tensor) -> list[KeyValue]:
        def constants() -> list[KeyValue]:
            return [self.backbone.keys_values(i, prompt.detach()) for i, prompt in enumerate(tokens)]

        return self._shared_answers.of([tokens, *self._learned], constants, beside=self.backbone.dtype)

    def _fixed_prompts(self, pool: PromptPool) -> Sequence[Prompt]:
        """The group prompts of each block where they are every image's: constant keys and values, unless they train."""
        if self._may_change(pool.tokens):
            return _by_block(pool.fixed())

        @torch.no_grad()
        def constants() -> list[KeyValue]:
            prompts = enumerate(pool.fixed()[0], start=pool.prefix_blocks)
            return [self.backbone.keys_values(i, prompt) for i, prompt in prompts]

        return self._fixed_answers.of([pool.tokens, *self._learned], constants, beside=self.backbone.dtype)

    @property
    def _shared_version(self) -> tuple[object, ...]:
        """Changes with any write to the shared prompt or to the trainable parameters in the backbone."""
        shared = () if self.shared is None else version(self.shared.tokens)
        return (*shared, *map(version, self._learned))

    # What trains, and what is stored.

    def only_train(self, *names: str) -> "PromptedClassifier":
        """Exactly the parameters whose name starts with one of `names` train; everything else is frozen."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(names) and self._may_learn(name))
        for start in names:
            assert any(name.startswith(start) for name, _ in self.named_parameters()), f"no parameter is called {start}"
        if isinstance(self.shared, DeepPrompt) and not self.shared.tokens.requires_grad:
            # Now, so that a resumed run's first step has no more work than the same step of an undisturbed run.
            with self._autocast():
                self._shared_keys_values(self.shared.tokens)
        return self

    def _may_learn(self, name: str) -> bool:
        """Whether a parameter or buffer is none of the backbone's frozen ones."""
        return not name.startswith("backbone.") or name.removeprefix("backbone.") in self.backbone.learned

    def learned_state(self) -> dict[str, Tensor]:
        """Everything but the frozen backbone, by name: what a checkpoint and a prompt file hold."""
        return {name: value for name, value in self.state_dict().items() if self._may_learn(name)}

    @torch.no_grad()
    def load_learned_state(self, tensors: dict[str, Tensor]) -> None:
        """Copies in place, so that optimizers keep their parameters."""
        state = self.learned_state()
        assert state.keys() == tensors.keys(), sorted(state.keys() ^ tensors.keys())
        for name, value in tensors.items():
            state[name].copy_(value)

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Rounds what is stored to `dtype`'s values, so that a file in `dtype` reloads to the same bits."""
        for value in self.learned_state().values():
            value.copy_(value.to(dtype))

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that a phase may train: all but the backbone's frozen ones. Buffers are none."""
        return sum(parameter.numel() for name, parameter in self.named_parameters() if self._may_learn(name))


def _by_block(group: Tensor) -> list[Prompt]:
    """Each image's prompts for L blocks [B L n D] as L prompts [B n D]."""
    return [group[:, j] for j in range(group.shape[1])]


def bare_classifier(backbone: Backbone, classes: tuple[str, ...]) -> PromptedClassifier:
    """The backbone with nothing learned, for its features; its head says nothing."""
    head = LinearHead(num_classes=len(classes), width=backbone.feature_width)
    model = PromptedClassifier(backbone, head, classes=classes)
    return model.to(next(backbone.parameters()).device)
