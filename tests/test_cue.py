"""CUE and its controls, re-derived number by number; what they leave as it was."""

import math

import pytest
import torch
import torch.nn.functional as F

from lpt.config import LATER_METHOD_SETTINGS, resolve
from lpt.engine.batches import Progress, draw, to_views
from lpt.errors import BackboneError, LptError
from lpt.losses import BinaryAdjusted, LogitAdjusted, distillation, loss_by_name
from lpt.methods.cue import CueSettings, CueTerms, neighbors, zero_shot_targets
from tests.support.toy import small_backbone, toy_task
from tests.support.training import bind, recipe_of, train

CLASSES, PROTOTYPES = 4, torch.randn(4, 32, generator=torch.Generator().manual_seed(4))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def backbone_with_prototypes():
    backbone = small_backbone(depth=2)
    backbone.prototypes = {f"class {k}": row for k, row in enumerate(PROTOTYPES)}
    return backbone


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def slow_bla(logits, targets, counts, tau, scale):
    total, images, classes = 0.0, len(logits), len(counts)
    for z, t in zip(logits.tolist(), targets.tolist(), strict=True):
        for k in range(classes):
            moved = scale * z[k] + tau * math.log(counts[k] / sum(counts))
            total -= t[k] * log_sigmoid(moved) + (1 - t[k]) * log_sigmoid(-moved)
    return total / (images * classes)


def slow_targets(similarity, label, number):
    """The label and the `number` best others."""
    others = sorted((k for k in range(len(similarity)) if k != label), key=lambda k: -similarity[k])
    return [1.0 if k == label or k in others[:number] else 0.0 for k in range(len(similarity))]


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_bla_is_a_mean_of_binary_losses_on_adjusted_logits(tau):
    counts, logits = [50, 7, 3, 1, 1], normal(6, 5)
    targets = (normal(6, 5, seed=1) > 0).float()
    found = BinaryAdjusted(torch.tensor(counts), tau, 3.0)(logits, targets)
    assert found.item() == pytest.approx(slow_bla(logits, targets, counts, tau, 3.0), rel=1e-5)


def test_bla_shrinks_as_the_number_of_classes_grows():
    """The hazard: classes that nobody confuses with anything cost nothing, and divide the rest."""
    few = BinaryAdjusted(torch.ones(10), 0.0)(torch.zeros(1, 10), F.one_hot(torch.tensor([0]), 10))
    far = torch.cat([torch.zeros(1, 10), torch.full((1, 90), -50.0)], 1)
    many = BinaryAdjusted(torch.ones(100), 0.0)(far, F.one_hot(torch.tensor([0]), 100))
    assert many.item() == pytest.approx(few.item() / 10, rel=1e-5)


def test_distillation_is_a_mean_divergence_and_zero_for_equals():
    ours, theirs = normal(5, 4), normal(5, 4, seed=1)
    total = 0.0
    for a, b in zip(theirs.softmax(1).tolist(), ours.softmax(1).tolist(), strict=True):
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(a, b, strict=True))
    assert distillation(ours, theirs).item() == pytest.approx(total / 5, rel=1e-5)
    assert distillation(ours, ours + 3).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("top", [1, 3, 9])
def test_zero_shot_targets_are_the_label_and_the_best_others(top):
    cosine, labels = normal(8, 6), torch.arange(8) % 6
    found = zero_shot_targets(cosine, labels, top)
    for row, label, similarity in zip(found.tolist(), labels.tolist(), cosine.tolist(), strict=True):
        assert row == slow_targets(similarity, label, top)
    assert found.sum(1).tolist() == [min(top, 5) + 1.0] * 8  # the label is never one of the others


