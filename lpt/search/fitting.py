"""`lpt fit`: plan, try, choose, say why, and train the one that was chosen on all training images."""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.config import Config, TrainSettings, check_data, nested, resolve
from lpt.data import LOCATION_SETTINGS, load_task
from lpt.data.longtail import shot_groups
from lpt.device import pick_device
from lpt.engine.lock import locked
from lpt.engine.processes import rank_and_world
from lpt.engine.session import Log, OnStep
from lpt.errors import ConfigError, LptError, quoted
from lpt.files import write_atomic
from lpt.report.search import search_table
from lpt.run import check_out, train
from lpt.search.bench import Bench, Trial, run_trial
from lpt.search.budget import SHORT, Planner, SearchPlan, kept_of, reference_of
from lpt.search.candidates import BACKBONES, Candidate, candidates, narrowed
from lpt.search.choice import CHEAPER, Z_CHOICE, Finalist, Metric, choose, difference, halved, image_weights, score
from lpt.settings import validated

UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Request:
    """What is asked of a search: the sections of a config without its method, settings that the method must have, a
    budget in seconds, and the metric to choose by."""

    sections: dict[str, dict[str, Any]]
    method: dict[str, Any]
    budget: float
    metric: Metric


class Chosen(NamedTuple):
    """A candidate, the config that trains it, and what is reported about the search; None where nothing was
    compared."""

    candidate: Candidate
    config: Config
    search: dict[str, Any] | None


