"""The fair test of phase 2: its arms on a toy task, routing by what is told, masked logits, and differences."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.accuracy import fair
from lpt.config import load_config, resolve
from lpt.engine.loop import follow
from lpt.methods import build_recipe
from tests.support.toy import small_backbone, toy_task
from tests.support.training import bind

METHOD = {"name": "lpt", "epochs": [1, 1], "pool_size": 20, "topk": 1, "beta": 0.0, "prefix_blocks": 1}
METHOD |= {"prompt_length": 2, "optimizer": "adamw", "lr": [0.01, 0.01], "query_head": True}


def cifar_like():
    """Four classes: two of one superclass, and one of each of two others."""
    return replace(toy_task((20, 10, 5, 3)), classes=("beaver", "bottle", "whale", "lawn_mower"))


def trained(arm, **changes):
    """(the model, the phases that ran) of an arm on the toy task."""
    task, backbone = cifar_like(), small_backbone(depth=2)
    raw = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {**METHOD, **changes}}
    config = resolve(raw, ["train.batch_size=8"])
    session = bind(task, backbone)
    routing = fair.Routing() if arm in ("random", "superclass") else None
    recipe = fair.arm_recipe(arm, build_recipe(config.method, task, backbone, session), config, task, routing)
    starts = []

    def phases():
        for phase in recipe.phases:
            starts.append((phase, {k: v.clone() for k, v in recipe.model.learned_state().items()}))
            yield phase

    model = follow(replace(recipe, phases=phases()), session)
    return model, starts, routing


def test_the_superclasses_are_cifars():
    lines = fair.SUPERCLASSES.split("\n")[1:-1]
    names = [name for line in lines for name in line.split()]
    assert len(lines) == 20 and len(set(names)) == 100 and all(len(line.split()) == 5 for line in lines)
    assert fair.superclass_of(("beaver", "bottle", "whale", "lawn mower")).tolist() == [0, 3, 0, 19]


def test_by_superclass_only_the_prompts_of_superclasses_that_are_there_get_a_gradient():
    model, starts, routing = trained("superclass")
    before = starts[1][1]["pool.tokens"]
    moved = (model.pool.tokens.detach() - before).abs().amax(dim=(1, 2, 3))
    decayed = moved[[k for k in range(20) if k not in (0, 3, 19)]].max()  # weight decay alone
    assert moved[[0, 3, 19]].min() > 20 * decayed
    task = cifar_like()
    routing.expect(fair.told_ids("superclass", task, task.test, pool_size=20, topk=1, seed=0))
    told, predicted = fair.measured_passes(model, task)
    superclass = fair.superclass_of(task.classes)
    for name in ("query", "prompted", "mean"):
        inside = predicted[f"{name} masked"]
        assert torch.equal(superclass[inside], superclass[task.test.labels])
        alone = superclass[task.test.labels] != 0  # a superclass of one class leaves no doubt
        assert torch.equal(inside[alone], task.test.labels[alone])
        assert told[f"{name} masked"]["class_accuracy"] >= told[name]["class_accuracy"]


def test_routed_rows_get_what_they_were_told_in_training_and_in_any_batches():
    task, routing = cifar_like(), fair.Routing()
    ids = fair.told_ids("random", task, task.train, pool_size=20, topk=2, seed=3)
    assert ids.shape == (38, 2) and (ids[:, 0] != ids[:, 1]).all()
    assert torch.equal(ids, fair.told_ids("random", task, task.train, pool_size=20, topk=2, seed=3))
    assert not torch.equal(ids, fair.told_ids("random", task, task.train, pool_size=20, topk=2, seed=4))
    routing.expect(ids)
    parts = [routing(torch.zeros(n, 4))[1] for n in (5, 30, 3)]
    assert torch.equal(torch.cat(parts), ids)
    with pytest.raises(AssertionError, match="more queries"):
        routing(torch.zeros(1, 4))
    model, _, _ = trained("random", topk=2)
    assert model.pool is not None


def test_a_frozen_head_stays_and_a_second_phase_1_is_one():
    model, starts, _ = trained("frozen_head")
    assert torch.equal(model.head.weight, starts[1][1]["head.weight"])
    assert not torch.equal(model.pool.tokens, starts[1][1]["pool.tokens"])
    model, starts, _ = trained("again:2", epochs=[1, 0])
    (first, _), (second, between) = starts
    assert [first.name, second.name] == ["phase1", "phase1-again"] and second.trains == first.trains
    assert second.steps == 2 * first.steps_per_epoch and second.lr == first.lr and model.pool is None
    assert not torch.equal(model.head.weight, between["head.weight"])
    batches = [phase.streams["instance"].sampler.batch(0) for phase in (first, second)]
    assert not torch.equal(*batches)


def test_a_plain_arm_is_the_method():
    task, backbone = cifar_like(), small_backbone(depth=2)
    session = bind(task, backbone)
    expected = follow(build_recipe(METHOD, task, backbone, session), session)
    model, _, _ = trained("plain")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_differences_have_intervals_and_equivalence_is_said_where_it_is_shown():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 1000)
    base = np.where(rng.random(10_000) < 0.7, labels, (labels + 1) % 10)
    worse = np.where(rng.random(10_000) < 0.05, -1, base)
    swapped = base.copy()
    swapped[:20] = -1  # 20 of 10,000 images
    line = {
        name: fair.difference_line(
            name, "a", "head", "head", [[{"head": x, "labels": labels}, {"head": base, "labels": labels}]]
        )
        for name, x in (("same", base), ("worse", worse), ("swapped", swapped))
    }
    assert "+0.00 | +0.00 to +0.00 | yes" in line["same"]
    assert line["worse"].endswith("| no |") and line["swapped"].endswith("| yes |")
    points = 100 * ((worse == labels).mean() - (base == labels).mean())
    assert f"| {points:+.2f} |" in line["worse"]
    means = fair.redrawn_means((worse == labels).astype(float) - (base == labels), labels)
    spread = 100 * np.sqrt(
        np.mean([((worse == labels).astype(float) - (base == labels))[labels == k].var() for k in range(10)]) / 10_000
    )
    assert 100 * means.std() == pytest.approx(spread, rel=0.05)


def test_a_routed_arm_is_a_whole_run_with_its_own_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(fair, "superclass_of", lambda classes: torch.arange(len(classes)) // 5)
    words = ["method.epochs=[1, 1]", "method.beta=0", "method.pool_size=4", "method.topk=2"]
    config = load_config("configs/digits_lt/lpt.yaml", words)
    report = fair.train_arm(config, tmp_path / "run", "random", say=lambda text: None)
    assert "retrieval" not in report and report["class_accuracy"] == report["passes"]["mean"]["class_accuracy"]
    passes = load_file(tmp_path / "run" / "passes.safetensors")
    right = passes["mean"] == passes["labels"]
    assert report["accuracy"] == pytest.approx(float(right.mean()))
    assert json.loads((tmp_path / "run" / "report.json").read_text())["passes"] == report["passes"]
