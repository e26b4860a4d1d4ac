"""Python as people use it: answers to images in any form, a loop of one's own, bars and tables in notebooks."""

import io
import json
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import lpt
from lpt import progress
from tests.support.pictures import picture, png
from tests.support.shared import ROOT
from tests.support.toy import small_backbone, toy_task


@pytest.fixture(scope="module")
def trained():
    task, backbone = toy_task(), small_backbone()
    return task, lpt.tune(task, backbone, method="class_mean")


def test_answers_are_the_same_in_whatever_form_images_come(trained, tmp_path):
    task, model = trained
    images = [picture(i) for i in range(5)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    arrays = [np.asarray(image) for image in images]
    views = torch.stack([model.transform(image) for image in images])
    forms = [
        images, paths, [str(path) for path in paths], [path.read_bytes() for path in paths], arrays, np.stack(arrays),
        [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays], views,
        DataLoader([(model.transform(path), 0) for path in paths], batch_size=2),
        DataLoader([{"image": view} for view in views], batch_size=3), iter([views[:2], views[2:]]),
    ]  # fmt: skip
    want = model.predict(images)
    assert want.classes == [model.classes[k] for k in want.labels.tolist()] and want.probabilities.shape == (5, 4)
    for form in forms:
        got = model.predict(form, batch_size=2)
        assert torch.allclose(got.probabilities, want.probabilities, atol=1e-5) and got.classes == want.classes
    for one in (images[3], paths[3], paths[3].read_bytes(), arrays[3]):
        assert torch.allclose(model.predict(one).probabilities, want.probabilities[3:4], atol=1e-5)
    in_memory = model.predict(task.test)
    assert torch.equal(in_memory.labels, model.predict(task.test.pixels).labels)
    assert (in_memory.labels == task.test.labels).double().mean() == lpt.evaluate(model, task)["accuracy"]


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "no image is given"),
        (3, "images are a int"),
        ({"a": 1}, "images are a dict"),
        ([3.5], "image 0: it is a float"),
        (torch.zeros(2, 3, 8, 8), r"shape \[2, 3, 8, 8\] is neither .* nor views \[B, 3, 32, 32\]"),
        (iter([["a"]]), "a batch is a str"),
        (["absent.png"], "absent.png cannot be decoded"),
        ([b"no image"], "number 0 cannot be decoded"),
        (str(ROOT), "is a folder"),
    ],
)
def test_what_are_no_images_is_one_sentence(trained, images, says):
    with pytest.raises(lpt.LptError, match=says):
        trained[1].predict(images)


def test_training_mode_is_left_as_it_was(trained):
    model = trained[1]
    for mode in (True, False):
        model.train(mode)
        model.predict(picture(0))
        assert model.training is mode


def test_the_transform_goes_to_workers_and_makes_the_test_view(trained):
    task, model = trained
    transform = pickle.loads(pickle.dumps(model.transform))
    image = Image.fromarray(task.test.pixels[0].permute(1, 2, 0).numpy())
    assert transform(image).shape == (3, 32, 32) and torch.equal(transform(image), transform(png(task.test.pixels[0])))
    assert torch.allclose(transform(image), model.backbone.preprocess.test(task.test.pixels[:1])[0], atol=0.05)


def test_the_model_of_ones_own_loop_trains_what_the_method_does():
    task, backbone = toy_task(), small_backbone()
    trains = {}
    for name, settings in {"lpt": {"prefix_blocks": 2}, "linear_probe": {}, "class_mean": {}}.items():
        model = lpt.model(task, backbone, method=name, **settings)
        trains[name] = {p.split(".")[0] for p, value in model.named_parameters() if value.requires_grad}
    assert trains == {"lpt": {"head", "shared"}, "linear_probe": {"head"}, "class_mean": set()}
    with pytest.raises(lpt.LptError, match="model: task is 3"):
        lpt.model(3, backbone)
    with pytest.raises(lpt.LptError, match=r"method\.epoch: .*did you mean epochs"):
        lpt.model(task, backbone, method="lpt", epoch=3)