def seconds_of(text: str) -> float:
    """A budget as people write it. Raises LptError.

    >>> seconds_of("10m"), seconds_of("90"), seconds_of("1.5h")
    (600.0, 90.0, 5400.0)
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([smh]?)", text.strip())
    seconds = float(found[1]) * UNITS[found[2] or "s"] if found else 0.0
    if not 0 < seconds < 1e9:
        raise LptError(f"--budget {quoted(repr(text))} is no time: give for example 90s, 10m or 1.5h")
    return seconds


def requested(
    root: str | None,
    overrides: Sequence[str],
    *,
    budget: str = "10m",
    metric: str = "class_mean",
    seed: int | None = None,
) -> Request:
    """What the words of a command ask for; `overrides` are `section.key=value` texts. Raises ConfigError with every
    mistake in them, and LptError."""
    given = nested(overrides)
    data = {"name": "folder", **given.get("data", {})}
    if root is not None:
        data["root"] = root
    data = {key: value for key, value in check_data(data).items() if value is not None}
    train_given = {**given.get("train", {}), **({} if seed is None else {"seed": seed})}
    settings, mistakes = validated("train", TrainSettings, {k: v for k, v in train_given.items() if k == "device"})
    if mistakes:
        raise ConfigError(mistakes)
    backbone = {"name": BACKBONES[pick_device(settings["device"]).type], **given.get("backbone", {})}
    others = {key: value for key, value in given.items() if key not in ("data", "train", "backbone", "method")}
    sections = {"backbone": backbone, "data": data, "train": train_given, **others}
    resolve({**sections, "method": {"name": "class_mean"}})  # all mistakes but those of the method
    if metric not in ("class_mean", "few", "accuracy"):
        raise LptError(f"--metric {quoted(repr(metric))} is none of class_mean, few, accuracy")
    return Request(sections, given.get("method", {}), seconds_of(budget), metric)


def fit(
    request: Request,
    out: Path,
    *,
    resume: bool = False,
    save: Path | None = None,
    say: Log = lambda text: None,
    show: OnStep = lambda phase, step, steps, rates: None,
) -> dict[str, Any]:
    """Searches, says why it chose what it chose, and trains that in the folder `out`; returns its report. The chosen
    config is written to `save`, too.

    Raises LptError, and Stopped when Ctrl-C or SIGTERM has ended it; with `resume` it then continues where it was.
    """
    check_out(out, resume=resume)
    if rank_and_world()[1] > 1:
        raise LptError("lpt fit searches in one process: run it so, then train the config that it leaves with several")
    config = searched(request, out, resume=resume, say=say, show=show).config
    if save:
        write_atomic(save, config.to_yaml().encode())
    return train(config, out, resume=resume, say=say, show=show)


def searched(
    request: Request,
    out: Path,
    *,
    resume: bool = False,
    say: Log = lambda text: None,
    show: OnStep = lambda phase, step, steps, rates: None,
) -> Chosen:
    """The choice alone. What the search computes lies in `out/search`, its summary in `out/search.json`."""
    began = time.perf_counter()
    task = load_task(**request.sections["data"])
    bench = Bench(request.sections, task, out / "search", log=say)
    bench.on_step = show
    found, others = narrowed(_all(bench, request), request.method)
    configs = [bench.config_of(one) for one in found]  # mistakes end it here
    if len(found) == 1 and (found[0].on_features or found[0].name == "given" or "epochs" in found[0].method):
        return Chosen(found[0], configs[0], None)
    if not (resume or not (out / "search").exists()):
        raise LptError(f"--out {out} already holds a search: add --resume to continue it, or give another folder")
    with bench.stop.listening(), locked(out):
        if len(bench.labels) == 0 and len(found) > 1:
            say("no class has 3 training images, so that nothing can be held out and compared: class means it is")
            return Chosen(found[0], configs[0], None)
        weights = _weights(bench, request.metric)
        plan = _planned(bench, found, request, time.perf_counter() - began)
        _say_plan(bench, plan, others, request, say)
        if len(plan.candidates) == 1:
            return Chosen(plan.candidates[0], bench.config_of(plan.candidates[0]), None)
        rows = tried(bench, plan, weights, say)
        chosen, summary = concluded(bench, plan, rows, weights, request)
        write_atomic(out / "search.json", json.dumps(summary, indent=1).encode())
        for line in [*search_table(summary).split("\n"), summary["why"]]:
            say(line)
        return Chosen(chosen, bench.config_of(chosen), summary)


def _all(bench: Bench, request: Request) -> list[Candidate]:
    batch_size = request.sections["train"].get("batch_size")
    return candidates(bench.task, bench.device, width=bench.backbone().width, batch_size=batch_size)


def _weights(bench: Bench, metric: Metric) -> Tensor:
    """The share of each held-out image in the metric. Raises LptError where no held-out image takes part."""
    task = bench.task
    weights = image_weights(bench.labels, task.counts, metric=metric, group_rule=task.group_rule)
    if len(bench.labels) and not bool(weights.sum() > 0):
        raise LptError(
            f"--metric {metric}: no few-shot class ({task.group_rule}) has 3 training images, so that none can be held "
            "out: use --metric class_mean"
        )
    return weights


# The plan.


def _planned(bench: Bench, found: Sequence[Candidate], request: Request, spent: float) -> SearchPlan:
    """The plan in the search's folder, or a new one. Raises LptError where that one is of another search."""
    file = bench.folder / "plan.json"
    identity = _identity(bench, request)
    try:
        plan = SearchPlan.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        plan = Planner(bench, found, request.budget, spent=spent).plan(identity)
        write_atomic(file, json.dumps(plan.as_json(), indent=1).encode())
        return plan
    if plan.identity != identity:
        raise LptError(f"{bench.folder} holds a search with other settings or images: give another --out")
    return plan


