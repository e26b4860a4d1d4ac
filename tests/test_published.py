"""What is published: names, sizes, licences; the list of it; and what a run says of its backbone's licence."""

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from lpt import run
from lpt.config import resolve
from lpt.errors import BackboneError
from lpt.model.backbones import catalogue, load_backbone, timm_vit
from lpt.model.backbones.published import SERVED, forbids_commercial_use, full_names, licence, megabytes, module_of
from tests.support.command_line import lpt as command
from tests.support.pictures import fill


def test_the_table_of_sizes_has_every_architecture_with_weights():
    """Where it has not: python -m benchmarks.speed.sizes."""
    architectures = {name.partition(".")[0] for name in timm.list_pretrained()}
    lacking = [name for name in architectures if module_of(name) in SERVED and megabytes(name) is None]
    assert not lacking


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_dinov3_qkvb", "vit_pe_core_tiny_patch16_384", "deit_tiny_patch16_224"]
)
def test_sizes_are_of_the_weights(architecture):
    with torch.device("meta"):
        vit = timm.create_model(architecture, num_classes=0)
    assert megabytes(architecture) == pytest.approx(sum(p.numel() for p in vit.parameters()) * 4e-6, abs=0.6)


def test_what_is_refused_has_no_size():
    for architecture in ("vit_base_patch16_sapiens2", "eva02_enormous_patch14_clip_224", "vit_base_patch16_rpn_224"):
        assert megabytes(architecture) == 0 and not any(name.startswith(f"{architecture}.") for name in full_names())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("timm:naflexvit_base_patch16_siglip.v2_webli", "timm:vit_base_patch16_siglip_"),
        ("timm:eva02_enormous_patch14_clip_224.laion2b", "timm:vit_large_patch14_clip_224.laion2b"),
        ("timm:vit_base_patch16_dinov4.lvd1689m", "timm:vit_base_patch16_dinov3.lvd1689m"),
        ("timm:vit_small_patch16_dinov3.lvd142m", "vit_small_patch16_dinov3.lvd1689m"),
    ],
)
def test_a_wrong_or_refused_name_is_answered_with_the_nearest_supported(name, nearest):
    with pytest.raises(BackboneError) as error:
        load_backbone(name)
    said = str(error.value)
    assert nearest in said and said.count("\n") == 0
    assert all(
        full.strip(" ").removeprefix("timm:") in full_names()
        for full in said.partition("tags: ")[2].split(",")
        if full.strip()
    )


@pytest.mark.parametrize(
    ("name", "terms", "forbids"),
    [
        ("timm:vit_base_patch16_dinov3.lvd1689m", "dinov3-license", False),
        ("timm:vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", "fair-noncommercial-research-license", True),
        ("timm:vit_base_patch16_224.mae", "cc-by-nc-4.0", True),
        ("timm:deit_tiny_patch16_224.fb_in1k", "apache-2.0", False),
        ("open_clip:PE-Core-B-16/meta", "apache-2.0", False),
        ("open_clip:ViT-B-16/metaclip_400m", "cc-by-nc-4.0", True),
    ],
)
def test_licences_are_those_of_timm(name, terms, forbids):
    assert licence(name) == terms and forbids_commercial_use(terms) == forbids


def test_names_without_a_known_licence():
    assert [licence(name) for name in ("nano", "untrained:test_vit", "timm:nothing.none", "open_clip:small")] == [
        None
    ] * 4


def test_the_list_names_families_with_what_they_support(capsys):
    code, printed, _ = command(capsys, "list", "backbones", "--all")
    lines = printed.splitlines()
    assert code == 0
    assert "DINOv3: prompts, every tuning, class prototypes by prototypes.weights" in lines
    assert "  timm:vit_base_patch16_dinov3.lvd1689m  256 px, 343 MB, dinov3-license" in lines
    assert any(
        line.startswith("  timm:vit_tiny_patch16_dinov3_qkvb.eupe") and "no commercial use" in line for line in lines
    )
    for family in ("SigLIP 2", "Perception Encoder"):
        assert f"{family} with a text tower: prompts, every tuning, class prototypes by texts" in lines
    for part in ("radio_v3.c_radio", "tipsv2.webli", "open_clip:PE-Core-B-16/meta", "open_clip:ViT-B-16-SigLIP2/webli"):
        assert part in printed
    deit = lines.index(
        "DeiT: prompts, every tuning, class prototypes by prototypes.weights or prototypes.from=classifier"
    )
    assert "  timm:deit_tiny_patch16_224.fb_in1k  224 px, 22 MB, apache-2.0" in lines[deit:]
    assert not any("sapiens2." in line or "enormous" in line or "naflex" in line for line in lines[:-1])
    assert lines[-1].startswith("refused by name: ")


def test_sizes_of_open_clips_own_towers():
    with torch.device("meta"):
        model = open_clip.model.CLIP(**{**open_clip.get_model_config("ViT-B-32"), "text_cfg": {"layers": 1}})
    tower = sum(parameter.numel() for parameter in model.visual.parameters())
    (listed,) = (one.megabytes for one in catalogue.of_open_clip() if one.name == "open_clip:ViT-B-32/openai")
    assert listed == pytest.approx(tower * 4e-6, abs=0.6)


def test_all_is_for_backbones(capsys):
    for words in (["list", "--all"], ["list", "methods", "--all"]):
        code, _, error = command(capsys, *words)
        assert code == 2 and "--all is for backbones" in error and "lpt list backbones --all" in error


def test_a_licence_that_forbids_commercial_use_is_said_when_a_run_starts(tmp_path):
    architecture = "vit_tiny_patch16_dinov3_qkvb"
    tensors = timm_vit.untrained(architecture).vit.state_dict()
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "w.safetensors")
    config = {
        "backbone": {"name": f"timm:{architecture}.eupe_lvd1689m", "weights": str(tmp_path / "w.safetensors")},
        "data": {"name": "folder", "root": str(fill(tmp_path / "photos", {"a": 6, "b": 5}))},
        "method": {"name": "class_mean"},
        "train": {"device": "cpu", "precision": "fp32"},
    }
    lines = []
    run.train(resolve(config, ["backbone.image_size=32"]), tmp_path / "run", say=lines.append)
    (said,) = (line for line in lines if "commercial" in line)
    assert said == (
        "warning: the weights of timm:vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m are under "
        "fair-noncommercial-research-license, which forbids commercial use"
    )
