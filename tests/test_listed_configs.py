"""The configs of ImageNet-LT, Places-LT and iNaturalist 2018, each from its own kind of paths and lists, in small."""

import json

import pytest
import torch
from safetensors.torch import save_file

import lpt
from lpt.config import load_config
from lpt.data import lists, load_task
from lpt.setup import open_backbone
from tests.support.command_line import lpt as command
from tests.support.listed import CLASSES, LAYOUTS, miniature
from tests.support.shared import ROOT

SETS = {"imagenet_lt": "imagenet-lt", "places_lt": "places-lt", "inat2018": "inat2018"}
CONFIGS = sorted(path for folder in SETS for path in (ROOT / "configs" / folder).glob("*.yaml"))
PUBLISHED_SCHEDULES = {"imagenet_lt": ([40, 40], 10), "places_lt": ([40, 40], 10), "inat2018": ([80, 80], 20)}
"""Epochs of LPT (strategies and lpt, section 4), and of LIFT."""


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """Root and what is published of each set in small, and prototypes of its classes."""
    made = {}
    for name in LAYOUTS:
        root = tmp_path_factory.mktemp(name)
        made[name] = root, miniature(name, root)
        rows = torch.randn(CLASSES, 128, generator=torch.Generator().manual_seed(0))
        (root / "names.txt").write_text("".join(f"class {k}\n" for k in range(CLASSES)))
        classes = json.dumps([f"class {k}" for k in range(CLASSES)])
        save_file({"prototypes": rows}, root / "prototypes.safetensors", metadata={"classes": classes})
    return made


@pytest.fixture
def small(miniatures, monkeypatch):
    """The overrides that make a config one of the miniature, on nano, for two steps."""

    def overrides(path):
        name = SETS[path.parent.name]
        root, published = miniatures[name]
        monkeypatch.setitem(lists.PUBLISHED, name, published)
        epochs = "[1, 1]" if path.stem.startswith("lpt") else "1"
        words = [f"data.root={root}", "backbone.name=nano", f"method.epochs={epochs}", "train.precision=fp32"]
        if path.stem.endswith("_clip"):
            words += [f"data.classes={root}/names.txt", f"prototypes.weights={root}/prototypes.safetensors"]
        return [*words, f"train.batch_size={published.train // 2}"]

    return overrides


def test_each_set_has_every_method_on_both_backbones():
    methods = {
        f"{way}_{key}" for way in ("vpt_la", "lora_la", "adaptformer_la", "linear_probe") for key in ("in21k", "clip")
    }
    for folder in SETS:
        assert {path.stem for path in CONFIGS if path.parent.name == folder} == methods | {"lpt_in21k"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_says_what_was_published_and_trains_two_steps(path, small):
    whole = load_config(path)
    for_lpt, for_others = PUBLISHED_SCHEDULES[path.parent.name]
    if path.stem.startswith("lpt"):
        assert (
            whole.method["epochs"] == for_lpt and whole.train.batch_size == 256 and whole.method["lr"] == [0.02, 0.02]
        )
    elif not path.stem.startswith("linear_probe"):
        assert whole.method["epochs"] == for_others and whole.train.batch_size == 128 and whole.method["lr"] == 0.02
    assert ("open_clip:ViT-B-16/openai" if "clip" in path.stem else "augreg_in21k") in whole.backbone.name
    assert "not run here" in path.read_text()
    config = load_config(path, small(path))
    task = load_task(**config.data)
    said = []
    model = lpt.tune(
        task,
        open_backbone(config),
        method=config.method["name"],
        batch_size=config.train.batch_size,
        say=said.append,
        **{key: value for key, value in config.method.items() if key != "name"},
    )
    assert model.classes == task.classes and len(model.classes) == CLASSES
    assert 0 <= lpt.evaluate(model, task)["accuracy"] <= 1


@pytest.mark.parametrize("folder", SETS)
def test_the_command_of_the_header_trains_from_the_lists(folder, small, capsys, tmp_path):
    path = ROOT / "configs" / folder / "lpt_in21k.yaml"
    code, said, err = command(capsys, "train", path, *small(path), "--out", tmp_path / "run")
    assert code == 0, err
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["cost"]["steps"] == 4 and (tmp_path / "run/prompt.safetensors").exists()
    assert f"{CLASSES} classes" in said


def test_lists_of_anything_else_are_refused(miniatures):
    for name, (root, _) in miniatures.items():
        with pytest.raises(lpt.LptError, match=f"are not {name}: {CLASSES} classes .*published are"):
            load_task(name, root=str(root))


def test_classes_are_called_by_a_file_where_there_is_one(miniatures, monkeypatch):
    """ImageNet's folders are WordNet ids and iNaturalist's numbers, which no text tower knows."""
    root, published = miniatures["inat2018"]
    monkeypatch.setitem(lists.PUBLISHED, "inat2018", published)
    assert load_task("inat2018", root=str(root)).classes[:2] == ("0", "1")
    named = load_task("inat2018", root=str(root), classes=str(root / "names.txt"))
    assert named.classes[:2] == ("class 0", "class 1")
