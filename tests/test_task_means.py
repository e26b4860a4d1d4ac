"""Class means of the bare backbone in prompt files: what they are, when they are computed, and what reads them."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lpt
from lpt.engine import session as session_module
from lpt.engine.session import Session
from lpt.errors import PromptFileError
from lpt.model import task_means as module
from lpt.model.classifier import bare_classifier
from lpt.model.task_means import TaskMeans, sampled_rows, task_means
from lpt.prompt_file import load_prompt, read_prompt, save_prompt
from tests.support.toy import prompted, small_backbone, toy_task
from tests.support.training import bind


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_means_and_scores_are_those_of_a_slow_loop():
    features, labels = normal(23, 6) + 1, torch.tensor([0] * 12 + [2] * 7 + [3] + [4] * 3)  # class 1 has none
    found = task_means(features, labels, 5)
    unit = [row / row.norm() for row in features]
    expected = torch.zeros(5, 6)
    for k in (0, 2, 3, 4):
        mean = sum(unit[i] for i in range(23) if labels[i] == k)
        expected[k] = mean / mean.norm()
    assert torch.allclose(found.means, expected, atol=1e-6)
    scores = []
    for i in range(23):
        if labels[i] == 3:  # alone: nothing is left to compare it with
            continue
        cosines = []
        for k in (0, 2, 3, 4):
            others = [unit[j] for j in range(23) if labels[j] == k and j != i]
            mean = sum(others)
            cosines.append(float(unit[i] @ mean / mean.norm()))
        scores.append((max(cosines), 1 / int((labels == labels[i]).sum())))
    scores.sort()
    assert found.scores[0] == pytest.approx(scores[0][0], abs=1e-5)
    assert found.scores[100] == pytest.approx(scores[-1][0], abs=1e-5)
    below = [sum(weight for _, weight in scores[: n + 1]) for n in range(len(scores))]
    for percent in (5, 50, 95):  # the least value at or below which is so much of the weight of three classes
        n = next(n for n in range(len(scores)) if below[n] >= percent / 100 * 3 - 1e-9)
        assert found.scores[percent] == pytest.approx(scores[n][0], abs=1e-5)


def test_where_every_class_has_one_image_nothing_is_known():
    found = task_means(normal(3, 4), torch.arange(3), 3)
    assert found.scores.tolist() == [-1.0] * 101 and torch.allclose(found.means, F.normalize(normal(3, 4), dim=1))


def test_a_sample_has_few_of_each_class(monkeypatch):
    monkeypatch.setattr(module, "IMAGES_OF_A_CLASS", 4)
    labels = torch.tensor([1] * 9 + [0] * 3 + [5] * 4 + [1])
    rows = sampled_rows(labels)
    assert torch.bincount(labels[rows]).tolist() == [3, 4, 0, 0, 0, 4] and rows.tolist() == sorted(set(rows.tolist()))
    assert rows.tolist()[:3] == [0, 2, 5]  # of ten, spread over all


@pytest.fixture(scope="module")
def trained():
    task, backbone = toy_task(), small_backbone()
    return task, backbone, lpt.tune(task, backbone, method="class_mean")


def test_training_writes_them_and_files_are_of_format_3(trained, tmp_path):
    task, backbone, model = trained
    features = torch.cat(
        [
            bare_classifier(backbone, task.classes).feature(backbone.preprocess.test(task.train.pixels[i : i + 1]))
            for i in range(len(task.train))
        ]
    )
    expected = task_means(features, task.train.labels, 4)
    path = tmp_path / "p.safetensors"
    header = save_prompt(path, model, method="class_mean", counts=task.counts, storage="fp32")
    stored = load_file(path)
    assert header.format == 3 and (stored["task.means"].dtype, stored["task.scores"].dtype) == (
        torch.float16,
        torch.float32,
    )
    assert torch.allclose(stored["task.means"].float(), expected.means, atol=1e-3)
    assert torch.allclose(stored["task.scores"], expected.scores, atol=1e-5)
    again = load_prompt(path, backbone)
    views = backbone.preprocess.test(task.test.pixels)
    assert torch.equal(again(views).logits, model(views).logits) and "task.means" not in again.learned_state()
    save_prompt(tmp_path / "again.safetensors", again, method="class_mean", counts=task.counts, storage="fp32")
    assert torch.equal(load_file(tmp_path / "again.safetensors")["task.means"], stored["task.means"])


def test_files_without_them_are_of_format_2_and_give_the_same_bits(trained, tmp_path):
    task, backbone, _ = trained
    model = prompted(backbone, num_classes=4).only_train().eval()
    views = backbone.preprocess.test(task.test.pixels)
    formats = []
    for means in (None, task_means(normal(9, 32), torch.arange(9) % 4, 4)):
        model.task_means = means
        formats.append(save_prompt(tmp_path / "p", model, method="lpt", counts=task.counts, storage="fp32").format)
        assert torch.equal(load_prompt(tmp_path / "p", backbone)(views).logits, model(views).logits)
    assert formats == [2, 3]


def test_features_that_a_method_has_asked_for_are_not_computed_again(trained, monkeypatch):
    task, backbone, _ = trained
    computed, said = [], []
    real = session_module.features
    monkeypatch.setattr(
        session_module, "features", lambda m, images, **k: computed.append(len(images)) or real(m, images, **k)
    )
    session = bind(task, backbone, log=said.append)
    fresh = session.task_means(task, backbone)
    assert computed == [len(task.train)] and "49 of 49 training images under the bare backbone, " in said[-1]
    model = bare_classifier(backbone, task.classes)
    session.features("features", prompted(backbone, num_classes=4), task.train)  # under a prompt: of no use
    session.task_means(task, backbone)
    assert computed == [49, 49, 49]
    session.features("features", model, task.train)
    known = session.task_means(task, backbone)
    assert len(computed) == 4 and "whose features were there" in said[-1]
    assert torch.allclose(known.means, fresh.means, atol=1e-5) and torch.allclose(known.scores, fresh.scores, atol=1e-5)
    assert isinstance(session, Session)


@pytest.mark.parametrize(
    ("means", "scores", "says"),
    [
        (torch.zeros(3, 32), torch.linspace(-1, 1, 101), "3 class means for 4 classes"),
        (torch.zeros(4, 32), torch.linspace(1, -1, 101), "no 101 quantiles"),
        (torch.zeros(4, 32), torch.linspace(-1, 1, 100), "no 101 quantiles"),
        (torch.full((4, 32), torch.nan), torch.linspace(-1, 1, 101), "not finite"),
        (torch.zeros(4, 32), torch.full((101,), torch.nan), "not finite"),
        (torch.zeros(4, 32, 1), torch.linspace(-1, 1, 101), "has shape"),
        (torch.zeros(4, 31), torch.linspace(-1, 1, 101), "the backbone needs a width of 32"),
    ],
)
def test_what_is_wrong_with_them_is_said(trained, tmp_path, means, scores, says):
    task, backbone, model = trained
    was = model.task_means
    try:
        model.task_means = TaskMeans(means, scores)
        save_prompt(tmp_path / "p", model, method="class_mean", counts=task.counts)
    finally:
        model.task_means = was
    with pytest.raises(PromptFileError, match=says):
        load_prompt(tmp_path / "p", backbone)


def test_one_of_both_is_a_damaged_file(trained, tmp_path):
    task, _, model = trained
    save_prompt(tmp_path / "p", model, method="class_mean", counts=task.counts)
    from safetensors.torch import save_file

    text = read_prompt(tmp_path / "p").header.model_copy(update={"format": 1}).model_dump_json()
    tensors = {name: value for name, value in load_file(tmp_path / "p").items() if name != "task.scores"}
    save_file(tensors, tmp_path / "p", {"lpt": text})
    with pytest.raises(PromptFileError, match=r"task\.means stands alone"):
        read_prompt(tmp_path / "p")
