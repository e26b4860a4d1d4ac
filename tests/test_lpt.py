"""The method: what each phase trains, what it leaves alone, and its options."""

import pytest
import torch

import lpt
from lpt.engine.batches import Progress, draw, to_views
from lpt.engine.history import History
from lpt.errors import LptError
from tests.support.toy import small_backbone, toy_task
from tests.support.training import bind, recipe_of, train

SETTINGS = dict(
    prompt_length=2, prefix_blocks=2, pool_size=4, topk=2, epochs=(2, 2), optimizer="adamw", lr=(5e-3, 5e-3)
)


def tuned(task=None, backbone=None, *, seed=0, batch_size=8, **changes):
    history, said = History(), []
    task, backbone = task or toy_task(), backbone or small_backbone()
    session = bind(task, backbone, batch_size=batch_size, seed=seed, history=history, log=said.append)
    return train("lpt", task, backbone, session, **(SETTINGS | changes)), history, said


def test_no_backbone_tensor_changes_by_one_bit():
    backbone = small_backbone()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    tuned(backbone=backbone)
    after = backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.training


def test_phase_2_freezes_the_shared_prompt_and_starts_from_the_head_of_phase_1():
    one, _, _ = tuned(epochs=(2, 0), weight_decay=0.0)
    both, history, _ = tuned(epochs=(2, 2), weight_decay=0.0)
    barely, _, _ = tuned(epochs=(2, 1), lr=(5e-3, 1e-9), weight_decay=0.0)
    assert one.pool is None and both.pool is not None
    assert torch.equal(one.shared.tokens, both.shared.tokens)
    assert torch.allclose(one.head.weight, barely.head.weight, atol=1e-6)
    assert not torch.equal(one.head.weight, both.head.weight)
    assert [line["phase"] for line in history.lines] == ["phase1", "phase1", "phase2", "phase2"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    first, again, other = tuned()[0], tuned()[0], tuned(seed=1)[0]
    for name, value in first.learned_state().items():
        assert torch.equal(value, again.learned_state()[name])
    assert not torch.equal(first.pool.tokens, other.pool.tokens)


def test_it_learns():
    task = toy_task((40, 20, 10, 5), test_per_class=20)
    model, history, _ = tuned(task, small_backbone(width=64), epochs=(8, 4), head_init="class_mean")
    losses = [line["balanced"] for line in history.lines if line["phase"] == "phase1"]
    assert losses[-1] < losses[0]
    assert lpt.evaluate(model, task.test, task.counts)["accuracy"] > 0.5  # chance is 0.25


@pytest.mark.parametrize("loss", ["agcl", "gcl", "la", "ce"])
def test_every_loss_trains(loss):
    _, history, _ = tuned(loss=loss, epochs=(1, 1))
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in history.lines)


def test_the_official_options_change_the_steps_and_the_stream():
    task = toy_task()
    _, history, _ = tuned(task, steps_per_epoch="floor_plus_1", instance_stream="per_step", warmup="first_epoch_1e-6")
    assert [line["step"] for line in history.lines] == [7, 14, 7, 14]  # floor(49 / 8) + 1
    assert history.lines[0]["lr"] == 1e-6
    _, ours, _ = tuned(task)
    assert [line["step"] for line in ours.lines] == [6, 12, 6, 12]


def test_centred_queries_and_kmeans_keys_use_more_of_the_pool():
    plain, _, _ = tuned(epochs=(1, 1))
    centred, history, _ = tuned(epochs=(1, 1), query_centering="mean", key_init="kmeans")
    assert plain.pool.centre.abs().sum() == 0 and centred.pool.centre.abs().sum() > 0
    assert history.lines[-1]["key_usage"]["perplexity"] > 3


def test_collapsed_keys_are_told():
    _, history, said = tuned(toy_task((40, 4)), pool_size=8, topk=1, epochs=(1, 3))
    collapsed = [line["key_usage"]["perplexity"] < 3 for line in history.lines if "key_usage" in line]
    assert any(collapsed)
    assert sum("keys collapsed" in text for text in said) == sum(collapsed)


def test_a_class_without_training_images_is_kept():
    task = toy_task((20, 0, 6, 3))
    model, _, _ = tuned(task, epochs=(1, 1), head_init="class_mean")
    assert model.head.weight.shape[0] == 4
    assert all(torch.isfinite(v).all() for v in model.learned_state().values())


