"""Experiment trackers hear of a run what its history and report say, once, also across a kill; they move no number."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lpt import run
from lpt.config import load_config
from lpt.engine import tracking
from lpt.engine.history import History
from lpt.engine.stopping import Stopped
from lpt.errors import ConfigError, LptError, NotInstalled
from lpt.report.markdown import table
from tests.support.command_line import lpt as command
from tests.support.shared import ROOT

CPU = torch.device("cpu")
CONFIG = ROOT / "configs/digits_lt/lpt.yaml"
SMALL = [
    "method.epochs=[1, 2]",
    "method.pool_size=5",
    "data.imbalance_factor=100",
    "data.val_per_class=1",
    "train.batch_size=32",
    "train.precision=fp32",
]


def config(*more):
    return load_config(CONFIG, [*SMALL, *more])


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    out = tmp_path_factory.mktemp("untracked") / "run"
    run.train(config(), out)
    return out


def scalars_of(folder: Path):
    """tag → [(step, value)] of every event file of a TensorBoard folder, in the order of writing; and its texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    series = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    return series, texts


def expected_curves(out: Path):
    """What trackers must have been told of epochs, from the history: tag → {step of the run: value}."""
    lines, expected = History(out / "history.jsonl").lines, {}
    steps_before = {"phase1": 0, "phase2": max(line["step"] for line in lines if line["phase"] == "phase1")}
    for line in lines:
        at = steps_before[line["phase"]] + line["step"]
        values = {f"{line['phase']}/epoch/loss": line["loss"], "val/few": line["val"]["few"]}
        if "key_usage" in line:
            values["key_usage/perplexity"] = line["key_usage"]["perplexity"]
        for tag, value in values.items():
            if value is not None:
                expected.setdefault(tag, {})[at] = value
    return expected


def check_against_the_run(series, out: Path):
    """Each point once, at its step, with the value of history and report."""
    report = json.loads((out / "report.json").read_text())
    for tag, points in expected_curves(out).items():
        assert [step for step, _ in series[tag]] == sorted(points), tag
        assert [value for _, value in series[tag]] == pytest.approx([points[step] for step in sorted(points)]), tag
    total = report["cost"]["steps"]
    for tag in ("phase1/loss", "phase1/lr", "phase2/loss", "phase2/lr"):
        steps = [step for step, _ in series[tag]]
        assert steps == sorted(set(steps)) and len(steps) > 3, tag
    steps = [step for step, _ in series["images_per_second"]]
    assert steps == list(range(1, total + 1)) == [step for step, _ in series["peak_memory_bytes"]]
    assert all(value > 0 for _, value in series["images_per_second"])
    for metric in ("class_accuracy", "few", "ece", "trainable_parameters"):
        assert series[f"final/{metric}"] == [(total, pytest.approx(report[metric]))]
    counts, per_class = report["data"]["counts"], report["per_class"]
    by_rank = [per_class[k] for k in sorted(range(10), key=lambda k: -counts[k])]
    assert series["final/accuracy_by_class_rank"] == [(k + 1, pytest.approx(v)) for k, v in enumerate(by_rank)]
    assert sum(value for _, value in series["final/choices_by_key_rank"]) == sum(report["key_usage"]["selections"])


def same_numbers(out: Path, other: Path):
    one, two = load_file(out / "prompt.safetensors"), load_file(other / "prompt.safetensors")
    assert all(one[name].equal(two[name]) for name in one) and one.keys() == two.keys()


