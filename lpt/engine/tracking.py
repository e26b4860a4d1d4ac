"""A run logged to experiment trackers, through accelerate's: TensorBoard, MLflow, Weights & Biases, Trackio.

What they get is a function of the run's numbers and moves none of them. `tracking.json` in the run's folder says under
which id each tracker knows the run, and how far it has been logged: a resumed run continues there, and logs nothing
twice.
"""

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lpt.device import peak_memory
from lpt.engine.session import Cost, Log
from lpt.errors import LptError, quoted, require
from lpt.files import write_atomic
from lpt.terms import TrackerName

EXTRAS: dict[TrackerName, str | None] = {"tensorboard": "track", "mlflow": "track", "wandb": None, "trackio": None}
"""Which of lpt's extras brings it, None where it is installed by itself."""
PROJECT = "lpt"
"""What trackers call the experiment or project unless their own environment variables name another."""
POINTS = 200
"""Of a curve over the steps of a phase, at most: a tracker may be far away."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raises NotInstalled for a tracker whose package is absent, before anything is trained."""
    for name in names:
        require(name, extra=EXTRAS[name], gives=f"train.track=[{name}]")


class Logged(NamedTuple):
    """Up to which step of the run trackers know single steps and epochs, and whether they know its end."""

    steps: int = -1
    epochs: int = -1
    end: bool = False


