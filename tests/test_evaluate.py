"""Predictions, and the two caches: what is kept is what would be computed, and nothing stale is used."""

import pytest
import torch

import lpt
from lpt import evaluate as public_evaluate
from lpt import serve
from lpt.data.longtail import usual_group_rule
from lpt.engine.evaluate import PrefixCache, features, measure, predict
from tests.support.toy import prompted, small_backbone, toy_images, toy_task

LABELS = torch.arange(7).repeat(5)


@pytest.fixture
def count_blocks(monkeypatch):
    """How many blocks have run so far, as a list that grows."""

    def watch(backbone):
        ran = []
        block = backbone.block
        monkeypatch.setattr(backbone, "block", lambda i, *a, **k: (ran.append(i), block(i, *a, **k))[1])
        return ran

    return watch


def test_a_second_evaluation_runs_one_tail_and_gives_the_same_bits(count_blocks):
    backbone = small_backbone()
    model, images, cache = prompted(backbone).only_train("pool.", "head."), toy_images(LABELS), PrefixCache()
    ran = count_blocks(backbone)
    plain = predict(model, images, batch_size=16)
    assert len(ran) == 3 * (2 + 2 + 2)  # three batches: prefix, query, tail
    first = predict(model, images, batch_size=16, cache=cache)
    ran.clear()
    second = predict(model, images, batch_size=16, cache=cache)
    assert ran == 3 * [2, 3]
    for found in (first, second):
        assert torch.equal(found.logits, plain.logits) and torch.equal(found.ids, plain.ids)


def test_what_trains_is_seen_through_the_cache_and_a_moved_shared_prompt_empties_it():
    model, images, cache = prompted(small_backbone()).only_train("pool.", "head."), toy_images(LABELS), PrefixCache()
    generator = torch.Generator().manual_seed(0)
    before = predict(model, images, cache=cache).logits
    for tensor in (model.pool.tokens, model.head.weight, model.shared.tokens, model.pool.keys, model.pool.centre):
        with torch.no_grad():
            tensor.add_(torch.randn(tensor.shape, generator=generator))
        after = predict(model, images, cache=cache).logits
        assert torch.equal(after, predict(model, images).logits)
        changes_logits = tensor is not model.pool.keys and tensor is not model.pool.centre  # those: only if ids change
        assert not (changes_logits and torch.equal(after, before))
        before = after


def test_other_images_another_view_and_another_model_are_not_mixed_up():
    backbone, cache = small_backbone(), PrefixCache()
    model, images = prompted(backbone).only_train(), toy_images(LABELS)
    predict(model, images, cache=cache)
    others = toy_images(LABELS, seed=5)
    assert torch.equal(predict(model, others, cache=cache).logits, predict(model, others).logits)
    predict(model, images, cache=cache)
    backbone.preprocess = backbone.preprocess.with_(mean=(0.1, 0.2, 0.3))
    assert torch.equal(predict(model, images, cache=cache).logits, predict(model, images).logits)
    second = prompted(small_backbone(seed=9)).only_train()
    assert torch.equal(predict(second, images, cache=cache).logits, predict(second, images).logits)


