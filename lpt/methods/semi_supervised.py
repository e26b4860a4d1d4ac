"""The semi-supervised stage: labeled and unlabeled images in every step, and pseudo-labels that leave a trace.

Methods bring an `Objective`: pseudo-labels of weak views, a loss on labeled images, a loss on strong views, and perhaps
a term that needs the whole batch. Shapes: views [B 3 H W], feature [B D'], probabilities [B C], labels [B].
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.samplers import InstanceBalanced
from lpt.data.task import Files, Images, Task
from lpt.engine.batches import Batch, Progress, Stream
from lpt.engine.optim import Optimizer, Warmup
from lpt.engine.phase import Phase
from lpt.engine.processes import rank_and_world
from lpt.engine.session import Session
from lpt.engine.step_memory import StepMemory
from lpt.errors import LptError
from lpt.methods.supervised import Tuning, tunable_names
from lpt.model.classifier import PromptedClassifier
from lpt.report.pseudo_labels import diagnose, write_round
from lpt.settings import Count, FractionBelowOne, Positive

LABELED = "labelled"
"""The stream of labeled images. Its views are drawn by this name: another spelling would draw others."""
WEAK = "weak"


@dataclass(frozen=True)
class SemiSchedule:
    """How long and on what. `ratio` unlabeled images come with each labeled one; the pseudo-labels are reported after
    each of at most `rounds` of equal length. A linear `warmup` takes a tenth of the steps, or one round if that is
    shorter.

    With `cached_views` V > 0, which needs a backbone in which nothing is trainable, features of one weak and V strong
    views of every image are computed once. `micro_batches` are exact, also in what needs the whole batch. `weight_ema`
    is the momentum of the running mean of what trains by gradient. SGD's `lr` is taken as it is.
    """

    steps: Positive = 10_000
    rounds: Positive = 20
    ratio: Positive = 1
    strong_views: Positive = 1
    cached_views: Count = 0
    micro_batches: Positive = 1
    weight_ema: FractionBelowOne = 0.0
    optimizer: Optimizer = "sgd"
    lr: FractionBelowOne = 0.01
    weight_decay: FractionBelowOne = 5e-4
    warmup: Warmup = "linear"

    def check(self, session: Session, task: Task, tuning: Tuning, *, unlabeled: bool = True) -> None:
        """Before anything is computed or written: raises LptError for a schedule that cannot be kept."""
        if unlabeled:
            unlabeled_images(task)
        if session.batch_size % (self.micro_batches * rank_and_world()[1]):
            raise LptError(
                f"train.batch_size {session.batch_size} is no multiple of method.micro_batches {self.micro_batches} on "
                "each process"
            )
        if self.steps < self.rounds:
            raise LptError(f"method.rounds {self.rounds} are more than the {self.steps} steps")
        if self.cached_views and tuning != "head":
            raise LptError(
                "method.cached_views needs features that stay as they are: set method.tuning=head, or 0 views"
            )


class PseudoLabels(NamedTuple):
    """Of weak views: probabilities [B C], whose largest is the pseudo-label, which pseudo-labels are kept (`mask` [B]),
    how much each weighs [B], and what every head says for itself [B C]."""

    probability: Tensor
    mask: Tensor
    weight: Tensor
    heads: Mapping[str, Tensor]

    @property
    def label(self) -> Tensor:
        return self.probability.argmax(1)

    def chunk(self, number: int) -> list["PseudoLabels"]:
        """The same in `number` parts of the batch."""
        heads = {name: probability.chunk(number) for name, probability in self.heads.items()}
        columns = (self.probability.chunk(number), self.mask.chunk(number), self.weight.chunk(number))
        parts = []
        for i, (probability, mask, weight) in enumerate(zip(*columns, strict=True)):
            parts.append(PseudoLabels(probability, mask, weight, {name: chunks[i] for name, chunks in heads.items()}))
        return parts


class BatchTerm(NamedTuple):
    """A term of the loss that needs the whole batch: its value, its gradient in the labeled features [B D'] (None: it
    has none), and what to do when the step's gradients are there."""

    loss: Tensor
    gradient: Tensor | None
    commit: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """L = supervised(features, labels) + consistency(strong features, pseudo-labels of the weak views) +
    batch_term(labeled features, labels, pseudo-labels). Without `pseudo_label` only labeled images are looked at."""

    supervised: Callable[[Tensor, Tensor], Tensor]
    pseudo_label: Callable[[Tensor], PseudoLabels] | None = None
    consistency: Callable[[Tensor, PseudoLabels], Tensor] | None = None
    batch_term: Callable[[Tensor, Tensor, PseudoLabels, StepMemory], BatchTerm] | None = None
    """Also given the phase's memory, for what it keeps from step to step."""


def unlabeled_images(task: Task) -> Images | Files:
    """The unlabeled images. Raises LptError where there are none."""
    if task.unlabeled is None or len(task.unlabeled) == 0:
        raise LptError(
            f"{task.name} has no unlabeled images: take data.name=cifar100-semi, give data.unlabeled a folder or "
            "list, or train on labels alone with method.name=fixmatch and method.lambda_u=0"
        )
    return task.unlabeled