def _identity(bench: Bench, request: Request) -> str:
    """A hash of all that a choice depends on, but for the clock, which the plan stands for."""
    data = {key: value for key, value in request.sections["data"].items() if key not in LOCATION_SETTINGS}
    places = ("weights", "device", "feature_cache", "workers", "checkpoint_seconds")
    others = {
        name: {key: value for key, value in section.items() if key not in places}
        for name, section in request.sections.items()
        if name != "data"
    }
    backbone = f"{bench.backbone().fingerprint} in {bench.precision}"
    parts = [data, others, request.method, request.budget, request.metric, bench.task.manifest()["sha256"], backbone]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _say_plan(bench: Bench, plan: SearchPlan, others: Sequence[str], request: Request, say: Log) -> None:
    say(held_out_line(bench, plan))
    for one in plan.candidates:
        epochs = f", {one.epochs} epoch{'s' * (one.epochs > 1)}" if one.epochs and not one.on_features else ""
        say(f"candidate {one.label} at {one.image_size} px{epochs}: about {one.seconds:.0f} s on all images")
    for label, why in plan.left_out:
        say(f"not tried: {label}: {why}")
    if others:
        say(f"not tried, for the settings given: {', '.join(others)}")
    say(f"search and training take about {plan.seconds:.0f} s of {request.budget:.0f} s, the test set comes after that")


def held_out_line(bench: Bench, plan: SearchPlan) -> str:
    """What candidates are compared on."""
    if bench.task.val is not None:
        return f"held out: the {len(bench.labels)} images of the val part"
    folds, classes = bench.folds, bench.task.classes
    number = sum(len(rows) for rows in folds.held_out[: plan.folds])
    line = f"held out: {number} of {len(bench.task.train)} training images"
    if plan.folds > 1:
        line += f" in {plan.folds} folds, since the tail is short of images"
    if folds.whole:
        names = ", ".join(quoted(classes[k], 40) for k in folds.whole[:5]) + (", ..." if len(folds.whole) > 5 else "")
        line += f"; {len(folds.whole)} classes with fewer than 3 stay whole ({names})"
    return line


# Trials.


class Row(NamedTuple):
    """A candidate, the share of its schedule that it got, its trials, and what it got right [H]."""

    candidate: Candidate
    share: float
    trials: list[Trial]
    right: Tensor

    @property
    def failed(self) -> str:
        return next((trial.failed for trial in self.trials if trial.failed), "")


def tried(bench: Bench, plan: SearchPlan, weights: Tensor, say: Log) -> list[Row]:
    """All candidates in the order of the plan: each with a short schedule if it needs the backbone's steps, and the
    better ones of these with a whole one."""

    def row(one: Candidate, share: float, folds: int) -> Row:
        trials = [run_trial(bench, one, fold, share, plan.identity) for fold in range(folds)]
        found = Row(one, share, trials, _right(bench, trials))
        if found.failed:
            say(f"{one.label}: {found.failed}")
        else:
            of = "" if share == 1 else f" after {share:.0%} of its steps"
            say(f"{one.label}{of}: {100 * score(found.right, weights).value:.1f} on held-out images")
        return found

    rows = {one.name: row(one, 1.0, plan.folds) for one in plan.candidates if one.on_features}
    tuned = [one for one in plan.candidates if not one.on_features]
    if len(tuned) > kept_of(len(tuned)):
        short = {one.name: row(one, SHORT, plan.folds) for one in tuned}
        rows |= short
        scores = {name: score(one.right, weights).value for name, one in short.items() if not one.failed}
        going_on = halved(scores, kept_of(len(tuned)))
        tuned = [one for one in tuned if one.name in going_on]
    return list((rows | {one.name: row(one, 1.0, plan.folds) for one in tuned}).values())


def _right(bench: Bench, trials: Sequence[Trial]) -> Tensor:
    """Whether each held-out image [H] was right, nan where it was not asked."""
    right = torch.full((len(bench.labels),), torch.nan)
    starts = torch.tensor([0, *(len(rows) for rows in bench.folds.held_out)]).cumsum(0).tolist()
    for trial in trials:
        if not trial.failed:
            rows = slice(starts[trial.fold], starts[trial.fold + 1])
            right[rows] = (torch.tensor(trial.predicted) == bench.labels[rows]).float()
    return right


# The choice.


