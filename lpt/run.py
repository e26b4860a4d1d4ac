"""A whole run: from a config to a folder with a prompt file, a report and its page.

`train` is the story: set up, open the folder, build the recipe, follow it, measure, write. Device, precision,
processes, history and evaluation are bound here, once for every method.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lpt.config import Config, data_of_run, load_config_of_run
from lpt.data import LOCATION_SETTINGS, load_task
from lpt.data.image_hashes import hashes_to_store
from lpt.data.task import Task
from lpt.device import PRECISIONS, peak_memory, versions
from lpt.engine.batches import Progress
from lpt.engine.evaluate import Predictions, PrefixCache, best_class, evaluate, measure, predict
from lpt.engine.history import History
from lpt.engine.lock import locked
from lpt.engine.loop import follow
from lpt.engine.processes import naming_lost_peers
from lpt.engine.query import most_chosen
from lpt.engine.retrieval import Arms, looked_at
from lpt.engine.selection import Best, watched
from lpt.engine.session import Log, OnStep, Session, total_cost
from lpt.engine.stopping import Stop
from lpt.engine.tracking import Tracking, check_trackers
from lpt.errors import DataError, LptError, UndecodableImage
from lpt.files import to_bytes, write_atomic
from lpt.memory import naming_lack_of_memory
from lpt.methods import build_recipe, described
from lpt.model.classifier import PromptedClassifier
from lpt.prompt_file import DTYPES, beyond_fp16, save_prompt
from lpt.report.finished import Rows, command_of, split_of, write_page
from lpt.report.markdown import markdown, table
from lpt.report.pseudo_labels import diagnose, read_last_round
from lpt.report.retrieval import bought
from lpt.report.search import search_lines, search_of
from lpt.results import Report
from lpt.setup import Setup

RUN_FILES = ("config.yaml", "checkpoints", "history.jsonl", "prompt.safetensors", "report.json")
"""By what a folder is known to hold a run."""
EPOCH_METRICS = ("accuracy", "class_accuracy", "many", "medium", "few", "ece")
"""What the history says of an evaluation after an epoch."""
FIVE_CROP_METRICS = (*EPOCH_METRICS, "worst_class", "nll", "brier")
"""What a report says of predictions that are means over five crops."""


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    say: Log = lambda text: None,
    show: OnStep = lambda phase, step, steps, rates: None,
) -> Report:
    """Runs the method of `config` and fills the folder `out`; returns the report. `say` takes lines of text for people,
    `show` the running numbers.

    Raises LptError, and Stopped when Ctrl-C or SIGTERM has ended it: in a phase with a checkpoint.
    """
    began, stop, out = time.perf_counter(), Stop(), Path(out)
    with (
        stop.listening(),
        naming_lost_peers(),
        naming_lack_of_memory(lambda: "between the steps"),
        _naming_the_skip(config),
    ):
        check_trackers(config.train.track)
        check_out(out, resume=resume)  # at once, and again when the folder is locked
        if resume and (note := _split_as_before(config, out)):
            config = config.model_copy(update={"data": {**config.data, "split_by": "position"}})
            say(note)
        setup = Setup(config)
        with open_run(setup, out, resume=resume) as folder:
            session = bind(setup, folder, stop, say, show)
            for line in setup.remarks():
                session.log(line)
            with contextlib.closing(session.tracking) if session.tracking else contextlib.nullcontext():
                recipe = build_recipe(setup.config.method, setup.task, setup.backbone, session)
                model = follow(recipe, session)
                results = measure_run(setup, folder, session, model)
                if setup.is_main:
                    write_results(setup, folder, session, results, began)
            setup.accelerator.wait_for_everyone()
    return Report(results.report, classes=setup.task.classes, counts=setup.task.counts.tolist())


@contextlib.contextmanager
def _naming_the_skip(config: Config) -> Iterator[None]:
    """Says how to continue without an image that cannot be decoded, where the data has a setting for that."""
    try:
        yield
    except UndecodableImage as error:
        if config.data.get("on_error") != "raise":
            raise
        raise DataError(f"{error}; lpt doctor names all such, data.on_error=skip continues without them") from None


def _split_as_before(config: Config, out: Path) -> str | None:
    """The message where the run in `out` has split its folder by position, as all of lpt 0.1 did."""
    written = out / "config.yaml"
    if config.data.get("split_by") != "image" or not written.exists():
        return None
    if load_config_of_run(written).data.get("split_by") != "position":
        return None
    return "note: this run's test part was split off by position, and it continues so (data.split_by)"


# The folder of a run.


def check_out(out: Path, *, resume: bool) -> None:
    """Raises LptError where `out` cannot become a run's folder, or the folder of a resumed run."""
    if out.exists() and not out.is_dir():
        raise LptError(f"--out {out} is a file: give a folder")
    if not resume and any((out / name).exists() for name in RUN_FILES):
        raise LptError(f"--out {out} already holds a run: add --resume to continue it, or give another folder")


