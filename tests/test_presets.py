"""Presets: every number of their sections, under what a config says itself, written out and hashed as numbers."""

import math

import pytest
import torch
import yaml

from lpt.config import load_config, load_config_of_run, resolve
from lpt.engine.optim import lr_at, scaled_lr
from lpt.errors import ConfigError
from lpt.listing import tables
from lpt.model.prompts import DeepPrompt, start_uniform
from lpt.presets import PRESETS
from lpt.setup import open_backbone
from tests.support.command_line import lpt
from tests.support.toy import small_backbone, toy_task
from tests.support.training import recipe_of

IN21K = {"name": "timm:vit_base_patch16_224.augreg_in21k"}
CLIP = {"name": "open_clip:ViT-B-16/openai"}


def config(preset, data="cifar100-lt", backbone=IN21K, *overrides, **sections):
    return resolve({"preset": preset, "backbone": backbone, "data": {"name": data}, **sections}, overrides)


TABLE = {  # spec: (rate at 128, epochs, AdaptFormer, LoRA, VPT length) of LIFT and of LIFT+
    "cifar100-lt": ((0.01, 10, 4, 4, 10), (0.02, 5, 4, 2, 8)),
    "imagenet-lt": ((0.01, 10, 32, 32, 10), (0.02, 5, 41, 16, 64)),
    "places-lt": ((0.01, 10, 8, 8, 10), (0.02, 5, 15, 4, 16)),
    "inat2018": ((0.01, 20, 256, 256, 10), (0.02, 15, 339, 128, 512)),
}


@pytest.mark.parametrize("data", list(TABLE))
@pytest.mark.parametrize("plus", [False, True])
def test_lift_and_lift_plus_have_the_numbers_of_their_table(data, plus):
    found = config("lift_plus" if plus else "lift", data)
    rate, epochs, adapter, rank, length = TABLE[data][plus]
    method, backbone, train = found.method, found.backbone, found.train
    assert scaled_lr("sgd", method["lr"], train.batch_size) == pytest.approx(rate) and train.batch_size == 128
    assert (method["epochs"], method["bottleneck"], method["rank"]) == (epochs, adapter, rank)
    assert (method["prompt_length"], method["prompt_init"]) == (length, "normal" if plus else "uniform")
    assert (method["name"], method["loss"], method["tau"], method["head"]) == ("fine_tune", "la", 1.0, "cosine")
    assert (method["scale"], method["optimizer"], method["weight_decay"]) == (25.0, "sgd", 5e-4)
    assert (method["warmup"], method["sampler"], train.tta) == ("none", "instance", "five_crop")
    assert (backbone.min_area, backbone.flip, backbone.transform) == (0.08, not plus, "lift")
    crops = (backbone.interpolation, backbone.crop_schedule)
    assert crops == (("bicubic", "mda") if plus else ("bilinear", "fixed"))


def test_full_fine_tuning_has_its_own_rates_and_clip_starts_from_texts():
    for data, rate in {"imagenet-lt": 5e-4, "places-lt": 1e-3, "inat2018": 5e-3}.items():
        full = config("lift", data, CLIP, method={"tuning": "full"})
        assert full.method["lr"] * 128 / 256 == pytest.approx(rate) and full.method["head_init"] == "prototypes"
    assert config("lift").method["head_init"] == "class_mean"
    assert config("lift", "digits-lt").method["rank"] == 0  # its rule


def test_the_pixels_are_those_of_its_section():
    small = {"name": "untrained:vit_tiny_patch16_224", "image_size": 32}
    lift, plus = (open_backbone(config(name, "cifar100-lt", small)).preprocess for name in ("lift", "lift_plus"))
    assert (lift.interpolation, lift.min_area, lift.flip, lift.crops) == ("bilinear", 0.08, True, "fixed")
    assert (plus.interpolation, plus.min_area, plus.flip, plus.crops) == ("bicubic", 0.08, False, "mda")
    assert lift.mean == plus.mean == (0.5,) * 3 == lift.std and lift.crop_ratio == 224 / 256
    own = open_backbone(config("lift_plus", "cifar100-lt", {**small, "min_area": 0.3})).preprocess
    assert own.min_area == 0.3 and own.crops == "mda"