def concluded(
    bench: Bench, plan: SearchPlan, rows: Sequence[Row], weights: Tensor, request: Request
) -> tuple[Candidate, dict[str, Any]]:
    """(the candidate that is taken, the summary of the search)."""
    whole = {row.candidate.name: row for row in rows if row.share == 1 and not row.failed}
    if not whole:
        raise LptError("every candidate of the search has failed: try train.precision=fp32")
    reference = reference_of([row.candidate for row in whole.values()])
    finalists = [Finalist(name, row.right, row.candidate.seconds, name == reference) for name, row in whole.items()]
    chosen = choose(finalists, weights)
    labels = {name: row.candidate.label for name, row in whole.items()}
    task = bench.task
    few = torch.zeros(len(bench.labels), dtype=torch.double)
    if len(shot_groups(task.counts, task.group_rule)["few"]):
        few = image_weights(bench.labels, task.counts, metric="few", group_rule=task.group_rule)
    summary = {
        "metric": request.metric,
        "budget_seconds": request.budget,
        "planned_seconds": plan.seconds,
        "seed": bench.train.seed,
        "held_out": held_out_line(bench, plan),
        "chosen": chosen.name,
        "why": _why(chosen, finalists, weights, request.metric, labels),
        "candidates": [_in_summary(row, weights, few, plan, chosen.name) for row in rows],
        "left_out": [list(pair) for pair in plan.left_out],
    }
    return whole[chosen.name].candidate, summary


def _in_summary(row: Row, weights: Tensor, few: Tensor, plan: SearchPlan, chosen: str) -> dict[str, Any]:
    one, trials = row.candidate, row.trials
    found: dict[str, Any] = {
        "name": one.name,
        "label": one.label,
        "method": one.settings,
        "image_size": one.image_size,
        "share": row.share,
        "chosen": one.name == chosen,
        "seconds": one.seconds,
        "search_seconds": round(sum(trial.seconds for trial in trials), 1),
        "failed": row.failed or None,
    }
    if row.failed:
        return found
    value, low, high = score(row.right, weights)
    of_few = score(row.right, few).value if few.sum() > 0 else None
    ms = trials[0].ms + (plan.ms[str(one.image_size)] if one.on_features else 0.0)
    return {
        **found,
        "score": value,
        "interval": [low, high],
        "few": of_few,
        "bytes": trials[0].bytes,
        "ms": round(ms, 2),
    }


def _why(
    chosen: Finalist, finalists: Sequence[Finalist], weights: Tensor, metric: Metric, labels: Mapping[str, str]
) -> str:
    """One sentence: what the chosen candidate is better at, or that a better number is noise."""
    values = {one.name: score(one.right, weights).value for one in finalists}
    best = max(finalists, key=lambda one: values[one.name])
    name, what = labels[chosen.name], f"held-out {metric.replace('_', ' ')}"
    images = f"on {int((~best.right.isnan()).sum())} images"
    if len(finalists) == 1:
        return f"{name} is chosen: nothing else was tried to the end."

    def lead(over: Finalist) -> str:
        found = difference(best.right, over.right, weights, z=Z_CHOICE)
        return f"{100 * found.value:.1f} points (80 % of {100 * found.low:+.1f} to {100 * found.high:+.1f})"

    if best is not chosen:
        price = f"costs {chosen.seconds:.0f} s instead of {best.seconds:.0f} s"
        if chosen.seconds * CHEAPER > best.seconds:
            price = "is what others have to beat"
        return (
            f"{name} is chosen: {labels[best.name]} has the best {what}, {100 * values[best.name]:.1f}, but its lead "
            f"of {lead(chosen)} is noise {images}, and {name} {price}."
        )
    others = [one for one in finalists if one is not best]
    second = max(others, key=lambda one: values[one.name])
    if not chosen.is_reference:  # it was taken for being better than the reference, whatever the others are
        second = next(one for one in finalists if one.is_reference)
    return (
        f"{name} is chosen: its {what}, {100 * values[best.name]:.1f}, is the highest, {lead(second)} above that of "
        f"{labels[second.name]} {images}."
    )
