"""What a run binds once for all of its phases: images, randomness, precision, folder, and where progress goes."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpt.data.loader import Workers
from lpt.data.preprocess import Preprocess
from lpt.data.task import Files, Images, Task
from lpt.engine.batches import ImageSource, InOrder, Progress, Stream, drawn_ahead, to_views
from lpt.engine.checkpoint import Checkpoint, DamagedCheckpoint, load_checkpoint, save_checkpoint, unreadable
from lpt.engine.evaluate import feature_problem, features
from lpt.engine.history import History
from lpt.engine.phase import EpochEnd
from lpt.engine.processes import all_agree, all_gather_rows, rank_and_world
from lpt.engine.query import fit_query_map
from lpt.engine.stopping import Stop
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier, bare_classifier
from lpt.model.task_means import TaskMeans, means_of_sample, sampled_rows, task_means

if TYPE_CHECKING:
    from lpt.engine.tracking import Tracking

Log = Callable[[str], None]
"""Takes a line of text for people."""
OnStep = Callable[[str, int, int, str], None]
"""Takes (phase, steps done, steps, rates and time left) after every step."""
VIEW_BATCH = 128
"""Views whose features are computed at a time."""


@dataclass
class Cost:
    """Of a phase, all processes together: steps, images (views through the model, or rows of features), FLOPs."""

    steps: int = 0
    images: int = 0
    flops: int = 0


def total_cost(costs: Iterable[Cost]) -> Cost:
    """Of a whole run."""
    costs = list(costs)
    return Cost(
        steps=sum(cost.steps for cost in costs),
        images=sum(cost.images for cost in costs),
        flops=sum(cost.flops for cost in costs),
    )


@dataclass(frozen=True, kw_only=True)
class Session:
    """One run as its methods and its loop see it. Only `costs`, `seconds_before` and the history grow while it runs.

    >>> import lpt
    >>> task, backbone = lpt.load_task("digits-lt"), lpt.load_backbone("nano")
    >>> session = lpt.Session(images=task.train, preprocess=backbone.preprocess, batch_size=32, seed=3)
    >>> session.start, session.gnm
    (3, 0.0)
    """

    images: ImageSource
    """The training images."""
    preprocess: Preprocess
    batch_size: int
    """Images of one stream in a step, of all processes together."""
    seed: int = 0
    start_seed: int | None = None
    """What the model's start is drawn from; None is `seed`, from which everything else is."""
    dtype: torch.dtype = torch.float32
    """Of the views that the model is given."""
    history: History = field(default_factory=History)
    checkpoints: Path | None = None
    """The folder of checkpoints; None keeps nothing."""
    checkpoint_seconds: float = 30.0
    feature_cache: Path | None = None
    """A folder for features of fixed views, which several runs may share (`lpt.engine.evaluate.features`)."""
    run_hash: str = ""
    """What checkpoints must agree with."""
    pseudo_labels: Path | None = None
    """The folder where a method that labels images by itself writes what it thought of each."""
    gnm: float = 0.0
    """How far beside the weights gradients are taken (`lpt.engine.gnm`); 0 is at the weights."""
    count_flops: bool = True
    workers: Workers = "auto"
    """Processes that make views of files, and strong views."""
    stop: Stop = field(default_factory=Stop)
    on_start: Callable[[], None] = lambda: None
    """Called before anything is computed or written, when the method has accepted its settings. It may be called
    again."""
    on_epoch: EpochEnd | None = None
    log: Log = lambda text: None
    on_step: OnStep = lambda phase, step, steps, rates: None
    tracking: "Tracking | None" = None
    """The experiment trackers that log it."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """By phase."""
    seconds_before: dict[str, float] = field(default_factory=dict)
    """Seconds by phase that earlier, killed processes have spent on what this one did not do again."""
    means_known: dict[str, TaskMeans] = field(default_factory=dict)
    """Of images whose features under the bare backbone have been computed, by their digest."""

    @property
    def start(self) -> int:
        """The seed of the model's start: prompts, adapters, head."""
        return self.seed if self.start_seed is None else self.start_seed

    def features(self, name: str, model: PromptedClassifier, images: Images | Files) -> Tensor:
        """The features [N D'] of the test views of `images` under `model` as it is now, computed once in a run."""

        def compute() -> Tensor:
            return features(model, images, folder=self.feature_cache, say=self.log, workers=self.workers)

        value = self.once(name, images, compute, problem=_problem_with(len(images), model.backbone.feature_width))
        if model.is_bare:
            self.means_known[images.digest] = means_of_sample(value, images.labels, len(model.classes))
        return value

    def task_means(self, task: Task, backbone: Backbone) -> TaskMeans:
        """Where `task` lies among the features of the bare backbone: of features that a method has asked for, else of
        one pass over a few images of each class. Their number and the seconds are said."""
        began, digest, number = time.perf_counter(), task.train.digest, len(sampled_rows(task.train.labels))
        of = f"{number} of {len(task.train)} training images under the bare backbone"
        if (known := self.means_known.get(digest)) is not None:
            self.log(f"class means for routing: of {of}, whose features were there")
            return known
        bare = bare_classifier(backbone, task.classes)
        sample = task.train.subset(sampled_rows(task.train.labels).tolist())
        found = features(bare, sample, folder=self.feature_cache, say=self.log, workers=self.workers)
        means = task_means(found, sample.labels, len(task.classes))
        self.log(f"class means for routing: of {of}, {time.perf_counter() - began:.1f} s")
        return means

    def query_map(self, model: PromptedClassifier, images: Images | Files) -> Tensor:
        """What makes early queries of `model` [D' S+1] (`lpt.engine.query.fit_query_map`), fitted once in a run."""
        return self.once("query-map", images, lambda: fit_query_map(model, images, workers=self.workers))

    def view_features(
        self, name: str, model: PromptedClassifier, images: ImageSource, *, strong: bool = False
    ) -> Tensor:
        """The features [N D'] of one random view of each of `images`, in order, computed once in a run: a stream's
        `features`, for stages in which nothing in the backbone is trainable. `name` draws the views."""

        def compute() -> Tensor:
            return self._view_features(name, model, images, strong)

        return self.once(name, images, compute, problem=_problem_with(len(images.labels), model.backbone.feature_width))

    def once(
        self,
        name: str,
        images: ImageSource,
        compute: Callable[[], Tensor],
        *,
        problem: Callable[[Tensor], str | None] = lambda value: None,
    ) -> Tensor:
        """What `compute` returns of `images`, kept beside the checkpoints: a resumed run need not compute it again,
        unless the images have another digest, the file is damaged, or `problem` says what is wrong with the value. What
        it cost under `name` is kept with it."""
        self.on_start()
        file = self.checkpoints / f"{name}-{images.digest[:12]}.safetensors" if self.checkpoints else None
        before = self._computed_before(file, problem) if file else None
        if all_agree(before is not None):
            assert before is not None
            return self._taken_over(name, before)
        began = time.perf_counter()
        value = compute()
        self.seconds_before[name] = 0.0  # this process has spent them
        if file and rank_and_world()[0] == 0:
            cost = asdict(self.costs[name]) if name in self.costs else {}
            checkpoint = Checkpoint(
                step=0,
                finished=True,
                seconds=time.perf_counter() - began,
                tensors={"value": value},
                memory={key: torch.tensor(number) for key, number in cost.items()},
            )
            save_checkpoint(file, checkpoint, run_hash=self.run_hash)
        return value

    def _computed_before(self, file: Path, problem: Callable[[Tensor], str | None]) -> Checkpoint | None:
        """What is kept in `file`, None where there is none, or one that is damaged: it is written anew."""
        try:
            checkpoint = load_checkpoint(file, run_hash=self.run_hash)
            if checkpoint is None:
                return None
            if "value" not in checkpoint.tensors:
                raise unreadable(file, "it holds no value")
            if wrong := problem(checkpoint.tensors["value"]):
                raise unreadable(file, wrong)
            return checkpoint
        except DamagedCheckpoint as error:
            self.log(f"{str(error).rpartition(': ')[0]}: what was in it is computed and written anew")
            return None

    def _taken_over(self, name: str, checkpoint: Checkpoint) -> Tensor:
        if checkpoint.memory:
            self.costs[name] = Cost(**{key: int(number) for key, number in checkpoint.memory.items()})
        self.seconds_before.setdefault(name, checkpoint.seconds)
        return checkpoint.tensors["value"]

    @torch.no_grad()
    def _view_features(self, name: str, model: PromptedClassifier, images: ImageSource, strong: bool) -> Tensor:
        device = next(model.parameters()).device
        rank, world = rank_and_world()
        total = len(images.labels)
        size = -(-min(VIEW_BATCH, total) // world) * world  # the same rows for any number of processes
        steps = -(-total // size)
        in_order = {name: Stream(InOrder(total, size), images, strong)}
        parts, flops = [], 0
        ahead = drawn_ahead(
            in_order,
            (Progress(name, step, steps, steps, self.seed, rank, world) for step in range(steps)),
            images,
            self.preprocess,
            number=steps,
            workers=self.workers,
            pinned=device.type == "cuda",
        )
        with ahead as batches:
            for progress, drawn in batches:
                views = to_views(drawn, self.preprocess, device, self.dtype)[name].views
                with counting_flops(self.count_flops and progress.step == 0) as counted:
                    parts.append(model.feature(views))
                flops = flops or counted() // size * world * total
                self.on_step(name, progress.step + 1, steps, "")
        self.costs[name] = Cost(images=total, flops=flops)
        return all_gather_rows(torch.cat(parts), steps * size)[:total].cpu()


def _problem_with(rows: int, width: int) -> Callable[[Tensor], str | None]:
    return lambda value: feature_problem(value, rows, width)


@contextlib.contextmanager
def counting_flops(wanted: bool) -> Iterator[Callable[[], int]]:
    """Counts the floating-point operations of what runs inside: two for each multiply-add of the matrix products."""
    if not wanted:
        yield lambda: 0
        return
    from torch.utils.flop_counter import FlopCounterMode

    counter: Any = FlopCounterMode(display=False)
    with counter:
        yield counter.get_total_flops