class RunFolder:
    """The folder of one run: nothing is written before `take`, which locks it for this process."""

    def __init__(self, out: Path, setup: Setup, *, resume: bool, until_closed: contextlib.ExitStack) -> None:
        self.out, self.setup, self.resume = out, setup, resume
        self.checkpoints = out / "checkpoints"
        self.pseudo_labels = out / "pseudo_labels"
        self.history = History(out / "history.jsonl" if setup.is_main else None)
        self.best = Best(self.checkpoints, setup.run_hash, writes=setup.is_main)
        self._until_closed, self._taken = until_closed, False

    def check_same_run(self) -> None:
        """Raises LptError where the folder holds a run with other settings, weights or images."""
        config_file = self.out / "config.yaml"
        if config_file.exists() and self.setup.identity_of(load_config_of_run(config_file)) != self.setup.run_hash:
            raise LptError(
                f"--out {self.out} holds a run with other settings: use those in {config_file}, or another --out"
            )
        sha256 = self.setup.manifest["sha256"]
        if split_of(self.out).get("sha256", sha256) != sha256:
            raise LptError(f"--out {self.out} holds a run on other images than there are now: give another --out")

    def take(self) -> None:
        """Locks the folder, looks at it once more, and says in it what is run; a second time nothing happens."""
        if self._taken or not self.setup.is_main:
            return
        self._taken = True
        self._until_closed.enter_context(locked(self.out))
        # Another run may have begun here, or ended, while this one was loading.
        check_out(self.out, resume=self.resume)
        self.check_same_run()
        self.history.read()
        write_atomic(self.out / "config.yaml", self.setup.config.to_yaml().encode())
        write_atomic(self.out / "split.json", json.dumps(self.setup.manifest).encode())


@contextlib.contextmanager
def open_run(setup: Setup, out: Path, *, resume: bool) -> Iterator[RunFolder]:
    """The folder `out` for this run, and its lock from the moment that the run takes it until the end."""
    with contextlib.ExitStack() as until_closed:
        folder = RunFolder(out, setup, resume=resume, until_closed=until_closed)
        folder.check_same_run()
        yield folder


def bind(setup: Setup, folder: RunFolder, stop: Stop, say: Log, show: OnStep) -> Session:
    """The session of a run in `folder`. Only the main process speaks and writes."""
    settings = setup.config.train
    session = Session(
        images=setup.task.train,
        preprocess=setup.backbone.preprocess,
        batch_size=settings.batch_size,
        seed=settings.seed,
        start_seed=settings.start_seed,
        dtype=PRECISIONS[setup.precision],
        history=folder.history,
        checkpoints=folder.checkpoints,
        checkpoint_seconds=settings.checkpoint_seconds,
        feature_cache=Path(settings.feature_cache) if settings.feature_cache else None,
        run_hash=setup.run_hash,
        pseudo_labels=folder.pseudo_labels,
        gnm=settings.gnm,
        count_flops=not settings.compile,
        workers=settings.workers,
        stop=stop,
        on_start=folder.take,
        on_epoch=EpochMetrics(setup, folder),
    )
    if not setup.is_main:
        return session
    tracking = track(setup, folder, session, say) if settings.track else None
    return replace(session, log=say, on_step=show, tracking=tracking)


def track(setup: Setup, folder: RunFolder, session: Session, say: Log) -> Tracking:
    """The trackers of a run, which know its settings, and what its numbers depend on beside them."""
    identity = {
        "run_hash": setup.run_hash,
        "split_sha256": setup.manifest["sha256"],
        "backbone_fingerprint": setup.backbone.fingerprint,
        "versions": versions(),
    }
    return Tracking(
        setup.config.train.track,
        folder.out,
        parameters={**setup.config.model_dump(), **identity},
        costs=session.costs,
        device=setup.device,
        resume=folder.resume,
        say=say,
    )


