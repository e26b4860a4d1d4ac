"""FixMatch, and what is like FineSSL and DASO: a step's loss and gradients by slow loops, and the limits of each."""

import copy
import math
from collections import deque
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lpt.engine.step_memory import StepMemory
from lpt.errors import BackboneError
from lpt.losses import loss_by_name
from lpt.methods import daso
from lpt.methods.semi_supervised import LABELED, PseudoLabels
from lpt.model.heads import FusedHead
from lpt.tuning import tune
from tests.support.semi import COUNTS, FAST, Killed, cross_entropy, normal, semi, semi_task, unit
from tests.support.toy import small_backbone, toy_task

PRIOR = [math.log(n / sum(COUNTS)) for n in COUNTS]


def cosine_logits(feature, rows, scale):
    return torch.stack([scale * unit(feature.double()) @ unit(row.double()) for row in rows])


def same_gradients(was, loss):
    """What the run found is the gradient of `loss`, which was made of its model; nothing else has one."""
    was.model.zero_grad(set_to_none=True)
    loss.backward()
    expected = {name: p.grad for name, p in was.model.named_parameters() if p.grad is not None}
    assert was.gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(was.gradients[name], value, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: n + m)


def views(was, name):
    return was.model.feature(was.batches[name].views)


# FixMatch.


