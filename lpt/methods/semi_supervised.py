"""A semi-supervised stage: labelled and unlabelled images in every step, and pseudo-labels that leave a trace.

Methods bring an opinion on weak views, a loss on labelled images, a loss on strong views, and perhaps something fitted
to the whole batch. Shapes: views [B 3 H W], feature [B D'], probabilities [B C], labels [B].
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.samplers import InstanceBalanced
from lpt.data.task import Files, Images, Task
from lpt.engine.batches import Batch, Progress, Stream
from lpt.engine.loop import Fit
from lpt.engine.optim import Optimizer, Warmup
from lpt.engine.processes import rank_and_world
from lpt.errors import LptError
from lpt.methods.supervised import Tuning, everything
from lpt.model.classifier import PromptedClassifier
from lpt.report.pseudo_labels import diagnose, write_round


class Opinion(NamedTuple):
    """On weak views: probabilities, whose largest is the pseudo-label, which images are `kept` [B], how much each
    weighs [B], and what every head says for itself."""

    probability: Tensor
    kept: Tensor
    weight: Tensor
    heads: Mapping[str, Tensor]

    @property
    def label(self) -> Tensor:
        return self.probability.argmax(1)

    def chunk(self, number: int) -> list["Opinion"]:
        heads = {name: of.chunk(number) for name, of in self.heads.items()}
        parts = zip(*(of.chunk(number) for of in (self.probability, self.kept, self.weight)), strict=True)
        return [
            Opinion(p, kept, w, {name: of[i] for name, of in heads.items()}) for i, (p, kept, w) in enumerate(parts)
        ]


class Fitted(NamedTuple):
    """What is fitted to a whole batch: a term of the loss, its gradient in the labelled features [B D'] (None: it has
    none), and what to do when the step's gradients are there."""

    loss: Tensor
    gradient: Tensor | None
    commit: Callable[[], None]


class Plan(NamedTuple):
    """How long and on what. `ratio` unlabelled images come with each labelled one; pseudo-labels are told after each of
    at most `rounds` of equal length. A linear `warmup` takes a tenth of the steps, or one round if that is shorter."""

    steps: int
    rounds: int
    ratio: int
    strong_views: int
    optimizer: Optimizer
    lr: float
    weight_decay: float
    warmup: Warmup
    cached_views: int = 0
    micro_batches: int = 1
    weight_ema: float = 0.0

    def check(self, fit: Fit, task: Task, tuning: Tuning, *, unlabelled: bool = True) -> None:
        """Before anything is computed or written: raises LptError for a plan that cannot be carried out."""
        B, k = fit.batch_size, self.micro_batches
        if unlabelled:
            unlabelled_of(task)
        if B % (k * rank_and_world()[1]):
            raise LptError(f"train.batch_size {B} is no multiple of method.micro_batches {k} on each process")
        if self.steps < self.rounds:
            raise LptError(f"method.rounds {self.rounds} are more than the {self.steps} steps")
        if self.cached_views and tuning != "head":
            raise LptError(
                "method.cached_views needs features that stay as they are: set method.tuning=head, or 0 views"
            )


Supervised = Callable[[Tensor, Tensor], Tensor]
Consistency = Callable[[Tensor, Opinion], Tensor]


def unlabelled_of(task: Task) -> Images | Files:
    """The unlabelled images. Raises LptError where there are none."""
    if task.unlabeled is None or len(task.unlabeled) == 0:
        raise LptError(
            f"{task.name} has no unlabelled images: take data.name=cifar100-semi, give data.unlabeled a folder or "
            "list, or train on labels alone with method.name=fixmatch and method.lambda_u=0"
        )
    return task.unlabeled


def agreement(logits: Tensor, found: Opinion) -> Tensor:
    """mean_j w_j CE(logits_j, ŷ_j) over all unlabelled images of the batch, believed or not (Sohn 2020, FixMatch)."""
    return (found.weight * F.cross_entropy(logits, found.label, reduction="none")).mean()