def test_neighbors_are_the_nearest_prototypes_and_by_chance_as_many_others():
    rows = normal(7, 5)
    found = neighbors(rows, 2)
    for k in range(7):
        cosine = [F.cosine_similarity(rows[k], rows[j], dim=0).item() for j in range(7)]
        assert found[k].tolist() == slow_targets(cosine, k, 2)
    chance = [neighbors(rows, 2, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(chance[0], chance[1]) and not torch.equal(chance[0], chance[2])
    for one in chance:
        assert torch.equal(one.sum(1), found.sum(1)) and torch.equal(one.diagonal(), torch.ones(7))
    assert not torch.equal(chance[0], found)


WHOLE = {"cue_zero_shot": 0.5, "cue_neighbors": 0.25, "cue_top": 2, "cue_near": 1, "distill": 0.1, "distill_scale": 9.0}


def test_a_step_is_the_loss_and_its_terms():
    task, backbone = toy_task(), backbone_with_prototypes()
    session = bind(task, backbone)
    recipe = recipe_of("fine_tune", task, backbone, session, tuning="adaptformer", epochs=1, **WHOLE)
    (phase,) = recipe.phases
    progress = Progress("tune", 0, phase.steps, phase.steps_per_epoch, 0)
    drawn = draw(phase.streams, progress, session.images, session.preprocess)
    batches = to_views(drawn, session.preprocess, torch.device("cpu"), torch.float32)
    (batch,) = batches.values()
    recipe.model.only_train(*phase.trains)
    logged = phase.step(recipe.model, batches, progress)

    logits, counts = recipe.model(batch.views).logits.detach(), task.counts.tolist()
    tokens = backbone.embed(batch.views)
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens)
    cosine = F.cosine_similarity(backbone.pool(tokens)[:, None], PROTOTYPES[None], dim=2)
    near = [[F.cosine_similarity(a, b, dim=0).item() for b in PROTOTYPES] for a in PROTOTYPES]
    labels = batch.labels.tolist()
    t_zs = torch.tensor([slow_targets(row, y, 2) for row, y in zip(cosine.tolist(), labels, strict=True)])
    t_nb = torch.tensor([slow_targets(near[y], y, 1) for y in labels])
    terms = {
        "zero_shot": 0.5 * slow_bla(logits, t_zs, counts, 1.0, 25.0),
        "neighbors": 0.25 * slow_bla(logits, t_nb, counts, 1.0, 25.0),
        "distilled": 0.1 * distillation(25 * logits, 9 * cosine).item(),
    }
    for name, value in terms.items():
        assert logged[name].item() == pytest.approx(value, rel=1e-4)
    first = LogitAdjusted(task.counts, 1.0, 25.0)(logits, batch.labels).item()
    assert logged["loss"].item() == pytest.approx(first + sum(terms.values()), rel=1e-4)
    logged["loss"].backward()
    got = {name for name, parameter in recipe.model.named_parameters() if parameter.grad is not None}
    assert got == {"head.weight"} | {f"backbone.{name}" for name in recipe.model.backbone.learned}


def test_cached_features_cost_no_frozen_forward_and_say_the_same():
    task, backbone = toy_task(), backbone_with_prototypes()
    session = bind(task, backbone)
    terms = CueTerms(CueSettings(**WHOLE), task, backbone, session, scale=25.0)
    views = backbone.preprocess.test(task.train.take(torch.arange(6)))
    feature = terms.frozen(views).feature
    of_views, of_features = (terms.zero_shot(x, are_features=f) for x, f in ((views, False), (feature, True)))
    assert torch.equal(of_views, of_features)
    probe = train("linear_probe", task, backbone, session, epochs=1, head="cosine", **WHOLE)
    plain = train("linear_probe", task, backbone, session, epochs=1, head="cosine")
    assert not torch.equal(probe.head.weight, plain.head.weight)


def test_without_texts_class_means_are_a_way_out_that_is_said():
    task, backbone = toy_task(), small_backbone(depth=2)
    with pytest.raises(BackboneError, match=r"prototypes.*set method\.cue_from=class_mean"):
        recipe_of("fine_tune", task, backbone, cue_neighbors=0.5)
    terms = CueTerms(
        CueSettings(cue_neighbors=0.5, cue_from="class_mean"), task, backbone, bind(task, backbone), scale=1
    )
    rows = torch.stack(
        [
            F.normalize(terms.frozen(backbone.preprocess.test(task.train.take(rows))).feature, dim=1).mean(0)
            for rows in ((task.train.labels == k).nonzero().flatten() for k in range(CLASSES))
        ]
    )
    torch.testing.assert_close(terms.frozen.head.weight.detach(), F.normalize(rows, dim=1), rtol=1e-4, atol=1e-5)


def test_without_its_settings_training_is_what_it_was_and_so_is_its_hash():
    task, backbone = toy_task(), small_backbone(depth=2)  # without prototypes: nothing asks for them
    settings = {"tuning": "vpt_deep", "epochs": 1}
    plain, again = (train("fine_tune", task, backbone, **settings, **more) for more in ({}, {"cue_top": 3}))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    # The hashes are those of the version before CUE.
    for name, of_before in {"fine_tune": "4b9c68e2e55a020c", "two_stage": "934b28a50ccd2655"}.items():
        raw = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": name}}
        assert resolve(raw).run_hash("s", "b") == of_before
    inside = {**raw, "method": {"name": "two_stage", "then": {"name": "fine_tune", "cue_neighbors": 0.5}}}
    plain_inside = {**raw, "method": {"name": "two_stage", "then": {"name": "fine_tune"}}}
    assert resolve(inside).run_hash("s", "b") != resolve(plain_inside).run_hash("s", "b")
    assert set(vars(CueSettings())) <= set(LATER_METHOD_SETTINGS)
    assert all(LATER_METHOD_SETTINGS[key] == value for key, value in vars(CueSettings()).items())


@pytest.mark.parametrize("loss", ["ce", "la", "bs"])
def test_smoothed_targets_are_a_control_of_the_losses_that_have_them(loss):
    logits, labels, counts = normal(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([9, 4, 2, 1])
    smoothed = loss_by_name(loss, counts, scale=2.0, label_smoothing=0.2)(logits, labels)
    moved = 2 * logits + (0 if loss == "ce" else (counts / counts.sum()).log())
    slow = 0.0
    for z, y in zip(moved.log_softmax(1).tolist(), labels.tolist(), strict=True):
        slow -= sum((0.8 * (k == y) + 0.2 / 4) * z[k] for k in range(4))
    assert smoothed.item() == pytest.approx(slow / 5, rel=1e-5)
    with pytest.raises(LptError, match=r"smooth_targets 0\.2 is of ce, la, bs, and not of loss focal"):
        loss_by_name("focal", counts, scale=1.0, label_smoothing=0.2)
