"""LPT: a shared prompt, then group prompts retrieved per image (Dong 2023, ICLR, arXiv 2210.01033).

Phase 1 learns one deep prompt and a cosine head. Phase 2 freezes that prompt and learns a pool of group prompts
with keys: an image's query, its feature under the shared prompt, picks the `topk` prompts whose keys are
nearest, and their mean is added to the shared prompt from block `prefix_blocks` on. Both phases sample
twice, class-balanced and instance-balanced, and sum an asymmetric Gaussian-clouded loss over the two streams.

Shapes: views [B 3 H W], logits [B C], queries [N D'].
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lpt.data.samplers import ClassBalanced, InstanceBalanced, InstancePerStep, instance_weight
from lpt.data.task import Task
from lpt.engine.batches import Batch, Progress, Stream
from lpt.engine.evaluate import features
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup, scaled_lr
from lpt.errors import LptError
from lpt.losses import GCL, CrossEntropy, LogitAdjusted, cloud_noise
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, class_means
from lpt.model.matching import class_keys, key_usage, kmeans_keys
from lpt.model.prompts import DeepPrompt, PromptPool
from lpt.settings import FractionBelowOne, Positive, Scale

COLLAPSED = 3.0
"""A key perplexity below this is reported as a collapse: almost all images share the same prompts."""


def tune(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    *,
    prompt_length: Positive = 10,
    prefix_blocks: int = 6,
    pool_size: Positive = 20,
    topk: Positive = 2,
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
) -> PromptedClassifier:
    """Defaults are the authors' code's where it is known and sound. Their script itself is `epochs=(40, 90)`,
    `warmup=first_epoch_1e-6`, `instance_stream=per_step` and `steps_per_epoch=floor_plus_1`.

    `epochs` are (phase 1, phase 2); (E, 0) is phase 1 alone, without a pool. An epoch is N/B steps of *two*
    batches of B images. `lr` is per phase; SGD's is per 256 images. `gammas_*` are (γ+, γ-) of a stream.
    `eta0` weighs the instance-balanced stream at the start, falling to 0. Raises LptError for shapes that the
    backbone cannot serve.

    Options that are not LPT's: `query_centering`, `key_init`, `head_init`; `pool_init=shared` starts every group
    prompt from the shared one (random ones take a share of the attention at once: phase 2 then starts far below
    the end of phase 1); `query_head` keeps phase 1's head for the query, and predictions average both.
    """
    if min(epochs) < 0 or epochs[0] + epochs[1] == 0:
        raise LptError(f"method.epochs {list(epochs)} trains nothing: give (phase 1, phase 2), for example [40, 40]")
    if key_init == "kmeans" and epochs[1] and pool_size > len(task.train):
        raise LptError(f"method.pool_size {pool_size} needs as many training images, there are {len(task.train)}")
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(fit.seed)
    head = CosineHead(num_classes=len(task.classes), width=backbone.feature_width, scale=scale, generator=generator)
    shared = DeepPrompt(layers=backbone.depth, length=prompt_length, width=backbone.width, generator=generator)
    pool = PromptPool(  # made before phase 1, so that a pool that cannot be served fails at once
        size=pool_size,
        topk=topk,
        prefix_blocks=prefix_blocks,
        depth=backbone.depth,
        length=prompt_length,
        width=backbone.width,
        key_width=backbone.feature_width,
        generator=generator,
    )
    model = PromptedClassifier(backbone, head, classes=task.classes, shared=shared).to(device)

    # The two streams and their losses.
    counts, labels, B = task.counts.to(device), task.train.labels, fit.batch_size
    instance = InstanceBalanced if instance_stream == "epoch" else InstancePerStep

    def streams(number: Literal[1, 2]) -> dict[str, Any]:
        seed = 2 * fit.seed + number - 1  # each phase sees the images in an order of its own
        return {
            "balanced": Stream(ClassBalanced(labels, batch_size=B, seed=seed)),
            "instance": Stream(instance(labels, batch_size=B, seed=seed)),
        }

    def loss_of(gammas: tuple[float, float], prior: bool) -> Any:
        if loss == "ce":
            return CrossEntropy(scale, label_smoothing)
        if loss == "la":  # class-balanced batches have a uniform prior already: adjusting twice would overshoot
            return LogitAdjusted(counts, float(prior), scale, label_smoothing)
        return GCL(counts, scale, margin, noise, *gammas, label_smoothing, agcl_form, asymmetric=loss == "agcl")

    losses = {"balanced": loss_of(gammas_bal, False), "instance": loss_of(gammas_ins, True)}

    def step(model: PromptedClassifier, batches: dict[str, Batch], progress: Progress) -> Iterator[dict[str, Tensor]]:
        """L = A(balanced) - β S_key + η [A(instance) - β S_key] (LPT §2.6), a part for each stream.

        What needs no gradient runs once for both streams; the tails, one after the other, hold one stream's
        activations at a time.
        """
        tokens = model.prefix(torch.cat([batch.views for batch in batches.values()]))
        queries = None if model.pool is None else model.query(tokens)
        eta, first = instance_weight(eta0, progress.epoch / progress.epochs), 0
        for stream, batch in batches.items():
            rows = slice(first, first := first + len(batch.labels))
            mask = None
            if head_dropout:
                keep = progress.uniform(f"drop/{stream}", len(batch.labels), backbone.feature_width) >= head_dropout
                mask = keep.float().to(device) / (1 - head_dropout)
            query = None if queries is None else queries[rows]
            output = model.tail(tokens[rows], query=query, feature_mask=mask)
            cloud = cloud_noise(progress.normal(f"cloud/{stream}", len(batch.labels), len(task.classes)))
            value = losses[stream](output.logits, batch.labels, cloud.to(device))
            logged = {}
            if output.similarity is not None and output.ids is not None:
                logged[f"key_{stream}"] = key_term = output.similarity.sum(1).mean()
                value = value - beta * key_term
                fit.memory.note(ids=output.ids, of=batch.labels)
            yield {"loss": value if stream == "balanced" else eta * value, stream: value, **logged}

    def usage(model: PromptedClassifier, progress: Progress) -> Mapping[str, Any]:
        noted = fit.memory.take()
        found = key_usage(noted["ids"], pool_size)
        found |= {"class_keys": class_keys(noted["ids"], noted["of"], len(task.classes), pool_size)}
        # All images on the same keys have perplexity topk; a pool hardly larger than that cannot collapse.
        limit = max(COLLAPSED, 1.5 * topk)
        if isinstance(p := found["perplexity"], float) and p < limit < pool_size:
            fit.say(
                f"warning: keys collapsed in epoch {progress.epoch + 1}: perplexity {p:.2f} of {pool_size}, "
                "almost all images get the same prompts; try method.query_centering=mean method.key_init=kmeans"
            )
        return {"key_usage": found}

    per_epoch = max(1, len(labels) // B + (steps_per_epoch == "floor_plus_1"))

    def phase(number: Literal[1, 2], on_epoch: Any) -> None:
        fit(
            f"phase{number}",
            model,
            step,
            streams(number),
            steps=epochs[number - 1] * per_epoch,
            steps_per_epoch=per_epoch,
            optimizer=optimizer,
            lr=scaled_lr(optimizer, lr[number - 1], B),
            weight_decay=weight_decay,
            warmup=warmup,
            on_epoch=on_epoch,
        )

    # Phase 1: the shared prompt and the head.
    if head_init == "class_mean":
        found = fit.once("features", lambda: features(model, task.train, folder=fit.feature_cache))
        with torch.no_grad():
            head.weight.copy_(class_means(found, labels, len(task.classes)))
    model.only_train("shared.", "head.")
    if epochs[0]:
        phase(1, None)
    if not epochs[1]:
        return model

    # Phase 2: group prompts, their keys, and the head that phase 1 left.
    if query_centering == "mean" or key_init == "kmeans":
        found = fit.once("queries", lambda: features(model, task.train, folder=fit.feature_cache))
        if query_centering == "mean":
            pool.centre.copy_(found.mean(0))
        if key_init == "kmeans":
            with torch.no_grad():
                pool.keys.copy_(kmeans_keys(found - pool.centre.cpu(), pool_size, seed=fit.seed))
    if pool_init == "shared":  # with half of the usual start's noise, so that the prompts differ
        with torch.no_grad():
            pool.tokens.mul_(0.5).add_(shared.tokens[prefix_blocks:].cpu())
    if query_head:
        model.query_head = copy.deepcopy(head)
    model.pool = pool.to(device)
    model.only_train("pool.", "head.")
    phase(2, usage)
    return model
