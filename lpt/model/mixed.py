"""Images of different tasks in one forward: each with the prompts, keys, adapters and head of its own task.

Tasks of one shape (`TaskModel.shape`) share a forward of `PromptedClassifier` itself, whose parts have an axis for the
images here; other shapes are batches of their own. Shapes: images [B 3 S S], a task's keys and values [L heads n d],
pool [K L' n D], logits [B C], where C is of the task with most classes and -inf stands where another has none.
"""

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.model.adapters import with_adapter
from lpt.model.backbones.base import Backbone, KeyValue, Prompt
from lpt.model.backbones.timm_vit import TimmViT
from lpt.model.classifier import Output, PromptedClassifier
from lpt.model.heads import Calibration, CosineHead, Head, LinearHead, NeighbourHead
from lpt.model.matching import FEW_KEYS, PoolKeys, each_keys, match_each
from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt

MOST_STACKED_CLASSES = 512
"""A head with more is computed by itself: its rows are not worth a copy."""


class TaskPool(NamedTuple):
    """A task's group prompts, in fp16 where that is what its file holds."""

    tokens: Tensor
    keys: PoolKeys
    centre: Tensor
    settings: tuple[tuple[str, Any], ...]
    """The settings of a `PromptPool`, besides its tensors."""

    @property
    def topk(self) -> int:
        return dict(self.settings)["topk"]


@dataclass(frozen=True, eq=False)
class TaskModel:
    """What one task adds to a frozen backbone. `alone` is its whole model where it cannot be mixed with others."""

    classes: tuple[str, ...]
    shape: Hashable
    """Tasks that agree in it go through a forward together."""
    head: Head
    deep: KeyValue | None = None
    shallow: Tensor | None = None
    pool: TaskPool | None = None
    query_head: CosineHead | None = None
    calibration: Calibration | None = None
    learned: Mapping[str, Tensor] | None = None
    """The trained parameters inside the backbone, by name."""
    settings: tuple[tuple[str, Any], ...] = ()
    """The settings of its model, besides its tensors."""
    adapted: "AdaptedBackbone | None" = None
    """The copy of the backbone that `learned` belongs in."""
    alone: PromptedClassifier | None = None

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        modules = (self.head, self.query_head, self.calibration)
        tensors = [value for module in modules if module for value in (*module.parameters(), *module.buffers())]
        tensors += [*(self.deep or ()), *((self.learned or {}).values())]
        tensors += [] if self.shallow is None else [self.shallow]
        tensors += [] if self.pool is None else [self.pool.tokens, *self.pool.keys, self.pool.centre]
        if self.alone is not None:
            tensors += [part for name, part in self.alone.learned_state().items() if not name.startswith("backbone.")]
        return sum({value.data_ptr(): value.nbytes for value in tensors}.values())

    @property
    def topk(self) -> int:
        """How many group prompts an image gets."""
        pool = self.pool if self.alone is None else self.alone.pool
        return 0 if pool is None else pool.topk


