"""What `lpt fit` picks, and that what it prints is a config."""

import json
import sys

import pytest
import torch
import yaml

from lpt.cli import main
from lpt.config import load_config, resolve
from lpt.suggest import BACKBONES, STEPS, config_for_folder, suggest
from tests.support.pictures import fill
from tests.support.shared import real
from tests.support.toy import toy_task


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("counts", [(2, 1), (30, 12, 5, 2), (500, 400, 300, 5), tuple(range(120, 0, -1))])
def test_every_suggestion_is_a_valid_config_within_the_budget(kind, counts):
    task = toy_task(counts, test_per_class=1)
    config, reasons = suggest(task, torch.device(kind))
    assert "backbone.name" in reasons and config["backbone"]["name"] == BACKBONES[kind]
    resolved = resolve({**config, "data": {"name": "folder", "root": "photos"}})
    epochs, batch = resolved.method["epochs"], resolved.train.batch_size
    steps = sum(epochs) * max(1, len(task.train) // batch)
    assert steps <= 1.5 * STEPS[kind] and min(epochs) >= 1
    assert 2 <= resolved.method["pool_size"] <= max(2, min(20, len(counts)))
    assert f"{steps} steps" in reasons["method.epochs"]


@pytest.mark.parametrize(("counts", "batch"), [((30, 12, 5, 2), 24), ((500, 400, 300, 5), 64), ((900, 300), 7)])
def test_another_batch_size_keeps_the_steps(counts, batch):
    task = toy_task(counts, test_per_class=1)
    plain, other = (suggest(task, torch.device("cpu"), batch_size=size)[0] for size in (None, batch))
    steps = [
        sum(config["method"]["epochs"]) * (len(task.train) // config["train"]["batch_size"])
        for config in (plain, other)
    ]
    assert other["train"]["batch_size"] == batch and steps[1] == pytest.approx(steps[0], rel=0.1)


def test_reasons_that_still_hold_are_given(tmp_path):
    photos = str(fill(tmp_path / "photos", {"cat": 12, "dog": 6, "owl": 3}))

    def reasons(*overrides):
        text = config_for_folder(photos, ["train.device=cpu", *overrides])[1]
        return {line[2:].partition(":")[0] for line in text.splitlines() if line.startswith("#")}

    every = {"backbone.name", "backbone.image_size", "method.epochs", "method.pool_size"}
    assert reasons() == reasons("method.name=lpt") == reasons("train.batch_size=8") == every
    assert reasons(f"backbone.name={BACKBONES['cpu']}") == every
    assert reasons("backbone.name=timm:vit_small_patch16_224.augreg_in1k") == every - {"backbone.name"}
    assert reasons("backbone.name=nano") == {"method.epochs", "method.pool_size"}
    assert reasons("method.name=knn") == {"backbone.name", "backbone.image_size"}
    assert reasons("method.epochs=[3, 1]", "backbone.image_size=64") == {"backbone.name", "method.pool_size"}


def test_a_large_set_gets_three_epochs():
    from types import SimpleNamespace

    task = SimpleNamespace(train=range(1_280_000), classes=range(1000))
    assert sum(suggest(task, torch.device("cpu"))[0]["method"]["epochs"]) == 3


def lpt(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["lpt", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


def test_fit_prints_a_config_that_gives_the_same_run(tmp_path, monkeypatch, capsys):
    photos = fill(tmp_path / "photos", {"cat": 12, "dog": 6, "owl": 3})
    fast = ["backbone.name=untrained:vit_tiny_patch16_224", "backbone.image_size=32", "method.epochs=[1, 1]"]
    saved, out = tmp_path / "saved.yaml", tmp_path / "run"
    code, said, err = lpt(monkeypatch, capsys, "fit", photos, *fast, "--out", out, "--save", saved)
    assert code == 0, err
    printed = yaml.safe_load(said[: said.index("folder (photos)")])
    assert printed == yaml.safe_load(saved.read_text()) and printed["method"]["epochs"] == [1, 1]
    assert (out / "report.html").exists() and (out / "prompt.safetensors").exists()
    assert "# method.epochs" not in said and "# method.pool_size" in said  # no reason for what was overridden
    assert "# backbone" not in said
    assert load_config(saved).model_dump() == load_config(out / "config.yaml").model_dump()


def test_fit_tells_what_is_wrong(tmp_path, monkeypatch, capsys):
    code, _, err = lpt(monkeypatch, capsys, "fit", tmp_path / "absent")
    assert code == 2 and "does not exist" in err
    photos = fill(tmp_path / "photos", {"cat": 4, "dog": 3})
    code, _, err = lpt(monkeypatch, capsys, "fit", photos, "train.device=[1]")
    assert code == 2 and "train.device" in err
    code, _, err = lpt(monkeypatch, capsys, "fit", photos, "method.epoch=3", "--out", tmp_path / "run")
    assert code == 2 and "method.epoch" in err and not (tmp_path / "run").exists()


def test_fit_with_another_method(tmp_path, monkeypatch, capsys):
    photos = fill(tmp_path / "photos", {"cat": 4, "dog": 3})
    words = ["method.name=linear_probe", "backbone.name=untrained:vit_tiny_patch16_224", "backbone.image_size=32"]
    code, said, err = lpt(monkeypatch, capsys, "fit", photos, *words, "--out", tmp_path / "run")
    assert code == 0 and "linear_probe" in said and "pool_size" not in said, err


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory):
    """Real CIFAR-100 images of six classes, 300 to 3 each, as a person would have them."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    place = tmp_path_factory.mktemp("real") / "photos"
    table = pq.read_table(real("data/cifar100/train.parquet"), columns=["img", "fine_label"])
    labels = table.column("fine_label").to_numpy()
    for k, n in enumerate((300, 120, 47, 19, 8, 3)):
        (place / f"class {k}").mkdir(parents=True)
        for row in (labels == k).nonzero()[0][:n]:
            image = Image.open(io.BytesIO(table.column("img")[int(row)].as_py()["bytes"]))
            image.save(place / f"class {k}" / f"{row}.png")
    return place


def test_fit_and_doctor_on_real_images(real_folder, tmp_path, monkeypatch, capsys, deit_tiny_weights):
    code, said, _ = lpt(monkeypatch, capsys, "doctor", real_folder)
    assert code == 0 and "6 classes" in said and "imbalance factor" in said
    fast = [f"backbone.weights={deit_tiny_weights}", "backbone.image_size=64", "method.epochs=[3, 1]"]
    code, _, err = lpt(monkeypatch, capsys, "fit", real_folder, *fast, "--out", tmp_path / "run")
    assert code == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["class_accuracy"] > 0.4  # chance is 0.17; two classes have one test image each
