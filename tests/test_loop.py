"""The loop on a toy model: schedules, resume, checkpoints, and what goes wrong."""

import json
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lpt.data.preprocess import Preprocess
from lpt.data.samplers import InstanceBalanced
from lpt.engine.batches import Progress, Stream
from lpt.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lpt.engine.history import History
from lpt.engine.loop import follow, run_phase
from lpt.engine.optim import lr_at, scaled_lr
from lpt.engine.phase import Recipe, checked_recipe
from lpt.engine.session import Cost
from lpt.engine.step_memory import StepMemory
from lpt.errors import TrainingError
from lpt.files import to_bytes
from tests.support.small_fit import LABELS, Linear, fit, phase, session, step
from tests.support.toy import toy_images


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


def test_every_epoch_tells_the_mean_of_its_own_steps():
    losses = []

    def watched(model, batches, progress):
        found = step(model, batches, progress)
        losses.append(found["loss"].item())
        return {**found, "number": torch.tensor(float(progress.step))}

    lines = fit(step=watched)[1].history.lines
    for line, first, last in zip(lines, (0, 4, 8), (4, 8, 11), strict=True):
        assert line["loss"] == pytest.approx(sum(losses[first:last]) / (last - first))
        assert line["number"] == pytest.approx(sum(range(first, last)) / (last - first))


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
    with pytest.raises(TrainingError, match="other settings, data, weights or precision"):
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


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_weights_and_checkpoint(tmp_path):
    def steep(model, batches, progress):
        loss = step(model, batches, progress)["loss"]
        return {"loss": loss + (0 * model.weight).square().sum().sqrt() if progress.step == 6 else loss}

    model = Linear()
    with pytest.raises(TrainingError, match=r"the gradient of phase1 is nan at step 6 .* keeps the last finite state"):
        fit(tmp_path / "c", step=steep, checkpoint_seconds=0.0, model=model)
    kept = load_checkpoint(tmp_path / "c" / "phase1.safetensors", run_hash="a")
    assert kept is not None and kept.step == 6 and torch.equal(kept.tensors["weight"], model.weight)
    assert torch.equal(fit(tmp_path / "c")[0].weight, fit(tmp_path / "d")[0].weight)


def test_weights_that_are_not_finite_are_never_stored(tmp_path):
    def far(model, batches, progress):
        loss = step(model, batches, progress)["loss"]
        return {"loss": 1e15 * model.weight.sum() if progress.step == 6 else 0 * loss}

    with pytest.raises(TrainingError, match=r"weight of phase1 is not finite after step 6 .*lower method\.lr"):
        fit(tmp_path / "c", step=far, optimizer="sgd", lr=1e25, checkpoint_seconds=0.0)
    kept = load_checkpoint(tmp_path / "c" / "phase1.safetensors", run_hash="a")
    assert kept is not None and kept.step == 6 and bool(torch.isfinite(kept.tensors["weight"]).all())


def rewritten(path, change):
    """The same checkpoint with another header, or other tensors."""
    with safe_open(path, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["lpt_checkpoint"]), load_file(path)
    del header["sha256"]
    change(header, tensors)
    path.write_bytes(to_bytes(tensors, lpt_checkpoint=header))


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.pop("flops"),
        lambda header, tensors: header.update(step="1"),
        lambda header, tensors: header.update(step=10**18),
        lambda header, tensors: header.update(finished=True),
        lambda header, tensors: tensors.pop("model/weight"),
        lambda header, tensors: tensors.update({"model/weight": torch.zeros(2)}),
        lambda header, tensors: tensors["model/weight"].fill_(float("nan")),
        lambda header, tensors: tensors.pop("moment/weight/exp_avg"),
        lambda header, tensors: tensors.update({"moment/other/step": tensors.pop("moment/weight/step")}),
        lambda header, tensors: tensors.update({"moment/weight/exp_avg": torch.zeros(3)}),
        lambda header, tensors: tensors.update({"memory/sum/loss": torch.zeros(3)}),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, change):
    def killed(model, batches, progress):
        if progress.step == 6:
            raise KeyboardInterrupt
        return step(model, batches, progress)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "c", step=killed, checkpoint_seconds=0.0)
    rewritten(tmp_path / "c" / "phase1.safetensors", change)
    with pytest.raises(TrainingError, match=r"phase1\.safetensors cannot be read \(.*\): delete it to start its phase"):
        fit(tmp_path / "c")


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
    first = bound.once("queries", bound.images, lambda: torch.tensor([1.0, 2.0]))
    assert torch.equal(bound.once("queries", bound.images, lambda: torch.zeros(2)), first)
    other = toy_images(LABELS, seed=5)  # of other images it is another value
    assert torch.equal(bound.once("queries", other, lambda: torch.zeros(2)), torch.zeros(2))


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


