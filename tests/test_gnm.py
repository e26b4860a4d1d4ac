"""Gaussian neighborhood minimization: a slow loop, exact restoration, resume, and the same noise everywhere."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lpt.config import resolve
from lpt.engine.batches import Progress, draw, to_views
from lpt.engine.gnm import in_neighborhood
from lpt.engine.loop import batches_ahead
from lpt.engine.optim import lr_at
from tests.support.semi import semi
from tests.support.small_fit import Linear, fit, phase, session, step
from tests.support.toy import small_backbone

RADIUS = 0.3


def progress_at(at, **changes):
    return replace(Progress("phase1", at, 11, 4, 0), **changes)


def slow_sgd(radius, *, lr, decay, steps=11, momentum=0.9):
    """θ ← θ - lr (momentum-averaged ∇L(θ + ε) + wd θ), number by number."""
    model, bound, one = Linear(), session(), phase(optimizer="sgd", lr=lr, weight_decay=decay)
    velocity = None
    for t in range(steps):
        progress = progress_at(t, steps=steps)
        drawn = draw(one.streams, progress, bound.images, bound.preprocess)
        views = to_views(drawn, bound.preprocess, torch.device("cpu"), torch.float32)
        theta = model.weight.detach().clone()
        normal = progress.shared_normal("gnm/weight", *theta.shape)
        noise = [[min(1.0, max(-1.0, number / 3)) for number in row] for row in normal.tolist()]
        model.weight.data = theta + radius * torch.tensor(noise)
        (gradient,) = torch.autograd.grad(step(model, views, progress)["loss"], [model.weight])
        gradient = gradient + decay * theta  # of the weights themselves, not of those beside them
        velocity = gradient if velocity is None else momentum * velocity + gradient
        model.weight.data = theta - lr_at(t, steps=steps, steps_per_epoch=4, lr=lr) * velocity
    return model.weight


def test_a_step_is_the_gradient_beside_the_weights_applied_to_them():
    found, _ = fit(optimizer="sgd", lr=0.05, gnm=RADIUS)
    torch.testing.assert_close(found.weight, slow_sgd(RADIUS, lr=0.05, decay=0.01), rtol=1e-4, atol=1e-6)
    plain, _ = fit(optimizer="sgd", lr=0.05)
    assert (found.weight - plain.weight).abs().max() > 1e-3
    torch.testing.assert_close(plain.weight, slow_sgd(0.0, lr=0.05, decay=0.01), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_neighborhood_of_no_size_is_plain_training_bit_for_bit(optimizer):
    plain, _ = fit(optimizer=optimizer)
    for radius in (0.0, 1e-40):  # of the second the noise is drawn, added, and below the last bit of every weight
        assert torch.equal(fit(optimizer=optimizer, gnm=radius)[0].weight, plain.weight)


def test_the_weights_come_back_with_their_very_bits_also_after_an_error():
    weight = nn.Parameter(torch.randn(50, 7) * 10.0 ** torch.randint(-20, 5, (50, 1)))
    before = weight.detach().clone()
    with in_neighborhood({"w": weight}, 0.005, progress_at(3)):
        assert not torch.equal(weight, before)
        assert (weight - before).abs().max() <= 0.005 * 1.001
    assert torch.equal(weight, before)
    with pytest.raises(KeyError), in_neighborhood({"w": weight}, 1e6, progress_at(3)):
        raise KeyError
    assert torch.equal(weight, before) and weight.requires_grad


@pytest.mark.parametrize(("epoch", "share"), [(0, 1.0), (58, 1.0), (59, 0.5), (117, 0.5), (118, 0.25)])
def test_the_neighborhood_halves_after_every_59_epochs(epoch, share):
    weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    progress = Progress("p", epoch * 4, 1000, 4, 0)
    with in_neighborhood({"w": weight}, 0.8, progress):
        noise = (progress.shared_normal("gnm/w", 4, 3).double() / 3).clamp(-1, 1)
        torch.testing.assert_close(weight.detach(), 0.8 * share * noise, rtol=1e-6, atol=1e-9)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 6])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, killed_at):
    whole, _ = fit(gnm=RADIUS)

    def dying(model, batches, progress):
        if progress.step == killed_at:
            raise Killed
        return step(model, batches, progress)

    model = Linear()
    with pytest.raises(Killed):
        fit(tmp_path / "checkpoints", gnm=RADIUS, step=dying, checkpoint_seconds=0.0, model=model)
    resumed, _ = fit(tmp_path / "checkpoints", gnm=RADIUS)
    assert torch.equal(resumed.weight, whole.weight)


def in_parts(model, batches, progress):
    """The loss of `step`, image by image."""
    (batch,) = batches.values()
    noise = progress.normal("noise", len(batch.labels), 3)
    for row in range(len(batch.labels)):
        logits = batch.views[row : row + 1].flatten(1) @ model.weight.T + 0.1 * noise[row : row + 1]
        yield {"loss": nn.functional.cross_entropy(logits, batch.labels[row : row + 1]) / len(batch.labels)}


def test_all_parts_of_a_step_are_taken_at_the_same_place():
    whole, parts = fit(gnm=RADIUS, optimizer="sgd")[0], fit(gnm=RADIUS, optimizer="sgd", step=in_parts)[0]
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-6)


def test_a_running_mean_of_the_weights_is_of_those_that_the_step_began_with():
    settings = {"steps": 1, "rounds": 1, "weight_ema": 0.9, "adapter_dim": 3, "tau": 0.4, "batch_size": 8}
    backbone = small_backbone(depth=2)
    backbone.prototypes = {f"class {k}": row for k, row in enumerate(torch.eye(32)[:4])}
    _, watched, _ = semi("ulfine", backbone, gnm=0.5, keep=True, **settings)
    mean, inside = watched.memory.tensors["average/head.weight"], watched.seen[0].model.head.weight
    start = torch.nn.functional.normalize(torch.eye(32)[:4], dim=1)
    torch.testing.assert_close(mean, start)
    assert (inside - start).abs().max() > 0.1  # what the step saw


def test_every_process_and_every_time_has_the_same_noise_and_every_name_another():
    one = progress_at(5).shared_normal("gnm/a", 200, 30)
    assert torch.equal(one, progress_at(5, rank=1, world=2).shared_normal("gnm/a", 200, 30))
    assert not torch.equal(one, progress_at(5).shared_normal("gnm/b", 200, 30))
    for change in ({"step": 6}, {"phase": "q"}, {"seed": 1}):
        assert not torch.equal(one, progress_at(5, **change).shared_normal("gnm/a", 200, 30))
    assert abs(one.mean()) < 0.05 and abs(one.std() - 1) < 0.05


def test_what_is_drawn_ahead_is_the_same():
    bound, ahead = session(), []
    with batches_ahead(phase(), bound, 0) as batches:
        for progress, _ in batches:
            ahead.append(progress.shared_normal("gnm/weight", 3, 4))
    assert all(torch.equal(one, progress_at(t).shared_normal("gnm/weight", 3, 4)) for t, one in enumerate(ahead))


def test_the_hash_of_a_run_without_it_is_the_one_of_before():
    raw = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": "knn"}}
    off, on = resolve(raw), resolve(raw, ["train.gnm=0.005"])
    assert off.run_hash("s", "b") == resolve(raw, ["train.gnm=0"]).run_hash("s", "b") == "e0e2a0cfcd18d553"
    assert on.run_hash("s", "b") != off.run_hash("s", "b")
