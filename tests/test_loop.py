"""The loop on a toy model: schedules, resume, checkpoints, and what goes wrong."""

import json

import pytest
import torch
from conftest import toy_images
from torch import nn

from lpt.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lpt.engine.loop import Fit, Progress, Stream
from lpt.engine.optim import lr_at, scaled_lr
from lpt.errors import TrainingError
from lpt.history import History
from lpt.preprocess import Preprocess
from lpt.samplers import InstanceBalanced

LABELS = torch.arange(3).repeat(8)


class Linear(nn.Module):
    """The smallest thing that the loop can train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3 * 8 * 8))
        self.register_buffer("centre", torch.zeros(2))

    def adapted(self):
        return self.state_dict()

    def load_adapted(self, tensors):
        self.load_state_dict(tensors)


def step(model, batches, progress):
    (batch,) = batches.values()
    noise = progress.normal("noise", len(batch.labels), 3)
    logits = batch.views.flatten(1) @ model.weight.T + 0.1 * noise
    return {"loss": nn.functional.cross_entropy(logits, batch.labels)}


def fit(folder=None, *, steps=11, optimizer="adamw", step=step, model=None, **changes):
    bound = Fit(
        images=toy_images(LABELS),
        preprocess=Preprocess(size=8),
        batch_size=4,
        checkpoints=folder,
        history=History(folder.parent / "history.jsonl" if folder else None),
        run_hash="a",
        **changes,
    )
    model = model or Linear()
    sampler = InstanceBalanced(LABELS, batch_size=4, seed=0)
    bound(
        "phase1", model, step, {"all": Stream(sampler)},
        steps=steps, steps_per_epoch=4, optimizer=optimizer, lr=1e-2, weight_decay=0.01,
    )  # fmt: skip
    return model, bound


def in_parts(model, batches, progress):
    """The same loss as `step`, image by image."""
    (batch,) = batches.values()
    noise = progress.normal("noise", len(batch.labels), 3)
    for row in range(len(batch.labels)):
        logits = batch.views[row : row + 1].flatten(1) @ model.weight.T + 0.1 * noise[row : row + 1]
        value = nn.functional.cross_entropy(logits, batch.labels[row : row + 1]) / len(batch.labels)
        assert row == 0 or model.weight.grad is not None  # the part before has gone backward
        yield {"loss": value}


def test_a_step_in_parts_is_the_step():
    (whole, bound), (parts, again) = fit(), fit(step=in_parts)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-6)
    losses = [[line["loss"] for line in b.history.lines] for b in (bound, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("killed_at", [0, 1, 4, 10])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, optimizer, killed_at):
    whole, _ = fit(optimizer=optimizer)

    def dying(model, batches, progress):
        if progress.step == killed_at:
            raise Killed
        return step(model, batches, progress)

    folder = tmp_path / "checkpoints"
    with pytest.raises(Killed):
        fit(folder, optimizer=optimizer, step=dying, checkpoint_seconds=0.0)
    assert (folder / "phase1.safetensors").exists() == (killed_at > 0)
    resumed, _ = fit(folder, optimizer=optimizer)
    assert torch.equal(resumed.weight, whole.weight)
    lines = [json.loads(text) for text in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 11]  # every epoch is told once


def test_a_finished_phase_returns_at_once_with_its_result(tmp_path):
    first, _ = fit(tmp_path / "c")

    def never(model, batches, progress):
        raise AssertionError("a finished phase trains nothing")

    again, _ = fit(tmp_path / "c", step=never)
    assert torch.equal(first.weight, again.weight)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(tmp_path / "c")
    with pytest.raises(TrainingError, match="other settings or data"):
        load_checkpoint(tmp_path / "c" / "phase1.safetensors", run_hash="b")


def test_a_damaged_checkpoint_is_named(tmp_path):
    fit(tmp_path / "c")
    path = tmp_path / "c" / "phase1.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TrainingError, match=r"cannot be read.*delete it"):
        fit(tmp_path / "c")


def test_a_checkpoint_holds_what_was_put_in(tmp_path):
    one = Checkpoint(3, False, 1.5, {"w": torch.randn(2, 2)}, {"w/step": torch.tensor(3.0), "w/exp_avg": torch.ones(2)})
    save_checkpoint(tmp_path / "x.safetensors", one, run_hash="a")
    back = load_checkpoint(tmp_path / "x.safetensors", run_hash="a")
    assert back is not None and (back.step, back.finished, back.seconds) == (3, False, 1.5)
    assert torch.equal(back.tensors["w"], one.tensors["w"]) and back.moments.keys() == one.moments.keys()
    assert load_checkpoint(tmp_path / "nothing.safetensors", run_hash="a") is None


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    def poisoned(model, batches, progress):
        loss = step(model, batches, progress)["loss"]
        return {"loss": loss * float("nan") if progress.step == 6 else loss}

    model = Linear()
    with pytest.raises(TrainingError, match=r"phase1 is nan at step 6 \(epoch 2, batch 2, learning rate"):
        fit(tmp_path / "c", step=poisoned, checkpoint_seconds=0.0, model=model)
    kept = load_checkpoint(tmp_path / "c" / "phase1.safetensors", run_hash="a")
    assert kept is not None and kept.step == 6 and torch.equal(kept.tensors["weight"], model.weight)
    assert torch.isfinite(model.weight).all()


def test_randomness_is_a_function_of_seed_phase_step_and_name_alone():
    at = dict(phase="p", step=5, steps=10, steps_per_epoch=2, seed=1)
    one = Progress(**at).normal("cloud", 6, 3)
    assert torch.equal(one, Progress(**at).normal("cloud", 6, 3))
    for change in ({"step": 6}, {"phase": "q"}, {"seed": 2}):
        assert not torch.equal(one, Progress(**(at | change)).normal("cloud", 6, 3))
    assert not torch.equal(one, Progress(**at).normal("drop", 6, 3))
    shares = [Progress(**at, rank=r, world=2).normal("cloud", 3, 3) for r in range(2)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), one)  # two processes see what one would


def test_a_value_that_is_made_once_is_not_made_again(tmp_path):
    _, bound = fit(tmp_path / "c")
    first = bound.once("queries", lambda: torch.tensor([1.0, 2.0]))
    assert torch.equal(bound.once("queries", lambda: torch.zeros(2)), first)


def test_learning_rates_of_both_schedules():
    """LPT spec section 4; 90 epochs, lr .02: e1 .019994, e45 .0100, e80 6.0e-4, e89 6.1e-6."""

    def official(epoch):
        return lr_at(epoch * 7, steps=630, steps_per_epoch=7, lr=0.02, warmup="first_epoch_1e-6")

    assert official(0) == 1e-6
    assert [official(e) for e in (1, 45, 80, 89)] == pytest.approx([0.019994, 0.01, 6.03e-4, 6.09e-6], rel=2e-3)
    ours = [lr_at(t, steps=100, steps_per_epoch=8, lr=1.0) for t in range(101)]
    assert ours[0] == 1 / 8 and ours[7] == ours[8] == 1 and ours[100] == pytest.approx(0, abs=1e-12)
    assert ours[99] > 0 and sorted(ours[8:], reverse=True) == ours[8:]
    assert scaled_lr("sgd", 0.02, 128) == 0.01 and scaled_lr("adamw", 0.02, 128) == 0.02


def test_a_history_cut_by_a_kill_is_read_up_to_the_cut(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.write(phase="phase1", step=1)
    history.write(phase="phase1", step=2)
    with path.open("a") as file:
        file.write('{"phase": "phase1", "st')
    again = History(path)
    again.rewind("phase1", 1)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1]


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(TrainingError, match="'sdg' is unknown: use sgd or adamw"):
        fit(optimizer="sdg")