def test_lpt_published_has_the_numbers_of_its_script():
    found = config("lpt_published", "places-lt", {})
    method = {
        "epochs": [40, 90],
        "lr": [0.02, 0.02],
        "warmup": "first_epoch_1e-6",
        "instance_stream": "per_step",
        "steps_per_epoch": "floor_plus_1",
        "weight_decay": 0.01,
        "gammas_bal": [0.0, 4.0],
        "gammas_ins": [0.5, 8.0],
        "prefix_blocks": 6,
        "pool_size": 20,
        "topk": 2,
    }
    assert {key: found.method[key] for key in method} == method
    assert (
        found.backbone.name == IN21K["name"] and found.backbone.transform == "lpt" and found.backbone.min_area == 0.08
    )
    assert found.backbone.norm_eps == 1e-5
    assert found.data["group_rule"] == "le20" and found.train.batch_size == 256 and found.train.precision == "fp32"


def test_an_explicit_key_wins_wherever_it_stands(tmp_path):
    raw = {"preset": "lift", "backbone": IN21K, "data": {"name": "cifar100-lt"}, "method": {"epochs": 3}}
    found = resolve(raw, ["method.lr=0.5", "train.batch_size=64"])
    assert (found.method["epochs"], found.method["lr"], found.train.batch_size) == (3, 0.5, 64)
    assert found.method["warmup"] == "none"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({key: raw[key] for key in ("backbone", "data")}))
    assert load_config(tmp_path / "c.yaml", ["preset=lift", "method.epochs=3"]).method["epochs"] == 3


def test_a_run_keeps_the_numbers_and_its_hash_is_theirs(tmp_path):
    found = config("lift_plus")
    (tmp_path / "config.yaml").write_text(found.to_yaml())
    again = load_config_of_run(tmp_path / "config.yaml")
    assert again == found and "preset" not in found.to_yaml()
    assert again.run_hash("s", "b") == found.run_hash("s", "b") != config("lift").run_hash("s", "b")


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"preset: 'lifd' is unknown.*did you mean lift"):
        config("lifd")
    with pytest.raises(ConfigError, match=r"preset=lift is of method fine_tune, and method\.name is 'lpt'"):
        config("lift", method={"name": "lpt"})
    with pytest.raises(ConfigError, match="preset: 3 is unknown"):
        config(3)
    with pytest.raises(ConfigError, match=r"method\.epohcs"):
        config("lift", "cifar100-lt", IN21K, "method.epohcs=3")


def test_they_are_listed(capsys):
    assert set(tables()["presets"]) == set(PRESETS) == {"lift", "lift_plus", "lpt_published"}
    code, said, _ = lpt(capsys, "list", "presets")
    assert code == 0 and all(f"  {name}  " in said for name in PRESETS)


def test_without_a_warm_up_the_rate_is_a_cosine_of_the_epoch():
    for step in range(30):
        expected = 0.3 * 0.5 * (1 + math.cos(math.pi * (step // 3) / 10))
        assert lr_at(step, steps=30, steps_per_epoch=3, lr=0.3, warmup="none") == pytest.approx(expected)


def test_uniform_prompts_are_within_vpts_bound_and_fill_it():
    prompt = DeepPrompt(layers=12, length=10, width=768)
    start_uniform(prompt, 16, torch.Generator().manual_seed(0))
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    assert prompt.tokens.abs().max() <= bound < 1.001 * prompt.tokens.abs().max()
    assert prompt.tokens.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_a_rank_of_nothing_is_lifts_width():
    task, backbone = toy_task(), small_backbone(depth=2)
    model = recipe_of("fine_tune", task, backbone, tuning="lora_qv", rank=0, epochs=1).model
    assert model.backbone.recipe["rank"] == 1  # 4 classes, 2 blocks
    uniform, normal = (
        recipe_of("fine_tune", task, backbone, tuning="vpt_deep", prompt_init=init).model.shared.tokens.detach()
        for init in ("uniform", "normal")
    )
    assert uniform.abs().max() <= math.sqrt(6 / (3 * 16**2 + 32)) and normal.std() < 0.021 < uniform.std()
