"""Prototypes from a classifier's own rows: which names match, and what is made of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lpt import run
from lpt.config import resolve
from lpt.errors import BackboneError, ConfigError
from lpt.model.backbones import timm_vit
from lpt.model.backbones.base import read_prototypes
from lpt.model.backbones.classifier_rows import ClassifierRows, genus, match, match_names
from lpt.setup import open_backbone
from tests.support.pictures import fill
from tests.support.shared import real

NAME = "timm:test_vit"
HASH = "a36173ab9c82e725"
"""Of a run without the setting, by lpt at d12baa9, which had none."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    return torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(tmp_path, rows):
    """A checkpoint of timm's small ViT with a classifier of ImageNet-1k."""
    tensors = {name: value.contiguous() for name, value in timm_vit.untrained("test_vit").vit.state_dict().items()}
    save_file({**tensors, "head.weight": rows, "head.bias": torch.zeros(1000)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def prototypes_file(path, names):
    save_file({"prototypes": torch.eye(len(names), 64)}, path, {"classes": json.dumps(names)})
    return path


def test_a_lemma_comes_before_a_last_word_and_that_before_a_genus():
    entries = [
        ("school bus", "a bus used to transport children"),
        ("bus, autobus", "a vehicle carrying many passengers"),
        ("Persian cat", "a long-haired breed of cat"),
        ("tabby", "a cat with a grey or tawny coat"),
        ("alp", "any high mountain"),
        ("volcano", "a mountain formed by volcanic material"),
    ]
    found = match(["bus", "BUS", "school_bus", "cat", "mountain", "boat"], entries)
    assert found == {"bus": [1], "BUS": [1], "school_bus": [0], "cat": [2], "mountain": [4, 5], "boat": []}


@pytest.mark.parametrize(
    ("definition", "noun"),
    [
        ("a chair mounted on rockers", "chair"),
        ("any of various small horses", "horses"),
        ("large monkey of equatorial forests", "monkey"),
        ("a breed of dog", "dog"),
        ("a bin, for ashes", "bin"),
        ("hunting spider that runs along the ground", "spider"),
        ("", ""),
        ("of any", ""),
    ],
)
def test_the_genus_of_a_definition_is_its_first_noun(definition, noun):
    assert genus(definition) == noun


def test_names_are_those_of_timms_tables():
    found = match_names(["goldfish", "Tench", "great_white_shark", "spider", "nothing"], "imagenet-1k")
    assert found["goldfish"] == [1] and found["Tench"] == [0] and found["great_white_shark"] == [2]
    assert len(found["spider"]) > 1 and found["nothing"] == []


def test_a_prototype_is_the_mean_of_the_rows_that_match(weights, rows):
    names = ["goldfish", "spider"]
    made = ClassifierRows(NAME, weights, None).encode(names, (), CPU)
    matched = match_names(names, "imagenet-1k")
    for name in names:
        slow = torch.zeros(64)
        for index in matched[name]:
            slow += rows[index] / len(matched[name])
        torch.testing.assert_close(made[name], slow)


def test_names_without_a_match_are_named_and_taken_from_the_file(weights, tmp_path):
    lacking = ClassifierRows(NAME, weights, None)
    with pytest.raises(BackboneError, match=r"2 of 3 classes match none of imagenet-1k.*aquarium_fish, sea; set proto"):
        lacking.encode(["goldfish", "aquarium_fish", "sea"], (), CPU)
    with pytest.raises(BackboneError, match=r"1 of 2 classes match none.*: sea; set"):
        given = prototypes_file(tmp_path / "p.safetensors", ["Aquarium Fish", "goldfish"])
        ClassifierRows(NAME, weights, given).encode(["aquarium_fish", "sea"], (), CPU)
    both = ClassifierRows(NAME, weights, prototypes_file(tmp_path / "p.safetensors", ["sea", "goldfish"]))
    made = both.encode(["goldfish", "sea"], (), CPU)
    assert torch.equal(made["sea"], torch.eye(2, 64)[0]) and not torch.equal(made["goldfish"], torch.eye(2, 64)[1])
    said = both.remark(["goldfish", "sea"])
    assert "rows of timm:test_vit's classifier of imagenet-1k for 1 of 2 classes; no match, so from" in said
    assert said.endswith(": sea")
    assert both.identity() != lacking.identity()


def test_a_checkpoint_without_such_a_classifier_is_refused(tmp_path):
    for head, said in (({}, "has no classifier"), ({"head.weight": torch.zeros(7, 64)}, "a classifier of 7 classes")):
        save_file({"norm.weight": torch.ones(64), **head}, tmp_path / "w.safetensors")
        with pytest.raises(BackboneError, match=rf"timm:test_vit .*{said}.*use prototypes\.weights"):
            ClassifierRows(NAME, tmp_path / "w.safetensors", None).encode(["goldfish"], (), CPU)


def test_a_download_brings_its_classifier(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: create(name.partition(".")[0], num_classes=1000))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = ClassifierRows("timm:test_vit.r160_in1k", None, None).encode(["goldfish"], (), CPU)
    assert made["goldfish"].shape == (64,) and torch.equal(torch.get_rng_state(), before)


def test_a_run_says_which_rows_it_takes(weights, rows, tmp_path):
    config = {
        "backbone": {"name": NAME, "weights": str(weights), "image_size": 32},
        "data": {"name": "folder", "root": str(fill(tmp_path / "photos", {"goldfish": 8, "spider": 6}))},
        "method": {"name": "zero_shot"},
        "prototypes": {"from": "classifier"},
        "train": {"device": "cpu", "precision": "fp32"},
    }
    lines = []
    report = run.train(resolve(config), tmp_path / "zero", say=lines.append)
    assert report["method"] == "zero_shot" and any("for 2 of 2 classes" in line for line in lines)
    assert "from: classifier" in (tmp_path / "zero/config.yaml").read_text()
    config["method"] = {"name": "fine_tune", "tuning": "head", "head_init": "prototypes", "epochs": 1, "lr": 0.0}
    run.train(resolve(config), tmp_path / "head")
    backbone = open_backbone(resolve(config))
    goldfish = backbone.class_prototypes(["goldfish"])[0]
    assert torch.equal(goldfish, rows[1])


def test_the_setting_is_called_from_and_is_for_models_of_timm():
    config = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": "zero_shot"}}
    with pytest.raises(BackboneError, match="nano has no classifier, only models of timm have"):
        open_backbone(resolve(config, ["prototypes.from=classifier"]))
    with pytest.raises(ConfigError, match=r"prototypes\.form: there is no such setting; did you mean from\?"):
        resolve(config, ["prototypes.form=classifier"])
    assert resolve(config).run_hash("split", "backbone") == HASH
    assert resolve(config, ["prototypes.from=classifier"]).run_hash("split", "backbone") != HASH


def test_deit_has_rows_for_two_thirds_of_cifar_100(deit_tiny_weights):
    text_prototypes = real("weights/cifar100_text_prototypes_deit_tiny.safetensors")
    names = list(read_prototypes(text_prototypes))
    rows = ClassifierRows("timm:deit_tiny_patch16_224", deit_tiny_weights, text_prototypes)
    assert "for 67 of 100 classes; no match" in rows.remark(names)
    assert sum(bool(found) for found in match_names(names, "imagenet-21k-goog").values()) == 98