def test_the_cache_stays_below_its_limit_and_is_right_above_it(count_blocks):
    backbone = small_backbone()
    model, images = prompted(backbone).only_train(), toy_images(LABELS)
    whole = PrefixCache()
    want = predict(model, images, batch_size=10, cache=whole).logits
    small = PrefixCache(limit=whole.bytes // 2)
    predict(model, images, batch_size=10, cache=small)
    assert 0 < small.bytes <= small.limit
    assert torch.equal(predict(model, images, batch_size=10, cache=small).logits, want)


def test_nothing_is_kept_while_the_shared_prompt_trains():
    model, images, cache = prompted(small_backbone(), pool=False), toy_images(LABELS), PrefixCache()
    predict(model.only_train("shared.", "head."), images, cache=cache)
    assert cache.bytes == 0
    model = prompted(small_backbone()).only_train("shared.", "pool.", "head.")
    predict(model, images, cache=cache)
    assert cache.bytes == 0


def test_features_are_computed_once_and_a_stale_file_is_never_read(tmp_path, count_blocks):
    backbone = small_backbone()
    model, images = prompted(backbone, pool=False).only_train(), toy_images(LABELS)
    want = features(model, images)
    ran = count_blocks(backbone)
    assert torch.equal(features(model, images, folder=tmp_path), want) and ran
    ran.clear()
    assert torch.equal(features(model, images, folder=tmp_path), want) and not ran
    (file,) = tmp_path.iterdir()

    def is_new():
        ran.clear()
        found = features(model, images, folder=tmp_path)
        assert torch.equal(found, features(model, images)) and ran
        return found

    with torch.no_grad():
        model.shared.tokens.add_(1.0)
    is_new()
    backbone.preprocess = backbone.preprocess.with_(interpolation="bilinear")
    is_new()
    images = toy_images(LABELS, seed=2)
    is_new()
    images = images.subset(reversed(range(len(LABELS))))
    is_new()
    backbone.to(torch.bfloat16)
    is_new()
    backbone.fingerprint = "another"
    is_new()
    assert len(list(tmp_path.iterdir())) == 7
    file.write_bytes(file.read_bytes()[:100])  # a damaged file is computed again
    fresh, images = prompted(small_backbone(), pool=False).only_train(), toy_images(LABELS)
    assert torch.equal(features(fresh, images, folder=tmp_path), want)


def test_a_training_view_setting_does_not_make_features_stale(tmp_path):
    backbone, images = small_backbone(), toy_images(LABELS)
    model = prompted(backbone, pool=False).only_train()
    features(model, images, folder=tmp_path)
    backbone.preprocess = backbone.preprocess.with_(min_area=0.3, flip=False)
    features(model, images, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_predictions_from_features_are_those_of_the_whole_model(tmp_path):
    model, images = prompted(small_backbone(), pool=False).only_train(), toy_images(LABELS)
    assert torch.equal(predict(model, images, folder=tmp_path).logits, predict(model, images).logits)
    task = toy_task()
    model = prompted(small_backbone(), pool=False, num_classes=4).only_train()
    stored = measure(model, predict(model, task.test, folder=tmp_path), task.counts, group_rule="thirds")
    assert stored == public_evaluate(model, task.test, task.counts, group_rule="thirds")


def test_each_head_of_a_fused_one_is_told_by_itself(clip, tmp_path):
    from tests.support.semi import semi

    task = toy_task()
    model = semi("ulfine", clip, steps=2, rounds=1, lr=0.05, tau=0.4, tuning="vpt_deep", prompt_length=2)[0]
    found = predict(model.only_train(), task.test)
    with torch.no_grad():
        views = clip.preprocess.test(task.test.pixels)
        linear, similarity = model.head.both(model.feature(views))
    assert found.head_logits.keys() == {"linear", "similarity"}
    torch.testing.assert_close(found.head_logits["linear"], linear, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.head_logits["similarity"], similarity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, 0.5 * linear + 0.5 * similarity, rtol=1e-4, atol=1e-4)
    parts = predict(model, task.test, batch_size=7)
    torch.testing.assert_close(parts.head_logits["similarity"], found.head_logits["similarity"], rtol=1e-4, atol=1e-4)
    kept = predict(model, task.test, folder=tmp_path)  # through features in a file
    assert torch.equal(kept.logits, found.logits) and kept.head_logits.keys() == found.head_logits.keys()
    assert all(torch.equal(kept.head_logits[name], value) for name, value in found.head_logits.items())

    metrics = measure(model, found, task.counts, group_rule="thirds")
    for name, logits in (("linear", linear), ("similarity", similarity)):
        right = (logits.argmax(1) == task.test.labels).double()
        alone = metrics["heads"][name]
        assert alone["accuracy"] == pytest.approx(right.mean().item())
        assert alone["worst_class"] == pytest.approx(right.view(4, 6).mean(1).min().item())
        assert alone["ece"] >= 0 and alone.keys() >= {"many", "medium", "few", "geometric_mean", "harmonic_mean"}
    assert metrics["heads"]["linear"] != metrics["heads"]["similarity"]
    assert "heads" not in measure(
        prompted(clip, num_classes=4), predict(prompted(clip, num_classes=4), task.test), task.counts
    )


# Groups.


def test_a_task_brings_its_group_rule_to_its_model_and_its_prompt_file(tmp_path):
    """Digits are in rank thirds, whatever their counts: on the command line, in Python, and after a reload."""
    task, backbone = lpt.load_task("digits-lt", imbalance_factor=60), lpt.load_backbone("nano")
    assert usual_group_rule(task.counts) == "lt20" != task.group_rule
    model = lpt.tune(task, backbone, method="class_mean")
    lpt.save_prompt(tmp_path / "p.safetensors", model, method="class_mean", counts=task.counts)
    again = lpt.load_prompt(tmp_path / "p.safetensors", backbone)
    for one in (model, again):
        by_task, by_images = public_evaluate(one, task), public_evaluate(one, task.test, task.counts)
        assert by_task == by_images and by_task["group_rule"] == "thirds" and by_task["few"] is not None
    assert public_evaluate(model, task, group_rule="lt20")["group_rule"] == "lt20"
    assert serve.evaluate_prompt(tmp_path / "p.safetensors", {"data": {"name": "digits-lt"}})["group_rule"] == "thirds"


def test_without_a_rule_no_group_is_empty_for_want_of_another():
    """Caltech-101's counts have nothing below 20: rank thirds then, as a folder of them has."""
    model, images = prompted(small_backbone(), num_classes=7), toy_images(LABELS)
    counts = torch.tensor([400, 130, 90, 60, 50, 40, 31])
    assert public_evaluate(model, images, counts)["group_rule"] == "thirds"
    assert public_evaluate(model, images, torch.tensor([400, 130, 90, 60, 50, 19, 3]))["group_rule"] == "lt20"


def test_images_need_the_counts_of_their_classes():
    with pytest.raises(lpt.LptError, match=r"give a task, or task\.counts"):
        public_evaluate(prompted(small_backbone()), toy_images(LABELS))
