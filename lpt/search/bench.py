"""What all candidates are tried on: the training images in folds, one backbone, and its features computed once.

Shapes: features [N D'], right [H].
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpt.config import Config, resolve
from lpt.data.folds import Folds, held_out_folds
from lpt.data.task import Files, Images, Task
from lpt.device import PRECISIONS, pick_device, pick_precision
from lpt.engine.evaluate import features, predict
from lpt.engine.loop import follow
from lpt.engine.phase import Recipe
from lpt.engine.session import Log, OnStep, Session
from lpt.engine.stopping import Stop
from lpt.errors import TrainingError
from lpt.files import write_atomic
from lpt.methods import build_recipe
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.search.candidates import Candidate
from lpt.setup import check_memory, open_backbone

BYTES = 2
"""Of a stored number: prompt files are in fp16."""


@dataclass(frozen=True, kw_only=True)
class FoldSession(Session):
    """A session in which the features of the bare backbone are there already: `known` [N D'], of `images`."""

    known: Tensor

    def features(self, name: str, model: PromptedClassifier, images: Images | Files) -> Tensor:
        # LPT asks for them under its untrained prompt, whose tokens are small: in a search those without it will do.
        if name == "features" and images is self.images and not model.backbone.learned:
            return self.known
        return super().features(name, model, images)


class Bench:
    """`sections` are those of a config, without the method; `folder` is where the search keeps what it has computed.

    `labels` [H] are those of all held-out images, fold after fold.
    """

    def __init__(self, sections: Mapping[str, Any], task: Task, folder: Path, *, log: Log = print) -> None:
        self.sections, self.task, self.folder, self.log = sections, task, folder, log
        self.train = resolve({**sections, "method": {"name": "class_mean"}}).train
        self.device = pick_device(self.train.device)
        self.precision = pick_precision(self.train.precision, self.device)
        self.stop = Stop()
        self.on_step: OnStep = lambda phase, step, steps, rates: None
        if task.val is None:
            self.folds = held_out_folds(task.train.labels, len(task.classes), seed=self.train.seed)
            self.labels = task.train.labels[torch.cat([torch.zeros(0).long(), *self.folds.held_out])]
        else:  # what the data itself holds out
            self.folds = Folds((torch.arange(len(task.val)),), ())
            self.labels = task.val.labels
        self._backbones: dict[int | None, Backbone] = {}
        self._features: dict[tuple[int, str], Tensor] = {}

    def config_of(self, candidate: Candidate) -> Config:
        """The config that trains a candidate on all training images."""
        backbone = {**self.sections["backbone"], "image_size": candidate.image_size or None}
        train = {"feature_cache": str(self.folder / "features"), **self.sections["train"]}
        train["batch_size"] = candidate.batch_size
        return resolve({**self.sections, "backbone": backbone, "train": train, "method": candidate.settings})

    def backbone(self, size: int | None = None) -> Backbone:
        """The backbone at an image size, by default the one that the config names, or its own."""
        if size not in self._backbones:
            backbone = {**self.sections["backbone"], **({} if size is None else {"image_size": size})}
            config = resolve({**self.sections, "backbone": backbone, "method": {"name": "class_mean"}})
            found = open_backbone(config).to(self.device, PRECISIONS[self.precision])
            self._backbones[size] = self._backbones.setdefault(found.preprocess.size, found)
        return self._backbones[size]

    def features(self, size: int, images: Images | Files) -> Tensor:
        """The features [N D'] of `images` under the bare backbone, from the disk where they were computed before."""
        key = (size, images.digest)
        if key not in self._features:
            cache = Path(self.train.feature_cache) if self.train.feature_cache else self.folder / "features"
            model = self.bare(self.backbone(size))
            self._features[key] = features(model, images, folder=cache, say=self.log, workers=self.train.workers)
        return self._features[key]

    def bare(self, backbone: Backbone) -> PromptedClassifier:
        """A model that knows nothing yet, for its features."""
        head = CosineHead(num_classes=len(self.task.classes), width=backbone.feature_width, scale=1.0)
        return PromptedClassifier(backbone, head, classes=self.task.classes).to(self.device)

    def fold_task(self, fold: int) -> tuple[Task, Tensor | None]:
        """(the task of a fold, without held-out images; the rows of its training images, None where it has all)."""
        if self.task.val is not None:
            return replace(self.task, val=None, unlabeled=None), None
        rows = self.folds.rest(fold, len(self.task.train))
        train = self.task.train.subset(rows.tolist())
        return replace(self.task, train=train, val=None, unlabeled=None), rows

    def held_out(self, fold: int) -> Images | Files:
        """The images that are held out in a fold."""
        if self.task.val is not None:
            return self.task.val
        return self.task.train.subset(self.folds.held_out[fold].tolist())

    def session(self, candidate: Candidate, task: Task, known: Tensor, **changes: Any) -> FoldSession:
        """A session for `candidate` on the images of a fold's `task`."""
        return FoldSession(
            images=task.train,
            preprocess=self.backbone(candidate.image_size).preprocess,
            batch_size=candidate.batch_size,
            seed=self.train.seed,
            dtype=PRECISIONS[self.precision],
            count_flops=False,
            workers=self.train.workers,
            stop=self.stop,
            on_step=self.on_step,
            known=known,
            **changes,
        )


@dataclass(frozen=True)
class Trial:
    """What came of a candidate on one fold: the classes that it predicts of the held-out images [H], what it cost, or
    the sentence with which it failed."""

    candidate: str
    fold: int
    share: float
    predicted: tuple[int, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    bytes: int = 0
    ms: float = 0.0
    failed: str = ""
    identity: str = field(default="", compare=False)


def run_trial(bench: Bench, candidate: Candidate, fold: int, share: float, identity: str) -> Trial:
    """Trains `candidate` on the rest of a fold, for a `share` of its schedule, and asks it about what is held out. What
    was done before is read from the search's folder, where the trial is kept as one whole file."""
    name = f"{candidate.name}-{fold}-{share:g}"
    file = bench.folder / "trials" / f"{name}.json"
    if (before := _read_trial(file, identity)) is not None:
        return before
    began = time.perf_counter()
    place = bench.folder / "checkpoints" / name
    run_hash = f"{identity}/{name}"
    try:
        trial = _train_and_ask(bench, candidate, fold, share, place, run_hash)
    except TrainingError as error:  # numbers that left their range: the others continue
        trial = Trial(candidate.name, fold, share, failed=str(error))
    trial = replace(trial, identity=identity, seconds=round(time.perf_counter() - began, 2))
    write_atomic(file, json.dumps(vars(trial)).encode())
    for left in place.glob("*"):
        left.unlink()
    return trial


def _read_trial(file: Path, identity: str) -> Trial | None:
    """A trial of this very search; None where there is none, or a file of something else."""
    try:
        found = json.loads(file.read_text())
        trial = Trial(**{**found, "predicted": tuple(found["predicted"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return trial if trial.identity == identity else None


def _train_and_ask(bench: Bench, candidate: Candidate, fold: int, share: float, place: Path, run_hash: str) -> Trial:
    task, rows = bench.fold_task(fold)
    size, held_out = candidate.image_size, bench.held_out(fold)
    backbone = bench.backbone(size)
    every = bench.features(size, bench.task.train)
    session = bench.session(
        candidate,
        task,
        every if rows is None else every[rows],
        checkpoints=None if candidate.on_features else place,
        run_hash=run_hash,
    )
    recipe = shortened(build_recipe(candidate.settings, task, backbone, session), share)
    model = follow(recipe, session)
    model.only_train().eval()
    began = time.perf_counter()
    if candidate.on_features:
        known = bench.features(size, held_out) if rows is None else every[bench.folds.held_out[fold]]
        with torch.no_grad():
            logits = model.classify(known.to(bench.device))
    else:
        logits = predict(model, held_out, workers=bench.train.workers).logits
    ms = 1000 * (time.perf_counter() - began) / len(held_out)
    return Trial(
        candidate.name,
        fold,
        share,
        predicted=tuple(logits.argmax(1).tolist()),
        steps=sum(cost.steps for cost in session.costs.values()),
        bytes=BYTES * sum(value.numel() for value in model.learned_state().values()),
        ms=round(ms, 3),
    )


def shortened(recipe: Recipe, share: float) -> Recipe:
    """The recipe with a `share` of the steps of each phase, whose rate falls to 0 all the same."""
    if recipe.phases is None or share == 1:
        return recipe
    given = recipe.phases

    def phases() -> Iterator[Any]:
        for phase in given:
            yield replace(phase, steps=max(1, round(share * phase.steps)))

    return Recipe(recipe.model, phases())


def check_fits(bench: Bench, candidate: Candidate) -> None:
    """Raises LptError where a step of `candidate` needs more memory than there is."""
    check_memory(
        candidate.settings,
        bench.task,
        bench.backbone(candidate.image_size),
        candidate.batch_size,
        dtype=PRECISIONS[bench.precision],
        device=bench.device,
    )