def consistency_loss(logits: Tensor, pseudo: PseudoLabels) -> Tensor:
    """mean_j w_j CE(logits_j, ŷ_j) over all unlabeled images of the batch, kept or not (Sohn 2020, FixMatch)."""
    return (pseudo.weight * F.cross_entropy(logits, pseudo.label, reduction="none")).mean()


def semi_phases(
    session: Session,
    model: PromptedClassifier,
    task: Task,
    schedule: SemiSchedule,
    objective: Objective,
    *,
    also_trains: tuple[str, ...] = (),
) -> Iterator[Phase]:
    """The one phase that trains what `model` may learn, and the parameters called `also_trains`, towards `objective`;
    then the weights become their running mean, if the schedule wants one."""
    memory = StepMemory()
    average = WeightAverage(model, memory, schedule.weight_ema) if schedule.weight_ema else None
    strong = tuple(f"strong{v}" for v in range(schedule.strong_views)) if objective.pseudo_label else ()
    streams = _streams(session, task, schedule, strong)
    if schedule.cached_views:
        streams = _cached_streams(session, model, streams, schedule.cached_views)
    yield Phase(
        name="semi",
        trains=(*tunable_names(model), *also_trains),
        step=SemiStep(
            objective=objective,
            strong=strong,
            micro_batches=schedule.micro_batches,
            views_are_features=schedule.cached_views > 0,
            memory=memory,
        ),
        streams=streams,
        steps=schedule.steps,
        steps_per_epoch=-(-schedule.steps // schedule.rounds),
        optimizer=schedule.optimizer,
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
        warmup=schedule.warmup,
        row_multiple=schedule.micro_batches,
        memory=memory,
        on_epoch=RoundReport(session, task, memory),
        before_update=average.update if average else lambda: None,
        evaluated=average.in_model if average else contextlib.nullcontext,
    )
    if average:
        average.copy_to_model()


def _streams(session: Session, task: Task, schedule: SemiSchedule, strong: tuple[str, ...]) -> dict[str, Stream]:
    """Labeled images, and where pseudo-labels are wanted a weak and some strong views of the same unlabeled ones."""
    labeled_rows = InstanceBalanced(task.train.labels, batch_size=session.batch_size, seed=session.seed)
    streams = {LABELED: Stream(labeled_rows, task.train)}
    if strong:
        images, size = unlabeled_images(task), session.batch_size * schedule.ratio
        unlabeled_rows = InstanceBalanced(images.labels, batch_size=size, seed=session.seed + 1)
        streams[WEAK] = Stream(unlabeled_rows, images)
        streams |= {name: Stream(unlabeled_rows, images, strong=True) for name in strong}
    return streams


def _cached_streams(
    session: Session, model: PromptedClassifier, streams: Mapping[str, Stream], views: int
) -> dict[str, Stream]:
    """The same streams as features: `views` strong views of every image, of which every step draws one."""
    cached = {}
    strong_features = None
    for name, stream in streams.items():
        images = stream.images
        assert images is not None
        if not stream.strong:
            features = session.view_features(f"{name}-features", model, images)
        else:
            if strong_features is None:  # all strong streams are of the same images
                each = [session.view_features(f"strong-features-{v}", model, images, strong=True) for v in range(views)]
                strong_features = torch.stack(each)
            features = strong_features
        cached[name] = Stream(stream.sampler, images, features=features)
    return cached


@dataclass(frozen=True, kw_only=True)
class SemiStep:
    """One step of an `Objective`. Labeled images and strong views go through the model together, weak ones apart, since
    they need no gradient."""

    objective: Objective
    strong: tuple[str, ...]
    micro_batches: int
    views_are_features: bool
    memory: StepMemory

    def __call__(
        self, model: PromptedClassifier, batches: dict[str, Batch], progress: Progress
    ) -> Iterator[dict[str, Tensor]]:
        labeled, number = batches[LABELED], self.micro_batches
        pseudo = self._pseudo_labels(model, batches, progress)
        pseudo_parts = pseudo.chunk(number) if pseudo else [None] * number
        term = None
        for i in range(number):
            views = [batches[name].views.chunk(number)[i] for name in (LABELED, *self.strong)]
            features = self._features(model, torch.cat(views))
            labeled_features, *strong_features = features.split([len(part) for part in views])
            terms = self._image_terms(
                labeled_features, labeled.labels.chunk(number)[i], strong_features, pseudo_parts[i]
            )
            loss = terms["supervised"] + terms.get("consistency", 0)
            if self.objective.batch_term and pseudo:
                if term is None:
                    whole = self._whole_batch(model, labeled, labeled_features)
                    term = self.objective.batch_term(whole, labeled.labels, pseudo, self.memory)
                    terms["fitted"] = term.loss
                    loss = loss + term.loss
                if term.gradient is not None:
                    # Its value is zero, its gradient in the features that of the term: exact for a part of the batch.
                    difference = labeled_features - labeled_features.detach()
                    loss = loss + (term.gradient.chunk(number)[i] * difference).sum()
            yield {"loss": loss, **terms}
        if term:
            term.commit()

    def _features(self, model: PromptedClassifier, views: Tensor) -> Tensor:
        return views.float() if self.views_are_features else model.feature(views)

    @torch.no_grad()
    def _whole_batch(self, model: PromptedClassifier, labeled: Batch, features: Tensor) -> Tensor:
        """The labeled features [B D'] of all micro-batches, without a graph; `features` are those of the first."""
        if self.micro_batches == 1:
            return features.detach()
        return torch.cat([self._features(model, views) for views in labeled.views.chunk(self.micro_batches)])

    @torch.no_grad()
    def _pseudo_labels(
        self, model: PromptedClassifier, batches: dict[str, Batch], progress: Progress
    ) -> PseudoLabels | None:
        if self.objective.pseudo_label is None:
            return None
        weak = batches[WEAK]
        features = [self._features(model, views) for views in weak.views.chunk(self.micro_batches)]
        pseudo = self.objective.pseudo_label(torch.cat(features))
        self._note(weak.rows, pseudo, progress.step)
        return pseudo

    def _image_terms(
        self, features: Tensor, labels: Tensor, strong_features: list[Tensor], pseudo: PseudoLabels | None
    ) -> dict[str, Tensor]:
        """The terms that are means over images, as this micro-batch's share of the batch."""
        number, consistency = self.micro_batches, self.objective.consistency
        terms = {"supervised": self.objective.supervised(features, labels) / number}
        if consistency and pseudo is not None:
            terms["consistency"] = torch.stack([consistency(view, pseudo) for view in strong_features]).mean() / number
            terms["kept"] = pseudo.mask.float().mean() / number
        return terms

    def _note(self, rows: Tensor, pseudo: PseudoLabels, step: int) -> None:
        """What the end of the round wants to know of a batch, by names that are in checkpoints and Parquet files."""
        confidence, label = pseudo.probability.max(1)
        notes = {
            "rows": rows.to(label.device),
            "step": torch.full_like(label, step),
            "label": label,
            "confidence": confidence,
            "kept": pseudo.mask,
        }
        for name, probability in pseudo.heads.items():
            top = probability.max(1)
            notes |= {f"{name}_label": top.indices, f"{name}_confidence": top.values}
        self.memory.note(**notes)


@dataclass(frozen=True)
class RoundReport:
    """At the end of a round: its pseudo-labels into their file, and what is worth a line in the history."""

    session: Session
    task: Task
    memory: StepMemory

    def __call__(self, model: PromptedClassifier, progress: Progress) -> Mapping[str, Any]:
        notes = self.memory.take_notes()
        return {"pseudo_labels": self.summarize_round(notes, progress.epoch + 1)} if notes else {}

    def summarize_round(self, notes: Mapping[str, Tensor], number: int) -> dict[str, Any]:
        """`notes` are `SemiStep`'s, of all processes. Writes the file, and warns of classes without pseudo-labels."""
        images, classes = unlabeled_images(self.task), self.task.classes
        file = self.session.pseudo_labels
        if file and rank_and_world()[0] == 0:
            write_round(file, notes, number=number, ids=images.ids, truth=images.labels, classes=classes)
        diagnosis = diagnose(notes, images.labels[notes["rows"]], self.task.counts, None)
        without = [name for name, kept in zip(classes, diagnosis["predicted"], strict=True) if kept == 0]
        if without:
            more = ", ..." if len(without) > 10 else ""
            self.session.log(
                f"warning: round {number} kept no pseudo-label of {len(without)} classes: "
                f"{', '.join(without[:10])}{more}"
            )
        shown = ("coverage", "precision", "false_kept", "false_confidence")
        return {key: diagnosis[key] for key in shown if key in diagnosis} | {"classes_without": without}


class WeightAverage:
    """A running mean of all that trains, m ← μ m + (1 - μ) w, in the phase's memory, so that checkpoints hold it.

    What is remembered is the mean of the weights before the step that is about to end; `means` adds those of now.
    """

    def __init__(self, model: PromptedClassifier, memory: StepMemory, momentum: float) -> None:
        self.model, self.memory, self.momentum = model, memory, momentum

    @torch.no_grad()
    def means(self) -> dict[str, tuple[torch.nn.Parameter, Tensor]]:
        """Name → (parameter, its running mean, the weights of now included)."""
        means = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                old = self.memory.tensors.get(f"average/{name}")
                mean = parameter.clone() if old is None else old.lerp(parameter, 1 - self.momentum)
                means[name] = (parameter, mean)
        return means

    def update(self) -> None:
        """To be called in every step, before the weights change."""
        self.memory.tensors.update({f"average/{name}": mean for name, (_, mean) in self.means().items()})

    def copy_to_model(self) -> None:
        for parameter, mean in self.means().values():
            parameter.data.copy_(mean)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """The model with its running means, as it would be if training ended now."""
        means = self.means()
        weights = {name: parameter.detach().clone() for name, (parameter, _) in means.items()}
        for parameter, mean in means.values():
            parameter.data.copy_(mean)
        try:
            yield
        finally:
            for name, (parameter, _) in means.items():
                parameter.data.copy_(weights[name])