# Streams, memory and cost.


def seen(rank=0, world=1, *, seed=0, images=None, **streams):
    """The batches of three steps by stream, in one of several processes without the others."""
    found = []

    def watching(model, batches, progress):
        found.append(batches)
        return {"loss": sum(batch.views.float().mean() for batch in batches.values()) * model.weight.sum()}

    bound = session(seed=seed, **({"images": images} if images else {}))
    sampler = InstanceBalanced(LABELS, batch_size=4, seed=0)
    given = {name: Stream(sampler, **rest) for name, rest in streams.items()}
    three = phase("p", watching, streams=given, steps=3, steps_per_epoch=3, optimizer="sgd", lr=0.0, weight_decay=0.0)
    with (
        patch("lpt.engine.loop.rank_and_world", lambda: (rank, world)),
        patch("lpt.engine.loop._mean_over_processes", lambda gradients, numbers: numbers),
    ):
        run_phase(three, Linear(), bound)
    return found


def test_strong_views_are_others_and_functions_of_seed_step_and_row_alone():
    streams = {"weak": {}, "strong0": {"strong": True}, "strong1": {"strong": True}}
    steps = seen(**streams)
    for batches in steps:
        assert all(torch.equal(batch.rows, batches["weak"].rows) for batch in batches.values())
        assert all(torch.equal(batch.labels, LABELS[batch.rows]) for batch in batches.values())
    views = [batches[name].views for batches in steps for name in streams]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    for batches, again, other in zip(steps, seen(**streams), seen(seed=1, **streams), strict=True):
        for name in streams:
            assert torch.equal(batches[name].views, again[name].views)
            assert not torch.equal(batches[name].views, other[name].views)
    # Another stream beside it changes nothing, and two processes see what one would.
    alone = seen(strong0={"strong": True})
    parts = [seen(rank, 2, **streams) for rank in range(2)]
    for t, batches in enumerate(steps):
        assert torch.equal(alone[t]["strong0"].views, batches["strong0"].views)
        for name in streams:
            for part in ("views", "labels", "rows"):
                shares = [getattr(of[t][name], part) for of in parts]
                assert torch.equal(torch.stack(shares, 1).flatten(0, 1), getattr(batches[name], part))


def test_each_strong_view_of_an_image_has_a_seed_of_its_own(monkeypatch):
    drawn = []
    monkeypatch.setattr("lpt.data.loader.augmented", lambda images, seeds, name: drawn.append(seeds) or images)
    seen(strong0={"strong": True}, strong1={"strong": True}, weak={})
    assert len(drawn) == 3 * 2 * 4 and len({seed for seeds in drawn for seed in seeds}) == 3 * 2 * 4


def test_strong_views_are_strong_on_average():
    """Grey squares and RandAugment: further from the plain image than a crop and a flip."""
    plain = Preprocess(size=8).test(toy_images(LABELS).pixels)
    distance = {"weak": 0.0, "strong": 0.0}
    for batches in seen(weak={}, strong={"strong": True}):
        for name, batch in batches.items():
            distance[name] += (batch.views - plain[batch.rows]).abs().mean().item()
    assert distance["strong"] > 1.3 * distance["weak"]


def test_a_stream_may_have_images_and_features_of_its_own():
    others = toy_images(LABELS.flip(0), seed=9)
    rows = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(0))
    steps = seen(mine={"images": others}, one={"features": rows[0]}, some={"features": rows})
    chosen = set()
    for batches in steps:
        assert torch.equal(batches["mine"].labels, LABELS.flip(0)[batches["mine"].rows])
        assert torch.equal(batches["one"].views, rows[0][batches["one"].rows])
        for view, row in zip(batches["some"].views, batches["some"].rows.tolist(), strict=True):
            (which,) = [v for v in range(3) if torch.equal(view, rows[v, row])]
            chosen.add(which)
    assert chosen == {0, 1, 2}
    parts = [seen(rank, 2, some={"features": rows}) for rank in range(2)]
    for t, batches in enumerate(seen(some={"features": rows})):
        shares = [of[t]["some"].views for of in parts]
        assert torch.equal(torch.stack(shares, 1).flatten(0, 1), batches["some"].views)


