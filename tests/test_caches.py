"""Caches of features that lie: looked at before they are believed, made anew with a line that says so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpt.engine.evaluate import features
from lpt.engine.session import Session
from lpt.errors import TrainingError
from lpt.files import read_tensors, to_bytes
from tests.support.command_line import lpt
from tests.support.toy import prompted, small_backbone, toy_images

LABELS = torch.arange(4).repeat(5)
CONFIG = Path(__file__).parents[1] / "configs/digits_lt/linear_probe.yaml"


def zeroed(file):
    """Other numbers inside a sound container, whose checksum is left as it was."""
    metadata, tensors = read_tensors(file)
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, file, metadata=metadata)


def of_another_shape(file):
    seal_anew(file, lambda value: value[:-3].clone())


def of_another_width(file):
    seal_anew(file, lambda value: value[:, :5].clone())


def of_another_type(file):
    seal_anew(file, lambda value: value.half())


def seal_anew(file, change):
    metadata, tensors = read_tensors(file)
    ((key, text),) = metadata.items()
    header = {name: value for name, value in json.loads(text).items() if name != "sha256"}
    changed = {n: change(value) if n in ("features", "model/value") else value for n, value in tensors.items()}
    file.write_bytes(to_bytes(changed, **{key: header}))


def without_seal(file):
    save_file(load_file(file), file)


def of_another_name(file):
    save_file({"feature": torch.zeros(20, 32)}, file, metadata={"lpt_features": "{}", "lpt_checkpoint": "{}"})


def with_a_bad_header(file):
    (key,) = read_tensors(file)[0]
    save_file(load_file(file), file, metadata={key: "[" * 5000})


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE = [zeroed, of_another_shape, of_another_width, of_another_type]
DAMAGE += [without_seal, of_another_name, with_a_bad_header, cut_off]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_feature_cache_is_looked_at_before_it_is_believed(tmp_path, damage):
    model, images, said = prompted(small_backbone(), pool=False).only_train(), toy_images(LABELS), []
    want = features(model, images, folder=tmp_path, say=said.append)
    assert torch.equal(features(model, images, folder=tmp_path, say=said.append), want) and said == []
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert torch.equal(features(model, images, folder=tmp_path, say=said.append), want)
    (line,) = said
    assert line.startswith(f"feature cache {file} is not used, ") and line.endswith("computed and written anew")
    assert file.read_bytes() == whole
    features(model, images, folder=tmp_path, say=said.append)
    assert len(said) == 1


def session(folder, images, said):
    return Session(
        images=images, preprocess=small_backbone().preprocess, batch_size=4, checkpoints=folder, log=said.append
    )


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("views", [False, True])
def test_features_beside_checkpoints_are_looked_at_too(tmp_path, damage, views):
    model, images, said = prompted(small_backbone(), pool=False).only_train(), toy_images(LABELS), []

    def value():
        bound = session(tmp_path, images, said)
        return bound.view_features("f", model, images) if views else bound.features("f", model, images)

    want = value()
    (file,) = tmp_path.iterdir()
    damage(file)
    assert torch.equal(value(), want)
    (line,) = said
    assert str(file) in line and line.endswith("what was in it is computed and written anew")
    assert torch.equal(value(), want) and len(said) == 1


def test_those_of_another_run_are_still_refused(tmp_path):
    model, images = prompted(small_backbone(), pool=False).only_train(), toy_images(LABELS)
    session(tmp_path, images, []).features("f", model, images)
    other = Session(
        images=images, preprocess=small_backbone().preprocess, batch_size=4, checkpoints=tmp_path, run_hash="other"
    )
    with pytest.raises(TrainingError, match="made with other settings"):
        other.features("f", model, images)


@pytest.mark.parametrize("damage", [zeroed, of_another_shape, without_seal])
def test_by_command_line_a_damaged_cache_is_said_and_costs_nothing(tmp_path, capsys, damage):
    cache = tmp_path / "cache"

    def train(out):
        words = ["train", CONFIG, "method.epochs=1", "train.precision=fp32", f"train.feature_cache={cache}"]
        code, said, err = lpt(capsys, *words, "--out", tmp_path / out)
        assert code == 0, err
        return said, json.loads((tmp_path / out / "report.json").read_text())

    said, report = train("a")
    files = sorted(cache.iterdir())
    assert len(files) == 2 and "anew" not in said  # of the training and of the test images
    for file in files:
        damage(file)
    said, again = train("b")
    assert said.count("is not used") == 2 and again["per_class"] == report["per_class"]
    assert again["nll"] == report["nll"]
    said, _ = train("c")
    assert "anew" not in said