class Tracking:
    """Logs the run in the folder `out` to the trackers `names`. They start when there is something to log: the
    folder is the run's own then.

    `parameters` are said once, nested dicts as `section.key`; `costs` hold the steps of earlier phases, so that a step
    of the run is one number. A tracker that does not start ends the run with an LptError, before its first step is
    logged; one that fails later is left out, with a line to `say`: hours of training do not depend on its server.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        out: Path,
        *,
        parameters: Mapping[str, Any],
        costs: Mapping[str, Cost],
        device: torch.device,
        resume: bool,
        say: Log = lambda text: None,
    ) -> None:
        self.names, self.out, self.parameters, self.costs, self.device = names, out, parameters, costs, device
        self.say = say
        self.file = out / "tracking.json"
        self.ids, self.logged = _stored(self.file) if resume else ({}, Logged())
        self._started: dict[str, Any] | None = None

    def step(self, phase: str, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Of the `steps` of a phase some: its losses, the rate, and what this process works and holds."""
        if step % -(-steps // POINTS) and step != steps:
            return
        at = self._step_of_run(phase, step)
        if at > self.logged.steps:
            memory = peak_memory(self.device)
            of_process = {"images_per_second": values["images_per_second"], "peak_memory_bytes": memory}
            rest = {f"{phase}/{key}": value for key, value in values.items() if key not in of_process}
            self._log({**rest, **of_process}, at, self.logged._replace(steps=at))

    def epoch(self, phase: str, step: int, line: Mapping[str, Any]) -> None:
        """What the history says of an epoch: means of losses, seconds, held-out groups, key usage."""
        at = self._step_of_run(phase, step)
        if at > self.logged.epochs:
            of_model = {key: value for key, value in line.items() if isinstance(value, Mapping)}
            means = {f"{phase}/epoch/{key}": value for key, value in line.items() if key not in of_model}
            self._log({**means, **of_model}, at, self.logged._replace(epochs=at))

    def end(self, report: Mapping[str, Any], table: str) -> None:
        """The final numbers and their `table`, accuracy over class rank as a curve, and the files for people."""
        if self.logged.end:
            return
        at = sum(cost.steps for cost in self.costs.values())
        final = {key: value for key, value in report.items() if _is_number(value)}
        curves = {"final/accuracy_by_class_rank": _by_rank(report["data"]["counts"], report["per_class"])}
        if usage := report.get("key_usage"):
            curves["final/choices_by_key_rank"] = sorted(usage["selections"], reverse=True)
        files = [self.out / "report.html", self.out / "report.json"]

        def tell(name: str, tracker: Any) -> None:
            tracker.log(_flat({"final": final}), step=at)
            _log_end(name, tracker, curves, table, files)

        self._tell(tell)
        self._remember(self.logged._replace(end=True))

    def close(self) -> None:
        """Every tracker has stored what was logged."""
        self._tell(lambda name, tracker: tracker.finish(), start=False)
        self._started = None

    def _step_of_run(self, phase: str, step: int) -> int:
        return step + sum(cost.steps for name, cost in self.costs.items() if name != phase)

    def _log(self, values: Mapping[str, Any], step: int, logged: Logged) -> None:
        self._tell(lambda name, tracker: tracker.log(_flat(values), step=step))
        self._remember(logged)

    def _tell(self, tell: Callable[[str, Any], None], *, start: bool = True) -> None:
        """Calls `tell` with the name and the tracker of each that works."""
        if self._started is None:
            if not start:
                return
            self._started = {name: self._start(name) for name in self.names}
            self._remember(self.logged)
        for name, tracker in list(self._started.items()):
            try:
                tell(name, tracker)
            except Exception as error:  # libraries raise what they like, and servers go away
                del self._started[name]
                self.say(f"warning: {name} logs no more of this run ({quoted(error)})")

    def _start(self, name: TrackerName) -> Any:
        """The tracker, where it was before. Raises LptError."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        before = self.ids.get(name)
        run_id = before or uuid.uuid4().hex
        where = ("tensorboard", self.out) if name == "tensorboard" else (PROJECT,)
        try:
            tracker: Any = LOGGER_TYPE_TO_CLASS[name](
                *where, **_going_on(name, self.out, run_id, is_new=before is None)
            )
            tracker.start()
            self.ids[name] = tracker.tracker.info.run_id if name == "mlflow" else run_id
            if before is None:
                tracker.store_init_configuration(_flat(self.parameters, joint=".", texts=True))
        except Exception as error:
            raise LptError(
                f"train.track: {name} does not start ({quoted(error)}): put that right, or leave it out"
            ) from error
        return tracker

    def _remember(self, logged: Logged) -> None:
        self.logged = logged
        write_atomic(self.file, json.dumps({"ids": self.ids, "logged": logged._asdict()}).encode())


def _stored(file: Path) -> tuple[dict[str, str], Logged]:
    """(the ids of before, what has been logged); nothing where the file is not there or damaged."""
    try:
        stored = json.loads(file.read_text())
        return {name: str(text) for name, text in stored["ids"].items()}, Logged(
            **stored.get("logged", stored.get("told"))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, Logged()


def _going_on(name: str, out: Path, run_id: str, *, is_new: bool) -> dict[str, Any]:
    """What each tracker needs to continue with a run. TensorBoard adds files to its folder, which is in the run's
    own."""
    if name == "mlflow":  # it gives ids itself
        return {"run_name": out.name} if is_new else {"run_id": run_id}
    if name == "wandb":
        return {"name": out.name, "id": run_id, "resume": "allow", "dir": str(out)}
    if name == "trackio":
        return {"name": f"{out.name}-{run_id[:8]}", "resume": "allow"}
    return {}


def _log_end(name: str, tracker: Any, curves: Mapping[str, Sequence[float]], table: str, files: Sequence[Path]) -> None:
    """Table, curves and files as each tracker has them: TensorBoard and MLflow draw any series of steps, a rank too."""
    if name in ("tensorboard", "mlflow"):
        for title, values in curves.items():
            for rank, value in enumerate(values, 1):
                tracker.log({title: value}, step=rank)
    if name == "tensorboard":
        tracker.log({"final/table": table})
    if name == "mlflow":
        for file in files:
            tracker.log_artifact(str(file))
    if name == "wandb":
        for title, values in curves.items():
            rows = [[rank, value] for rank, value in enumerate(values, 1)]
            tracker.log_table(title, columns=["rank", "value"], data=rows)


def _by_rank(counts: Sequence[int], per_class: Sequence[float | None]) -> list[float]:
    """Accuracies from the class with most training images on, without those that have no test image."""
    order = sorted(range(len(counts)), key=lambda k: -counts[k])
    return [accuracy for k in order if (accuracy := per_class[k]) is not None]


def _flat(values: Mapping[str, Any], *, joint: str = "/", texts: bool = False) -> dict[str, Any]:
    """Nested dicts under joint names that every tracker takes: finite numbers, and with `texts` everything else as one.

    >>> _flat({"val": {"few": 0.5, "many": None}, "loss": float("nan"), "lr": 0.1})
    {'val/few': 0.5, 'lr': 0.1}
    >>> _flat({"method": {"name": "lpt", "epochs": [2, 1]}}, joint=".", texts=True)
    {'method.name': 'lpt', 'method.epochs': '[2, 1]'}
    """
    return {re.sub(r"[^\w./ -]", "_", name): value for name, value in _leaves(values, joint, texts)}


def _leaves(values: Mapping[str, Any], joint: str, texts: bool) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}{joint}{name}", leaf) for name, leaf in _leaves(value, joint, texts))
        elif texts:
            yield key, value if isinstance(value, str) else json.dumps(value)
        elif _is_number(value):
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