@pytest.mark.parametrize("changes", [{}, {"lambda_u": 2.5, "la_tau": 0.5, "strong_views": 2}, {"soft_from": 0.6}])
def test_a_step_of_fixmatch_by_hand(clip, changes):
    settings = {**FAST, "tau": 0.69, "scale": 25.0, **changes}
    was = semi("fixmatch", clip, batch_size=6, keep=True, **settings)[1].seen[1]
    rows, labels = was.model.head.weight, was.batches[LABELED].labels
    shift = [settings.get("la_tau", 1.0) * p for p in PRIOR]
    loss = 0.0
    for feature, label in zip(views(was, LABELED), labels.tolist(), strict=True):
        logits = cosine_logits(feature, rows, 25)
        loss = loss + cross_entropy([z + s for z, s in zip(logits, shift, strict=True)], label) / 6
    with torch.no_grad():
        weak = torch.stack([cosine_logits(f, rows, 25).softmax(0) for f in views(was, "weak")])
    strong = [name for name in was.batches if name.startswith("strong")]
    assert len(strong) == settings.get("strong_views", 1)
    kept = soft = 0
    for name in strong:
        for feature, p in zip(views(was, name), weak, strict=True):
            logits, value = cosine_logits(feature, rows, 25), 0.0
            if p.max() >= 0.69:
                value, kept = cross_entropy(logits, int(p.argmax())), kept + 1
            elif p.max() >= settings.get("soft_from", 2.0):
                value, soft = sum(p[k] * cross_entropy(logits, k) for k in range(4)), soft + 1
            loss = loss + settings.get("lambda_u", 1.0) * value / 6 / len(strong)
    assert 0 < kept < 6 * len(strong) and bool(soft) == ("soft_from" in settings), "choose other thresholds"
    assert was.logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert was.logged["kept"] == pytest.approx(kept / 6 / len(strong))
    same_gradients(was, loss)


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_parts_of_a_batch_are_the_batch(clip, micro_batches):
    settings = {**FAST, "tau": 0.8, "soft_from": 0.6, "strong_views": 2, "ratio": 2, "weight_ema": 0.5}
    whole, fit, _ = semi("fixmatch", clip, batch_size=6, keep=True, **settings)
    parts, again, _ = semi("fixmatch", clip, batch_size=6, keep=True, micro_batches=micro_batches, **settings)
    for one, two in zip(fit.seen, again.seen, strict=True):
        assert two.logged == pytest.approx(one.logged, rel=1e-4)
        for name, value in one.gradients.items():
            torch.testing.assert_close(two.gradients[name], value, rtol=1e-3, atol=1e-5)
    for name, value in whole.learned_state().items():
        torch.testing.assert_close(parts.learned_state()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_on_labels_alone_no_unlabeled_image_is_looked_at(clip, tuning):
    class Unseen:
        labels = torch.zeros(9, dtype=torch.long)
        digest = "x"

        def __len__(self):
            raise AssertionError("unlabeled images were looked at")

        take = __len__

    settings = {**FAST, "tuning": tuning, "lambda_u": 0.0, "la_tau": 0.7, "scale": 20.0}
    model, fit, _ = semi("fixmatch", clip, toy_task(COUNTS), keep=True, **settings)
    hidden, again, _ = semi("fixmatch", clip, replace(semi_task(), unlabeled=Unseen()), **settings)
    assert fit.losses == again.losses and fit.streams.keys() == {LABELED}
    assert all(torch.equal(value, hidden.learned_state()[name]) for name, value in model.learned_state().items())
    la = loss_by_name("la", torch.tensor(COUNTS), scale=20.0, tau=0.7)  # the loss of fine_tune
    for was in fit.seen:
        batch = was.batches[LABELED]
        assert was.logged["loss"] == pytest.approx(la(was.model.eval()(batch.views).logits, batch.labels).item(), 1e-5)
        assert was.logged.keys() == {"loss", "supervised"}


def test_one_step_is_that_of_fine_tune_with_logit_adjustment(clip):
    """The same start, the same batch, and the same weights after it; fine_tune's SGD takes lr per 256 images."""
    task = toy_task(COUNTS)
    shared = {"tuning": "adaptformer", "bottleneck": 4, "head_init": "prototypes", "weight_decay": 0.0}
    fine = semi("fine_tune", clip, task, batch_size=26, epochs=1, lr=0.5, **shared)[0]
    same, fit, _ = semi(
        "fixmatch", clip, task, batch_size=26, lr=0.5 * 26 / 256, lambda_u=0, steps=1, rounds=1, **shared
    )
    assert len(fit.losses) == 1
    assert fine.learned_state().keys() == same.learned_state().keys()
    # Streams of other names have other views, so the steps are the same up to those.
    start = F.normalize(clip.unproject(clip.class_prototypes(task.classes)), dim=1)
    steps = [(model.head.weight - start).flatten() for model in (fine, same)]
    assert F.cosine_similarity(steps[0], steps[1], dim=0) > 0.9
    assert steps[0].norm().item() == pytest.approx(steps[1].norm().item(), rel=0.2)


def test_weights_may_be_a_running_mean(clip):
    """Each mean is of the weights before a step, the last of those after the last one."""
    settings = {**FAST, "tau": 0.5, "steps": 4}
    model, _, _ = semi("fixmatch", clip, weight_ema=0.6, **settings)
    plain, fit, _ = semi("fixmatch", clip, keep=True, **settings)
    trail = [was.model for was in fit.seen] + [plain]
    for name, p in model.named_parameters():
        if name in fit.seen[0].gradients:
            mean = dict(trail[0].named_parameters())[name].detach()
            for later in trail[1:]:
                mean = 0.6 * mean + 0.4 * dict(later.named_parameters())[name].detach()
            torch.testing.assert_close(p.detach(), mean, rtol=1e-5, atol=1e-7)


# FineSSL.


def test_a_step_like_finessl_by_hand(clip):
    settings = {"steps": 3, "rounds": 1, "lr": 0.05, "weight_decay": 0.0, "prompt_length": 3, "tau": 0.818}
    model, fit, _ = semi("finessl", clip, batch_size=6, keep=True, smoothing=0.3, lambda_u=2.0, **settings)
    was, scale = fit.seen[1], 1 / 0.07
    main, second = was.model.head.weight, was.model.query_head.weight
    first = fit.seen[0].model
    assert not torch.equal(main, second) and torch.equal(first.head.weight, first.query_head.weight)
    loss = 0.0
    for feature, label in zip(views(was, LABELED), was.batches[LABELED].labels.tolist(), strict=True):
        for f, rows in ((feature, main), (feature.detach(), second)):
            logits = [z + p for z, p in zip(cosine_logits(f, rows, scale), PRIOR, strict=True)]
            loss = loss + cross_entropy(logits, label) / 6
    kept = 0
    for name in ("strong0", "strong1"):
        for feature, weak in zip(views(was, name), views(was, "weak").detach(), strict=True):
            p, q = (cosine_logits(weak, rows, scale).softmax(0).detach() for rows in (main, second))
            label = int(p.argmax())
            loss = loss + 2.0 * q.max() * cross_entropy(cosine_logits(feature, main, scale), label) / 6 / 2
            if p.max() >= 0.818:
                kept += 1
                other = cosine_logits(feature.detach(), second, scale)
                smooth = [0.3 / 4 + 0.7 * (k == label) for k in range(4)]
                loss = loss + sum(s * cross_entropy(other, k) for k, s in enumerate(smooth)) / 6 / 2
    assert 0 < kept < 12, "choose another tau"
    assert was.logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    same_gradients(was, loss)
    assert model.query_head is None and set(model.learned_state()) == {"head.weight", "shared.tokens"}


def test_the_second_head_teaches_the_backbone_nothing(clip):
    """Its own losses are on detached features: with λ_u = 0 the backbone is FixMatch's on labels alone."""
    shared = {"tuning": "adaptformer", "bottleneck": 4, "steps": 3, "rounds": 1, "lr": 0.1, "scale": 25.0}
    one = semi("finessl", clip, lambda_u=0.0, tau=0.1, strong_views=1, **shared)[0]
    plain = semi("fixmatch", clip, lambda_u=0.0, **shared)[0]
    for name, value in plain.learned_state().items():
        torch.testing.assert_close(one.learned_state()[name], value, rtol=1e-4, atol=1e-6)


# DASO.


@pytest.mark.parametrize(("temperature", "tau"), [(0.3, 0.68), (1.5, 0.61)])
def test_a_step_like_daso_by_hand(clip, temperature, tau):
    settings = {**FAST, "tau": tau, "temperature": temperature, "histogram_ema": 0.6, "lambda_align": 0.5}
    model, fit, _ = semi("daso", clip, batch_size=6, keep=True, lambda_u=2.0, **settings)
    was, then = fit.seen[1], fit.seen[2].model.head
    head = was.model.head

    def both(feature):
        joint = feature.double() @ clip.projection.double()
        return cosine_logits(feature, head.weight, 25), cosine_logits(joint, head.prototypes, 20)

    loss = 0.0
    for feature, label in zip(views(was, LABELED), was.batches[LABELED].labels.tolist(), strict=True):
        loss = loss + cross_entropy([z + p for z, p in zip(both(feature)[0], PRIOR, strict=True)], label) / 6
    often = [h ** (1 / temperature) for h in head.frequency.tolist()]
    kept, predicted = 0, [0] * 4
    for feature, weak in zip(views(was, "strong0"), views(was, "weak").detach(), strict=True):
        linear, similarity = (z.softmax(0).detach() for z in both(weak))
        share = often[int(linear.argmax())] / max(often)
        blend = (1 - share) * linear + share * similarity
        predicted[int(blend.argmax())] += 1
        logits, compared = both(feature)
        if blend.max() >= tau:
            kept += 1
            loss = loss + 2.0 * cross_entropy(logits, int(blend.argmax())) / 6
        loss = loss + 0.5 * sum(similarity[k] * cross_entropy(compared, k) for k in range(4)) / 6
    assert 0 < kept < 6, "choose another tau"
    assert was.logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    same_gradients(was, loss)
    expected = [0.6 * h + 0.4 * n / 6 for h, n in zip(head.frequency.tolist(), predicted, strict=True)]
    assert then.frequency.tolist() == pytest.approx(expected, rel=1e-5)

    # Prototypes: means of the unit features of both steps so far, in the joint space; texts where there are none.
    mine = {k: [] for k in range(4)}
    for step in fit.seen[:2]:
        batch = step.batches[LABELED]
        with torch.no_grad():
            joint = step.model.feature(batch.views).double() @ clip.projection.double()
        for row, label in zip(joint, batch.labels.tolist(), strict=True):
            mine[label].append(unit(row))
    texts = F.normalize(clip.class_prototypes(model.classes), dim=1).double()
    for k, rows in mine.items():
        wanted = unit(sum(rows)) if rows else texts[k]
        torch.testing.assert_close(then.prototypes[k].double(), wanted, rtol=1e-4, atol=1e-5)
    assert not model.head.fuse and torch.equal(model.head.texts.double(), texts)
    images = normal(3, 3, 32, 32)
    assert torch.equal(model(images).logits, model.head.both(model.feature(images))[0]), (
        "it predicts by its linear head"
    )


def test_a_queue_holds_the_last_features_of_each_class(monkeypatch):
    monkeypatch.setattr(daso, "QUEUE", 3)
    head = FusedHead(num_classes=4, width=8, joint_width=8)
    with torch.no_grad():
        head.prototypes.copy_(F.normalize(normal(4, 8), dim=1))
    text = head.prototypes[3].clone()

    memory = StepMemory()
    queues = [deque(maxlen=3) for _ in range(4)]
    for step in range(5):
        labels = torch.tensor([[0, 1, 0], [0, 0, 2], [1, 0, 0], [0, 2, 1], [1, 1, 1]][step])
        rows = F.normalize(normal(3, 8, seed=10 + step), dim=1)
        daso.enqueue(memory, head, rows, labels)
        for row, k in zip(rows, labels.tolist(), strict=True):
            queues[k].append(row)
        for k in range(3):
            if queues[k]:
                torch.testing.assert_close(head.prototypes[k], unit(sum(queues[k])))
    assert torch.equal(head.prototypes[3], text) and memory.tensors["queued"].tolist() == [7, 6, 2, 0]


# All of them.


@pytest.mark.parametrize("killed_at", [1, 4])
@pytest.mark.parametrize("method", ["fixmatch", "finessl", "daso"])
def test_a_killed_run_ends_in_the_same_bits_and_the_same_table(clip, tmp_path, method, killed_at):
    import pyarrow.parquet as pq

    settings = {"steps": 6, "rounds": 2, "lr": 0.05, "tau": 0.4}
    settings |= {"fixmatch": {"weight_ema": 0.9, "bottleneck": 4}, "finessl": {"prompt_length": 3}}.get(method, {})
    whole, undisturbed, _ = semi(method, clip, folder=tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        semi(method, clip, folder=tmp_path / "killed", killed_at=killed_at, **settings)
    model, fit, _ = semi(method, clip, folder=tmp_path / "killed", **settings)
    assert fit.losses == undisturbed.losses[killed_at:] and fit.costs == undisturbed.costs
    assert all(torch.equal(value, whole.learned_state()[name]) for name, value in model.learned_state().items())
    kept, expected = fit.memory.tensors, undisturbed.memory.tensors
    assert all(torch.equal(kept[name], value) for name, value in expected.items()) and kept.keys() == expected.keys()
    assert ("queue" in kept) == (method == "daso")
    tables = [pq.read_table(tmp_path / name / "pseudo_labels") for name in ("whole", "killed")]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 6 * 4
    again = semi(method, clip, folder=tmp_path / "killed", **settings)  # all is finished: nothing trains
    assert not again[1].losses and again[1].costs == fit.costs
    assert all(torch.equal(value, whole.learned_state()[name]) for name, value in again[0].learned_state().items())


@pytest.mark.parametrize("method", ["fixmatch", "finessl", "daso", "ulfine"])
def test_runs_are_functions_of_their_seed(clip, method):
    settings = {"steps": 2, "rounds": 1, "lr": 0.05, "tau": 0.4}
    one, same, other = (semi(method, clip, seed=seed, **settings)[1].losses for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("method", ["fixmatch", "finessl", "daso", "ulfine"])
def test_the_backbone_that_was_given_keeps_its_bits(clip, method):
    before = copy.deepcopy(clip.state_dict())
    model = semi(method, clip, steps=2, rounds=1, lr=0.1, tuning="full")[0]
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert not torch.equal(model.backbone.vit.blocks[1].mlp.fc1.weight, clip.vit.blocks[1].mlp.fc1.weight)


def test_an_opinion_in_parts():
    probability = normal(6, 4).softmax(1)
    kept = probability.amax(1) > 0.5
    whole = PseudoLabels(probability, kept, kept.float(), {"linear": probability, "second": -probability})
    parts = whole.chunk(3)
    assert len(parts) == 3 and torch.equal(whole.label, probability.argmax(1))
    for i, part in enumerate(parts):
        rows = slice(2 * i, 2 * i + 2)
        assert torch.equal(part.probability, probability[rows]) and torch.equal(part.mask, kept[rows])
        assert torch.equal(part.weight, kept[rows].float()) and torch.equal(part.heads["second"], -probability[rows])
        assert torch.equal(part.heads["linear"], probability[rows])


@pytest.mark.parametrize(
    ("method", "helps"), [("fixmatch", True), ("finessl", True), ("fine_tune", True), ("daso", False)]
)
def test_a_backbone_without_texts_gets_another_start_named_where_that_helps(method, helps):
    settings = {"epochs": 1} if method == "fine_tune" else FAST
    with pytest.raises(BackboneError, match=r"has no class prototypes: set prototypes\.weights") as error:
        tune(semi_task(), small_backbone(), method=method, head_init="prototypes", batch_size=6, **settings)
    assert ("; or set method.head_init=class_mean, which needs none" in str(error.value)) == helps
    if helps:
        tune(semi_task(), small_backbone(), method=method, head_init="class_mean", batch_size=6, **settings)