def test_tensorboard_hears_everything_once_across_a_kill(untracked, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    out = tmp_path / "run"
    words = [*SMALL, "train.track=tensorboard", "train.checkpoint_seconds=0", "--out", str(out), "--resume"]
    start = [sys.executable, "-m", "lpt", "train", str(CONFIG), *words]
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.time()
    while not _steps_logged(out) > 4 and process.poll() is None and time.time() - began < 300:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "report.json").exists()
    report = run.train(config("train.track=tensorboard"), out, resume=True)
    series, texts = scalars_of(out / "tensorboard")
    check_against_the_run(series, out)
    assert len(list((out / "tensorboard").glob("events*"))) == 2  # of one run: what lies in a folder is
    assert texts["final/table/text_summary"] == table([(report["described"], report)])
    (parameters,) = (out / "tensorboard").glob("*/hparams.yml")
    said = parameters.read_text()
    for fact in ("method.name: lpt", "train.batch_size: '32'", f"split_sha256: {report['data']['split_sha256']}"):
        assert fact in said
    assert "run_hash: " in said and f"backbone_fingerprint: {report['backbone']['fingerprint']}" in said
    same_numbers(out, untracked)
    written = {path: path.stat().st_size for path in (out / "tensorboard").rglob("*")}
    run.train(config("train.track=tensorboard"), out, resume=True)  # it has ended: there is nothing to say
    assert {path: path.stat().st_size for path in (out / "tensorboard").rglob("*")} == written


def _steps_logged(out: Path) -> int:
    try:
        return json.loads((out / "tracking.json").read_text())["logged"]["steps"]
    except (OSError, ValueError):
        return -1