@pytest.mark.parametrize("killed_at", [2, 5, 8])
def test_what_a_phase_remembers_survives_a_kill_within_an_epoch(tmp_path, killed_at):
    def run(folder, dies=None):
        taken, memory = [], StepMemory()

        def remembering(model, batches, progress):
            if progress.step == dies:
                raise Killed
            (batch,) = batches.values()
            memory.note(rows=batch.rows, step=torch.full((4,), progress.step))
            memory.tensors["sum"] = memory.tensors.get("sum", torch.zeros(())) + batch.views.mean()
            return {**step(model, batches, progress), "third": torch.tensor(1 / 3)}

        bound = session(
            folder,
            history=History(folder.parent / f"{folder.name}.jsonl"),
            checkpoint_seconds=0.0,
            on_epoch=lambda model, progress: taken.append(memory.take_notes()) or {},
        )
        run_phase(phase("p", remembering, steps=10, lr=0.1, weight_decay=0.0, memory=memory), Linear(), bound)
        return bound, memory, taken

    whole, memory, expected = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", killed_at)
    again, again_memory, taken = run(tmp_path / "killed")
    assert torch.equal(again_memory.tensors["sum"], memory.tensors["sum"]) and again.costs == whole.costs
    for one, two in zip(expected[-len(taken) :], taken, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert taken[-1]["step"].tolist() == 4 * [8] + 4 * [9] and len(taken) == 3 - killed_at // 4
    lines = [
        [{k: v for k, v in line.items() if "seconds" not in k} for line in b.history.lines] for b in (whole, again)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 3


def test_operations_are_counted_once_and_change_no_bit():
    """The logits are one product [4 192] [192 3] and its gradient in the weight: 2 · 4 · 192 · 3 each."""
    counted, bound = fit()
    plain, other = fit(count_flops=False)
    assert bound.costs == {"phase1": Cost(steps=11, images=44, flops=11 * 2 * (2 * 4 * 192 * 3))}
    assert other.costs == {"phase1": Cost(steps=11, images=44, flops=0)}
    assert torch.equal(counted.weight, plain.weight)
    _, again = fit(step=in_parts)
    assert again.costs == bound.costs


def test_a_resumed_and_a_finished_phase_cost_what_an_undisturbed_one_does(tmp_path):
    def dying(model, batches, progress):
        if progress.step == 6:
            raise Killed
        return step(model, batches, progress)

    costs = fit()[1].costs
    with pytest.raises(Killed):
        fit(tmp_path / "c", step=dying, checkpoint_seconds=0.0)
    assert fit(tmp_path / "c")[1].costs == costs
    assert fit(tmp_path / "c")[1].costs == costs


def test_features_of_views_are_counted_and_their_cost_is_kept(tmp_path):
    class Model(Linear):
        backbone = SimpleNamespace(feature_width=3)

        def feature(self, views):
            return views.flatten(1) @ self.weight.T + views.mean((1, 2, 3))[:, None]

    model, images = Model(), toy_images(LABELS)
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))

    def made():
        bound = session(tmp_path)
        return bound, bound.view_features("weak", model, images)

    bound, first = made()
    assert first.shape == (24, 3) and not torch.equal(first, bound.view_features("strong", model, images, strong=True))
    assert bound.costs["weak"] == Cost(steps=0, images=24, flops=24 * 2 * 192 * 3)
    again, second = made()
    assert torch.equal(first, second) and again.costs["weak"] == bound.costs["weak"]
    other = session().view_features("another", model, images)
    assert not torch.equal(other, first) and torch.equal(other, session().view_features("another", model, images))