class EpochMetrics:
    """After an epoch: metrics on the held-out images, of which `best` keeps the best epoch where the config wants it,
    and in the last epochs, where it wants that, on the test set, which nothing is chosen by."""

    def __init__(self, setup: Setup, folder: RunFolder) -> None:
        self.task, self.settings, self.cache = setup.task, setup.config.train, PrefixCache()
        self.best = folder.best if self.settings.select == "best_val" else None

    def __call__(self, model: PromptedClassifier, progress: Progress) -> dict[str, Any]:
        task, measured = self.task, {}
        if task.val is not None:
            metrics = evaluate(
                model,
                task.val,
                task.counts,
                group_rule=task.group_rule,
                cache=self.cache,
                workers=self.settings.workers,
            )
            if self.best:
                self.best.offer(model, progress.phase, progress.step + 1, metrics["class_accuracy"])
            measured["val"] = {key: metrics[key] for key in EPOCH_METRICS}
        if progress.epochs - progress.epoch <= self.settings.watch_test:
            metrics = evaluate(model, task, workers=self.settings.workers)
            measured["test"] = {key: metrics[key] for key in EPOCH_METRICS}
        return measured


# What came of it.


@dataclass(frozen=True)
class Results:
    """A trained model, what it predicts on the test set, the precision of its prompt file, and the report, to which the
    process that writes adds sizes, seconds and memory."""

    model: PromptedClassifier
    predictions: Predictions
    storage: str
    report: dict[str, Any]


def measure_run(setup: Setup, folder: RunFolder, session: Session, model: PromptedClassifier) -> Results:
    """Chooses the weights and evaluates them. What is evaluated is what is stored: they are rounded first, so that the
    file reloads to the same bits."""
    task, settings = setup.task, setup.config.train
    selection = "last"
    if settings.select == "best_val":
        trained = [phase for phase, cost in session.costs.items() if cost.steps]
        selection = folder.best.restore(model, trained[-1])
    storage = settings.storage
    if storage == "fp16" and (name := beyond_fp16(model)):
        session.log(f"warning: {name} holds numbers beyond fp16's 65504; the prompt file is stored in fp32")
        storage = "fp32"
    model.round_to(DTYPES[storage])
    model.only_train().eval()
    model.task_means = session.task_means(task, setup.backbone)
    predictions, retrieval = predict_test(setup, session, model)
    metrics = measure(model, predictions, task.counts, group_rule=task.group_rule)
    report = {
        **metrics,
        **({"retrieval": retrieval} if retrieval else {}),
        "method": setup.config.method["name"],
        "described": described(setup.config.method["name"], setup.config.method),
        "selection": selection,
        "scale": model.head.scale,
        "backbone": {"name": setup.backbone.name, "fingerprint": setup.backbone.fingerprint},
        "data": data_facts(setup),
        "seed": settings.seed,
        "precision": setup.precision,
        "trainable_parameters": model.trainable_parameters,
        "cost": asdict(total_cost(session.costs.values())),
        "absent_classes": task.absent_classes(),
        "skipped_images": list(task.facts.get("skipped", ())),
        "labels_seen": {name: len(shared) for name, shared in setup.labels_seen.items()},
        "versions": versions(),
    }
    if settings.tta == "five_crop":
        crops = predict(model, task.test, workers=settings.workers, tta=settings.tta)
        measured = measure(model, crops, task.counts, group_rule=task.group_rule)
        report["five_crops"] = {key: measured[key] for key in FIVE_CROP_METRICS}
    return Results(model, predictions, storage, report)


def predict_test(
    setup: Setup, session: Session, model: PromptedClassifier
) -> tuple[Predictions, dict[str, Any] | None]:
    """(what `model` predicts on the test set, what its group prompts buy where it has any).

    The second is of held-out images where there are some, since it is to choose by, and else of the test images, from
    the prefix tokens of the same pass.
    """
    task, workers = setup.task, setup.config.train.workers
    images = task.test if task.val is None else task.val
    arms, constant, chosen_by = None, [], 0.0
    if model.pool is not None:
        ids, chosen_by = most_chosen(model, task.train, workers=workers)
        arms, constant = Arms.of(model, images.labels, constant=ids, seed=session.seed), ids.tolist()
    beside = arms if task.val is None else None
    predictions = predict(
        model, task.test, folder=session.feature_cache, say=session.log, workers=workers, beside=beside
    )
    if arms is None:
        return predictions, None
    answers = (predictions if beside else predict(model, images, workers=workers, beside=arms)).beside
    answer = "both" if model.query_head is not None else "fixed" if "fixed" in answers else "retrieved"
    retrieval = bought(
        *looked_at(answers, images.labels),
        task.counts,
        group_rule=task.group_rule,
        answer=answer,
        images="test" if task.val is None else "held-out",
        constant=constant,
        chosen_by=chosen_by,
    )
    session.log(retrieval["says"])
    return predictions, retrieval


