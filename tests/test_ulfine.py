"""ULFine: the acceptance tests of its specification, and a step's loss, gradients and prototypes by slow loops.

Shapes: feature [B D'], joint [B J], prototypes [C J], logits [B C].
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from lpt.methods.semi_supervised import LABELED, PseudoLabels
from lpt.methods.ulfine import Fitting, orthogonality
from lpt.model.backbones import load_backbone
from lpt.model.backbones.base import read_prototypes
from lpt.model.heads import FusedHead
from tests.support.semi import COUNTS, FAST, UNLABELED, Killed, cross_entropy, normal, semi, semi_task, unit
from tests.support.shared import real
from tests.support.toy import toy_task
from tests.support.training import recipe_of

STATE = ("prototypes", "visual", "seen", "frequency")
SETTINGS = {k: v for k, v in FAST.items() if k != "bottleneck"} | {"adapter_dim": 4, "tau": 0.4}


def ulfine(backbone, *args, **settings):
    return semi("ulfine", backbone, *args, **{**SETTINGS, **settings})


def fresh_head(num_classes=5, width=8, **more):
    head = FusedHead(num_classes=num_classes, width=width, joint_width=width, **more)
    with torch.no_grad():
        head.weight.copy_(normal(num_classes, width, seed=1))
        head.texts.copy_(F.normalize(normal(num_classes, width, seed=2), dim=1))
        head.prototypes.copy_(head.texts)
    return head


def opinion(logits, tau=0.0):
    probability = logits.softmax(1)
    kept = probability.amax(1) >= tau
    return PseudoLabels(probability, kept, kept.float(), {"linear": probability})


def followed(head, joint, labels, found, *, mode="anchored", mu=0.1, rho=0.9, estimator="soft", m=0.99, center=False):
    """The state after a step, class by class in double precision; differentiable in `joint` and `head.texts`."""
    num_classes = len(head.weight)
    votes, number = torch.zeros(num_classes, dtype=torch.double), 0
    for p, kept in zip(found.probability.double(), found.mask.tolist(), strict=True):
        if estimator == "soft" or kept:
            number += 1
            for k in range(num_classes):
                votes[k] += (float(p.argmax() == k)) if estimator == "histogram" else p[k]
    frequency = head.frequency.double()
    if number:
        frequency = m * frequency + (1 - m) * votes / number
    visual, seen = list(head.visual.double()), head.seen.tolist()
    for k in range(num_classes):
        mine = [unit(row) for row, label in zip(joint.double(), labels.tolist(), strict=True) if label == k]
        if mine:
            mean = unit(sum(mine) / len(mine))
            visual[k] = rho * visual[k] + (1 - rho) * mean if seen[k] else mean
            seen[k] = 1.0
    base = list(head.prototypes.double()) if mode == "recursive" else [unit(t) for t in head.texts.double()]
    targets = {k: unit(visual[k]) for k in range(num_classes) if seen[k]}
    text_mean, visual_mean = sum(base) / num_classes, sum(targets.values()) / max(len(targets), 1)
    prototypes = []
    for k in range(num_classes):
        alpha = mu * frequency[k] / max(frequency.tolist()) if seen[k] else 0.0
        if alpha == 0:
            prototypes.append(base[k])
        elif center:
            mixed = (1 - alpha) * (base[k] - text_mean) + alpha * (targets[k] - visual_mean)
            prototypes.append(unit(mixed + text_mean))
        else:
            prototypes.append(unit((1 - alpha) * base[k] + alpha * targets[k]))
    return torch.stack(prototypes), torch.stack(visual), torch.tensor(seen), frequency


def squared_cosines(rows):
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    norms = [row.norm().clamp(min=1e-12) for row in rows]
    return sum((rows[i] @ rows[j] / norms[i] / norms[j]) ** 2 for i, j in pairs) / len(pairs)


# Acceptance 1: before a step, the similarity is zero-shot.


def test_at_the_start_similarities_are_open_clips_zero_shot_logits(tower):
    import open_clip

    model, clip, name, _ = tower
    before = ulfine(clip, keep=True, steps=1, scale_sim=100.0, eta=0.0)[1].seen[0].model
    views = normal(16, 3, 32, 32)
    names = open_clip.get_tokenizer(name.partition(":")[2])([f"a photo of a class {k}" for k in range(4)])
    image, text = (F.normalize(rows, dim=1) for rows in (model.encode_image(views), model.encode_text(names)))
    with torch.no_grad():
        linear, similarity = before.head.both(before.feature(views))
        fused = before.eval()(views).logits
    torch.testing.assert_close(similarity, 100 * image @ text.T, rtol=1e-3, atol=1e-3)
    assert torch.equal(fused.argmax(1), (image @ text.T).argmax(1))
    assert torch.equal(fused, recipe_of("zero_shot", toy_task(COUNTS), clip).model(views).logits * 100)
    # The linear head starts at the texts brought back by the projection: zero-shot up to a factor for each image.
    back = text @ clip.projection.T
    expected = 25 * F.normalize(before.feature(views), dim=1) @ F.normalize(back, dim=1).T
    torch.testing.assert_close(linear, expected, rtol=1e-4, atol=1e-3)


def test_at_the_start_it_is_zero_shot_on_a_real_backbone_too(deit_tiny_weights):
    path = real("weights/cifar100_text_prototypes_deit_tiny.safetensors")
    backbone = load_backbone("timm:deit_tiny_patch16_224", weights=deit_tiny_weights, image_size=64)
    backbone.prototypes = read_prototypes(path)
    with safe_open(path, framework="pt") as file:
        names, rows = json.loads(file.metadata()["classes"]), file.get_tensor("prototypes").float()
    task = replace(semi_task(), classes=tuple(names[:4]))
    model, fit, _ = ulfine(backbone, task, keep=True, steps=2, scale_sim=100.0, eta=0.0, tau=0.2)
    views = normal(6, 3, 64, 64)
    with torch.no_grad():
        feature = fit.seen[0].model.feature(views)
        similarity = fit.seen[0].model.head.both(feature)[1]
        found = fit.seen[0].model.eval()(views).logits
        assert not torch.allclose(model.eval()(views).logits, found, atol=1e-3), "nothing has learned"
    expected = torch.tensor([[100 * unit(f) @ unit(rows[k]) for k in range(4)] for f in feature])
    torch.testing.assert_close(similarity, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.argmax(1), expected.argmax(1))


# Acceptance 2 and 3: α, and what it does to prototypes.


@pytest.mark.parametrize("mode", ["anchored", "recursive"])
@pytest.mark.parametrize("estimator", ["soft", "masked", "histogram"])
@pytest.mark.parametrize("center", [False, True])
def test_a_step_moves_each_class_as_a_slow_loop_does(mode, estimator, center):
    head = fresh_head()
    settings = {"mode": mode, "mu": 0.3, "center": center, "pu_estimator": estimator, "orth_weight": 0.0}
    fitting = Fitting(**settings, visual_ema=0.6, pu_ema=0.7)
    slow = {"mode": mode, "mu": 0.3, "center": center, "estimator": estimator, "rho": 0.6, "m": 0.7}
    for step in range(4):
        labels = torch.tensor([[0, 0, 1], [1, 3, 3], [0, 1, 3], [3, 0, 0]][step])  # class 2 and 4 never come
        found = opinion(3 * normal(6, 5, seed=20 + step), tau=0.7)
        assert 0 < found.mask.sum() < 6
        feature = 5 * normal(3, 8, seed=step)
        expected = followed(head, feature, labels, found, **slow)
        before = {name: getattr(head, name).clone() for name in STATE}
        done = fitting(head, feature, labels, found)
        assert all(torch.equal(before[name], getattr(head, name)) for name in STATE), "moved before it should"
        done.commit()
        for name, value in zip(STATE, expected, strict=True):
            torch.testing.assert_close(getattr(head, name).double(), value.double(), rtol=1e-5, atol=1e-6)
        if not center:
            assert torch.equal(head.prototypes[[2, 4]], head.texts[[2, 4]])
    assert head.seen.tolist() == [1, 1, 0, 1, 0]
    torch.testing.assert_close(head.frequency.sum(), torch.tensor(1.0))


def test_alpha_is_at_most_mu_which_the_most_predicted_class_has_and_the_unseen_have_none():
    """α is read off a prototype: texts and visual means are orthogonal, so tan of its angle is α / (1 - α)."""
    head = fresh_head(num_classes=4, width=8)
    with torch.no_grad():
        head.texts.copy_(torch.eye(8)[:4])
        head.prototypes.copy_(head.texts)
    fitting = Fitting(mu=0.3, pu_ema=0.0, orth_weight=0.0)
    probability = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.2, 0.5, 0.1, 0.2]])
    found = PseudoLabels(probability, torch.ones(2, dtype=torch.bool), torch.ones(2), {})
    fitting(head, torch.eye(8)[4:7], torch.tensor([0, 1, 2]), found).commit()
    tangent = [head.prototypes[k, 4 + k] / head.prototypes[k, k] for k in range(3)]
    alpha = [(t / (1 + t)).item() for t in tangent]
    assert alpha == pytest.approx([0.3 * 0.15 / 0.55, 0.3, 0.3 * 0.15 / 0.55], rel=1e-5)
    assert torch.equal(head.prototypes[3], head.texts[3]) and head.seen.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("mode", ["anchored", "recursive"])
def test_without_mu_texts_keep_their_bits(clip, mode):
    model, fit, _ = ulfine(clip, mu=0.0, proto_mode=mode, keep=True)
    texts = F.normalize(clip.class_prototypes(model.classes), dim=1)
    assert torch.equal(model.head.prototypes, texts) and torch.equal(model.head.texts, texts)
    assert model.head.seen.any() and not torch.equal(model.head.visual, fit.seen[0].model.head.visual)
    moving = ulfine(clip, mu=0.1, proto_mode=mode)[0]
    assert not torch.equal(moving.head.prototypes, texts) and torch.equal(moving.head.texts, texts)


def test_the_recursive_update_with_a_constant_mean_follows_its_closed_form():
    """Without normalisation base_T = (1 - α)^T t + (1 - (1 - α)^T) v. With it directions stay in the plane of t and v,
    and cot of the angle to v falls by (1 - α) a step and by what the norm adds; both are checked here."""
    head, mu, steps = fresh_head(num_classes=2, width=8), 0.05, 7
    direction = F.normalize(normal(8, seed=5), dim=0)
    fitting = Fitting(mode="recursive", mu=mu, pu_ema=0.0, orth_weight=0.0)
    found = PseudoLabels(torch.tensor([[0.6, 0.4]]), torch.tensor([True]), torch.ones(1), {})
    a, b = 1.0, 0.0  # the prototype of class 0 is (a t + b v), of class 1 with 2/3 of the α
    text, alpha = head.texts[0].double(), mu
    for _ in range(steps):
        fitting(head, direction.expand(2, 8), torch.tensor([0, 1]), found).commit()
        a, b = (1 - alpha) * a, (1 - alpha) * b + alpha
        whole = a * text + b * direction.double()
        torch.testing.assert_close(head.prototypes[0].double(), unit(whole), rtol=1e-5, atol=1e-6)
        a, b = a / whole.norm().item(), b / whole.norm().item()
    # In the orthogonal case a step before its normalisation is exactly the closed form of one step.
    one = fresh_head(num_classes=2, width=8)
    state = fitting.following(one, direction.expand(2, 8), torch.ones(2), torch.tensor([0.6, 0.4]), torch.tensor(1.0))
    for k, alpha in ((0, mu), (1, mu * 2 / 3)):
        mixed = (1 - alpha) * one.texts[k] + alpha * direction
        torch.testing.assert_close(state.prototypes[k], mixed / mixed.norm())


def test_a_class_that_is_never_predicted_keeps_its_text_and_without_kept_images_nothing_is_counted():
    head = fresh_head()
    with torch.no_grad():
        head.frequency.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]))
    found = opinion(normal(4, 5), tau=1.0)
    assert not found.mask.any()
    fitting = Fitting(mu=0.5, pu_estimator="histogram", orth_weight=0.0)
    fitting(head, normal(5, 8), torch.arange(5), found).commit()
    assert head.frequency.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert torch.equal(head.prototypes[2:], head.texts[2:]) and not torch.equal(head.prototypes[0], head.texts[0])


def test_the_sum_over_processes_is_taken_as_it_is(monkeypatch):
    """Where others nearly cancel this process's part, own part and rest do not add up to the sum's bits."""
    total = 1e-4 * normal(5, 8, seed=9)
    monkeypatch.setattr("lpt.methods.ulfine.all_reduce_sum", lambda mine: total if mine.dim() == 2 else mine)
    head = fresh_head()
    Fitting(orth_weight=1.0)(head, normal(5, 8), torch.arange(5), opinion(normal(4, 5))).commit()
    assert torch.equal(head.visual, F.normalize(total, dim=1))


# Acceptance 4: orthogonality.


def test_orthogonality_is_zero_for_orthonormal_rows_and_blind_to_order_and_number():
    basis = torch.linalg.qr(normal(8, 8, seed=3)).Q
    assert orthogonality(basis[:5]).item() == pytest.approx(0, abs=1e-6)
    rows = normal(6, 8)
    assert orthogonality(rows).item() == pytest.approx(squared_cosines(rows.double()).item(), rel=1e-5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(orthogonality(rows[order]), orthogonality(rows))
    torch.testing.assert_close(orthogonality(7 * rows), orthogonality(rows))
    for num_classes in (2, 7, 40):  # equicorrelated: all cosines 0.3
        correlation = 0.7 * torch.eye(num_classes) + 0.3
        assert orthogonality(torch.linalg.cholesky(correlation)).item() == pytest.approx(0.09, rel=1e-4)


# A whole step by hand.


def fused_by_hand(linear, similarity, fusion, eta):
    if fusion == "zscore":
        spread = [sum((x - row.mean()) ** 2 for x in row) / (len(row) - 1) for row in (linear, similarity)]
        each = [(row - row.mean()) / s.sqrt() for row, s in zip((linear, similarity), spread, strict=True)]
        return spread[0].sqrt() * (eta * each[0] + (1 - eta) * each[1])
    return eta * linear + (1 - eta) * similarity


def loss_by_hand(model, batches, s):
    """Spec section 3, image by image; the loss with its graph, and what the state will be."""
    head, prior = model.head, [s["la_tau"] * torch.tensor(n / sum(COUNTS)).log().double() for n in COUNTS]

    def heads(feature):
        joint = feature @ model.backbone.projection.double() if s["proto_space"] == "joint" else feature
        scales = head.scales.double()
        linear = [scales[0] * unit(feature) @ unit(row) for row in head.weight.double()]
        similarity = [scales[1] * unit(joint) @ unit(row) for row in head.prototypes.double()]
        return torch.stack(linear), torch.stack(similarity), joint

    def trained(feature, target, shift):
        linear, similarity, _ = heads(feature)
        main = fused_by_hand(linear, similarity, s["fusion"], s["eta"]) if s["fuse_train"] else linear
        value = cross_entropy([z + p * shift for z, p in zip(main, prior, strict=True)], target)
        other = cross_entropy([z + p * shift for z, p in zip(similarity, prior, strict=True)], target)
        return value + s["lambda_sim"] * other

    with torch.no_grad():
        said = []
        for feature in model.feature(batches["weak"].views).double():
            linear, similarity, _ = heads(feature)
            both = fused_by_hand(linear, similarity, s["fusion"], s["eta"]) if s["fuse_pseudo_labels"] else linear
            said.append(both.exp() / both.exp().sum())
    found = opinion(torch.stack(said).log(), tau=s["tau"])
    labeled = model.feature(batches[LABELED].views).double()
    labels = batches[LABELED].labels
    supervised = sum(trained(f, int(y), 1.0) for f, y in zip(labeled, labels, strict=True)) / len(labels)
    consistency, views = 0.0, [batches[name].views for name in sorted(batches) if name.startswith("strong")]
    for view in views:
        for f, p, kept in zip(model.feature(view).double(), found.probability, found.mask, strict=True):
            if kept:
                shift = float(s["la_on"] == "both")
                consistency = consistency + trained(f, int(p.argmax()), shift) / len(found.mask) / len(views)
    joint = torch.stack([heads(f)[2] for f in labeled])
    rest = {"mode": s["proto_mode"], "mu": s["mu"], "center": s["proto_center"], "estimator": s["pu_estimator"]}
    state = followed(head, joint, labels, found, rho=s["visual_ema"], m=s["pu_ema"], **rest)
    rows = state[1] if s["orth_on"] == "visual_prototypes" else state[0]
    orth = s["orth_weight"] * squared_cosines(rows) if s["orth_weight"] else 0.0
    return supervised + s["lambda_u"] * consistency + orth, state, found


DEFAULTS = {
    "proto_space": "joint", "proto_mode": "anchored", "mu": 0.2, "visual_ema": 0.9, "pu_estimator": "soft",
    "pu_ema": 0.99, "proto_center": False, "orth_weight": 3.0, "orth_on": "updated_prototypes", "fusion": "scale",
    "eta": 0.5, "fuse_pseudo_labels": True, "fuse_train": False, "lambda_u": 1.0, "la_tau": 1.0,
    "la_on": "labeled", "lambda_sim": 0.0, "tau": 0.4,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"tau": 0.85},
        {"tau": 0.85, "lambda_sim": 0.5, "la_on": "both", "learn_scales": True, "lambda_u": 2.0},
        {"tau": 0.555, "fuse_train": True, "fusion": "zscore", "eta": 0.3, "orth_weight": 0.0, "scale_sim": 60.0},
        {"tau": 0.9, "orth_on": "learnable_text", "proto_center": True, "la_tau": 0.5},
        {"tau": 0.75, "orth_on": "visual_prototypes", "strong_views": 2, "ratio": 2, "micro_batches": 2},
        {
            "tau": 0.9,
            "proto_space": "features",
            "proto_mode": "recursive",
            "pu_estimator": "masked",
            "fuse_pseudo_labels": False,
        },
    ],
    ids=["defaults", "sim", "zscore", "text", "visual", "features"],
)
def test_loss_gradients_and_state_of_a_step_are_those_by_hand(clip, changes):
    s = {**DEFAULTS, **changes}
    _, fit, _ = ulfine(clip, keep=True, **s)
    was, then = fit.seen[1], fit.seen[2].model.head  # the second step: visual means are there, and adapters moved
    loss, state, found = loss_by_hand(was.model, was.batches, s)
    assert 0 < found.mask.sum() < len(found.mask), "choose another tau"
    assert was.logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    was.model.zero_grad(set_to_none=True)
    loss.backward()
    names = {name for name, p in was.model.named_parameters() if p.grad is not None}
    assert names == was.gradients.keys() and any(".adapter." in name for name in names)
    for name, p in was.model.named_parameters():
        if name in names:
            torch.testing.assert_close(was.gradients[name], p.grad, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: n + m)
    for name, value in zip(STATE, state, strict=True):
        torch.testing.assert_close(getattr(then, name).double(), value.double(), rtol=1e-4, atol=1e-5)


def test_orthogonality_pushes_the_backbone_and_texts_only_where_it_should(clip):
    plain, fit, _ = ulfine(clip, orth_weight=0.0, keep=True)
    _, again, _ = ulfine(clip, orth_weight=50.0, orth_on="visual_prototypes", keep=True)
    name = next(n for n in fit.seen[0].gradients if ".adapter.up.weight" in n)
    first = [f.seen[0].gradients[name] for f in (fit, again)]
    assert not torch.allclose(first[0], first[1], atol=1e-4)
    assert torch.equal(fit.seen[0].gradients["head.weight"], again.seen[0].gradients["head.weight"])
    texts = F.normalize(clip.class_prototypes(plain.classes), dim=1)
    learned, _, _ = ulfine(clip, orth_on="learnable_text", orth_weight=5.0)
    assert isinstance(learned.head.texts, torch.nn.Parameter) and not torch.allclose(learned.head.texts, texts)
    assert orthogonality(learned.head.texts) < orthogonality(texts)


# Acceptance 7: parts of a batch are the batch.


@pytest.mark.parametrize(
    "changes",
    [{}, {"orth_on": "visual_prototypes", "strong_views": 2}, {"orth_on": "learnable_text"}, {"cached_views": 2}],
    ids=["prototypes", "visual", "text", "cached"],
)
def test_micro_batches_are_one_batch_in_loss_gradients_and_prototypes(clip, changes):
    cached = {"tuning": "head"} if "cached_views" in changes else {}
    settings = {"orth_weight": 4.0, "mu": 0.3, "keep": True, "batch_size": 8, **changes, **cached}
    runs = [ulfine(clip, micro_batches=k, **settings) for k in (1, 2, 8)]
    model, fit, _ = runs[0]
    for other, again, _ in runs[1:]:
        for one, two in zip(fit.seen, again.seen, strict=True):
            assert two.logged == pytest.approx(one.logged, rel=1e-4, abs=1e-6)
            assert one.gradients.keys() == two.gradients.keys()
            for name, value in one.gradients.items():
                torch.testing.assert_close(two.gradients[name], value, rtol=1e-3, atol=1e-5)
        for name, value in model.learned_state().items():
            torch.testing.assert_close(other.learned_state()[name], value, rtol=1e-4, atol=1e-5)


# Acceptance 6: a killed run continues as it would have.


@pytest.mark.parametrize("killed_at", [0, 1, 4, 6])
@pytest.mark.parametrize(
    "changes",
    [
        {"weight_ema": 0.9, "proto_mode": "recursive", "optimizer": "adamw", "lr": 1e-3, "micro_batches": 2},
        {"orth_on": "learnable_text", "learn_scales": True, "pu_estimator": "masked"},
        {"tuning": "head", "cached_views": 2, "strong_views": 2},
    ],
    ids=["recursive", "text", "cached"],
)
def test_a_killed_run_ends_in_the_same_bits_and_the_same_table(clip, tmp_path, changes, killed_at):
    import pyarrow.parquet as pq

    settings = {"steps": 7, "rounds": 3, **changes}  # rounds end after steps 3, 6 and 7
    whole, undisturbed, _ = ulfine(clip, folder=tmp_path / "whole", **settings)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        ulfine(clip, folder=folder, killed_at=killed_at, **settings)
    model, fit, _ = ulfine(clip, folder=folder, **settings)
    assert fit.losses == undisturbed.losses[killed_at:]
    assert all(torch.equal(value, whole.learned_state()[name]) for name, value in model.learned_state().items())
    kept, expected = fit.memory.stored(), undisturbed.memory.stored()
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)
    assert bool(kept) == ("weight_ema" in changes)
    tables = [pq.read_table(place / "pseudo_labels") for place in (tmp_path / "whole", folder)]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 7 * 4
    assert fit.costs == undisturbed.costs

    def told(run):  # everything but the clock
        return [{k: v for k, v in line.items() if "seconds" not in k} for line in run.history.lines]

    assert told(fit) == told(undisturbed) and len(told(fit)) == 3


def test_a_kill_between_the_table_and_the_checkpoint_leaves_no_row_twice(clip, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    from lpt.engine import phase_state

    settings = {"steps": 6, "rounds": 3}
    ulfine(clip, folder=tmp_path / "whole", **settings)
    save = phase_state.save_checkpoint

    def dying(path, checkpoint, **rest):
        if checkpoint.step == 4:
            raise Killed
        save(path, checkpoint, **rest)

    monkeypatch.setattr(phase_state, "save_checkpoint", dying)
    with pytest.raises(Killed):
        ulfine(clip, folder=tmp_path / "killed", **settings)
    assert pq.read_table(tmp_path / "killed" / "pseudo_labels")["round"].to_pylist() == 8 * [1] + 8 * [2]
    monkeypatch.setattr(phase_state, "save_checkpoint", save)
    ulfine(clip, folder=tmp_path / "killed", **settings)
    tables = [pq.read_table(tmp_path / name / "pseudo_labels") for name in ("whole", "killed")]
    assert tables[0].equals(tables[1])


# Limits.


@pytest.mark.parametrize("tuning", ["adaptformer", "vpt_deep", "head"])
def test_with_the_linear_head_alone_it_is_fixmatch(clip, tuning):
    shared = {"steps": 4, "rounds": 2, "tau": 0.4, "tuning": tuning, "weight_decay": 1e-3, "lr": 0.1, "la_tau": 0.7}
    fine, fit, _ = semi("ulfine", clip, eta=1.0, mu=0.0, orth_weight=0.0, adapter_dim=4, **shared)
    match, other, _ = semi("fixmatch", clip, bottleneck=4, **shared)
    assert fit.losses == other.losses and len(set(fit.losses)) == 4
    for name, value in match.learned_state().items():
        assert torch.equal(fine.learned_state()[name], value), name
    kept = [[line["kept"] for line in run.history.lines] for run in (fit, other)]
    assert kept[0] == kept[1] and 0 < sum(kept[0]) < 2


def test_widths_of_the_bottleneck(clip):
    def width(**settings):
        model = ulfine(clip, steps=1, **settings)[0]
        return next(v.shape[0] for k, v in model.learned_state().items() if k.endswith("adapter.down.weight"))

    assert width(adapter_dim="auto") == 4 and width(adapter_dim="auto_lift") == 1 and width(adapter_dim=3) == 3


def test_labels_of_unlabeled_images_are_never_looked_at(clip):
    task = semi_task()
    blind = replace(task, unlabeled=replace(task.unlabeled, labels=torch.full((sum(UNLABELED),), -1)))
    one, fit, _ = ulfine(clip, task)
    other, again, _ = ulfine(clip, blind)
    assert fit.losses == again.losses
    assert all(torch.equal(value, other.learned_state()[name]) for name, value in one.learned_state().items())
    known, unknown = fit.history.lines[-1]["pseudo_labels"], again.history.lines[-1]["pseudo_labels"]
    assert "precision" in known and unknown.keys() == {"coverage", "classes_without"}
