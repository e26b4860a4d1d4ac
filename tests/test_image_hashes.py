"""A prompt file knows what it was trained on: a folder that has changed since is tested without its training images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lpt
from lpt import run, serve
from lpt.config import resolve
from lpt.data import Files
from lpt.data.image_hashes import HASH_BYTES, UNREADABLE, hashes_to_store, image_draws, image_hashes, packed, unpacked
from lpt.files import to_bytes
from lpt.prompt_file import read_prompt
from tests.support.toy import toy_images, toy_task


def write_noise(folder, counts, *, seed=0, suffix="png"):
    """Photos without anything to learn: who tests on images that were trained on sees it at once."""
    rng = np.random.default_rng(seed)
    for name, number in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{seed}-{i:02d}.{suffix}")


@pytest.fixture
def trained(tmp_path):
    """(a folder of noise, a prompt file of neighbours that know every training image by heart)."""
    photos = tmp_path / "photos"
    write_noise(photos, {"ant": 12, "bee": 9, "cat": 6})
    config = {
        "backbone": {"name": "nano"},
        "data": {"name": "folder", "root": str(photos)},
        "method": {"name": "knn", "k": 1},
    }
    run.train(resolve(config), tmp_path / "run")
    return photos, tmp_path / "run" / "prompt.safetensors"


def evaluated(prompt, photos, **data):
    said = []
    settings = {"data": {"name": "folder", "root": str(photos), **data}}
    metrics = serve.evaluate_prompt(prompt, settings, say=said.append)
    return metrics, [line for line in said if "trained on" in line or "training images:" in line]


def add_a_photo(photos):
    write_noise(photos, {"ant": 1}, seed=5)


def rename_a_class(photos):
    (photos / "cat").rename(photos / "lynx")


def rename_every_file(photos):
    for path in [*photos.rglob("*.png")]:
        path.rename(path.with_name(f"x{path.name}"))


def add_many(photos):
    write_noise(photos, {"ant": 30, "bee": 1, "dog": 9}, seed=6)


def take_some_away(photos):
    for path in sorted(photos.rglob("*.png"))[::7]:
        path.unlink()


def rename_the_folder_of_all(photos):
    return photos.rename(photos.with_name("pictures"))


def save_every_file_anew(photos):
    """Other bytes, the same pixels."""
    for path in [*photos.rglob("*.png")]:
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()


@pytest.mark.parametrize("change", [add_a_photo, rename_a_class, rename_every_file, save_every_file_anew])
def test_a_folder_that_has_changed_is_tested_without_its_training_images(trained, change):
    photos, prompt = trained
    before, said = evaluated(prompt, photos)
    training = len(read_prompt(prompt).tensors["head.bank"])
    assert said == [] and before["trained_on_left_out"] == 0
    change(photos)
    metrics, said = evaluated(prompt, photos)
    assert metrics["trained_on_left_out"] == training and f"{training} test images were trained on" in said[0]
    assert metrics["accuracy"] < 0.8  # noise; neighbours have all of what they were trained on right


def test_training_images_among_another_test_part_are_left_out(trained, tmp_path):
    photos, prompt = trained
    other = tmp_path / "other"
    write_noise(other / "train", {"ant": 2, "bee": 2, "cat": 2}, seed=8)
    write_noise(other / "test", {"ant": 3, "bee": 3, "cat": 3}, seed=9)
    known = [*lpt.load_task("folder", root=str(photos)).train.ids][:4]
    for name in known:
        (other / "test" / name).write_bytes((photos / name).read_bytes())
    metrics, _ = evaluated(prompt, other)
    assert metrics["trained_on_left_out"] == 4


def test_nothing_to_test_on_is_a_sentence(trained):
    photos, prompt = trained
    task = lpt.load_task("folder", root=str(photos))
    for name in task.test.ids:
        (photos / name).unlink()
    with pytest.raises(lpt.LptError, match="test images were trained on: give images that the prompt file does not"):
        evaluated(prompt, photos)


def test_another_seed_of_digits_is_tested_without_training_images(tmp_path):
    config = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": "class_mean"}}
    run.train(resolve(config), tmp_path / "run")
    prompt = tmp_path / "run" / "prompt.safetensors"
    said = []
    assert serve.evaluate_prompt(prompt, {}, say=said.append)["trained_on_left_out"] == 0
    task, other = lpt.load_task("digits-lt"), lpt.load_task("digits-lt", seed=4)
    both = set(task.train.ids) & set(other.test.ids)
    metrics = serve.evaluate_prompt(prompt, {"data": {"seed": 4}}, say=said.append)
    assert metrics["trained_on_left_out"] == len(both) > 20
    assert f"warning: {len(both)} test images were trained on, and are left out" in said


def test_nothing_is_stored_of_an_official_test_part_and_of_files_in_lists(tmp_path):
    task = toy_task()
    assert hashes_to_store(task) and hashes_to_store(replace(task, test_is_official=True)) is None
    write_noise(tmp_path, {"ant": 4, "bee": 4})
    for part, rows in (("train", (0, 1)), ("test", (2, 3))):
        lines = [f"{name}/0-0{i}.png {k}\n" for k, name in enumerate(["ant", "bee"]) for i in rows]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    lists = {part: str(tmp_path / f"{part}.txt") for part in ("train", "test")}
    listed = lpt.load_task("lists", root=str(tmp_path), **lists)
    assert listed.test_is_official and hashes_to_store(listed) is None


def test_given_parts_that_are_cut_anew_are_tested_without_training_images(trained, tmp_path):
    photos = tmp_path / "given"
    write_noise(photos / "train", {"ant": 5, "bee": 4}, seed=1)
    write_noise(photos / "test", {"ant": 3, "bee": 3}, seed=2)
    data = {"name": "folder", "root": str(photos)}
    config = {"backbone": {"name": "nano"}, "data": data, "method": {"name": "knn", "k": 1}}
    run.train(resolve(config), tmp_path / "of_given")
    prompt = tmp_path / "of_given" / "prompt.safetensors"
    assert evaluated(prompt, photos)[0]["trained_on_left_out"] == 0
    (photos / "test" / "ant" / "1-00.png").write_bytes((photos / "train" / "ant" / "1-00.png").read_bytes())
    metrics, said = evaluated(prompt, photos)
    assert metrics["trained_on_left_out"] == 1 and len(said) == 1


# The split itself.


def parts(photos, **settings):
    task = lpt.load_task("folder", root=str(photos), **settings)
    train, test = ({Path(part.source(i)).read_bytes() for i in range(len(part))} for part in (task.train, task.test))
    return train, test


@pytest.mark.parametrize("change", [add_a_photo, add_many, take_some_away, rename_a_class, rename_the_folder_of_all])
def test_an_image_stays_in_its_part_whatever_happens_beside_it(tmp_path, change):
    photos = tmp_path / "photos"
    write_noise(photos, {"ant": 60, "bee": 40, "cat": 25})
    train, test = parts(photos)
    photos = change(photos) or photos
    train_now, test_now = parts(photos)
    assert not train & test_now and not test & train_now
    assert len(train & train_now) + len(test & test_now) > 80


def test_each_class_gives_about_its_share_and_at_least_one(tmp_path):
    photos = tmp_path / "photos"
    write_noise(photos, {"a": 400, **{f"b{i}": 2 for i in range(20)}, "c": 1})
    task = lpt.load_task("folder", root=str(photos), test_share=0.25)
    tested = torch.bincount(task.test.labels, minlength=22).tolist()
    assert 70 <= tested[0] <= 130 and tested[1:] == [1] * 20 + [0] and task.counts.min() >= 1
    assert "about 0.25 of each class split off as test set with seed 0" in task.facts["test_part"]
    others = lpt.load_task("folder", root=str(photos), test_share=0.25, seed=1)
    assert set(others.test.ids) != set(task.test.ids)
    more = lpt.load_task("folder", root=str(photos), test_share=0.5)  # a larger share holds a smaller one
    assert {i for i in task.test.ids if i[0] == "a"} < {i for i in more.test.ids if i[0] == "a"}


def test_copies_of_an_image_are_in_one_part(tmp_path):
    write_noise(tmp_path, {"ant": 30, "bee": 30})
    for path in [*tmp_path.rglob("*.png")]:
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    train, test = parts(tmp_path)
    assert len(train) + len(test) == 60 and not train & test


def test_images_in_parquet_are_split_by_themselves_too(tmp_path):
    write_noise(tmp_path / "photos", {"ant": 30, "bee": 30})
    files = sorted((tmp_path / "photos").rglob("*.png"))
    tested = []
    for name, order in (("one", files), ("two", files[::-1][5:])):
        (tmp_path / name).mkdir()
        pictures = [{"bytes": file.read_bytes(), "path": None} for file in order]
        labels = [file.parent.name for file in order]
        pq.write_table(pa.table({"image": pictures, "label": labels}), tmp_path / name / "all.parquet")
        task = lpt.load_task("folder", root=str(tmp_path / name))
        tested.append({task.test.source(i) for i in range(len(task.test))})
    assert len(tested[0]) >= 8 and tested[1] <= tested[0]
    assert len(tested[0] - tested[1]) <= 5


def test_large_files_are_read_at_both_ends(tmp_path):
    for name, end in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(b"\xff\xd8" + bytes(300_000) + end)
    files = Files(lambda i: str(tmp_path / "abc"[i]), torch.zeros(3, dtype=torch.long), tuple("abc"), tuple("abc"))
    draws = image_draws(files, 0)
    assert draws[0] == draws[2] != draws[1] and (draws >= 0).all() and (draws < 1).all()


# What was made before the split was by image.


def test_the_split_of_before_is_still_there(tmp_path):
    write_noise(tmp_path, {"ant": 12, "bee": 9, "cat": 6})
    task = lpt.load_task("folder", root=str(tmp_path), split_by="position")
    assert torch.bincount(task.test.labels).tolist() == [2, 2, 1]
    assert [*task.test.ids] == [
        "ant/0-00.png",
        "ant/0-07.png",
        "bee/0-01.png",
        "bee/0-02.png",
        "cat/0-05.png",
    ]  # as lpt 0.1 does


def run_of_before(tmp_path):
    """(photos, config, folder) of a run as lpt 0.1 has left it, without a word on how it was split."""
    photos, out = tmp_path / "photos", tmp_path / "run"
    write_noise(photos, {"ant": 12, "bee": 9, "cat": 6})
    data = {"name": "folder", "root": str(photos)}
    config = {"backbone": {"name": "nano"}, "data": data, "method": {"name": "linear_probe", "epochs": 2}}
    run.train(resolve(config, ["data.split_by=position"]), out)
    text = (out / "config.yaml").read_text()
    assert "  split_by: position\n" in text
    (out / "config.yaml").write_text(text.replace("  split_by: position\n", ""))
    return photos, config, out


def test_a_run_of_before_goes_on_with_its_split(tmp_path):
    _, config, out = run_of_before(tmp_path)
    before = (out / "report.json").read_bytes()
    (out / "report.json").unlink()
    said = []
    run.train(resolve(config), out, resume=True, say=said.append)
    assert any("split off by position, and it continues so" in line for line in said)
    again = json.loads((out / "report.json").read_text())
    assert again["data"] == json.loads(before)["data"] and again["accuracy"] == json.loads(before)["accuracy"]
    run.train(resolve(config), out, resume=True)  # a second time: now the config says so


def test_a_prompt_file_of_before_is_tested_on_its_own_split(tmp_path):
    photos, _, out = run_of_before(tmp_path)
    header, tensors = read_prompt(out / "prompt.safetensors")
    content = json.loads(header.model_dump_json())
    del content["data"]["settings"]["split_by"], content["trained_on"]
    (out / "prompt.safetensors").write_bytes(to_bytes(tensors, lpt=content))
    metrics, said = evaluated(out / "prompt.safetensors", photos)
    assert said == [] and metrics["accuracy"] == json.loads((out / "report.json").read_text())["accuracy"]
    add_a_photo(photos)
    _, said = evaluated(out / "prompt.safetensors", photos)
    assert "the prompt file does not know its training images" in said[0]


def test_memory_and_files_have_one_hash_and_a_broken_file_none(tmp_path):
    images = toy_images(torch.tensor([0, 1, 1]))
    for i, name in enumerate(("a", "b", "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
    task = lpt.load_task("folder", root=str(tmp_path), test_share=0.4)
    files = {**dict(zip(task.train.ids, image_hashes(task.train), strict=True))}
    files |= dict(zip(task.test.ids, image_hashes(task.test), strict=True))
    assert [files[name] for name in ("a/0.png", "b/1.png", "b/2.png")] == image_hashes(images).tolist()
    (tmp_path / task.test.ids[0]).write_bytes(b"no image")
    assert image_hashes(task.test).tolist() == [UNREADABLE] and packed(np.array([UNREADABLE])) == ""


@given(st.lists(st.integers(min_value=0, max_value=2 ** (8 * HASH_BYTES) - 1), max_size=50))
def test_hashes_go_through_a_header(hashes):
    assert unpacked(packed(np.array(hashes, dtype=np.int64))).tolist() == sorted(set(hashes))


@pytest.mark.parametrize("text", ["x", "====", "AAAA", "ä" * 5, json.dumps([1])])
def test_what_is_no_list_of_hashes_is_refused(text):
    with pytest.raises(ValueError):
        unpacked(text)
