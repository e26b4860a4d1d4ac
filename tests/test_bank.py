"""Many tasks in one bank: every method's answers as its own model gives them, files that come and go, and a budget."""

import gc
import io
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest
import torch
from PIL import Image

import lpt
from lpt.errors import LptError, PromptFileError, UnknownTask
from lpt.methods import METHODS
from lpt.model.mixed import AdaptedBackbone
from lpt.prompt_file import load_prompt, save_prompt
from lpt.serve.bank import Asked, TaskBank
from tests.support.semi import FAST, semi_task
from tests.support.toy import prompted, small_backbone, toy_task
from tests.support.training import train

LPT = {"method": "lpt", "epochs": (1, 1), "pool_size": 5, "prompt_length": 3, "prefix_blocks": 2}
TUNED = {"method": "fine_tune", "epochs": 1, "lr": 0.1}
ULFINE = {key: value for key, value in FAST.items() if key != "bottleneck"}
CASES = {
    "lpt": LPT,
    "lpt early": {**LPT, "prefix_blocks": 1, "topk": 3, "query_head": True, "query_centering": "mean"},
    "lpt larger pool": {**LPT, "pool_size": 7, "pool_init": "shared"},
    "lpt phase 1": {**LPT, "epochs": (1, 0), "prompt_length": 4},
    "shallow": {**TUNED, "tuning": "vpt_shallow", "prompt_length": 3},
    "shallow longer": {**TUNED, "tuning": "vpt_shallow", "prompt_length": 5, "head": "linear"},
    "deep": {**TUNED, "tuning": "vpt_deep", "prompt_length": 3},
    "lora": {**TUNED, "tuning": "lora", "rank": 2},
    "lora again": {**TUNED, "tuning": "lora", "rank": 2, "lr": 0.3, "head": "linear"},
    "lora larger": {**TUNED, "tuning": "lora", "rank": 3},
    "adaptformer": {**TUNED, "tuning": "adaptformer", "bottleneck": 3},
    "adaptformer again": {**TUNED, "tuning": "adaptformer", "bottleneck": 3, "lr": 0.3},
    "bias": {**TUNED, "tuning": "bias"},
    "norm": {**TUNED, "tuning": "norm"},
    "full": {**TUNED, "tuning": "full"},
    "probe": {"method": "linear_probe", "epochs": 2, "lr": 0.05},
    "cosine probe": {"method": "linear_probe", "epochs": 2, "head": "cosine"},
    "means": {"method": "class_mean"},
    "neighbours": {"method": "knn", "k": 5},
    "texts": {"method": "zero_shot"},
    "two stages": {"method": "two_stage", "epochs_stage1": 1, "then": {"name": "lpt", **LPT, "pool_size": 4}},
    "two stages adapted": {
        "method": "two_stage",
        "epochs_stage1": 1,
        "then": {"name": "fine_tune", "tuning": "adaptformer", "bottleneck": 2, "epochs": 1},
    },
    "augmented first": {
        "method": "pre_finetune",
        "then": {"name": "fine_tune", "tuning": "vpt_deep", "epochs": 1, "prompt_length": 3},
    },
    "calibrated": {"method": "decoupled", "adjust": "posthoc_la", "first": {"name": "class_mean"}},
    "calibrated too": {"method": "decoupled", "adjust": "marc", "epochs": 1, "first": {"name": "class_mean"}},
    "fixmatch": {"method": "fixmatch", **FAST},
    "finessl": {"method": "finessl", **FAST},
    "daso": {"method": "daso", **FAST},
    "fused": {"method": "ulfine", **ULFINE, "tuning": "vpt_deep", "prompt_length": 3},
    "fused otherwise": {"method": "ulfine", **ULFINE, "tuning": "head", "fusion": "zscore"},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """(a backbone, a folder of prompt files of every method on it). Tasks differ in their number of classes."""
    folder, backbone = tmp_path_factory.mktemp("prompts"), small_backbone()
    generator = torch.Generator().manual_seed(0)
    backbone.prototypes = {f"class {k}": torch.randn(32, generator=generator) for k in range(7)}
    for (name, settings), extra in zip(CASES.items(), cycle((0, 3, 1, 2)), strict=False):
        settings = {key: value for key, value in settings.items() if key != "method"}
        if isinstance(then := settings.get("then"), dict):
            settings["then"] = {key: value for key, value in then.items() if key != "method"}
        method, counts = CASES[name]["method"], (9, 5, 3, 2, 2, 2, 2)[: 4 + extra]
        task = semi_task((3,) * len(counts), counts)
        model = train(method, task, backbone, **settings).only_train().eval()
        model.round_to(torch.float16)
        save_prompt(folder / f"{name}.safetensors", model, method=method, counts=task.counts)
    return backbone, folder


def test_every_method_is_among_the_cases():
    names = {CASES[name]["method"] for name in CASES}
    names |= {part["name"] for case in CASES.values() if isinstance(part := case.get("then"), dict)}
    assert names == set(METHODS)


@pytest.fixture(scope="module")
def bank(library):
    return TaskBank(library[0], library[1] / "*.safetensors", batch_size=64)


def views(number, seed=0):
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def asked(bank, names, seed=0):
    return [Asked(task, view) for task, view in zip(bank.hold(names), views(len(names), seed), strict=True)]


def mixture(number, seed=1):
    order = torch.randint(len(CASES), (number,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*CASES, *(list(CASES)[k] for k in order)]


def same_as_alone(bank, folder, names, atol=1e-5):
    """Every image has the answer that the model of its task alone gives it."""
    requests = asked(bank, names)
    output = bank.forward(requests)
    for name in dict.fromkeys(names):
        rows = [row for row, one in enumerate(names) if one == name]
        model = load_prompt(folder / f"{name}.safetensors", bank.backbone)
        with torch.no_grad():
            alone = model(torch.stack([requests[row].view for row in rows]).to(bank.backbone.dtype))
        classes = len(model.classes)
        assert torch.isneginf(output.logits[rows, classes:]).all()
        torch.testing.assert_close(output.logits[rows, :classes], alone.logits.float(), rtol=0, atol=atol, msg=name)
        mine = output.top(classes)[0][rows, :classes]
        theirs = model.probabilities(alone.logits.float()).sort(1, descending=True).values
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol, msg=name)
        given = 0 if alone.ids is None else alone.ids.shape[1]
        assert (output.ids[rows, given:] == -1).all()
        if given:
            assert output.ids[rows, :given].tolist() == alone.ids.tolist()
            torch.testing.assert_close(output.similarity[rows, :given], alone.similarity, rtol=0, atol=atol)


def test_every_image_of_a_mixed_batch_is_answered_as_by_its_own_model(bank, library):
    same_as_alone(bank, library[1], mixture(60))


def test_so_it_is_in_batches_of_other_sizes_and_of_one_task(library, bank):
    small = TaskBank(library[0], library[1], batch_size=3)
    same_as_alone(small, library[1], mixture(20, seed=2))
    same_as_alone(bank, library[1], ["lpt"] * 5)
    same_as_alone(bank, library[1], ["lora", "lora again"] * 3)


def test_tasks_of_one_shape_go_through_the_backbone_once(bank, monkeypatch):
    seen, embed = [], type(bank.backbone).embed
    monkeypatch.setattr(type(bank.backbone), "embed", lambda self, x: seen.append(len(x)) or embed(self, x))
    together = ["lpt", "lpt larger pool", "two stages"]  # other pools, heads and classes, the same prompt length
    bank.forward(asked(bank, together * 4))
    bank.forward(asked(bank, ["deep", "augmented first", "fused"] * 2))
    bank.forward(asked(bank, ["probe", "cosine probe", "means", "neighbours", "texts", "calibrated", "calibrated too"]))
    bank.forward(asked(bank, ["lora", "lora again", "adaptformer", "adaptformer again"]))
    assert seen == [12, 6, 7, 2, 2]


def test_adapters_leave_the_backbone_as_it_was(bank, library):
    one = views(2)
    before = bank.backbone.pool(bank.backbone.embed(one))
    learned = {key: adapted.learned() for key, adapted in bank._adapted.items()}
    bank.forward(asked(bank, list(CASES)))
    assert torch.equal(bank.backbone.pool(bank.backbone.embed(one)), before)
    for key, adapted in bank._adapted.items():
        assert all(torch.equal(value, learned[key][name]) for name, value in adapted.learned().items())
        size = {"rank": key[1], "bottleneck": key[1]} if key[1] else {}
        fresh = AdaptedBackbone(bank.backbone, kind=adapted.kind, **size)
        assert adapted.backbone.state_dict().keys() == fresh.backbone.state_dict().keys()
    assert len(bank._adapted) == 8  # lora of two ranks, adaptformer of three widths, bias, norm, full


def test_in_bf16_answers_are_as_near_as_its_numbers_allow(library):
    bank = TaskBank(small_backbone().to(torch.bfloat16), library[1])
    assert len(bank) == len(CASES)
    requests = asked(bank, list(CASES))
    output = bank.forward(requests)
    for row, (name, (_, view)) in enumerate(zip(CASES, requests, strict=True)):
        model = load_prompt(library[1] / f"{name}.safetensors", bank.backbone)
        with torch.no_grad():
            alone = model(view[None].bfloat16())
        classes = len(model.classes)
        if alone.ids is None or alone.ids[0].tolist() == output.ids[row, : alone.ids.shape[1]].tolist():
            mine, theirs = output.logits[row, :classes], alone.logits[0].float()
            assert (mine - theirs).abs().max() < 0.05 * theirs.abs().max().clamp(min=1), name


# Images.


def photo(seed=0, size=(40, 30)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_an_image_is_the_same_whatever_it_is_given_as(bank, tmp_path):
    image = photo()
    (tmp_path / "a.png").write_bytes(encoded(image))
    given = [tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), image]
    answers = bank.predict(given, "lpt", topk=3)
    assert len(set(answers)) == 1 and answers[0].error is None
    (alone,) = bank.predict(image, ["lpt"], topk=3)
    assert alone.classes == answers[0].classes and len(alone.classes) == len(alone.counts) == 3
    header = bank.header("lpt")
    assert alone.counts == tuple(header.counts[header.classes.index(name)] for name in alone.classes)
    assert len(alone.group_prompts) == len(alone.similarity) == 2
    assert bank.predict(image, "probe")[0].group_prompts == ()


def test_pixels_are_seen_as_evaluation_sees_them(bank, library):
    task = toy_task()
    model = load_prompt(library[1] / "lpt.safetensors", bank.backbone)
    wanted = lpt.engine.evaluate.predict_top(model, task.test, topk=4)
    answers = bank.predict(list(task.test.pixels), "lpt", topk=4)
    mine = torch.tensor([answer.probabilities for answer in answers])
    assert torch.allclose(mine, wanted.probabilities, atol=1e-5)
    assert bank.predict(task.test.pixels, "lpt", topk=4) == answers
    more = bank.predict([*task.test.pixels] * 12, "means", topk=1)  # more than are held at a time
    assert len(more) == 288 and more[:24] == bank.predict(task.test.pixels, "means", topk=1)


def test_each_task_has_views_of_its_own(library, tmp_path):
    backbone = library[0]
    model = prompted(backbone, num_classes=4).only_train().eval()
    for name, changes in (("as it is", {}), ("square", {"square": True, "mean": (0.3,) * 3})):
        was, backbone.preprocess = backbone.preprocess, backbone.preprocess.with_(**changes)
        save_prompt(tmp_path / f"{name}.safetensors", model, method="lpt", counts=toy_task().counts, storage="fp32")
        backbone.preprocess = was
    bank = TaskBank(backbone, tmp_path)
    image = photo(size=(90, 30))
    for held in bank.hold(["as it is", "square"]):
        assert torch.equal(
            held.view(image),
            held.preprocess.normalized(
                held.preprocess.cut_one(lpt.data.preprocess.File("x", encoded(image)), None)[None]
            )[0],
        )
    first, second = (held.view(image) for held in bank.hold(["as it is", "square"]))
    assert not torch.allclose(first, second, atol=0.1)


def test_what_is_no_image_is_named_and_the_others_are_answered(bank, tmp_path):
    bad = [b"words", encoded(photo())[:50], tmp_path / "absent.png", torch.zeros(3, 4, 4), torch.zeros(1, 4, 4).byte()]
    answers = bank.predict([*bad, photo()], "lpt")
    assert all("image" in answer.error and not answer.classes for answer in answers[:-1])
    assert answers[-1].error is None and "absent.png" in answers[2].error


# Names.


def test_unknown_tasks_are_named_with_those_that_are_alike(bank):
    with pytest.raises(UnknownTask, match="no task 'shalow': did you mean shallow") as error:
        bank.predict(photo(), "shalow")
    assert error.value.near[0] == "shallow"
    with pytest.raises(LptError, match="1 images and 2 tasks"):
        bank.predict(photo(), ["lpt", "deep"])
    with pytest.raises(LptError, match="topk: got 0"):
        bank.predict(photo(), "lpt", topk=0)
    with pytest.raises(LptError, match="backbone is 'nano'"):
        TaskBank("nano")
    assert "lpt" in bank and "x" not in bank and bank.tasks == tuple(sorted(CASES)) and not bank.refused


def test_files_are_named_by_pattern_folder_list_or_task(library, tmp_path):
    backbone, folder = library
    (tmp_path / "lamps").mkdir()
    shutil.copy(folder / "probe.safetensors", tmp_path / "lamps/prompt.safetensors")
    assert TaskBank(backbone, f"{tmp_path}/*/prompt.safetensors").tasks == ("lamps",)
    assert TaskBank(backbone, [folder / "lpt.safetensors", str(folder / "deep.safetensors")]).tasks == ("deep", "lpt")
    assert TaskBank(backbone, {"shoes": folder / "lpt.safetensors"}).tasks == ("shoes",)
    assert TaskBank(backbone).tasks == () and TaskBank(backbone, tmp_path).tasks == ()
    with pytest.raises(LptError, match="no file has such a name"):
        TaskBank(backbone, f"{tmp_path}/*.nothing")
    assert "cannot be read" in str(TaskBank(backbone, tmp_path / "absent").refused)


# Files that come, change and go.


@pytest.fixture
def few(library, tmp_path):
    """(bank, folder, backbone) with three tasks."""
    for name in ("lpt", "deep", "probe"):
        shutil.copy(library[1] / f"{name}.safetensors", tmp_path)
    return TaskBank(library[0], tmp_path), tmp_path, library


def test_a_folder_is_looked_at_again(few):
    bank, folder, (_, source) = few
    assert bank.sync() == []
    shutil.copy(source / "means.safetensors", folder)
    replaced = folder / ".new"
    shutil.copy(source / "lora.safetensors", replaced)
    replaced.rename(folder / "deep.safetensors")
    (folder / "probe.safetensors").unlink()
    held = bank.hold(["deep", "probe"])
    assert sorted(bank.sync()) == ["task deep is replaced", "task means is added", "task probe is removed"]
    assert bank.tasks == ("deep", "lpt", "means") and bank.header("deep").inside is not None
    # A request keeps what it began with.
    answers = bank.answer([Asked(task, view) for task, view in zip(held, views(2), strict=True)])
    assert [answer.error for answer in answers] == [None, None] and held[0].header.inside is None


def test_a_damaged_file_is_refused_and_what_it_was_goes_on(few):
    bank, folder, _ = few
    before = bank.answer(asked(bank, ["lpt"]))
    (folder / "lpt.safetensors").write_bytes(b"no such thing")
    (folder / "new.safetensors").write_bytes((folder / "deep.safetensors").read_bytes()[:-8])
    said = bank.sync()
    assert len(said) == 2 and said[0].endswith("; the file of before is served") and "new.safetensors" in said[1]
    assert set(bank.refused) == {str(folder / "lpt.safetensors"), str(folder / "new.safetensors")}
    assert bank.answer(asked(bank, ["lpt"])) == before and "new" not in bank
    assert bank.sync() == [] and len(bank.refused) == 2  # said once
    shutil.copy(folder / "deep.safetensors", folder / "lpt.safetensors")
    assert bank.sync() == ["task lpt is replaced"] and len(bank.refused) == 1


def test_files_for_another_backbone_are_refused_by_name(few):
    bank, folder, _ = few
    other = prompted(small_backbone(seed=1), num_classes=4).only_train().eval()
    save_prompt(folder / "other.safetensors", other, method="lpt", counts=toy_task().counts)
    (said,) = bank.sync()
    assert "is for backbone untrained:" in said and "other" not in bank
    with pytest.raises(PromptFileError, match="is for backbone"):
        bank.add(folder / "other.safetensors", name="lpt")
    assert bank.hold("lpt")[0].path == folder / "lpt.safetensors"


def test_two_files_of_one_name_are_not_mixed_up(few, tmp_path):
    _, folder, (backbone, _) = few
    (folder / "b").mkdir()
    shutil.copy(folder / "lpt.safetensors", folder / "b/deep.safetensors")
    both = TaskBank(backbone, [folder, folder / "b"])
    assert "has the name of" in both.refused[str(folder / "b/deep.safetensors")]
    assert both.header("deep").method == "fine_tune"


# Memory.


def test_tasks_used_longest_ago_are_dropped_and_read_again(library, bank):
    backbone, folder = library
    names = ["lpt", "deep", "probe", "lora", "lpt phase 1"]
    sizes = {name: bank.hold(name)[0].model.bytes for name in names}
    limit = sizes["lpt"] + sizes["deep"] + sizes["probe"]
    small = TaskBank(backbone, [folder / f"{name}.safetensors" for name in names], memory=limit)
    for name in (*names, *names[::-1], "lpt", "deep", "probe"):
        small.answer(asked(small, [name]))
        assert small.bytes <= limit and small.loaded[-1] == name
    assert set(small.loaded) == {"lpt", "deep", "probe"}
    same_as_alone(small, folder, names * 3)  # more in one batch than are kept
    assert small.bytes <= limit
    assert TaskBank(backbone, folder / "full.safetensors", memory=1).loaded == ("full",)  # one is always kept


def test_copies_of_the_backbone_go_with_the_last_task_that_needs_them(library):
    bank = TaskBank(library[0], [library[1] / f"{name}.safetensors" for name in ("lora", "lora again", "probe")])
    for name in ("lora", "lora again"):
        assert bank.adapted_bytes > 0
        bank.remove(name)
    gc.collect()
    assert bank.adapted_bytes == 0 and bank.tasks == ("probe",)


def test_bytes_are_those_of_the_tensors(library, bank):
    deep, probe = (bank.hold(name)[0] for name in ("lpt phase 1", "probe"))
    classes = len(deep.header.classes)
    assert deep.model.bytes == 4 * (2 * 4 * 4 * 32 + classes * 32)  # keys and values of 4 tokens in 4 blocks
    assert probe.model.bytes == 4 * (len(probe.header.classes) * 33)
    assert bank.adapted_bytes > 0 and bank.bytes == sum(bank.hold(name)[0].model.bytes for name in bank.tasks)


# Threads.


def test_threads_use_it_while_tasks_are_replaced(few):
    bank, folder, (backbone, source) = few
    bank.memory = bank.bytes // 2
    images = views(1)
    wanted = {}
    for name in ("lpt", "deep", "probe", "adaptformer"):
        model = load_prompt(source / f"{name}.safetensors", backbone)
        with torch.no_grad():
            wanted[name] = model(images).logits[0]
    end, wrong = threading.Event(), []

    def ask(number):
        done = 0
        while not end.is_set():
            name = ("lpt", "deep", "probe")[(number + done) % 3]
            (task,) = bank.hold(name)
            row = bank.forward([Asked(task, images[0])]).logits[0]
            expected = [wanted[name], wanted["adaptformer"]] if name == "deep" else [wanted[name]]
            if not any(len(row) == len(one) and torch.allclose(row, one, atol=1e-5) for one in expected):
                wrong.append(name)
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ask, number) for number in range(4)]
        for turn in range(30):
            shutil.copy(source / ("adaptformer.safetensors" if turn % 2 else "deep.safetensors"), folder / ".new")
            (folder / ".new").rename(folder / "deep.safetensors")
            said = bank.sync()
            assert said == ["task deep is replaced"]
        end.set()
        assert all(future.result() > 3 for future in futures) and not wrong