def test_what_cannot_be_served_is_refused_before_training():
    for changes, says in (
        ({"epochs": (0, 0)}, "trains nothing"),
        ({"prefix_blocks": 4}, "use 0 to 3"),
        ({"topk": 5}, "topk 5 does not fit a pool of 4"),
    ):
        with pytest.raises(LptError, match=says):
            tuned(**changes)


def test_five_lines_of_python_are_a_program(tmp_path):
    backbone = small_backbone()
    task = lpt.load_task("digits-lt")
    model = lpt.tune(task, backbone, method="lpt", batch_size=64, **(SETTINGS | {"epochs": (1, 1)}))
    metrics = lpt.evaluate(model, task.test, task.counts, group_rule=task.group_rule)
    model.round_to(torch.float16)
    lpt.save_prompt(tmp_path / "p.safetensors", model, method="lpt", counts=task.counts)
    again = lpt.load_prompt(tmp_path / "p.safetensors", backbone)
    assert abs(lpt.evaluate(again, task.test, task.counts)["accuracy"] - metrics["accuracy"]) < 0.02
    with pytest.raises(LptError, match="did you mean lpt"):
        lpt.tune(task, backbone, method="ltp")


def test_group_prompts_can_start_from_the_shared_one():
    """A random start takes attention away from what phase 1 learned: DeiT-Tiny falls to a few per cent."""
    silent = dict(epochs=(8, 1), lr=(5e-2, 1e-9), weight_decay=0.0)
    near, far = tuned(pool_init="shared", **silent)[0], tuned(pool_init="tn", **silent)[0]
    assert near.shared.tokens.std() > 0.04  # phase 1 has moved it away from its own start
    assert (near.pool.tokens - near.shared.tokens[2:]).std() < 0.015
    assert (far.pool.tokens - far.shared.tokens[2:]).std() > 0.04


def test_the_query_head_is_phase_1s_and_speaks_in_eval_mode_only(tmp_path):
    task = toy_task()
    alone, _, _ = tuned(task, epochs=(2, 0))
    plain, _, _ = tuned(task)
    both, _, _ = tuned(task, query_head=True)
    views = alone.backbone.preprocess.test(task.test.pixels)
    assert torch.equal(both.query_head.weight, alone.head.weight)
    assert torch.equal(both.head.weight, plain.head.weight)  # training is the same with and without it
    with torch.no_grad():
        a, p, b = (m.eval()(views).logits for m in (alone, plain, both))
        assert torch.allclose(b, (a + p) / 2, atol=1e-6)
        assert torch.equal(both.train()(views).logits, plain.train()(views).logits)
    both.eval().round_to(torch.float16)
    lpt.save_prompt(tmp_path / "p.safetensors", both, method="lpt", counts=task.counts)
    again = lpt.load_prompt(tmp_path / "p.safetensors", both.backbone)
    assert torch.equal(again(views).logits, both(views).logits)


def test_one_step_has_the_gradients_of_the_formula():
    """The whole step against LPT §2.6, written plainly: one forward of both streams, one sum, one backward."""
    from lpt.losses import GCL, cloud_noise

    task, backbone = toy_task(), small_backbone()
    session = bind(task, backbone)
    recipe = recipe_of("lpt", task, backbone, session, **(SETTINGS | dict(head_dropout=0.0, query_centering="mean")))
    model, (_, phase2) = recipe.model, recipe.phases
    model.only_train(*phase2.trains)
    progress = Progress("phase2", 3, 12, 4, session.seed)
    drawn = draw(phase2.streams, progress, session.images, session.preprocess)
    batches = to_views(drawn, session.preprocess, torch.device("cpu"), session.dtype)
    for part in phase2.step(model, batches, progress):
        part["loss"].backward()
    mine = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    total = 0.0
    for stream, gammas, weight in (("balanced", (0.0, 4.0), 1.0), ("instance", (0.5, 8.0), 0.5)):
        batch = batches[stream]
        output = model(batch.views)
        cloud = cloud_noise(progress.normal(f"cloud/{stream}", 8, 4))
        a = GCL(task.counts, 20.0, 0.1, 0.5, *gammas)(output.logits, batch.labels, cloud)
        total = total + weight * (a - 0.5 * output.similarity.sum(1).mean())
    total.backward()
    theirs = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert theirs.keys() == mine.keys() == {"pool.tokens", "pool.keys", "head.weight"}
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)
