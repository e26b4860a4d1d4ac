"""Your own images: every layout gives the same task, and files give the views that memory gives."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import small_backbone, toy_task
from PIL import Image

import lpt
from lpt.cli import main
from lpt.data.task import Files
from lpt.errors import DataError
from lpt.preprocess import File, Preprocess, decoded


def picture(seed, height=40, width=60):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def fill(folder, counts, *, seed=0, kind="png"):
    for k, (name, n) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture(1000 * seed + 100 * k + i).save(folder / name / f"{i}.{kind}")
    return folder


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


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_names_the_class_of_each_file(tmp_path, kind):
    place = tmp_path / "p"
    place.mkdir()
    rows = [(f"{i}.png", ["wren", "robin"][i % 2]) for i in range(10)]
    for i, (name, _) in enumerate(rows):
        picture(i).save(place / name)
    if kind == "csv":
        text = "file_name,species\n" + "".join(f"{name},{label}\n" for name, label in rows)
    else:
        text = "".join(json.dumps({"file_name": name, "species": label}) + "\n" for name, label in rows)
    (place / f"metadata.{kind}").write_text(text)
    task = lpt.load_task("folder", root=str(place))
    assert task.classes == ("robin", "wren") and len(task.train) + len(task.test) == 10
    labels = dict(rows)
    for name, label in zip(task.train.ids, task.train.labels.tolist(), strict=True):
        assert labels[name] == task.classes[label]


def test_parquet_with_encoded_images(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "p").mkdir()
    for role, n in (("train", 12), ("test", 4)):
        cells = []
        for i in range(n):
            buffer = io.BytesIO()
            picture(i).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        table = pa.table({"picture": image, "kind": pa.array([i % 3 for i in range(n)])})
        pq.write_table(table, tmp_path / "p" / f"{role}.parquet")
    root = str(tmp_path / "p")
    with pytest.raises(DataError, match=r"columns picture, kind: which holds the image\? Set data.image_column"):
        lpt.load_task("folder", root=root)
    with pytest.raises(DataError, match=r"image_column 'pictur' is no column .* did you mean picture"):
        lpt.load_task("folder", root=root, image_column="pictur")
    task = lpt.load_task("folder", root=root, image_column="picture", label_column="kind")
    assert task.classes == ("0", "1", "2") and task.counts.tolist() == [4, 4, 4] and len(task.test) == 4
    assert Preprocess(size=8).cut(task.test.take(torch.arange(4))).shape == (4, 3, 8, 8)


def test_what_is_no_dataset_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("hello")
    (tmp_path / "file.jpg").write_text("hello")
    for root, says in (
        (None, "data.root is missing"),
        (tmp_path / "absent" / "x", "does not exist"),
        (tmp_path / "empty", "cannot be read"),
        (tmp_path / "text", "cannot be read"),
        (tmp_path / "file.jpg", "is a file"),
        ("someone/nothing", "cannot be read as a dataset"),
    ):
        with pytest.raises(DataError, match=says):
            lpt.load_task("folder", root=None if root is None else str(root))


def test_one_class_is_no_task(tmp_path):
    with pytest.raises(DataError, match="has 1 class"):
        lpt.load_task("folder", root=str(fill(tmp_path / "p", {"a": 4})))


def as_files(images):
    """PNG files of what lies in memory."""

    def source(i):
        buffer = io.BytesIO()
        Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()

    return Files(source, images.labels, images.ids, "1")


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_files_give_the_views_that_memory_gives(mode):
    """Up to Pillow's rounding to bytes, once for each direction."""
    preprocess = Preprocess(size=24, crop_ratio=0.9, interpolation=mode)
    pixels = torch.stack([torch.from_numpy(np.array(picture(i, 37, 53))).permute(2, 0, 1) for i in range(6)])
    files = [File(str(i), _png(p)) for i, p in enumerate(pixels)]
    chance = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    for theirs, ours in (
        (preprocess.test(pixels), preprocess.normalised(preprocess.cut(files))),
        (preprocess.train(pixels, chance), preprocess.normalised(preprocess.cut(files, chance))),
    ):
        assert (theirs - ours).abs().max() <= 2.5 / 127.5 and (theirs - ours).abs().mean() <= 0.6 / 127.5


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    image = picture(3, 800, 1200)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    small = decoded(File("x", buffer.getvalue()), least=64)
    assert 64 <= min(small.size) < 400
    preprocess = Preprocess(size=32)
    cut = preprocess.cut([File("x", buffer.getvalue())]).float()
    whole = preprocess.cut([File("x", _png(torch.from_numpy(np.array(image)).permute(2, 0, 1)))]).float()
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
    before = lpt.load_task("folder", root=str(flat)).train.digest
    assert lpt.load_task("folder", root=str(flat)).train.digest == before
    os.utime(flat / "cat" / "0.png", ns=(1, 1))
    assert lpt.load_task("folder", root=str(flat)).train.digest != before


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
    lpt_("evaluate", out / "prompt.safetensors", f"data.root={flat}", "--json", tmp_path / "e.json")
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["per_class"] == report["per_class"] and again["nll"] == report["nll"]
    assert again["data"]["split_sha256"] == report["data"]["split_sha256"]
    assert lpt_("predict", out / "prompt.safetensors", flat / "cat").count("cat/") == 6