def train_semi(
    fit: Fit,
    model: PromptedClassifier,
    task: Task,
    plan: Plan,
    *,
    supervised: Supervised,
    opinion: Callable[[Tensor], Opinion] | None = None,
    consistency: Consistency | None = None,
    fitting: Callable[[Tensor, Tensor, Opinion], Fitted] | None = None,
    also: tuple[str, ...] = (),
) -> None:
    """Trains what `model` may learn (and the parameters called `also`): L = supervised(features, labels) +
    consistency(strong features, opinion on the weak views) + fitting(labelled features, labels, opinion).

    Without an `opinion` only labelled images are looked at. Labelled images and strong views go through the model
    together, weak ones apart, since they need no gradient. With `cached_views` V > 0, which needs a backbone in which
    nothing learns, features of one weak and V strong views of every image are computed once, and a step takes
    microseconds. `micro_batches` are exact, also in what is fitted to the whole batch: its gradient in the features
    is found first.
    """
    B, k, cached = fit.batch_size, plan.micro_batches, plan.cached_views > 0
    streams = {"labelled": Stream(InstanceBalanced(task.train.labels, batch_size=B, seed=fit.seed), task.train)}
    strong = [f"strong{v}" for v in range(plan.strong_views)] if opinion else []
    if opinion:
        pool = unlabelled_of(task)
        drawn = InstanceBalanced(pool.labels, batch_size=B * plan.ratio, seed=fit.seed + 1)
        streams |= {"weak": Stream(drawn, pool), **{name: Stream(drawn, pool, strong=True) for name in strong}}
    if cached:
        streams = _cached(fit, model, streams, plan.cached_views)

    def of(views: Tensor) -> Tensor:
        return views.float() if cached else model.feature(views)

    def step(model: PromptedClassifier, batches: dict[str, Batch], progress: Progress) -> Iterator[dict[str, Tensor]]:
        labelled, found = batches["labelled"], None
        if opinion:
            with torch.no_grad():
                found = opinion(torch.cat([of(views) for views in batches["weak"].views.chunk(k)]))
            _note(fit, batches["weak"].rows, found, progress.step)
        whole = None
        if fitting and k > 1:
            with torch.no_grad():
                whole = torch.cat([of(views) for views in labelled.views.chunk(k)])
        fitted = None
        opinions = found.chunk(k) if found else [None] * k
        for i in range(k):
            parts = [labelled.views.chunk(k)[i], *(batches[name].views.chunk(k)[i] for name in strong)]
            mine, *others = of(torch.cat(parts)).split([len(part) for part in parts])
            logged = {"supervised": supervised(mine, labelled.labels.chunk(k)[i]) / k}
            if consistency and (said := opinions[i]) is not None:
                logged["consistency"] = torch.stack([consistency(view, said) for view in others]).mean() / k
                logged["kept"] = said.kept.float().mean() / k
            loss = logged["supervised"] + logged.get("consistency", 0)
            if fitting and found:
                fitted = fitted or fitting(mine.detach() if whole is None else whole, labelled.labels, found)
                if i == 0:
                    logged["fitted"] = fitted.loss
                    loss = loss + fitted.loss
                if fitted.gradient is not None:
                    loss = loss + (fitted.gradient.chunk(k)[i] * (mine - mine.detach())).sum()
            yield {"loss": loss, **logged}
        if fitted:
            fitted.commit()
        if plan.weight_ema:
            means = _means(fit, model, plan.weight_ema)
            fit.memory.state.update({f"average/{name}": mean for name, (_, mean) in means.items()})

    def audit(model: PromptedClassifier, progress: Progress) -> Mapping[str, Any]:
        noted = fit.memory.take()
        return {"pseudo_labels": _told(fit, task, noted, progress)} if noted else {}

    model.only_train(*everything(model), *also)
    fit(
        "semi",
        model,
        step,
        streams,
        steps=plan.steps,
        steps_per_epoch=-(-plan.steps // plan.rounds),
        optimizer=plan.optimizer,
        lr=plan.lr,
        weight_decay=plan.weight_decay,
        warmup=plan.warmup,
        on_epoch=audit,
        evaluated=partial(_averaged, fit, model, plan.weight_ema) if plan.weight_ema else contextlib.nullcontext,
    )
    if plan.weight_ema:
        for p, mean in _means(fit, model, plan.weight_ema).values():
            p.data.copy_(mean)


def _cached(fit: Fit, model: PromptedClassifier, streams: dict[str, Stream], views: int) -> dict[str, Stream]:
    """The same streams as features: `views` strong views of every image, of which every step draws one."""
    out, strong = {}, None
    for name, stream in streams.items():
        assert stream.images is not None
        images = stream.images
        if not stream.strong:
            whole = f"{name}-features"
            found = fit.once(whole, lambda n=whole, i=images: fit.view_features(n, model, i), images)
        elif strong is None:
            names = [f"strong-features-{v}" for v in range(views)]
            seen = [
                fit.once(n, lambda n=n, i=images: fit.view_features(n, model, i, strong=True), images) for n in names
            ]
            found = strong = torch.stack(seen)
        else:
            found = strong
        out[name] = Stream(stream.sampler, images, features=found)
    return out


def _note(fit: Fit, rows: Tensor, found: Opinion, step: int) -> None:
    """What the audit wants to know of a batch, for the end of the round."""
    confidence, label = found.probability.max(1)
    device = label.device
    notes = {"rows": rows.to(device), "step": torch.full_like(label, step), "label": label, "confidence": confidence}
    notes["kept"] = found.kept
    for name, said in found.heads.items():
        top = said.max(1)
        notes |= {f"{name}_label": top.indices, f"{name}_confidence": top.values}
    fit.memory.note(**notes)


def _told(fit: Fit, task: Task, noted: dict[str, Tensor], progress: Progress) -> dict[str, Any]:
    pool = unlabelled_of(task)
    number = progress.epoch + 1
    if fit.audit and rank_and_world()[0] == 0:
        write_round(fit.audit, noted, number=number, ids=pool.ids, truth=pool.labels, classes=task.classes)
    found = diagnose(noted, pool.labels[noted["rows"]], task.counts, None)
    if silent := [name for name, n in zip(task.classes, found["predicted"], strict=True) if n == 0]:
        more = ", ..." if len(silent) > 10 else ""
        fit.say(
            f"warning: round {number} kept no pseudo-label of {len(silent)} classes: {', '.join(silent[:10])}{more}"
        )
    told = {name: found[name] for name in ("coverage", "precision", "false_kept", "false_confidence") if name in found}
    return told | {"classes_without": silent}


@torch.no_grad()
def _means(fit: Fit, model: PromptedClassifier, momentum: float) -> dict[str, tuple[torch.nn.Parameter, Tensor]]:
    """What trains, each with its running mean, the weights of now included; a step keeps the means of those before."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: fit.memory.state.get(f"average/{name}") for name in trained}
    return {n: (p, p.clone() if (old := kept[n]) is None else old.lerp(p, 1 - momentum)) for n, p in trained.items()}


@contextlib.contextmanager
def _averaged(fit: Fit, model: PromptedClassifier, momentum: float) -> Iterator[None]:
    """The model with its running means, as it would be if training ended now."""
    means = _means(fit, model, momentum)
    now = {name: p.detach().clone() for name, (p, _) in means.items()}
    for p, mean in means.values():
        p.data.copy_(mean)
    try:
        yield
    finally:
        for name, (p, _) in means.items():
            p.data.copy_(now[name])