class AdaptedBackbone:
    """A copy of a backbone with an adapter in it, whose learned tensors are those of one task, or of each image, at a
    time: a thousand tasks need one copy. Only one thread at a time has it."""

    def __init__(self, backbone: Backbone, **recipe: Any) -> None:
        """`recipe` are the arguments of `with_adapter`."""
        self.backbone = with_adapter(backbone, **recipe)
        self.kind: str = recipe["kind"]
        self.lock = threading.RLock()
        self._parameters = {name: p for name, p in self.backbone.named_parameters() if name in self.backbone.learned}

    @property
    def mixes(self) -> bool:
        """Whether each image of a batch can have its own."""
        return self.kind in ("lora", "adaptformer") and isinstance(self.backbone, TimmViT)

    def given(self, recipe: object) -> Backbone:
        """The copy, for whoever would make one."""
        return self.backbone

    def learned(self) -> dict[str, Tensor]:
        """A copy of what is in it now."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @contextmanager
    def of_one(self, learned: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside it the backbone is that of one task."""
        with self.lock:
            before = {name: parameter.data for name, parameter in self._parameters.items()}
            try:
                for name, parameter in self._parameters.items():
                    parameter.data = learned[name]
                yield
            finally:
                for name, parameter in self._parameters.items():
                    parameter.data = before[name]

    @contextmanager
    def of_each(self, tasks: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
        """Inside it the b-th image of a batch is seen by the backbone of the b-th task."""
        each = {name: torch.stack([learned[name] for learned in tasks]) for name in self._parameters}
        with self.lock:
            put = list(_modules_of_each(self.backbone, self.kind, each))
            before = [parent.get_submodule(name) for parent, name, _ in put]
            try:
                for parent, name, module in put:
                    parent.add_module(name, module)
                yield
            finally:
                for (parent, name, _), module in zip(put, before, strict=True):
                    parent.add_module(name, module)


def _modules_of_each(
    backbone: Backbone, kind: str, each: Mapping[str, Tensor]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in it, the module that takes its place) for every adapter of a backbone."""
    last = ".default.weight" if kind == "lora" else ".adapter.scale"
    for name in each:
        if name.endswith(last):
            path, _, ending = name.rpartition(".")
            parent, _, own = path.rpartition(".")
            parts = {key.removeprefix(f"{path}."): value for key, value in each.items() if key.startswith(f"{path}.")}
            module = EachLinear(parts[ending]) if kind == "lora" else EachAdaptFormer(parts)
            yield backbone.get_submodule(parent), own, module


class EachLinear(nn.Module):
    """x Wᵀ + b, where each image has its own W [B out in] and b [B out]. [B N in] → [B N out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, tokens: Tensor) -> Tensor:
        product = tokens @ self.weight.mT
        return product if self.bias is None else product + self.bias[:, None].to(product.dtype)


class EachAdaptFormer(nn.Module):
    """As `lpt.model.adapters.AdaptFormer`, where each image has its own; `parts` are its tensors with an axis for the
    images before all."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.norm_weight, self.norm_bias, self.scale = parts["norm.weight"], parts["norm.bias"], parts["scale"]
        self.down = EachLinear(parts["down.weight"], parts["down.bias"])
        self.up = EachLinear(parts["up.weight"], parts["up.bias"])

    def forward(self, tokens: Tensor) -> Tensor:
        plain = F.layer_norm(tokens.float(), tokens.shape[-1:])  # a norm's own numbers are kept in fp32
        update = self.up(F.relu(self.down(plain * self.norm_weight[:, None] + self.norm_bias[:, None])))
        return self.scale[:, None].to(update.dtype) * update


# A task's model, taken apart.


@torch.no_grad()
def task_model(model: PromptedClassifier, adapted: AdaptedBackbone | None = None) -> TaskModel:
    """What `model` adds to its backbone; `adapted` is what its backbone is a part of, with this task's tensors in it,
    where something has been learned in there."""
    model = model.only_train().eval()
    learned = adapted.learned() if adapted else None
    if not _can_be_mixed(model, adapted):
        return TaskModel(model.classes, object(), model.head, learned=learned, adapted=adapted, alone=model)
    deep = shallow = pool = None
    if isinstance(model.shared, ShallowPrompt):
        shallow = model.shared.tokens[0]
    elif model.shared is not None:
        answers = [model.backbone.keys_values(i, prompt) for i, prompt in enumerate(model.shared.tokens)]
        deep = KeyValue(*(torch.cat(parts) for parts in zip(*answers, strict=True)))
    if model.pool is not None:
        of = model.pool
        pool = TaskPool(_compact(of.tokens), PoolKeys.of(of.keys), of.centre, _settings(of))
    shape = (
        None if deep is None else deep.key.shape,
        None if shallow is None else shallow.shape,
        None if pool is None else (pool.tokens.shape[1:], pool.settings),
        model.query_head is None,
        _settings(model),
        adapted,
    )
    return TaskModel(
        classes=model.classes,
        shape=shape,
        head=model.head,
        deep=deep,
        shallow=shallow,
        pool=pool,
        query_head=model.query_head,
        calibration=model.calibration,
        settings=_settings(model),
        learned=learned,
        adapted=adapted,
    )


def _can_be_mixed(model: PromptedClassifier, adapted: AdaptedBackbone | None) -> bool:
    """Whether all that the model is made of is known here: what is not goes through its own forward."""
    parts = {name: type(part) for name, part in model.named_children() if name not in ("backbone", "head")}
    shared = parts.pop("shared", DeepPrompt) in (DeepPrompt, ShallowPrompt)
    known = {"pool": PromptPool, "query_head": CosineHead, "calibration": Calibration}
    if type(model) is not PromptedClassifier or not shared or not parts.items() <= known.items():
        return False
    if model.pool is not None and (len(model.pool.keys) > FEW_KEYS or model.pool.query != "full"):
        return False
    # A prompt's keys and values would be those of each task's own adapter.
    return adapted is None or (adapted.mixes and model.shared is None and model.pool is None)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The settings of a module, besides its tensors: only modules that agree in them can be computed together."""
    plain = [
        (name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str | None)
    ]
    return tuple((name, value) for name, value in sorted(plain) if name not in NOT_COMPUTED_WITH and name[0] != "_")


NOT_COMPUTED_WITH = (
    "group_rule",
    "trained_on",
    "task_means",
    "query_head",
    "calibration",
    "pool",
    "shared",
    "training",
)
"""What a model remembers of its task, and parts that it does not have."""


def _compact(tokens: Tensor) -> Tensor:
    """The same numbers in fp16, where that holds them."""
    small = tokens.detach().half()
    return small if torch.equal(small.to(tokens.dtype), tokens) else tokens.detach()


# One forward.


class MixedOutput(NamedTuple):
    """`logits` [B C] are as each task's own model has them, -inf beyond its classes; `scale` [B 1] is what they are
    multiplied with before the softmax. `ids` and `similarity` [B k] are of group prompts, -1 and 0 where none is."""

    logits: Tensor
    scale: Tensor
    similarity: Tensor
    ids: Tensor

    def top(self, topk: int) -> tuple[Tensor, Tensor]:
        """(probabilities, classes) [B k] of the most probable classes; 0 beyond a task's own."""
        scaled = self.scale * self.logits
        classes = scaled.topk(min(topk, scaled.shape[1])).indices
        return scaled.softmax(1).gather(1, classes), classes


@torch.no_grad()
def forward(
    backbone: Backbone, tasks: Sequence[TaskModel], images: Tensor, *, batch_size: int | None = None
) -> MixedOutput:
    """What the b-th of `tasks` says of the b-th of `images`; at most `batch_size` of them go through the backbone
    together."""
    device = images.device
    rows_of: dict[Hashable, list[int]] = {}
    for row, task in enumerate(tasks):
        rows_of.setdefault(task.shape, []).append(row)
    classes, topk = max(len(task.classes) for task in tasks), max(task.topk for task in tasks)
    whole = MixedOutput(
        logits=torch.full((len(tasks), classes), -torch.inf, device=device),
        scale=torch.tensor([[task.head.scale] for task in tasks], dtype=torch.float32, device=device),
        similarity=torch.zeros(len(tasks), topk, device=device),
        ids=torch.full((len(tasks), topk), -1, dtype=torch.long, device=device),
    )
    for rows in rows_of.values():
        size = batch_size or len(rows)
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            output = _of_one_shape(backbone, [tasks[row] for row in part], images[part])
            whole.logits[part, : output.logits.shape[1]] = output.logits.float()
            if output.ids is not None and output.similarity is not None:
                whole.similarity[part, : output.ids.shape[1]] = output.similarity.float()
                whole.ids[part, : output.ids.shape[1]] = output.ids
    return whole


def _of_one_shape(backbone: Backbone, tasks: Sequence[TaskModel], images: Tensor) -> Output:
    """The answers of tasks that agree in their shape."""
    first = tasks[0]
    if first.alone is not None:
        with first.adapted.of_one(first.learned or {}) if first.adapted else nullcontext():
            return first.alone(images)
    if first.adapted is None:
        return _MixedClassifier(backbone, tasks)(images)
    with first.adapted.of_each([task.learned or {} for task in tasks]):
        return _MixedClassifier(first.adapted.backbone, tasks)(images)


class _MixedClassifier(PromptedClassifier):
    """The model of a batch: of its b-th image as the b-th of `tasks`, all of one shape, would have it."""

    def __init__(self, backbone: Backbone, tasks: Sequence[TaskModel]) -> None:
        first = tasks[0]
        query_heads = [task.query_head for task in tasks if task.query_head]
        super().__init__(
            backbone,
            cast(Any, _EachHead([task.head for task in tasks])),
            classes=(),
            query_head=cast(Any, _EachHead(query_heads)) if query_heads else None,
            calibration=_each_calibration(tasks),
        )
        self.training = False
        if first.deep is not None:
            self._deep = KeyValue(*(_each([getattr(task.deep, part) for task in tasks]) for part in KeyValue._fields))
        if first.shallow is not None:
            self.shared = _EachShallow(torch.stack([task.shallow for task in tasks if task.shallow is not None]))
        if first.pool is not None:
            self.pool = _EachPool([task.pool for task in tasks if task.pool is not None])
        for name, value in first.settings:
            setattr(self, name, value)

    _deep: KeyValue | None = None

    def _shared_prompt(self, i: int) -> list[Prompt]:
        return [] if self._deep is None else [KeyValue(*(part[:, i] for part in self._deep))]

    def match(self, query: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.pool, _EachPool)
        return match_each(query - self.pool.centre, self.pool.each_keys, self.pool.topk)


def _each(tensors: Sequence[Tensor]) -> Tensor:
    """[B …] of B tensors, [1 …] where they are all the same one, which then is not copied."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0][None]
    return torch.stack(list(tensors))


class _EachShallow(ShallowPrompt):
    """A shallow prompt for each image; `.tokens` is [B n D]."""

    def __init__(self, tokens: Tensor) -> None:
        nn.Module.__init__(self)
        self.tokens = nn.Parameter(tokens, requires_grad=False)


class _EachPool(PromptPool):
    """A pool for each image."""

    def __init__(self, pools: Sequence[TaskPool]) -> None:
        nn.Module.__init__(self)
        for name, value in pools[0].settings:
            setattr(self, name, value)
        self.pools, self.each_keys = pools, each_keys([pool.keys for pool in pools])
        self.register_buffer("centre", torch.stack([pool.centre for pool in pools]))

    def ensemble(self, ids: Tensor) -> Tensor:
        """[B k] → [B L n D]."""
        means = [(rows, pool.tokens[ids[rows]].float().mean(1)) for pool, rows in _rows_of_each(self.pools)]
        return _in_order(means, len(ids))


def _each_calibration(tasks: Sequence[TaskModel]) -> Calibration | None:
    """With a row [C] for each image, which is the identity where its task has none."""
    if not any(task.calibration for task in tasks):
        return None
    whole = Calibration(0)
    device = next(task.calibration.scale.device for task in tasks if task.calibration)
    rows = [task.calibration or Calibration(len(task.classes)) for task in tasks]
    for name, fill in (("scale", 1.0), ("offset", 0.0)):
        parts = [getattr(calibration, name).detach().to(device) for calibration in rows]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
        setattr(whole, name, nn.Parameter(padded, requires_grad=False))
    whole.unit = torch.ones((), device=device)
    return whole


# Heads.


class _EachHead(nn.Module):
    """A head for each image. Logits [B C] are -inf beyond the classes of an image's own.

    Cosine and linear heads of about as many classes are one matrix product; others are computed one by one.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = heads
        self.classes = max(map(_num_classes, heads))

    def forward(self, feature: Tensor) -> Tensor:
        logits = torch.full((len(feature), self.classes), -torch.inf, device=feature.device)
        stacks: dict[Hashable, list[tuple[Head, list[int]]]] = {}
        for head, rows in _rows_of_each(self.heads):
            stacks.setdefault(_stack_of(head), []).append((head, rows))
        for stack in stacks.values():
            if len(stack) > 1 and _stack_of(stack[0][0]) is not None:
                _put_stacked(logits, feature, stack)
                continue
            for head, rows in stack:
                logits[rows, : _num_classes(head)] = head(feature[rows]).float()
        return logits


def _num_classes(head: Head) -> int:
    return head.num_classes if isinstance(head, NeighbourHead) else len(_rows(head))


def _rows(head: Head) -> Tensor:
    """[C D'] of a head that has them."""
    return cast(Tensor, head.weight)


def _stack_of(head: Head) -> Hashable:
    """Heads that agree in it are computed together; None is by itself."""
    if type(head) not in (CosineHead, LinearHead) or len(_rows(head)) > MOST_STACKED_CLASSES:
        return None
    is_joint = isinstance(head, CosineHead) and head.project is not None
    return type(head), is_joint, (len(_rows(head)) - 1).bit_length()


def _put_stacked(logits: Tensor, feature: Tensor, stack: Sequence[tuple[Head, list[int]]]) -> None:
    """Writes the logits of the images of several heads, by one product: features [T m D'] of the m images of each head,
    zeros where one has less, with the T heads' rows [T C D'], zeros where one has less."""
    heads = [head for head, _ in stack]
    most, order = max(len(rows) for _, rows in stack), [row for _, rows in stack for row in rows]
    place = torch.tensor([t * most + m for t, (_, rows) in enumerate(stack) for m in range(len(rows))])
    place = place.to(feature.device)
    first = heads[0]
    inputs = feature[order]
    if isinstance(first, CosineHead) and first.project:
        inputs = first.project(inputs)
    weight = nn.utils.rnn.pad_sequence([_rows(head) for head in heads], batch_first=True)
    inputs, weight = inputs.float(), weight.float()
    if isinstance(first, CosineHead):
        inputs, weight = F.normalize(inputs, dim=1, eps=1e-12), F.normalize(weight, dim=2, eps=1e-12)
    packed = inputs.new_zeros(len(heads) * most, inputs.shape[1]).index_copy_(0, place, inputs)
    product = packed.unflatten(0, (len(heads), most)) @ weight.mT
    if isinstance(first, LinearHead):
        biases = [head.bias.float() for head in heads if isinstance(head, LinearHead)]
        product = product + nn.utils.rnn.pad_sequence(biases, batch_first=True)[:, None]
    sizes = torch.tensor([_num_classes(head) for head in heads], device=feature.device)
    there = torch.arange(product.shape[2], device=feature.device) < sizes[:, None, None]
    logits[order, : product.shape[2]] = product.masked_fill(~there, -torch.inf).flatten(0, 1)[place]


Owner = TypeVar("Owner")


def _rows_of_each(owners: Sequence[Owner]) -> list[tuple[Owner, list[int]]]:
    """Each of them once, with the places where it stands."""
    rows: dict[int, tuple[Owner, list[int]]] = {}
    for row, owner in enumerate(owners):
        rows.setdefault(id(owner), (owner, []))[1].append(row)
    return list(rows.values())


def _in_order(parts: Sequence[tuple[list[int], Tensor]], number: int) -> Tensor:
    """The rows of all parts where they belong."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.tensor([row for rows, _ in parts for row in rows])
    values = torch.cat([value for _, value in parts])
    return torch.empty_like(values).index_copy_(0, order.to(values.device), values)