def test_mlflow_hears_everything_in_one_run_across_a_stop(untracked, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    store = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    mlflow.set_tracking_uri(store.as_uri())
    out, steps = tmp_path / "run", 0

    def stop_in_phase_2(phase, step, number, rates):
        nonlocal steps
        steps += 1
        if phase == "phase2" and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run.train(config("train.track=[mlflow]"), out, show=stop_in_phase_2)
    report = run.train(config("train.track=[mlflow]"), out, resume=True)
    client = mlflow.tracking.MlflowClient(store.as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'lpt'")
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.status == "FINISHED" and one.info.run_name == "run" and steps > 4
    series = {}
    for tag in one.data.metrics:
        points = client.get_metric_history(one.info.run_id, tag)
        series[tag] = [(point.step, point.value) for point in sorted(points, key=lambda point: point.timestamp)]
    check_against_the_run({tag: sorted(points) for tag, points in series.items()}, out)
    assert one.data.params["method.name"] == "lpt" and one.data.params["method.epochs"] == "[1, 2]"
    assert one.data.params["split_sha256"] == report["data"]["split_sha256"]
    assert {file.path for file in client.list_artifacts(one.info.run_id)} == {"report.html", "report.json"}
    same_numbers(out, untracked)


class Heard:
    """A tracker of accelerate's shape that keeps what it is told."""

    made = ()

    def __init__(self, project, *places, **arguments):
        self.arguments, self.logged, self.tables, self.ended = {"project": project, **arguments}, [], [], False
        Heard.made = (*Heard.made, self)

    def start(self):
        self.tracker = self

    def store_init_configuration(self, values):
        self.parameters = values

    def log(self, values, step=None):
        self.logged.append((step, values))

    def log_table(self, name, columns, data):
        self.tables.append((name, len(data)))

    def finish(self):
        self.ended = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_go_on_under_their_own_id(tmp_path, monkeypatch, name):
    """Their packages are not installed here: what accelerate's classes would be given is looked at."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Heard)
    monkeypatch.setattr(Heard, "made", ())

    def tracker(resume):
        return tracking.Tracking([name], tmp_path, parameters={"a": {"b": 1}}, costs={}, device=CPU, resume=resume)

    numbers = {"loss": 1.0, "lr": 0.1, "images_per_second": 3.0}
    first = tracker(False)
    for step in (1, 2):
        first.step("all", step, 2, numbers)
    first.epoch("all", 2, {"loss": 1.0, "val": {"few": None, "many": 0.5}, "seconds": math.nan})
    first.close()
    file = tmp_path / "tracking.json"
    file.write_text(file.read_text().replace('"logged"', '"told"'))  # as lpt 0.1 wrote it
    second = tracker(True)
    second.step("all", 2, 3, numbers)  # logged before
    second.step("all", 3, 3, numbers)
    report = {"accuracy": 0.5, "few": None, "data": {"counts": [3, 9]}, "per_class": [0.2, None], "method": "m"}
    second.end(report, "| table |")
    second.end(report, "| table |")
    second.close()
    before, after = Heard.made
    assert before.arguments == after.arguments and before.arguments["project"] == "lpt" and before.ended and after.ended
    assert before.arguments["resume"] == "allow" and tmp_path.name in before.arguments["name"]
    assert before.parameters == {"a.b": "1"} and not hasattr(after, "parameters")
    assert [step for step, _ in before.logged] == [1, 2, 2] and [step for step, _ in after.logged] == [3, 0]
    assert before.logged[2][1] == {"all/epoch/loss": 1.0, "val/many": 0.5}
    assert after.logged[1][1] == {"final/accuracy": 0.5}
    assert after.tables == ([("final/accuracy_by_class_rank", 1)] if name == "wandb" else [])


def test_a_curve_has_few_points_and_the_last(tmp_path, monkeypatch):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Heard)
    monkeypatch.setattr(Heard, "made", ())
    told = tracking.Tracking(["wandb"], tmp_path, parameters={}, costs={}, device=CPU, resume=False)
    for step in range(1, 1750):
        told.step("all", step, 1749, {"loss": 1.0, "images_per_second": 3.0})
    steps = [step for step, _ in Heard.made[0].logged]
    assert steps[0] == 9 and steps[-1] == 1749 and 0.9 * tracking.POINTS <= len(steps) <= tracking.POINTS


def test_a_tracker_that_fails_is_left_out_and_one_that_does_not_start_ends_the_run(tmp_path, monkeypatch):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    class Falls(Heard):
        def log(self, values, step=None):
            super().log(values, step)
            if step == 2:
                raise ConnectionError("the server\nis gone")

    class NeverStarts(Heard):
        def start(self):
            raise ValueError("log in first")

    def told(names, said):
        return tracking.Tracking(names, tmp_path, parameters={}, costs={}, device=CPU, resume=False, say=said.append)

    monkeypatch.setattr(Heard, "made", ())
    for name, kind in (("wandb", Falls), ("trackio", Heard), ("tensorboard", NeverStarts)):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
    said, numbers = [], {"loss": 1.0, "images_per_second": 3.0}
    two = told(["wandb", "trackio"], said)
    for step in (1, 2, 3):
        two.step("all", step, 3, numbers)
    two.close()
    assert said == ["warning: wandb logs no more of this run (the server is gone)"]
    assert [[step for step, _ in one.logged] for one in Heard.made] == [[1, 2], [1, 2, 3]]
    assert [one.ended for one in Heard.made] == [False, True]
    with pytest.raises(LptError, match=r"train\.track: tensorboard does not start \(log in first\): put that right"):
        told(["tensorboard"], said).step("all", 1, 3, numbers)


def test_tracking_is_no_part_of_a_runs_hash():
    plain, tracked = load_config(CONFIG), load_config(CONFIG, ["train.track=[tensorboard, mlflow]"])
    assert plain.run_hash("s", "b") == tracked.run_hash("s", "b")
    assert plain.train.track == [] and tracked.train.track == ["tensorboard", "mlflow"]
    with pytest.raises(ConfigError, match=r"train.track.*'tensorboard', 'mlflow', 'wandb' or 'trackio'"):
        load_config(CONFIG, ["train.track=[tensorbord]"])


def test_an_absent_tracker_is_told_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    out = tmp_path / "run"
    code, _, err = command(capsys, "train", CONFIG, "train.track=[mlflow]", "--out", out)
    assert code == 2 and not out.exists()
    assert err == "error: train.track=[mlflow] needs mlflow, which is not installed: pip install 'lpt[track]'\n"
    with pytest.raises(NotInstalled, match=r"pip install trackio$"):
        tracking.check_trackers(["trackio"])