def test_the_loop_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/python.md").read_text()
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    assert 18 <= len([line for line in code.splitlines() if line.strip()]) <= 22
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    first, second, accuracy = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert second < first and accuracy > 0.2
    assert lpt.load_prompt("digits.safetensors", lpt.load_backbone("nano")).shared is not None


def test_a_report_is_a_mapping_and_a_table(trained):
    task, model = trained
    report = lpt.evaluate(model, task)
    assert isinstance(report, dict) and json.loads(json.dumps(report)) == report
    page = report._repr_html_()
    assert f"<td>{100 * report['accuracy']:.1f}</td>" in page and "class mean" in page and page.count("<tr>") >= 6
    named = lpt.Report({"per_class": [0.5, None]}, classes=("<b>", "x"), counts=(3, 4))._repr_html_()
    assert "&lt;b&gt;" in named and "<b>" not in named and "<td>3</td>" in named


def test_bars_are_drawn_in_notebooks_and_nowhere_else(monkeypatch, capsys):
    drawn = []
    shown = SimpleNamespace(update=drawn.append)
    monkeypatch.setattr("IPython.display.display", lambda picture, display_id: (drawn.append(picture), shown)[1])
    task, backbone = toy_task(), small_backbone()
    model = lpt.tune(task, backbone, method="linear_probe", epochs=2, batch_size=16)
    lpt.evaluate(model, task)
    lpt.tune(task, backbone, method="class_mean", progress=True)  # asked for, and no terminal
    assert not drawn and capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    lpt.tune(task, backbone, method="linear_probe", epochs=2, batch_size=16, progress=False)
    assert not drawn
    lpt.tune(task, backbone, method="linear_probe", epochs=2, batch_size=16)
    lpt.evaluate(model, task)
    from rich.console import Console

    screen = io.StringIO()
    for one in drawn:
        Console(file=screen, width=100).print(one)
    assert "6/6" in screen.getvalue() and "evaluate" in screen.getvalue()


def test_the_estimator_is_one_of_scikit_learn():
    model_selection = pytest.importorskip("sklearn.model_selection")
    from sklearn.base import clone

    task = toy_task((12, 8, 6))
    images, labels = list(task.train.pixels), np.array(["owl", "crane", "stork"])[task.train.labels.numpy()]
    estimator = lpt.Estimator(small_backbone(), method="class_mean", scale=20.0)
    with pytest.raises(lpt.LptError, match="call fit first"):
        estimator.predict(images)
    assert clone(estimator).get_params()["scale"] == 20.0 == estimator.get_params()["scale"]
    assert estimator.set_params(seed=3).seed == 3
    fitted = estimator.fit(images, labels)
    assert fitted.classes_.tolist() == ["crane", "owl", "stork"] and set(fitted.predict(images)) <= set(labels)
    assert np.allclose(fitted.predict_proba(images).sum(1), 1) and fitted.score(images, labels) > 0.8
    scores = model_selection.cross_val_score(estimator, images, labels, cv=2)
    assert len(scores) == 2 and min(scores) > 0.5


def test_every_public_name_is_listed_once_and_explained():
    listed = re.findall(r"^\| `(\w+)` \|.*\| `(lpt/[\w/]+\.py)` \|$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(lpt.__all__)
    for name, file in listed:
        value = getattr(lpt, name)
        if name == "model":  # the package is what is called
            from lpt.tuning import model as value
        assert ">>> " in value.__doc__, name
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), name
        if not isinstance(value, type):
            assert "Raises" in value.__doc__ or "errors are those" in value.__doc__, name


def test_the_name_of_the_package_can_be_called_and_is_still_one():
    import lpt.model.classifier

    assert lpt.model.classifier.PromptedClassifier is lpt.PromptedClassifier and callable(lpt.model)
