"""Your own images: every layout gives the same task, and files give the views that memory gives."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import lpt
from lpt.cli import main
from lpt.data.preprocess import File, Preprocess, decoded
from lpt.errors import DataError
from tests.support.pictures import as_files, fill, picture, png
from tests.support.toy import small_backbone, toy_task

CLASSES = {"cat": 6, "dog": 3, "owl": 2}


@pytest.fixture
def flat(tmp_path):
    return fill(tmp_path / "photos", CLASSES)


def test_class_folders_become_a_task_with_a_stratified_test_part(flat):
    task = lpt.load_task("folder", root=str(flat))
    assert task.classes == ("cat", "dog", "owl")
    assert task.counts.tolist() == [5, 2, 1]
    assert torch.bincount(task.test.labels).tolist() == [1, 1, 1]
    assert set(task.train.ids).isdisjoint(task.test.ids) and len(task.train) + len(task.test) == 11
    for part in (task.train, task.test):
        for name, label in zip(part.ids, part.labels.tolist(), strict=True):
            assert name.split("/")[0] == task.classes[label] and (flat / name).exists()
    assert "0.2 of each class" in task.facts["test_part"]


def test_a_class_with_one_image_keeps_it_for_training(tmp_path):
    task = lpt.load_task("folder", root=str(fill(tmp_path / "p", {"a": 5, "b": 1})))
    assert task.counts.tolist() == [4, 1] and torch.bincount(task.test.labels, minlength=2).tolist() == [1, 0]


def test_the_split_depends_on_its_seed_alone(flat, monkeypatch):
    first = lpt.load_task("folder", root=str(flat))
    monkeypatch.chdir(flat.parent)
    again = lpt.load_task("folder", root="photos")
    assert first.manifest()["sha256"] == again.manifest()["sha256"]
    assert {lpt.load_task("folder", root=str(flat), seed=s).manifest()["sha256"] for s in range(4)} != {
        first.manifest()["sha256"]
    }


def test_given_parts_are_used(tmp_path):
    for role, counts in (("train", CLASSES), ("val", {"cat": 2, "dog": 1}), ("test", {"dog": 4})):
        fill(tmp_path / "p" / role, counts)
    task = lpt.load_task("folder", root=str(tmp_path / "p"))
    assert task.counts.tolist() == [6, 3, 2] and len(task.val) == 3 and len(task.test) == 4
    shutil.rmtree(tmp_path / "p" / "test")
    task = lpt.load_task("folder", root=str(tmp_path / "p"))
    assert task.val is None and len(task.test) == 3 and "val part is the test set" in task.facts["test_part"]


def test_a_class_may_be_called_train_or_test(tmp_path):
    task = lpt.load_task("folder", root=str(fill(tmp_path / "p", {"train": 5, "test": 4, "car": 5})))
    assert task.classes == ("car", "test", "train") and len(task.train) + len(task.test) == 14
    task = lpt.load_task("folder", root=str(fill(tmp_path / "q", {"test tubes": 5, "validation": 4})))
    assert task.classes == ("test tubes", "validation") and len(task.train) + len(task.test) == 9


def test_what_is_no_dataset_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("hello")
    (tmp_path / "file.jpg").write_text("hello")
    for root, says in (
        (None, "data.root is missing"),
        (tmp_path / "absent" / "x", "^data.root [^ ]* does not exist$"),
        ("absent/", "^data.root absent/ does not exist$"),
        (tmp_path / "empty", "^data.root .* holds no image"),
        (tmp_path / "text", "holds no image"),
        (tmp_path / "file.jpg", "is a file"),
        ("someone/nothing", "cannot be read as a dataset"),
    ):
        with pytest.raises(DataError, match=says):
            lpt.load_task("folder", root=None if root is None else str(root))


def test_parts_with_something_beside_them(tmp_path):
    place = tmp_path / "p"
    fill(place / "Train", CLASSES), fill(place / "TEST", {"cat": 2})
    (place / "__pycache__").mkdir()
    (place / "docs").mkdir()
    (place / "docs" / "notes.txt").write_text("no image")
    task = lpt.load_task("folder", root=str(place))
    assert task.counts.tolist() == [6, 3, 2] and len(task.test) == 2
    picture(5).save(place / "docs" / "figure.png")
    with pytest.raises(DataError, match="beside them docs, which holds images too"):
        lpt.load_task("folder", root=str(place))
    shutil.rmtree(place / "docs")
    fill(place / "val", {"cat": 1}), fill(place / "validation", {"cat": 1})
    with pytest.raises(DataError, match="two folders for one part, val and validation"):
        lpt.load_task("folder", root=str(place))


def test_links_brackets_and_nested_folders_are_read_and_strays_are_told(tmp_path):
    place = fill(tmp_path / "ro[ot] *", {"a [1]": 3, "b {2}": 3, "c d": 3})
    fill(tmp_path / "elsewhere", {"x": 4})
    (place / "linked").symlink_to(tmp_path / "elsewhere" / "x")
    (place / "linked" / "loop").symlink_to(place)
    fill(place / "birds", {"robin": 2, "wren": 2})  # one class, birds
    picture(1).save(place / "stray.png")
    (place / ".hidden").mkdir()
    picture(2).save(place / ".hidden" / "x.png")
    picture(3).save(place / "c d" / "photo.AVIF", format="AVIF")
    task = lpt.load_task("folder", root=str(place))
    assert task.classes == ("a [1]", "b {2}", "birds", "c d", "linked")
    assert len(task.train) + len(task.test) == 3 + 3 + 4 + 4 + 4
    assert task.facts["left_out"] == ["stray.png"]
    assert Preprocess(size=8).cut(task.train.take(torch.arange(len(task.train)))).shape[0] == len(task.train)


def test_nothing_to_test_on_and_nothing_to_hold_out(tmp_path):
    with pytest.raises(DataError, match="has no image to test on"):
        lpt.load_task("folder", root=str(fill(tmp_path / "p", {"a": 1, "b": 1})))
    with pytest.raises(DataError, match=r"no class of .* has a second training image"):
        lpt.load_task("folder", root=str(fill(tmp_path / "q", {"a": 2, "b": 2})), val_per_class=3)


def test_one_class_is_no_task(tmp_path):
    with pytest.raises(DataError, match="has 1 class"):
        lpt.load_task("folder", root=str(fill(tmp_path / "p", {"a": 4})))


@pytest.mark.parametrize("cutter", ["pillow", "torch"])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_files_give_the_views_that_memory_gives(mode, cutter):
    """Up to rounding to bytes, once for each direction. Training views of torch are of whole pixels."""
    preprocess = Preprocess(size=24, crop_ratio=0.9, interpolation=mode, cutter=cutter)
    pixels = torch.stack([torch.from_numpy(np.array(picture(i, 37, 53))).permute(2, 0, 1) for i in range(6)])
    files = [File(str(i), png(p)) for i, p in enumerate(pixels)]
    chance = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    for theirs, ours in (
        (preprocess.test(pixels), preprocess.normalized(preprocess.cut(files))),
        *[(preprocess.train(pixels, chance), preprocess.normalized(preprocess.cut(files, chance)))]
        * (cutter == "pillow"),
    ):
        assert (theirs - ours).abs().max() <= 2.5 / 127.5 and (theirs - ours).abs().mean() <= 0.6 / 127.5


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    image = picture(3, 800, 1200)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    small = decoded(File("x", buffer.getvalue()), min_side=64)
    assert 64 <= min(small.size) < 400
    preprocess = Preprocess(size=32)
    cut = preprocess.cut([File("x", buffer.getvalue())]).float()
    whole = preprocess.cut([File("x", png(torch.from_numpy(np.array(image)).permute(2, 0, 1)))]).float()
    assert (cut - whole).abs().mean() < 3


def test_images_are_upright_and_16_bits_become_8():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    exif = image.getexif()
    exif[274] = 6  # rotated by 90°
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert decoded(File("x", buffer.getvalue())).size == (3, 4)
    deep = Image.fromarray((np.arange(12).reshape(3, 4) * 5000).astype(np.uint16))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    found = np.array(decoded(File("x", buffer.getvalue())))
    assert found.shape == (3, 4, 3) and np.array_equal(found[..., 0], (np.arange(12).reshape(3, 4) * 5000) // 256)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"])
def test_every_kind_of_pixel_becomes_rgb(mode):
    grey = (np.arange(48, dtype=np.uint8) * 5).reshape(6, 8)
    if mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode in ("I", "I;16"):
        image = Image.fromarray(grey.astype(np.int32) if mode == "I" else grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert("P" if mode == "PA" else mode)
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode not in ("PA", "HSV") else "PNG") if mode not in ("PA", "HSV") else image.convert(
        "RGBA" if mode == "PA" else "RGB"
    ).save(buffer, "PNG")
    found = np.array(decoded(File("x", buffer.getvalue())))
    assert found.shape == (6, 8, 3) and found.dtype == np.uint8
    if mode != "1":
        assert abs(found.astype(int).mean(2) - grey).max() <= (40 if mode.startswith("P") else 8)  # a palette is coarse


def test_a_long_thin_image_takes_no_memory():
    import resource

    buffer = io.BytesIO()
    Image.new("L", (60_000, 1), 128).save(buffer, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for chance in (None, torch.full((1, 5), 0.5)):
        assert Preprocess(size=224).cut([File("x", buffer.getvalue())], chance).shape == (1, 3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000", "DDS"])
def test_damaged_files_are_refused_or_decoded_and_nothing_else(kind):
    buffer = io.BytesIO()
    picture(1).save(buffer, kind)
    whole, rng = buffer.getvalue(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = rng.integers(256)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(whole))]
        try:
            assert decoded(File("x", bytes(damaged))).mode == "RGB"
        except DataError as error:
            assert str(error).startswith("image x cannot be decoded")


def test_a_broken_image_is_named(flat):
    (flat / "cat" / "2.png").write_bytes((flat / "cat" / "2.png").read_bytes()[:60])
    task = lpt.load_task("folder", root=str(flat))
    for part in (task.train, task.test):
        if "cat/2.png" in part.ids:
            with pytest.raises(DataError, match=r"image cat/2.png cannot be decoded"):
                Preprocess(size=8).cut(part.take(torch.arange(len(part))))


def test_training_on_files_is_training_on_memory_up_to_rounding():
    task, backbone = toy_task((20, 10, 5, 3)), small_backbone()
    settings = dict(method="linear_probe", batch_size=8, epochs=4)
    memory = lpt.tune(task, backbone, **settings)
    from dataclasses import replace

    files = replace(task, train=as_files(task.train), test=as_files(task.test))
    disk = lpt.tune(files, backbone, **settings)
    assert (memory.head.weight - disk.head.weight).norm() <= 0.02 * memory.head.weight.norm()
    prompted = lpt.tune(files, backbone, epochs=(1, 1), batch_size=8, pool_size=3, prompt_length=2, prefix_blocks=2)
    assert 0 <= lpt.evaluate(prompted, files.test, files.counts, group_rule="thirds")["accuracy"] <= 1


def test_a_changed_file_has_another_digest(flat):
    task = lpt.load_task("folder", root=str(flat))
    assert lpt.load_task("folder", root=str(flat)).train.digest == task.train.digest
    os.utime(flat / task.train.ids[0], ns=(1, 1))
    touched = lpt.load_task("folder", root=str(flat))
    assert touched.train.digest != task.train.digest  # no cache is trusted
    assert touched.manifest()["sha256"] == task.manifest()["sha256"]  # and it is the same split
    picture(77, 30, 30).save(flat / task.train.ids[0])
    assert lpt.load_task("folder", root=str(flat)).manifest()["sha256"] != task.manifest()["sha256"]


def test_the_command_line_trains_evaluates_and_predicts_on_a_folder(flat, tmp_path, monkeypatch, capsys):
    def lpt_(*words):
        monkeypatch.setattr(sys, "argv", ["lpt", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr()
        return capsys.readouterr().out

    out = tmp_path / "run"
    sets = ["data.name=folder", f"data.root={flat}", "method.epochs=[1, 1]", "method.pool_size=3", "train.batch_size=4"]
    config = tmp_path / "c.yaml"
    config.write_text(
        "backbone: {name: 'untrained:vit_tiny_patch16_224', image_size: 32}\nmethod: {name: lpt, prefix_blocks: 10}\n"
    )
    said = lpt_("train", config, *sets, "--out", out)
    assert "8 training images of 3 classes, 5 to 1 each" in said and "split off as test set" in said
    report = json.loads((out / "report.json").read_text())
    prompt, made = out / "prompt.safetensors", "backbone.name=untrained:vit_tiny_patch16_224"
    lpt_("evaluate", prompt, f"data.root={flat}", made, "--json", tmp_path / "e.json")
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["per_class"] == report["per_class"] and again["nll"] == report["nll"]
    assert again["data"]["split_sha256"] == report["data"]["split_sha256"]
    assert lpt_("predict", prompt, flat / "cat", made).count("cat/") == 6


def test_broken_images_are_skipped_when_asked_and_listed(flat, tmp_path):
    for name in ("cat/2.png", "owl/0.png"):
        (flat / name).write_bytes((flat / name).read_bytes()[:60])
    (flat / "dog" / "1.png").write_bytes(b"")
    task = lpt.load_task("folder", root=str(flat), on_error="skip")
    assert len(task.train) + len(task.test) == 8 and task.classes == ("cat", "dog", "owl")
    assert any(
        "3 images cannot be decoded and are skipped, for example image cat/2.png" in x for x in task.summary_lines()
    )
    from lpt import run
    from lpt.config import resolve

    config = {
        "backbone": {"name": "untrained:vit_tiny_patch16_224", "image_size": 32},
        "data": {"name": "folder", "root": str(flat), "on_error": "skip"},
        "method": {"name": "class_mean"},
    }
    report = run.train(resolve(config), tmp_path / "run")
    assert [text.split()[1] for text in report["skipped_images"]] == ["cat/2.png", "dog/1.png", "owl/0.png"]
    assert "skipped images | 3: image cat/2.png" in (tmp_path / "run" / "report.md").read_text()
    for file in flat.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="no training image that can be decoded"):
        lpt.load_task("folder", root=str(flat), on_error="skip")


def test_an_empty_folder_is_named_and_is_no_class(flat):
    (flat / "emu").mkdir()
    (flat / "emu" / ".DS_Store").write_text("x")
    task = lpt.load_task("folder", root=str(flat))
    assert task.classes == ("cat", "dog", "owl")
    assert any("1 folders hold no image and are no classes, for example emu" in line for line in task.summary_lines())


@pytest.mark.parametrize("other", ["Cat", "CAT ", "ｃａｔ"])
def test_two_spellings_of_one_class_are_refused(tmp_path, other):
    fill(tmp_path / "photos" / "train", {"cat": 3, "dog": 2})
    fill(tmp_path / "photos" / "test", {other: 3, "dog": 2})
    with pytest.raises(DataError, match="are one in two spellings"):
        lpt.load_task("folder", root=str(tmp_path / "photos"))


def test_a_folder_that_may_not_be_read_is_named(flat, monkeypatch):
    scan = os.scandir

    def refused(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"dog cannot be read \(Permission denied\)"):
        lpt.load_task("folder", root=str(flat))


def test_names_of_classes_may_be_any(tmp_path):
    names = ["a, b", "red panda", "кошка", "猫", "100 %", "<b>"]
    fill(tmp_path / "photos", {name: 3 for name in names})
    assert set(lpt.load_task("folder", root=str(tmp_path / "photos")).classes) == set(names)


@pytest.fixture
def more(tmp_path):
    """Eight unlabeled images beside the photos: three in folders with the name of a class."""
    fill(tmp_path / "more", {"cat": 2, "dog/yard": 1, "Owl": 1, "2024/cat": 2}, seed=3)
    picture(900).save(tmp_path / "more" / "a b.png")
    picture(901).save(tmp_path / "more" / "dog.png")
    return tmp_path / "more"


def test_unlabeled_images_lie_at_any_depth_and_keep_the_truth_of_their_topmost_folder(flat, more, monkeypatch):
    task = lpt.load_task("folder", root=str(flat), unlabeled=str(more))
    truth = dict(zip(task.unlabeled.ids, task.unlabeled.labels.tolist(), strict=True))
    assert truth == {
        "2024/cat/0.png": -1, "2024/cat/1.png": -1, "Owl/0.png": -1, "a b.png": -1, "cat/0.png": 0, "cat/1.png": 0,
        "dog.png": -1, "dog/yard/0.png": 1,
    }  # fmt: skip
    assert task.classes == ("cat", "dog", "owl") and task.counts.tolist() == [5, 2, 1]
    assert "8 unlabeled" in task.summary_lines()[0] and task.manifest()["parts"]["unlabeled"]["images"] == 8
    assert Preprocess(size=8).cut(task.unlabeled.take(torch.arange(8))).shape == (8, 3, 8, 8)
    monkeypatch.chdir(more)
    again = lpt.load_task("folder", root=str(flat), unlabeled=".")
    assert again.manifest()["sha256"] == task.manifest()["sha256"]
    assert lpt.load_task("folder", root=str(flat)).manifest()["sha256"] != task.manifest()["sha256"]
    picture(5, 20, 20).save(more / "dog.png")
    assert lpt.load_task("folder", root=str(flat), unlabeled=".").manifest()["sha256"] != task.manifest()["sha256"]


def test_an_unlabeled_folder_inside_root_is_no_class(flat, more):
    apart = lpt.load_task("folder", root=str(flat), unlabeled=str(more))
    with pytest.raises(DataError, match=r"has Unlabelled among its class folders: set data\.unlabeled=.*Unlabelled if"):
        lpt.load_task("folder", root=str(more.rename(flat / "Unlabelled").parent))
    inside = lpt.load_task("folder", root=str(flat), unlabeled=str(flat / "Unlabelled"))
    assert inside.classes == apart.classes and inside.manifest()["sha256"] == apart.manifest()["sha256"]
    whole = lpt.load_task("folder", root=str(flat / "Unlabelled"), unlabeled=str(flat / "Unlabelled"))
    assert whole.classes == ("2024", "Owl", "cat", "dog") and len(whole.unlabeled) == 8


def test_an_unlabeled_part_beside_the_others(tmp_path, more):
    for role, counts in (("train", CLASSES), ("test", {"dog": 4})):
        fill(tmp_path / "p" / role, counts, seed=len(role))
    root = str(tmp_path / "p")
    apart = lpt.load_task("folder", root=root, unlabeled=str(more))
    shutil.copytree(more, tmp_path / "p" / "unlabelled")
    beside = lpt.load_task("folder", root=root)
    assert beside.unlabeled.ids == apart.unlabeled.ids and beside.counts.tolist() == [6, 3, 2]
    assert beside.manifest()["sha256"] == apart.manifest()["sha256"]
    (more / "dog.png").unlink()  # the one that is given is the one that is taken
    assert len(lpt.load_task("folder", root=root, unlabeled=str(more)).unlabeled) == 7
    trained = lpt.load_task("folder", root=root, unlabeled=str(tmp_path / "p" / "train"))
    assert trained.counts.tolist() == [6, 3, 2] and trained.unlabeled.labels.tolist() == trained.train.labels.tolist()
    fill(tmp_path / "p" / "unlabeled", {"x": 1})
    with pytest.raises(DataError, match="two folders for one part, unlabeled and unlabelled: keep one of them"):
        lpt.load_task("folder", root=root)


def test_a_list_of_unlabeled_images(flat, more):
    lines = ["a b.png", "cat/0.png", "dog/yard/0.png 1", "2024/cat/1.png 0", "../photos/owl/0.png"]
    (more / "list.txt").write_text("\n".join(lines))
    task = lpt.load_task("folder", root=str(flat), unlabeled=str(more / "list.txt"))
    assert task.unlabeled.ids == ("a b.png", "cat/0.png", "dog/yard/0.png", "2024/cat/1.png", "../photos/owl/0.png")
    assert task.unlabeled.labels.tolist() == [-1, -1, 1, 0, -1]
    assert Preprocess(size=8).cut(task.unlabeled.take(torch.arange(5))).shape == (5, 3, 8, 8)
    for text, says in (
        ("\n", r"list\.txt is empty"),
        ("a b.png 3\n", "line 1: label 3, and classes are 0 to 2"),
        ("a b.png\ngone.png\n", r"names 1 files that are not there, the first is gone\.png: its paths start at .*more"),
        ("dog.png\ndog.png 1\n", r"the unlabeled part of .* lists an image twice: dog\.png"),
    ):
        (more / "list.txt").write_text(text)
        with pytest.raises(DataError, match=says):
            lpt.load_task("folder", root=str(flat), unlabeled=str(more / "list.txt"))


def test_unlabeled_images_that_cannot_be_had(flat, more, monkeypatch):
    def says(place, match):
        with pytest.raises(DataError, match=match):
            lpt.load_task("folder", root=str(flat), unlabeled=str(place))

    (more / "nothing").mkdir()
    says(more / "gone", "data.unlabeled .*gone does not exist: give a folder of images, or a list of them")
    says(more / "nothing", "data.unlabeled .*nothing holds no image")
    says(more / "dog.png", "dog.png cannot be read")  # an image is no list
    (more / "lost.png").symlink_to(more / "elsewhere.png")
    says(
        more, r"has 1 links that lead to nothing, more 1 \(lost\.png\): mend or remove them, or set data\.on_error=skip"
    )
    scan = os.scandir

    def refused(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    says(more, r"more cannot be read \(Permission denied\)")


def test_a_broken_unlabeled_image_is_named_or_skipped(flat, more):
    (more / "cat" / "1.png").write_bytes(b"no image")
    task = lpt.load_task("folder", root=str(flat), unlabeled=str(more))
    with pytest.raises(DataError, match=r"image cat/1\.png cannot be decoded"):
        Preprocess(size=8).cut(task.unlabeled.take(torch.arange(8)))
    task = lpt.load_task("folder", root=str(flat), unlabeled=str(more), on_error="skip")
    assert len(task.unlabeled) == 7 and "cat/1.png" not in task.unlabeled.ids
    assert any(
        "1 images cannot be decoded and are skipped, for example image more/cat/1.png" in x
        for x in task.summary_lines()
    )
    for file in more.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="no unlabeled image that can be decoded"):
        lpt.load_task("folder", root=str(flat), unlabeled=str(more), on_error="skip")


def test_unlabeled_images_that_are_test_images_are_told(flat, more):
    test = lpt.load_task("folder", root=str(flat)).test.ids
    assert not any("test images too" in line for line in _described(flat, more))
    (more / "link.png").symlink_to(flat / test[0])
    (more / "hard.png").hardlink_to(flat / test[1])
    assert "warning: 2 unlabeled images are test images too, for example hard.png" in _described(flat, more)
    assert f"warning: {len(test)} unlabeled images are test images too, for example {test[0]}" in _described(flat, flat)


def _described(root, unlabeled):
    return lpt.load_task("folder", root=str(root), unlabeled=str(unlabeled)).summary_lines()
