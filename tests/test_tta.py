"""Five crops of each image: means of logits, one decoding, in every command that answers."""

import json

import pytest
import torch

from lpt.config import resolve
from lpt.data.preprocess import Preprocess
from lpt.data.task import Files
from lpt.engine.evaluate import evaluate, predict
from lpt.errors import ConfigError, LptError
from lpt.run import train
from lpt.serve import open_prompt, predict_files
from lpt.serve.predicting import find_images
from lpt.serve.streaming import predict_to_file
from tests.support.command_line import lpt
from tests.support.pictures import fill
from tests.support.toy import prompted, small_backbone, toy_task

RAW = {
    "backbone": {"name": "nano", "flip": False},
    "data": {"name": "digits-lt"},
    "method": {"name": "class_mean"},
    "train": {"device": "cpu", "precision": "fp32"},
}


@pytest.mark.parametrize("pool", [True, False])
@torch.no_grad()
def test_an_answer_is_the_mean_of_the_logits_of_five_crops(pool):
    model, task = prompted(small_backbone(depth=2), num_classes=4, pool=pool).eval(), toy_task()
    found = predict(model, task.test, tta="five_crop", batch_size=5)
    views = Preprocess(**{**vars(model.backbone.preprocess), "five_crops": True}).test(task.test.take(torch.arange(24)))
    for i in range(24):
        each = [model(views[i, crop][None]).logits[0] for crop in range(5)]
        torch.testing.assert_close(found.logits[i], sum(each) / 5, rtol=1e-4, atol=1e-5)
    assert found.ids is None and not torch.equal(found.logits, predict(model, task.test).logits)
    assert not torch.equal(views[:, 0], views[:, 3]) and torch.equal(found.labels, task.test.labels)


@pytest.fixture
def photos(tmp_path):
    root = fill(tmp_path / "photos", {"a": 5, "b": 3}, kind="jpg")
    (root / "a" / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    return root


@pytest.fixture
def prompt(finished):
    return finished / "prompt.safetensors"


def test_files_are_answered_as_images_in_memory_are_and_broken_ones_named(prompt, photos):
    model, _ = open_prompt(prompt)
    paths = find_images([photos]).paths
    told = list(predict_files(model, paths, topk=2, tta="five_crop", batch_size=3, workers=0))
    assert [("error" in one) for one in told] == [path.name == "broken.jpg" for path in paths]
    five = model.backbone.preprocess.seen_as("five_crop")
    good = [path for path in paths if path.name != "broken.jpg"]
    labels = torch.zeros(len(good), dtype=torch.long)
    files = Files(lambda i: str(good[i]), labels, tuple(map(str, good)), tuple(map(str, good)))
    cut = five.normalized(five.cut(files.take(torch.arange(len(good)))))
    with torch.no_grad():
        logits = torch.stack([model(crop).logits for crop in cut.unbind(1)]).mean(0)
    best = model.probabilities(logits).topk(2)
    answers = [one for one in told if "error" not in one]
    for answer, names, shares in zip(answers, best.indices.tolist(), best.values.tolist(), strict=True):
        assert answer["classes"] == [model.classes[k] for k in names]
        assert answer["probabilities"] == pytest.approx(shares, abs=1e-5)
    torch.testing.assert_close(predict(model, files, tta="five_crop", workers=0).logits, logits, rtol=1e-4, atol=1e-5)


def test_streamed_rows_are_those_of_predict_and_not_gone_on_with_by_another_ensemble(prompt, photos, tmp_path, capsys):
    code, said, aside = lpt(capsys, "predict", prompt, photos, "--out", tmp_path / "rows.jsonl", "--tta", "five_crop")
    assert code == 0 and said.endswith("9 rows, 1 of them of images that cannot be read\n"), aside
    model, _ = open_prompt(prompt)
    told = {one["image"]: one for one in predict_files(model, find_images([photos]).paths, topk=1, tta="five_crop")}
    for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()):
        if row.get("error") is None:
            assert row["probability"] == pytest.approx(told[row["path"]]["probabilities"][0], abs=1e-5)
    out = tmp_path / "again.parquet"
    assert predict_to_file(model, [photos], out, prompt=prompt, tta="five_crop").rows == 9
    with pytest.raises(LptError, match=r"begun with other settings \(tta\)"):
        predict_to_file(model, [photos], out, prompt=prompt, resume=True)
    assert predict_to_file(model, [photos], out, prompt=prompt, tta="five_crop", resume=True).rows == 0  # it is whole


def test_a_report_has_a_row_for_it_and_evaluate_gives_the_same(tmp_path, capsys):
    report = train(resolve(RAW, ["train.tta=five_crop"]), tmp_path / "run")
    crops = report["five_crops"]
    assert crops["class_accuracy"] != report["class_accuracy"]
    written = (tmp_path / "run" / "report.md").read_text()
    assert "class_mean, five crops |" in written and "mean of five crops" in (tmp_path / "run/report.html").read_text()
    prompt = tmp_path / "run" / "prompt.safetensors"
    for tta, expected in (("none", report), ("five_crop", crops)):
        code, said, _ = lpt(capsys, "evaluate", prompt, "--tta", tta, "--json", tmp_path / "m.json", "train.device=cpu")
        metrics = json.loads((tmp_path / "m.json").read_text())
        assert code == 0 and metrics["tta"] == tta and ("five crops" in said) == (tta == "five_crop")
        assert metrics["class_accuracy"] == pytest.approx(expected["class_accuracy"], abs=1e-6)


def test_unknown_ensembles_are_named(prompt, photos, capsys):
    for command in (("evaluate", prompt), ("predict", prompt, photos)):
        code, _, aside = lpt(capsys, *command, "--tta", "ten_crop")
        assert code == 2 and "--tta ten_crop: there are none, five_crop" in aside
    with pytest.raises(ConfigError, match="five_crop"):
        evaluate(prompted(small_backbone(depth=2), num_classes=4), toy_task(), tta="ten_crop")


def test_the_hash_of_a_run_without_it_is_the_one_of_before():
    assert resolve(RAW).run_hash("s", "b") == resolve(RAW, ["train.tta=none"]).run_hash("s", "b")
    assert resolve(RAW, ["train.tta=five_crop"]).run_hash("s", "b") != resolve(RAW).run_hash("s", "b")
