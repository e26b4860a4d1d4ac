"""A prompt file knows what it was trained on: a folder that has changed since is tested without its training images."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lpt
from lpt import run, serve
from lpt.config import resolve
from lpt.data.image_hashes import HASH_BYTES, UNREADABLE, image_hashes, packed, unpacked
from lpt.prompt_file import read_prompt
from tests.support.toy import toy_images


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
    return metrics, [line for line in said if "trained on" in line]


def add_a_photo(photos):
    write_noise(photos, {"ant": 1}, seed=5)


def rename_a_class(photos):
    (photos / "cat").rename(photos / "lynx")


def rename_every_file(photos):
    for path in [*photos.rglob("*.png")]:
        path.rename(path.with_name(f"x{path.name}"))


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


def test_given_parts_and_images_in_memory_store_no_hashes(tmp_path):
    config = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": "class_mean"}}
    run.train(resolve(config), tmp_path / "run")
    assert read_prompt(tmp_path / "run" / "prompt.safetensors").header.trained_on is None


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
