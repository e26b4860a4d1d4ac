"""The ε of LayerNorms as a setting: against an oracle that has its own, and a part of what a backbone is."""

import json

import pytest
import torch
import yaml

import lpt
from lpt.config import load_config
from lpt.errors import BackboneError, ConfigError, PromptFileError
from lpt.model.backbones import random_backbone
from lpt.model.backbones.base import with_norm_eps
from lpt.prompt_file import read_prompt
from lpt.serve.opening import open_prompt
from lpt.setup import Setup
from tests.support.command_line import lpt as command
from tests.support.published import EPS, published_logits
from tests.support.shared import real
from tests.support.toy import images, prompted, small_backbone, toy_task

CONFIG = "configs/digits_lt/linear_probe.yaml"


def differences(backbone, views, heads):
    """The largest difference of our logits from the published ones, and whether the same group prompts were chosen."""
    model = prompted(backbone, num_classes=9).only_train().eval()
    vit = {name.removeprefix("vit."): value for name, value in backbone.named_parameters()}
    logits, ids = published_logits(vit, model.learned_state(), views, heads=heads, topk=2)
    ours = model(views)
    return (20 * ours.logits.double() - 20 * logits).abs().max().item(), torch.equal(ours.ids, ids)


@torch.no_grad()
def test_the_published_constant_makes_the_published_logits():
    backbone = small_backbone(width=64)
    views = 0.05 * images(backbone, 8)  # little variance, as tokens of a trained model have in some blocks
    own, _ = differences(backbone, views, heads=2)
    published, same_prompts = differences(with_norm_eps(backbone, EPS), views, heads=2)
    assert same_prompts and published < 5e-5 < 100 * published < own


@torch.no_grad()
def test_on_deit_tiny_too():
    path = real("weights/deit_tiny_patch16_224.fp16.safetensors")
    errors = {}
    for eps in (None, EPS):
        backbone = lpt.load_backbone("timm:deit_tiny_patch16_224", weights=path, image_size=64, norm_eps=eps)
        errors[eps], same_prompts = differences(backbone, images(backbone, 4), heads=3)
        assert same_prompts
    assert errors[EPS] < 5e-5 and errors[None] > 20 * errors[EPS]


@pytest.mark.parametrize("family", ["nano", "timm", "open_clip"])
def test_every_family_takes_it(family, tower):
    name = {"nano": "nano", "timm": "timm:vit_tiny_patch16_224.augreg_in21k", "open_clip": tower[2]}[family]
    backbone = random_backbone(name, norm_eps=1e-3)
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms and all(norm.eps == 1e-3 for norm in norms) and backbone.norm_eps == 1e-3


def test_the_models_own_is_no_other_backbone_and_another_is():
    plain, own, other = (lpt.load_backbone("nano", norm_eps=eps) for eps in (None, 1e-6, 1e-5))
    assert own.norm_eps is None and own.fingerprint == plain.fingerprint
    assert other.norm_eps == 1e-5 and other.fingerprint != plain.fingerprint
    assert len({lpt.load_backbone("nano", norm_eps=eps).fingerprint for eps in (1e-5, 2e-5, 1e-4)}) == 3
    with pytest.raises(ConfigError, match="norm_eps"):
        lpt.load_backbone("nano", norm_eps=-1.0)


def test_norms_that_would_keep_theirs_are_refused():
    backbone = small_backbone()
    backbone.vit.norm = torch.nn.RMSNorm(32)
    with pytest.raises(BackboneError, match=r"ε of LayerNorms, vit\.norm is none"):
        with_norm_eps(backbone, 1e-5)


def test_a_prompt_file_made_with_another_is_refused_by_name(tmp_path):
    path, counts = tmp_path / "p.safetensors", toy_task().counts
    plain, other = small_backbone(), with_norm_eps(small_backbone(), 1e-5)
    lpt.save_prompt(path, prompted(other, num_classes=4).only_train(), method="lpt", counts=counts)
    assert read_prompt(path).header.backbone.norm_eps == 1e-5
    lpt.load_prompt(path, with_norm_eps(small_backbone(), 1e-5))
    with pytest.raises(
        PromptFileError, match=r"with ε = 1e-05 in .* they have the model's own ε: set .*norm_eps=1e-05"
    ):
        lpt.load_prompt(path, plain)
    with pytest.raises(PromptFileError, match=r"set backbone\.norm_eps=1e-05"):
        lpt.load_prompt(path, with_norm_eps(small_backbone(), 1e-4))
    lpt.save_prompt(path, prompted(plain, num_classes=4).only_train(), method="lpt", counts=counts)
    with pytest.raises(PromptFileError, match=r"they have ε = 1e-05: leave out backbone\.norm_eps"):
        lpt.load_prompt(path, other)


def test_a_run_has_it_in_its_identity_and_its_file_brings_it(tmp_path, capsys):
    plain, own, other = (
        Setup(load_config(CONFIG, [f"backbone.norm_eps={eps}", "train.precision=fp32"])) for eps in ("", "1e-6", "1e-5")
    )
    assert plain.run_hash == own.run_hash != other.run_hash
    small = ["method.name=class_mean", "train.precision=fp32", "backbone.norm_eps=1e-5"]
    assert command(capsys, "train", CONFIG, *small, "--out", tmp_path / "run")[0] == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["backbone"]["norm_eps"] == 1e-5
    model, header = open_prompt(tmp_path / "run/prompt.safetensors")
    assert header.backbone.norm_eps == model.backbone.norm_eps == 1e-5
    code, _, _ = command(capsys, "evaluate", tmp_path / "run/prompt.safetensors", "--json", tmp_path / "m.json")
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert code == 0 and json.loads((tmp_path / "m.json").read_text())["nll"] == pytest.approx(report["nll"], abs=1e-6)
    assert "ε 1e-05" in command(capsys, "inspect", tmp_path / "run/prompt.safetensors")[1]
