"""Ctrl-C and SIGTERM: the first one asks, the loop saves and ends; outside of steps, and the second time, at once."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from lpt.engine.checkpoint import load_checkpoint
from lpt.engine.stopping import Stop, Stopped
from tests.support.command_line import lpt as command
from tests.support.small_fit import fit, step

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_its_step_with_a_checkpoint(tmp_path, number):
    whole, _ = fit()
    stop = Stop()

    def asked(model, batches, progress):
        if progress.step == 5:
            os.kill(os.getpid(), number)
        return step(model, batches, progress)

    folder = tmp_path / "checkpoints"
    with stop.listening(), pytest.raises(Stopped) as ended:
        fit(folder, step=asked, stop=stop, checkpoint_seconds=1e9)
    assert ended.value.code == 128 + number and str(ended.value) == signal.Signals(number).name
    seen = []

    def counted(model, batches, progress):
        seen.append(progress.step)
        return step(model, batches, progress)

    resumed, _ = fit(folder, step=counted)
    assert seen == [6, 7, 8, 9, 10]
    assert torch.equal(resumed.weight, whole.weight)


def test_a_signal_after_the_last_step_had_looked_ends_the_phase(tmp_path):
    stop, folder = Stop(), tmp_path / "checkpoints"

    def measured(model, progress):
        if progress.step == 10:
            stop(signal.SIGTERM)
        return {}

    with pytest.raises(Stopped):
        fit(folder, on_epoch=measured, stop=stop)
    assert load_checkpoint(folder / "phase1.safetensors", run_hash="a").finished


def test_outside_of_steps_and_at_a_second_ctrl_c_it_ends_at_once():
    stop = Stop()
    with pytest.raises(Stopped):
        stop(signal.SIGTERM)
    stop = Stop()
    with pytest.raises(Stopped, match="SIGINT"), stop.while_steps_run():
        stop(signal.SIGTERM)
        stop(signal.SIGTERM)  # a launcher passes on what everybody has already got
        assert stop.asked
        stop(signal.SIGINT)
    stop = Stop()
    with pytest.raises(Stopped, match="SIGTERM"), stop.while_steps_run():
        stop(signal.SIGTERM)  # too late for the loop to see


def test_what_forgives_a_damaged_image_does_not_forgive_a_signal():
    assert not issubclass(Stopped, Exception)


def test_the_handlers_before_come_back_and_threads_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) is stop
    assert signal.getsignal(signal.SIGTERM) is before
    inside = []

    def work():
        with Stop().listening():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "nothing is saved yet: the same command begins again"),
        (("config.yaml",), "nothing is saved yet: the same command with --resume --out {out} begins again"),
        (("config.yaml", "checkpoints/head.safetensors"), "--resume --out {out} continues from what is saved"),
    ],
)
def test_what_is_said_of_what_is_saved_is_so(tmp_path, monkeypatch, capsys, files, said):
    out = tmp_path / "run"

    def train(config, folder, **others):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr("lpt.run.train", train)
    code, _, err = command(capsys, "train", ROOT / "configs/digits_lt/lpt.yaml", "--out", out)
    assert code == 130 and err == f"stopped by SIGINT; {err.partition('; ')[2]}" and said.format(out=out) in err