def data_facts(setup: Setup) -> dict[str, Any]:
    """What report and prompt file say of the data."""
    task = setup.task
    return {
        "name": task.name,
        "variant": task.facts.get("variant"),
        "imbalance_factor": task.imbalance_factor,
        "split_sha256": setup.manifest["sha256"],
        "counts": task.counts.tolist(),
        "group_rule": task.group_rule,
    }


def write_results(setup: Setup, folder: RunFolder, session: Session, results: Results, began: float) -> None:
    """Prompt file, predictions, report and page; completes the report."""
    out, report, classes = folder.out, results.report, setup.task.classes
    spent = sum(session.seconds_before.values()) + time.perf_counter() - began
    write_prompt(setup, out / "prompt.safetensors", results)
    if pseudo_labels := summarize_pseudo_labels(folder.pseudo_labels, setup.task):
        report["pseudo_labels"] = pseudo_labels
    if on_test := watched(session.history.lines):
        report["watched"] = on_test
    report |= {
        "prompt_bytes": (out / "prompt.safetensors").stat().st_size,
        "seconds": round(spent, 1),
        "peak_memory_bytes": peak_memory(setup.device),
    }
    confidence, predicted_class = best_class(results.model, results.predictions.logits)
    predicted = {
        "labels": results.predictions.labels,
        "predicted": predicted_class,
        "confidence": confidence,
    }
    write_atomic(out / "predictions.safetensors", to_bytes(predicted))
    text = markdown(report, classes=classes, command=command_of(out))
    if search := search_of(out):
        text += "\n" + "\n".join(search_lines(search))
    write_atomic(out / "report.md", text.encode())
    write_atomic(out / "report.json", json.dumps(report, indent=1).encode())
    write_page(out, test=setup.task.test)
    if session.tracking:
        session.tracking.end(report, table([(report["described"], report)]))


def write_prompt(setup: Setup, path: Path, results: Results) -> None:
    """The prompt file, with what was measured."""
    config, task = setup.config, setup.task
    labeled_sha256 = setup.manifest["sha256"]
    if task.unlabeled:  # the unlabeled images need not be at hand when the file is evaluated
        labeled_sha256 = replace(task, unlabeled=None).manifest()["sha256"]
    save_prompt(
        path,
        results.model,
        method=config.method["name"],
        counts=task.counts,
        storage=results.storage,
        settings=config.stored_method_settings(),
        precision=setup.precision,
        data={
            **data_facts(setup),
            "labeled_sha256": labeled_sha256,
            "settings": {key: value for key, value in config.data.items() if key not in LOCATION_SETTINGS},
        },
        metrics={key: results.report[key] for key in (*EPOCH_METRICS, "nll")},
        versions=versions(),
        trained_on=hashes_to_store(task),
        start_seed=config.train.seed if config.train.start_seed is None else config.train.start_seed,
    )


def summarize_pseudo_labels(path: Path, task: Task) -> dict[str, Any] | None:
    """What the last round of pseudo-labels was like, if there was one."""
    last = read_last_round(path, task.classes) if task.unlabeled is not None else None
    if last is None:
        return None
    assert task.unlabeled is not None
    notes, number = last
    labels = task.unlabeled.labels
    true_counts = torch.bincount(labels, minlength=len(task.classes)) if bool((labels >= 0).all()) else None
    return {"round": number, **diagnose(notes, notes["truth"], task.counts, true_counts)}


def report_again(out: Path, *, against: Sequence[Path] = ()) -> Rows:
    """`write_page` once more, with the images if the data is still where the run's config says."""
    test = None
    if (out / "config.yaml").exists():
        with contextlib.suppress(LptError, OSError, ValueError):  # a page without pictures is better than none
            task = load_task(**data_of_run(out / "config.yaml"))
            test = task.test if task.manifest()["sha256"] == split_of(out).get("sha256") else None
    return write_page(out, test=test, against=against)
