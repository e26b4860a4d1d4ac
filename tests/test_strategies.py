"""Two-stage fine-tuning, pre-finetuning and what comes after training: what each stage moves, and what it must not."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import lpt
from lpt.engine.evaluate import features
from lpt.engine.history import History
from lpt.engine.loop import follow
from lpt.engine.optim import lr_at
from lpt.engine.phase import Recipe
from lpt.errors import BackboneError, ConfigError, LptError
from lpt.losses import log_prior
from lpt.methods.decoupled import temperature
from lpt.model.heads import Calibration
from lpt.prompt_file import load_prompt, save_prompt
from tests.support.toy import images, small_backbone, toy_task
from tests.support.training import bind, recipe_of

COUNTS = (30, 12, 5, 2)
FAST = {"epochs": 2, "optimizer": "adamw", "lr": 1e-2, "prompt_length": 2}


def trained(method, task=None, backbone=None, spy=None, checkpoints=None, **settings):
    """(model, history, what was said); `spy` sees (phase, model before, model after) of every stage."""
    task, backbone = task or toy_task(COUNTS), backbone or small_backbone()
    history, said = History(), []

    def watched(recipe):
        for phase in recipe.phases or ():
            recipe.model.only_train(*phase.trains)
            before = {k: v.clone() for k, v in recipe.model.state_dict().items()}
            yield phase
            if spy:
                (stream, *_) = phase.streams.values()
                spy(phase.name, before, {k: v.clone() for k, v in recipe.model.state_dict().items()}, stream)

    session = bind(task, backbone, history=history, checkpoints=checkpoints, log=said.append)
    recipe = recipe_of(method, task, backbone, session, **settings)
    model = follow(Recipe(recipe.model, watched(recipe)), session)
    return model.only_train().eval(), history.lines, said


def moved(before, after):
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("tuning", ["vpt_deep", "adaptformer"])
def test_stage_1_moves_the_head_alone_and_stage_2_what_it_may(tuning):
    stages = {}
    then = {"name": "fine_tune", "tuning": tuning, **FAST}
    trained(
        "two_stage",
        spy=lambda phase, a, b, stream: stages.update({phase: (moved(a, b), stream)}),
        epochs_stage1=3,
        then=then,
    )
    assert list(stages) == ["reweighted", "tune"]
    assert stages["reweighted"][0] == {"head.weight"} and stages["reweighted"][1].features is not None
    second = stages["tune"][0]
    assert "head.weight" in second and len(second) > 1
    assert all(name == "head.weight" or name.startswith("shared.") or ".adapter." in name for name in second)


def test_stage_1_may_take_the_last_block_along():
    stages = {}
    then = {"name": "fine_tune", "tuning": "norm", **FAST}
    spy = lambda phase, a, b, stream: stages.update({phase: moved(a, b)})  # noqa: E731
    trained("two_stage", spy=spy, epochs_stage1=2, stage1_train="last_block", then=then)
    assert stages["reweighted"] > {"head.weight"}
    assert all(name == "head.weight" or name.startswith("backbone.vit.blocks.3.norm") for name in stages["reweighted"])
    with pytest.raises(LptError, match="last_block needs a tuning"):
        trained("two_stage", stage1_train="last_block", then={"name": "fine_tune", "tuning": "vpt_deep", **FAST})


@pytest.mark.parametrize("method", ["two_stage", "pre_finetune"])
def test_without_stage_1_it_is_the_plain_method(method):
    settings = {"tuning": "vpt_deep", "loss": "ce", **FAST}
    plain, _, _ = trained("fine_tune", **settings)
    same, _, _ = trained(method, epochs_stage1=0, then={"name": "fine_tune", **settings})
    assert all(torch.equal(v, same.learned_state()[k]) for k, v in plain.learned_state().items())
    other, _, _ = trained(method, epochs_stage1=2, then={"name": "fine_tune", **settings})
    assert not torch.equal(plain.head.weight, other.head.weight)


def test_pre_finetuning_starts_on_a_set_with_equal_counts_and_goes_before_lpt_too():
    stages = {}
    spy = lambda phase, a, b, stream: stages.update({phase: (moved(a, b), stream)})  # noqa: E731
    then = {"name": "lpt", "epochs": [1, 1], "pool_size": 3, "prompt_length": 2, "prefix_blocks": 2}
    model, _, _ = trained("pre_finetune", spy=spy, per_class="max", views=1, then=then)
    assert list(stages) == ["augmented", "phase1", "phase2"] and model.pool is not None
    assert torch.bincount(stages["augmented"][1].images.labels).tolist() == [30] * 4
    assert stages["augmented"][0] == {"head.weight", "shared.tokens"}
    assert "shared.tokens" in stages["phase1"][0] and "shared.tokens" not in stages["phase2"][0]


def test_two_stage_inside_pre_finetuning():
    names = []
    inside = {"name": "two_stage", "epochs_stage1": 1, "then": {"name": "fine_tune", "tuning": "vpt_shallow", **FAST}}
    trained("pre_finetune", spy=lambda phase, *rest: names.append(phase), stage1_train="head", then=inside)
    assert names == ["augmented", "reweighted", "tune"]


@pytest.mark.parametrize("tuning", ["vpt_deep", "adaptformer"])
def test_the_inner_first_step_sees_what_the_outer_one_has_learned(tuning):
    """Stage 1 of two-stage trains on cached features: those after pre-finetuning, not before."""
    seen = {}
    backbone, task = small_backbone(), toy_task(COUNTS)

    def spy(phase, before, after, stream):
        seen[phase] = (after, stream.features)

    then = {"name": "fine_tune", "tuning": tuning, **FAST}
    inside = {"name": "two_stage", "epochs_stage1": 1, "then": then}
    model, _, _ = trained("pre_finetune", task, backbone, spy=spy, then=inside)
    model.load_state_dict(seen["augmented"][0])
    torch.testing.assert_close(seen["reweighted"][1], features(model, task.train))
    names = []
    alone = {**inside, "epochs_stage1": 0}
    trained("pre_finetune", spy=lambda phase, *rest: names.append(phase), then=alone)
    assert names == ["augmented", "tune"]


def test_a_second_step_that_trains_nothing_is_refused():
    for method in ("two_stage", "pre_finetune"):
        with pytest.raises(LptError, match="class_mean trains nothing"):
            trained(method, then={"name": "class_mean"})


def test_the_loss_of_stage_2():
    warned = lambda said: any("erase" in line for line in said)  # noqa: E731
    lpt_then = {"name": "lpt", "epochs": [6, 0], "prompt_length": 2, "prefix_blocks": 2}
    assert not warned(trained("two_stage", epochs_stage1=1, then=lpt_then)[2])  # its own loss
    assert warned(trained("two_stage", epochs_stage1=1, stage2_loss="ce", then=lpt_then)[2])
    with pytest.raises(LptError, match="class_mean has no loss of its own"):
        trained("two_stage", stage2_loss="la", then={"name": "class_mean"})


def test_class_balanced_sampling_is_not_adjusted_again():
    with pytest.raises(LptError, match="would do so twice"):
        trained("fine_tune", sampler="class", **FAST)
    assert trained("fine_tune", sampler="class", loss="ce", tuning="head", **FAST)


def test_long_cross_entropy_in_stage_2_is_warned_about():
    settings = {"name": "fine_tune", "tuning": "head", "loss": "ce", **FAST}
    short, long = ({**settings, "epochs": epochs} for epochs in (5, 6))
    said = trained("two_stage", then=short, epochs_stage1=1)[2]
    assert not any("erase" in line for line in said)
    said = trained("two_stage", then=long, epochs_stage1=1)[2]
    assert any("erase what stage 1 has balanced" in line for line in said)
    said = trained("two_stage", then=long, epochs_stage1=1, stage2_loss="la")[2]
    assert not any("erase" in line for line in said)


def test_the_tail_of_the_training_set_is_logged_every_epoch():
    _, lines, _ = trained("two_stage", epochs_stage1=2, then={"name": "fine_tune", "tuning": "head", **FAST})
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        ("reweighted", 1),
        ("reweighted", 2),
        ("tune", 1),
        ("tune", 2),
    ]
    assert all(0 <= line["train_few"] <= 1 for line in lines)


@pytest.mark.parametrize("steps", [7, 40])
def test_every_stage_ends_at_a_rate_of_zero(steps):
    rates = [lr_at(t, steps=steps, steps_per_epoch=5, lr=0.1) for t in range(steps)]
    assert lr_at(steps, steps=steps, steps_per_epoch=5, lr=0.1) == pytest.approx(0, abs=1e-12)
    assert rates[-1] < rates[len(rates) // 2] < 0.1 + 1e-9


def test_a_converged_head_does_not_remember_stage_1():
    """Cross-entropy on frozen features has one optimum: however stage 1 went, a long stage 2 ends there."""
    settings = {"tuning": "head", "head": "linear", "epochs": 400, "lr": 0.9, "weight_decay": 0.05}
    task = toy_task((12, 6, 3))
    backbone = small_backbone()
    backbone.preprocess = backbone.preprocess.with_(min_area=1.0, flip=False)
    plain, _, _ = trained("fine_tune", task, backbone, loss="ce", **settings)
    both, _, _ = trained(
        "two_stage", task, backbone, epochs_stage1=20, then={"name": "fine_tune", "loss": "ce", **settings}
    )
    torch.testing.assert_close(plain.head.weight, both.head.weight, rtol=0.02, atol=0.01)
    assert plain.head.weight.abs().max() > 0.1


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    then = {"name": "fine_tune", "tuning": "adaptformer", **FAST}
    whole, _, _ = trained("two_stage", epochs_stage1=3, then=then)

    class Killed(Exception):
        pass

    def kill(phase, *rest):
        if phase == "reweighted":
            raise Killed

    with pytest.raises(Killed):
        trained("two_stage", spy=kill, checkpoints=tmp_path, epochs_stage1=3, then=then)
    again, _, said = trained("two_stage", checkpoints=tmp_path, epochs_stage1=3, then=then)
    assert "reweighted: finished before" in said
    assert all(torch.equal(v, again.learned_state()[k]) for k, v in whole.learned_state().items())


# After training.

FIRST = {"name": "fine_tune", "tuning": "vpt_deep", "loss": "ce", **FAST}


@pytest.mark.parametrize("adjust", ["crt", "lws", "marc"])
@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_second_stages_touch_the_classifier_alone(adjust, head):
    stages = {}
    spy = lambda phase, a, b, stream: stages.update({phase: moved(a, b)})  # noqa: E731
    model, _, _ = trained("decoupled", spy=spy, adjust=adjust, first={**FIRST, "head": head}, epochs=2)
    allowed = {"crt": {"head.weight", "head.bias"}, "lws": {"calibration.scale"}}
    assert stages[f"adjust-{adjust}"] <= allowed.get(adjust, {"calibration.scale", "calibration.offset"})
    assert stages[f"adjust-{adjust}"]
    if model.calibration is not None:
        assert torch.equal(model.calibration.unit, torch.ones(4))


def test_calibration_is_the_identity_at_its_start():
    z = torch.randn(5, 4)
    assert torch.equal(Calibration(4)(z), z)


def test_marcs_offsets_are_in_units_of_the_norms():
    calibration, z = Calibration(3), torch.randn(5, 3)
    norms, a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.1, -0.2, 0.3])
    calibration.unit.copy_(norms)
    calibration.scale.data.copy_(a)
    calibration.offset.data.copy_(b)
    wanted = torch.tensor([[a[j] * row[j] + b[j] * norms[j] for j in range(3)] for row in z])
    torch.testing.assert_close(calibration(z).detach(), wanted)
    calibration.fold()
    torch.testing.assert_close(calibration(z).detach(), wanted)


def test_tau_normalisation_between_identity_and_unit_rows():
    plain, _, _ = trained("fine_tune", **{k: v for k, v in FIRST.items() if k != "name"}, head="linear")
    for tau in (0.0, 0.5, 1.0):
        model, _, _ = trained("decoupled", adjust="tau_norm", tau=tau, first={**FIRST, "head": "linear"})
        norms = plain.head.weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.head.weight, plain.head.weight / norms**tau)
        assert not model.head.bias.any()
    torch.testing.assert_close(model.head.weight.norm(dim=1), torch.ones(4))
    with pytest.raises(LptError, match="unit rows already"):
        trained("decoupled", adjust="tau_norm", first=FIRST)


@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_posthoc_logit_adjustment_subtracts_the_prior_from_what_the_softmax_sees(head):
    task, backbone = toy_task(COUNTS), small_backbone()
    views = images(backbone)
    plain, _, _ = trained("fine_tune", task, backbone, **{k: v for k, v in FIRST.items() if k != "name"}, head=head)
    model, _, _ = trained("decoupled", task, backbone, adjust="posthoc_la", tau=1.5, first={**FIRST, "head": head})
    before, after = (m.head.scale * m(views).logits for m in (plain, model))
    torch.testing.assert_close(after, before - 1.5 * log_prior(task.counts), rtol=1e-4, atol=1e-4)
    even = toy_task((8, 8, 8))
    first = {**FIRST, "head": head}
    flat, _, _ = trained("decoupled", even, backbone, adjust="posthoc_la", first=first)
    same, _, _ = trained("fine_tune", even, backbone, **{k: v for k, v in first.items() if k != "name"})
    assert torch.equal(flat(views).logits.argmax(1), same(views).logits.argmax(1))


def test_posthoc_adjustment_of_lpt_with_its_pool():
    first = {"name": "lpt", "epochs": [1, 1], "pool_size": 3, "prompt_length": 2, "prefix_blocks": 2}
    model, _, _ = trained("decoupled", adjust="posthoc_la", first=first)
    assert model.pool is not None and model.calibration is not None
    with pytest.raises(LptError, match="behind a prompt pool"):
        trained("decoupled", adjust="crt", first=first)


def test_adjustments_see_the_mean_of_both_heads():
    first = {
        "name": "lpt",
        "epochs": [1, 1],
        "pool_size": 3,
        "prompt_length": 2,
        "prefix_blocks": 2,
        "query_head": True,
    }
    task, backbone = toy_task(COUNTS), small_backbone()
    plain, _, _ = trained("lpt", task, backbone, **{k: v for k, v in first.items() if k != "name"})
    model, _, _ = trained("decoupled", task, backbone, adjust="posthoc_la", first=first)
    before, after = (m.head.scale * m(images(backbone)).logits for m in (plain, model))
    torch.testing.assert_close(after, before - log_prior(task.counts), rtol=1e-4, atol=1e-4)


def test_impossible_adjustments_are_refused_before_anything_trains():
    phases = []
    spy = lambda phase, *rest: phases.append(phase)  # noqa: E731
    for adjust, first, said in (
        ("tau_norm", FIRST, "unit rows"),
        ("temperature", FIRST, "val_per_class"),
        ("crt", {"name": "two_stage", "then": {"name": "lpt", "epochs": [1, 1]}}, "behind a prompt pool"),
        ("crt", {"name": "decoupled", "first": {"name": "lpt", "epochs": [1, 1]}}, "behind a prompt pool"),
        ("marc", {"name": "two_stage", "then": {"name": "ulfine"}}, "fused of two"),
        ("lws", {"name": "knn"}, "neighbours"),
        ("posthoc_la", {"name": "decoupled", "adjust": "lws", "first": FIRST}, "adjusted already"),
    ):
        with pytest.raises(LptError, match=said):
            trained("decoupled", adjust=adjust, first=first, spy=spy)
    assert not phases


@pytest.mark.parametrize("name", ["two_stage", "pre_finetune"])
def test_a_method_cannot_run_inside_itself(name):
    inner = {"name": "two_stage", "then": {"name": name, "then": FIRST}}
    with pytest.raises(LptError, match=f"{name} cannot run inside {name}"):
        trained(name, then=inner)


def test_temperature_is_the_minimum_of_the_nll():
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(400, 5, generator=generator, dtype=torch.float64)
    labels = (logits / 6 + torch.randn(400, 5, generator=generator)).argmax(1)
    found = temperature(logits, labels)
    nll = {t: F.cross_entropy(logits / t, labels).item() for t in (found, found * 1.02, found / 1.02)}
    assert min(nll, key=nll.__getitem__) == found and 1 < found < 20
    with pytest.raises(LptError, match="val_per_class"):
        trained("decoupled", adjust="temperature", first=FIRST)


def test_a_mistake_in_the_inner_method_is_told():
    with pytest.raises(ConfigError, match="epoch: there is no such setting"):
        trained("two_stage", then={"name": "fine_tune", "epoch": 3})
    with pytest.raises(LptError, match="did you mean fine_tune"):
        trained("two_stage", then={"name": "fine_tun"})


# What is stored.

EVERY = {
    **{tuning: ("fine_tune", {"tuning": tuning}) for tuning in ("head", "vpt_shallow", "vpt_deep", "bias", "norm")},
    **{tuning: ("fine_tune", {"tuning": tuning}) for tuning in ("adaptformer", "lora", "full")},
    "linear head": ("fine_tune", {"tuning": "head", "head": "linear"}),
    "lws": ("decoupled", {"adjust": "lws", "first": {**FIRST, "tuning": "lora"}, "epochs": 1}),
    "class mean": ("class_mean", {}),
    "knn": ("knn", {"k": 5}),
}


@pytest.mark.parametrize("what", list(EVERY))
def test_every_model_reloads_to_the_same_bits(what, tmp_path):
    method, settings = EVERY[what]
    if method == "fine_tune":
        settings = {**FAST, **settings}
    backbone, task = small_backbone(), toy_task(COUNTS)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    model, _, _ = trained(method, task, backbone, **settings)
    model.round_to(torch.float16)
    save_prompt(tmp_path / "x.safetensors", model, method=method, counts=task.counts)
    again = load_prompt(tmp_path / "x.safetensors", small_backbone())
    views = images(backbone, 5)
    assert torch.equal(model(views).logits, again(views).logits)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items()), "frozen is frozen"
    assert math.isfinite(lpt.evaluate(again, task.test, task.counts)["nll"])


def test_a_file_with_something_inside_the_backbone_must_say_what(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    task = toy_task(COUNTS)
    model, _, _ = trained("fine_tune", task, **FAST, tuning="lora")
    save_prompt(tmp_path / "x.safetensors", model, method="fine_tune", counts=task.counts)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        header, tensors = json.loads(file.metadata()["lpt"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    header["inside"]["kind"] = "norm"
    del header["sha256"]
    header["format"] = 1
    save_file(tensors, tmp_path / "y.safetensors", {"lpt": json.dumps(header)})
    with pytest.raises(LptError, match="differ in backbone"):
        load_prompt(tmp_path / "y.safetensors", small_backbone())


# Prototypes.


def test_zero_shot_is_the_nearest_prototype_by_name():
    backbone, task = small_backbone(), toy_task(COUNTS)
    with pytest.raises(BackboneError, match=r"prototypes\.weights"):
        trained("zero_shot", task, backbone)
    rows = F.normalize(torch.randn(5, backbone.feature_width), dim=1)
    backbone.prototypes = {f"Class_{k}": rows[k] for k in (4, 2, 0, 1, 3)}
    model, _, _ = trained("zero_shot", task, backbone)
    assert torch.allclose(model.head.weight, rows[:4])
    backbone.prototypes = {"class 0": rows[0], "class 1": rows[1], "klass 2": rows[2]}
    with pytest.raises(BackboneError, match="lack 2 of 4 classes: class 2, class 3; did you mean"):
        trained("zero_shot", task, backbone)


def test_real_text_prototypes_classify_cifar100(cifar100_root, deit_tiny_weights):
    """33.0 per cent zero-shot at 224 px on all 10,000 test images; here every fortieth of them."""
    from lpt.model.backbones.base import read_prototypes

    path = deit_tiny_weights.parent / "cifar100_text_prototypes_deit_tiny.safetensors"
    backbone = lpt.load_backbone("timm:deit_tiny_patch16_224", weights=deit_tiny_weights)
    backbone.prototypes = read_prototypes(path)
    task = lpt.load_task("cifar100-lt", root=str(cifar100_root))
    model, _, _ = trained("zero_shot", task, backbone)
    assert 0.25 < lpt.evaluate(model, task.test.subset(range(0, 10_000, 40)), task.counts)["accuracy"] < 0.42


def test_a_file_of_prototypes_that_is_none(tmp_path):
    from safetensors.torch import save_file

    from lpt.model.backbones.base import read_prototypes

    with pytest.raises(BackboneError, match="does not exist"):
        read_prototypes(tmp_path / "absent")
    (tmp_path / "x").write_text("no")
    with pytest.raises(BackboneError, match="no file of prototypes"):
        read_prototypes(tmp_path / "x")
    save_file({"prototypes": torch.ones(2, 3)}, tmp_path / "y", {"classes": '["a"]'})
    with pytest.raises(BackboneError, match=r"1 names for prototypes of shape \[2, 3\]"):
        read_prototypes(tmp_path / "y")