def test_features_of_views_do_not_depend_on_the_number_of_processes():
    class Model(Linear):
        backbone = SimpleNamespace(feature_width=192)

        def feature(self, views):
            return views.flatten(1)

    images = toy_images(torch.arange(4).repeat(75))
    bound = session(images=images)
    whole = bound.view_features("weak", Model(), images, strong=True)
    for rank in range(2):
        with (
            patch("lpt.engine.session.rank_and_world", lambda rank=rank: (rank, 2)),
            patch("lpt.engine.session.all_gather_rows", lambda mine, total: mine),
        ):
            mine = bound.view_features("weak", Model(), images, strong=True)
        assert torch.equal(mine[:150], whole[rank::2])  # of the last batch only what is there


def test_the_seconds_of_features_that_a_killed_run_has_computed_are_kept(tmp_path):
    def made():
        bound = session(tmp_path)
        bound.once("queries", bound.images, lambda: (time.sleep(0.05), torch.zeros(2))[1])
        return bound

    assert made().seconds_before == {"queries": 0.0}  # this process has spent them, and knows
    again = made()
    assert 0.05 <= again.seconds_before["queries"] < 10
    again.once("queries", again.images, lambda: torch.zeros(2))
    assert again.seconds_before["queries"] >= 0.05


def test_processes_that_see_different_checkpoints_are_told(tmp_path):
    fit(tmp_path / "c")
    with (
        patch("lpt.engine.phase_state.all_reduce_sum", lambda mine: mine + 5),
        pytest.raises(TrainingError, match="a disk that all see"),
    ):
        fit(tmp_path / "c")


# Recipes.


def test_a_phase_is_asked_for_when_the_one_before_is_done():
    """What a method does between two phases sees the model as the first has left it."""
    weights = []

    def phases(model):
        yield phase("phase1")
        weights.append(model.weight.clone())
        yield phase("two")

    model = Linear()
    assert follow(Recipe(model, phases(model)), session()) is model
    assert torch.equal(weights[0], fit()[0].weight) and not torch.equal(weights[0], model.weight)


def test_a_finished_phase_is_loaded_before_the_next_is_asked_for(tmp_path):
    weights = []

    def phases(model):
        yield phase("one")
        weights.append(model.weight.clone())
        yield phase("two")

    for _ in range(2):
        model = Linear()
        follow(Recipe(model, phases(model)), session(tmp_path))
        weights.append(model.weight.clone())
    between, end, between_again, end_again = weights
    assert torch.equal(between, between_again) and torch.equal(end, end_again)


@pytest.mark.parametrize("returned", [None, Linear(), (phase(name) for name in "ab")])
def test_what_is_no_recipe_is_refused(returned):
    """A generator that nobody consumes would train nothing, and nobody would know."""
    with pytest.raises(
        TrainingError, match=r"method mine returned a \w+, which trains nothing: return Recipe\(model, ph"
    ):
        checked_recipe("mine", returned)


def test_a_recipe_of_anything_but_phases_is_refused():
    with pytest.raises(TrainingError, match="a recipe yields phases, and not generator"):
        follow(Recipe(Linear(), [(phase(name) for name in "ab")]), session())


def test_a_recipe_without_phases_or_steps_trains_nothing():
    started = []
    bound = session(on_start=lambda: started.append(True))
    model = Linear()
    follow(Recipe(model), bound)
    follow(Recipe(model, [phase(steps=0)]), bound)
    assert started and not bound.costs and not model.weight.any()


def test_a_phase_of_fewer_than_no_steps_is_refused():
    with pytest.raises(TrainingError, match="phase phase1 of -1 steps"):
        phase(steps=-1)


def test_noise_is_standard_normal_and_a_row_costs_the_same_on_any_number_of_processes():
    at = dict(phase="p", step=5, steps=10, steps_per_epoch=2, seed=1)
    noise, chance = Progress(**at).normal("cloud", 64, 4001), Progress(**at).uniform("drop", 64, 4001)
    assert noise.dtype == chance.dtype == torch.float32 and noise.shape == chance.shape == (64, 4001)
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**4).mean() - 3) < 0.1
    assert torch.corrcoef(noise[:8]).fill_diagonal_(0).abs().max() < 0.1
    assert chance.min() >= 0 and chance.max() < 1 and abs(chance.mean() - 0.5) < 0.01
    assert torch.equal(Progress(**at, rank=1000, world=100_000).normal("cloud", 2, 3)[0],
                       Progress(**at, rank=1000, world=2000).normal("cloud", 1, 3)[0])  # fmt: skip
