"""Whose image is this: the index against all cosines, thresholds, and commands and banks that ask it."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import lpt
from lpt.errors import DataError, LptError
from lpt.model.classifier import bare_classifier
from lpt.model.task_means import TaskMeans, task_means
from lpt.prompt_file import save_prompt
from lpt.serve.bank import TaskBank
from lpt.serve.router import Router
from tests.support.command_line import lpt as command
from tests.support.toy import prompted, toy_images, toy_task


def tasks_of(sizes, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"task {number}": TaskMeans(
            F.normalize(torch.randn(size, width, generator=generator), dim=1), torch.linspace(0, 1, 101)
        )
        for number, size in enumerate(sizes)
    }


def exactly(tasks, features):
    """(the task of the largest cosine, that cosine) of each feature, by all of them."""
    found = []
    for feature in F.normalize(features, dim=1):
        best = {name: max(float(feature @ mean) for mean in task.means) for name, task in tasks.items()}
        name = max(best, key=lambda one: best[one])
        found.append((name, best[name]))
    return found


def test_routes_are_those_of_all_cosines():
    tasks = tasks_of((3, 7, 1, 5))
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    routes = Router(tasks, accept=0.6).routes(features)
    for route, (name, score) in zip(routes, exactly(tasks, features), strict=True):
        assert route.nearest == name and route.score == pytest.approx(score, abs=1e-5)
        assert route.threshold == pytest.approx(0.4) and route.task == (name if route.score >= 0.4 else None)
    assert {route.task is None for route in routes} == {True, False}


def test_large_libraries_have_an_index_that_hardly_misses():
    tasks = tasks_of([50] * 200, width=32)  # random means are the worst case: they have no cells
    names = list(tasks)
    generator = torch.Generator().manual_seed(2)
    rows = torch.cat([task.means for task in tasks.values()])
    features = rows[torch.randint(len(rows), (300,), generator=generator)]
    features = features + 0.05 * torch.randn(300, 32, generator=generator)
    flat, cells = Router(tasks), Router(tasks, most_flat=100)
    assert type(flat.index).__name__ == "IndexFlatIP" and type(cells.index).__name__ == "IndexIVFFlat"
    wanted, found = flat.routes(features), cells.routes(features)
    assert np.mean([a.nearest == b.nearest for a, b in zip(wanted, found, strict=True)]) >= 0.99
    cells.index.nprobe = cells.index.nlist  # all cells: exact
    assert [r.nearest for r in cells.routes(features)] == [r.nearest for r in wanted] and names


def test_a_threshold_lets_as_many_of_its_own_pass_as_was_asked_for():
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(6, 24, generator=generator)

    def images(number):
        labels = torch.arange(6).repeat_interleave(number)
        return centres[labels] + torch.randn(6 * number, 24, generator=generator), labels

    means = task_means(*images(50), 6)
    for accept in (0.5, 0.9, 0.95):
        routes = Router({"own": means}, accept=accept).routes(images(500)[0])
        assert np.mean([route.task is not None for route in routes]) == pytest.approx(accept, abs=0.05)
    strangers = Router({"own": means}).routes(torch.randn(500, 24, generator=generator))
    assert np.mean([route.task is not None for route in strangers]) < 0.1


def test_classes_without_images_are_nobodys_and_no_task_is_said():
    means = torch.zeros(2, 4)
    means[0, 0] = 1
    tasks = {"a": TaskMeans(means, torch.full((101,), -1.0)), "b": TaskMeans(-means, torch.full((101,), -1.0))}
    (route,) = Router(tasks).routes(torch.tensor([[-0.1, 1.0, 0, 0]]))
    assert route.nearest == "b"  # not the zeros of either, whose cosine with everything is zero
    with pytest.raises(LptError, match="no class means, train them again"):
        Router({})
    with pytest.raises(LptError, match=r"accept 1\.5: give a share"):
        Router(tasks, accept=1.5)


# In a bank.


CHANNEL = {"red": 0, "green": 1, "blue": 2}


def painted(images, colour):
    darker = images // 4
    darker[:, CHANNEL[colour]] += 180
    return darker


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """(a backbone, a folder with three tasks, each of images of its own colour, and one of before)."""
    folder, backbone = tmp_path_factory.mktemp("library"), lpt.load_backbone("nano")
    for name in CHANNEL:
        task = toy_task((8, 6, 4))
        pixels = painted(task.train.pixels, name)
        task = lpt.Task(name, task.classes, lpt.Images(pixels, task.train.labels, task.train.ids), task.test)
        model = lpt.tune(task, backbone, method="class_mean")
        save_prompt(folder / f"{name}.safetensors", model, method="class_mean", counts=task.counts)
    old = prompted(backbone, num_classes=4).only_train().eval()
    save_prompt(folder / "old.safetensors", old, method="lpt", counts=toy_task().counts)
    return backbone, folder


def pixels(colour):
    """An image of the first class that no task was trained on."""
    return painted(toy_images(torch.zeros(1, dtype=torch.long), seed=9).pixels, colour)[0]


def test_auto_is_the_task_that_an_image_is_routed_to(coloured):
    bank = TaskBank(*coloured, accept=1.0)
    images = [pixels("blue"), b"words", pixels("red"), pixels("green"), pixels("red")]
    answers = bank.predict(images, ["auto", "auto", "auto", "auto", "old"], topk=2)
    assert [answer.task for answer in answers] == ["blue", None, "red", "green", "old"]
    assert "cannot be decoded" in answers[1].error and answers[4].route is None and answers[4].group_prompts
    assert answers[0].route.score >= answers[0].route.threshold
    (alone,) = bank.predict(pixels("red"), "red", topk=2)
    assert answers[2].classes == alone.classes and answers[2].counts == alone.counts
    assert answers[2]._replace(route=None).probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_an_image_of_nobody_has_no_task(coloured):
    bank = TaskBank(*coloured)
    stranger = torch.randint(0, 255, (3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    (answer,) = bank.predict(stranger, "auto")
    assert answer.task is None and answer.classes == () and answer.error is None
    assert answer.route.score < answer.route.threshold and answer.route.nearest in bank
    assert all(isinstance(route, DataError) for route in bank.route([b"", torch.zeros(3, 2, 2)]))


def test_routes_change_with_the_library(coloured, tmp_path):
    backbone, folder = coloured
    for name in ("red", "blue", "old"):
        shutil.copy(folder / f"{name}.safetensors", tmp_path)
    bank = TaskBank(backbone, tmp_path, accept=1.0, memory=1)
    assert bank.route(pixels("blue"))[0].task == "blue"
    (tmp_path / "blue.safetensors").unlink()
    bank.sync()
    assert bank.route(pixels("blue"))[0].nearest == "red"
    bank.add(folder / "blue.safetensors", name="sky")
    assert bank.route(pixels("blue"))[0].task == "sky" and set(bank.loaded) == {"sky"}
    for name in ("sky", "red"):
        bank.remove(name)
    with pytest.raises(LptError, match="no task can be routed to"):
        bank.route(pixels("blue"))
    with pytest.raises(LptError, match="no task can be called auto"):
        bank.add(folder / "blue.safetensors", name="auto")


def test_tasks_with_other_views_are_compared_by_their_own(coloured, tmp_path):
    backbone, folder = coloured
    shutil.copy(folder / "red.safetensors", tmp_path)
    was, backbone.preprocess = backbone.preprocess, backbone.preprocess.with_(mean=(0.2,) * 3)
    model = lpt.tune(toy_task(), backbone, method="class_mean")
    save_prompt(tmp_path / "darker.safetensors", model, method="class_mean", counts=toy_task().counts)
    backbone.preprocess = was
    bank = TaskBank(backbone, tmp_path)
    assert len(bank.routers()) == 2
    image = toy_task().train.pixels[0]
    best = {}
    for preprocess, router in bank.routers():
        feature = bare_classifier(backbone, ("a", "b")).feature(preprocess.test(image[None]))
        best[router.names[0]] = router.routes(feature.detach())[0].score
    (route,) = bank.route(image)
    assert route.score == pytest.approx(max(best.values()), abs=1e-5) and best[route.nearest] == max(best.values())


def test_lpt_route_says_whose_image_it_is(coloured, tmp_path, capsys):
    for colour in ("red", "blue"):
        Image.fromarray(pixels(colour).permute(1, 2, 0).numpy()).save(tmp_path / f"{colour}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = [str(tmp_path / name) for name in ("red.png", "blue.png")]
    code, out, err = command(capsys, "route", str(coloured[1]), *files, "--accept", "1", "--json", f"{tmp_path}/r.json")
    assert code == 0 and [line.split("  ")[1] for line in out.splitlines()] == ["red", "blue"], err
    written = json.loads((tmp_path / "r.json").read_text())
    assert [answer["task"] for answer in written] == ["red", "blue"] and {"score", "threshold"} <= set(written[0])
    code, out, err = command(capsys, "route", str(coloured[1]), str(tmp_path / "bad.png"), files[0], "train.device=cpu")
    assert code == 1 and "bad.png cannot be decoded" in err and len(out.splitlines()) == 1
    code, _, err = command(capsys, "route", str(tmp_path), files[0])
    assert code == 2 and "it holds no prompt file" in err
