"""LPT: a shared prompt, then group prompts retrieved per image (Dong 2023, ICLR, arXiv 2210.01033).

Phase 1 learns one deep prompt and a cosine head. Phase 2 freezes that prompt and learns a pool of group prompts
with keys: an image's query, its feature under the shared prompt, picks the `topk` prompts whose keys are
nearest, and their mean is added to the shared prompt from block `prefix_blocks` on. Both phases sample
twice, class-balanced and instance-balanced, and sum an asymmetric Gaussian-clouded loss over the two streams.

Ours, not LPT's: `tuning` puts LoRA or AdaptFormer into phase 1, beside the shared prompt or in its place; with `query`
early or none, images get their group prompts without a pass of their own.

Shapes: views [B 3 H W], logits [B C], queries [N D'].
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lpt.data.samplers import ClassBalanced, InstanceBalanced, InstancePerStep, instance_weight
from lpt.data.task import Task
from lpt.engine.batches import Batch, Progress, Stream
from lpt.engine.optim import Optimizer, Warmup, scaled_lr
from lpt.engine.phase import Phase, Recipe
from lpt.engine.session import Log, Session
from lpt.engine.step_memory import StepMemory
from lpt.errors import LptError
from lpt.losses import GCL, CrossEntropy, LogitAdjusted, cloud_noise
from lpt.methods.supervised import tunable_names
from lpt.model.adapters import auto_bottleneck, with_adapter
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, class_means
from lpt.model.matching import class_keys, key_usage, kmeans_keys
from lpt.model.prompts import DeepPrompt, PromptPool, summary_width
from lpt.settings import AdapterWidth, FractionBelowOne, Positive, Rank, Scale
from lpt.terms import AdapterKind, QueryMode

Phase1 = Literal["vpt_deep", "lora", "adaptformer", "vpt_deep+lora", "vpt_deep+adaptformer"]
"""What phase 1 tunes beside the head: the shared prompt, something inside the backbone in its place, or both."""

INSIDE: dict[str, AdapterKind] = {"lora": "lora", "adaptformer": "adaptformer"}

COLLAPSED = 3.0
"""A key perplexity below this is reported as a collapse: almost all images share the same prompts."""
StreamLoss = CrossEntropy | LogitAdjusted | GCL


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    *,
    tuning: Phase1 = "vpt_deep",
    prompt_length: Positive = 10,
    bottleneck: AdapterWidth = 0,
    rank: Rank = 8,
    prefix_blocks: int = 6,
    pool_size: Positive = 20,
    topk: Positive = 2,
    query: QueryMode = "full",
    epochs: tuple[int, int] = (40, 40),
    optimizer: Optimizer = "sgd",
    lr: tuple[FractionBelowOne, FractionBelowOne] = (0.02, 0.02),
    weight_decay: FractionBelowOne = 0.01,
    warmup: Warmup = "linear",
    loss: Literal["agcl", "gcl", "la", "ce"] = "agcl",
    agcl_form: Literal["code", "paper"] = "code",
    gammas_bal: tuple[float, float] = (0.0, 4.0),
    gammas_ins: tuple[float, float] = (0.5, 8.0),
    scale: Scale = 20.0,
    margin: float = 0.1,
    noise: float = 0.5,
    label_smoothing: FractionBelowOne = 0.1,
    head_dropout: FractionBelowOne = 0.1,
    head_init: Literal["random", "class_mean"] = "random",
    beta: float = 0.5,
    eta0: float = 0.5,
    query_centering: Literal["off", "mean"] = "off",
    key_init: Literal["tn", "kmeans"] = "tn",
    pool_init: Literal["tn", "shared"] = "tn",
    query_head: bool = False,
    instance_stream: Literal["epoch", "per_step"] = "epoch",
    steps_per_epoch: Literal["floor", "floor_plus_1"] = "floor",
) -> Recipe:
    """Defaults are the authors' code's where it is known and sound. Their script itself is `epochs=(40, 90)`,
    `warmup=first_epoch_1e-6`, `instance_stream=per_step` and `steps_per_epoch=floor_plus_1`.

    `epochs` are (phase 1, phase 2); (E, 0) is phase 1 alone, without a pool. An epoch is N/B steps of *two*
    batches of B images. `lr` is per phase; SGD's is per 256 images. `gammas_*` are (γ+, γ-) of a stream.
    `eta0` weighs the instance-balanced stream at the start, falling to 0. Raises LptError for shapes that the
    backbone cannot serve.

    Options that are not LPT's: `query_centering`, `key_init`, `head_init`; `pool_init=shared` starts every group
    prompt from the shared one (random ones take a share of the attention at once: phase 2 then starts far below
    the end of phase 1); `query_head` keeps phase 1's head for the query, and predictions average both. `tuning` is
    what phase 1 learns beside the head: `bottleneck` is AdaptFormer's (0 is LIFT's width for the number of classes),
    `rank` LoRA's. `query=early` takes the query from the tokens of block `prefix_blocks`, by a linear map that is
    fitted to the training images; with `none` there are `topk` group prompts in all, which every image gets. Both spare
    the query its pass, and `query_head` its subject: predictions are of the prompted pass alone.
    """
    if min(epochs) < 0 or epochs[0] + epochs[1] == 0:
        raise LptError(f"method.epochs {list(epochs)} trains nothing: give (phase 1, phase 2), for example [40, 40]")
    if key_init == "kmeans" and query != "none" and epochs[1] and pool_size > len(task.train):
        raise LptError(f"method.pool_size {pool_size} needs as many training images, there are {len(task.train)}")
    if pool_init == "shared" and not tuning.startswith("vpt_deep"):
        raise LptError(f"method.pool_init=shared needs a shared prompt, method.tuning={tuning} has none: use tn")
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(session.start)
    head = CosineHead(num_classes=len(task.classes), width=backbone.feature_width, scale=scale, generator=generator)
    sizes: dict[str, Any] = {"length": prompt_length, "width": backbone.width, "generator": generator}
    shared = DeepPrompt(layers=backbone.depth, **sizes) if tuning.startswith("vpt_deep") else None
    pool = PromptPool(  # made before phase 1, so that a pool that cannot be served fails at once
        size=topk if query == "none" else pool_size,
        topk=topk,
        prefix_blocks=prefix_blocks,
        depth=backbone.depth,
        key_width=backbone.feature_width,
        query=query,
        summary_width=summary_width(backbone.width, backbone.prefix),
        **sizes,
    ).to(device)
    if kind := INSIDE.get(tuning.rpartition("+")[2]):
        width = bottleneck or auto_bottleneck(len(task.classes), backbone.depth)
        backbone = with_adapter(backbone, kind, bottleneck=width, rank=rank, seed=session.seed)
    model = PromptedClassifier(backbone, head, classes=task.classes, shared=shared).to(device)
    labels, batch_size, counts = task.train.labels, session.batch_size, task.counts.to(device)
    if head_init == "class_mean":
        start = class_means(session.features("features", model, task.train), labels, len(task.classes))
        head.weight.data.copy_(start)

    def stream_loss(gammas: tuple[float, float], *, adjust_prior: bool) -> StreamLoss:
        if loss == "ce":
            return CrossEntropy(scale, label_smoothing)
        if loss == "la":  # class-balanced batches have a uniform prior already: adjusting twice would overshoot
            return LogitAdjusted(counts, float(adjust_prior), scale, label_smoothing)
        return GCL(counts, scale, margin, noise, *gammas, label_smoothing, agcl_form, asymmetric=loss == "agcl")

    steps_in_epoch = max(1, len(labels) // batch_size + (steps_per_epoch == "floor_plus_1"))

    def phase(number: Literal[1, 2], *trains: str, reports_keys: bool) -> Phase:
        memory = StepMemory()
        return Phase(
            name=f"phase{number}",
            trains=trains,
            step=DualStreamStep(
                balanced=stream_loss(gammas_bal, adjust_prior=False),
                instance=stream_loss(gammas_ins, adjust_prior=True),
                beta=beta,
                eta0=eta0,
                head_dropout=head_dropout,
                memory=memory,
            ),
            # Each phase sees the images in an order of its own.
            streams=dual_streams(labels, batch_size, 2 * session.seed + number - 1, instance_stream),
            steps=epochs[number - 1] * steps_in_epoch,
            steps_per_epoch=steps_in_epoch,
            optimizer=optimizer,
            lr=scaled_lr(optimizer, lr[number - 1], batch_size),
            weight_decay=weight_decay,
            warmup=warmup,
            memory=memory,
            on_epoch=KeyReport(memory, topk, session.log) if reports_keys else None,
        )

    def phases() -> Iterator[Phase]:
        # Phase 1: the shared prompt and the head.
        yield phase(1, *tunable_names(model), reports_keys=False)
        if not epochs[1]:
            return
        # Phase 2: group prompts, their keys, and the head that phase 1 left.
        model.phase1_head = head.weight.detach().clone()
        start_keys(pool, model, session, task, center=query_centering == "mean", kmeans=key_init == "kmeans")
        if pool_init == "shared" and shared is not None:  # half of the usual noise, so that the prompts differ
            pool.tokens.data.mul_(0.5).add_(shared.tokens.data[prefix_blocks:])
        if query_head and query == "full":
            model.query_head = copy.deepcopy(head)
        model.pool = pool
        yield phase(2, "pool.", "head.", reports_keys=query != "none")

    return Recipe(model, phases())


def dual_streams(
    labels: Tensor, batch_size: int, seed: int, instance_stream: Literal["epoch", "per_step"]
) -> dict[str, Stream]:
    """The two streams of both phases: class-balanced, and by image (LPT, section 3)."""
    instance_sampler = InstanceBalanced if instance_stream == "epoch" else InstancePerStep
    return {
        "balanced": Stream(ClassBalanced(labels, batch_size=batch_size, seed=seed)),
        "instance": Stream(instance_sampler(labels, batch_size=batch_size, seed=seed)),
    }


@dataclass(frozen=True, kw_only=True)
class DualStreamStep:
    """L = A(balanced) - β S_key + η [A(instance) - β S_key] (LPT §2.6), a part for each stream; without keys S_key
    is 0. η falls from `eta0` to 0 over the epochs.

    What needs no gradient runs once for both streams; the tails, one after the other, hold one stream's activations at
    a time.
    """

    balanced: StreamLoss
    instance: StreamLoss
    beta: float
    eta0: float
    head_dropout: float
    memory: StepMemory

    def __call__(
        self, model: PromptedClassifier, batches: dict[str, Batch], progress: Progress
    ) -> Iterator[dict[str, Tensor]]:
        tokens = model.prefix(torch.cat([batch.views for batch in batches.values()]))
        queries = model.query(tokens) if model.needs_query else None
        eta = instance_weight(self.eta0, progress.epoch / progress.epochs)
        start = 0
        for stream, batch in batches.items():
            rows = slice(start, start + len(batch.labels))
            start = rows.stop
            output = model.tail(
                tokens[rows],
                query=None if queries is None else queries[rows],
                feature_mask=self._dropout_mask(stream, model.backbone.feature_width, batch, progress),
            )
            cloud = cloud_noise(progress.normal(f"cloud/{stream}", len(batch.labels), len(model.classes)))
            criterion = self.balanced if stream == "balanced" else self.instance
            value = criterion(output.logits, batch.labels, cloud.to(batch.labels.device))
            logged = {}
            if output.similarity is not None and output.ids is not None:
                key_term = output.similarity.sum(1).mean()
                value = value - self.beta * key_term
                logged[f"key_{stream}"] = key_term
                self.memory.note(ids=output.ids, of=batch.labels)  # checkpoints know both by these names
            yield {"loss": value if stream == "balanced" else eta * value, stream: value, **logged}

    def _dropout_mask(self, stream: str, width: int, batch: Batch, progress: Progress) -> Tensor | None:
        """What the features [B D'] are multiplied with; the mask is drawn here so that a resumed run has the same."""
        if not self.head_dropout:
            return None
        kept = progress.uniform(f"drop/{stream}", len(batch.labels), width) >= self.head_dropout
        return kept.float().to(batch.labels.device) / (1 - self.head_dropout)


def start_keys(
    pool: PromptPool, model: PromptedClassifier, session: Session, task: Task, *, center: bool, kmeans: bool
) -> None:
    """The map of early queries, where queries are centered, and where keys start, from the queries [N D'] of the
    training images under `model` (ours, not LPT's)."""
    if pool.query_map is not None:
        model.pool = pool  # now, since queries are early ones from here on
        pool.query_map.copy_(session.query_map(model, task.train))
    if pool.query == "none" or not (center or kmeans):
        return
    queries = session.features("queries", model, task.train)
    if center:
        pool.centre.copy_(queries.mean(0))
    if kmeans:
        keys = kmeans_keys(queries - pool.centre.cpu(), len(pool.keys), seed=session.seed)
        pool.keys.data.copy_(keys)


@dataclass(frozen=True)
class KeyReport:
    """At the end of an epoch: how evenly the keys were chosen, and which key each class chose; warns of a collapse."""

    memory: StepMemory
    topk: int
    log: Log

    def __call__(self, model: PromptedClassifier, progress: Progress) -> Mapping[str, Any]:
        assert model.pool is not None
        num_keys = len(model.pool.keys)
        notes = self.memory.take_notes()
        usage = key_usage(notes["ids"], num_keys)
        usage["class_keys"] = class_keys(notes["ids"], notes["of"], len(model.classes), num_keys)
        # All images on the same keys have perplexity topk; a pool hardly larger than that cannot collapse.
        limit = max(COLLAPSED, 1.5 * self.topk)
        perplexity = usage["perplexity"]
        if isinstance(perplexity, float) and perplexity < limit < num_keys:
            self.log(
                f"warning: keys collapsed in epoch {progress.epoch + 1}: perplexity {perplexity:.2f} of {num_keys}, "
                "almost all images get the same prompts; try method.query_centering=mean method.key_init=kmeans"
            )
        return {"key_usage": usage}
