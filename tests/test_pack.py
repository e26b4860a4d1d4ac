"""Packs: the same classes, split and counts as the images they were made of; whole after any kill, and checked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

import lpt
from lpt.config import check_data
from lpt.data import LOCATION_SETTINGS, Files, lists, load_task, packing
from lpt.data.pack import HEAD, INDEX
from lpt.data.packing import pack, shrunk
from lpt.data.preprocess import File, decoded
from tests.support.command_line import lpt as command
from tests.support.listed import miniature
from tests.support.pictures import fill, picture
from tests.support.shared import ROOT
from tests.support.toy import toy_task

COUNTS = {"red owl": 9, "café": 5, "b": 3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos in train/, test/ and unlabeled/, of several formats and sizes, one upright by its EXIF data alone."""
    root = tmp_path_factory.mktemp("photos")
    fill(root / "train", COUNTS, kind="jpg")
    fill(root / "test", dict.fromkeys(COUNTS, 2), seed=1)
    fill(root / "unlabeled", {"any": 4}, seed=2, kind="webp")
    picture(7, 300, 200).save(root / "train/b/large.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(8, 200, 300).save(root / "train/b/turned.jpg", exif=turned)
    return root


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(packing, "IN_A_SHARD", 4)


def parts(task):
    return {
        role: images for role in ("train", "val", "test", "unlabeled") if (images := getattr(task, role)) is not None
    }


def same_split(one, other):
    assert one.name == other.name and one.classes == other.classes and one.group_rule == other.group_rule
    assert one.counts.tolist() == other.counts.tolist()
    assert parts(one).keys() == parts(other).keys()
    for role, images in parts(one).items():
        theirs = parts(other)[role]
        assert images.ids == theirs.ids and torch.equal(images.labels, theirs.labels), role
    return True


def image(images, row):
    (file,) = images.take(torch.tensor([row]))
    return decoded(file)


@pytest.mark.usefixtures("small_shards")
def test_a_pack_is_the_same_task_with_smaller_images(photos, tmp_path, capsys):
    code, said, err = command(capsys, "pack", photos, "--out", tmp_path / "pack", "--side", 32)
    assert code == 0, err
    assert "train      19 images" in said and f"data.root={tmp_path / 'pack'}" in said
    whole, packed = load_task("folder", root=str(photos)), load_task("folder", root=str(tmp_path / "pack"))
    assert same_split(whole, packed)
    for role, images in parts(packed).items():
        for row in range(len(images)):
            mine, theirs = image(images, row), image(getattr(whole, role), row)
            assert min(mine.size) == 32, (role, images.ids[row])
            expected = np.asarray(theirs.resize(mine.size, Image.Resampling.BICUBIC), dtype=float)
            assert np.abs(np.asarray(mine, dtype=float) - expected).mean() < 6
    turned = packed.train.ids.index("train/b/turned.jpg")
    assert image(packed.train, turned).size == (32, 48)
    assert packed.manifest()["packed"] == {"side": 32, "split_sha256": whole.manifest()["sha256"]}
    assert packed.manifest()["sha256"] != whole.manifest()["sha256"]  # other pixels, other numbers
    head = json.loads((tmp_path / "pack" / HEAD).read_text())
    assert head["task"]["counts"] == whole.counts.tolist() and len(head["shards"]) == 5 + 2 + 1
    assert sorted(path.name for path in (tmp_path / "pack").iterdir()) == sorted(
        [HEAD, INDEX, "classnames.txt", *(shard["name"] for shard in head["shards"])]
    )


@pytest.mark.usefixtures("small_shards")
def test_others_read_its_shards_too(photos, tmp_path, capsys):
    """`datasets`, and this package's own reader of shards, without the files beside them."""
    import datasets

    assert command(capsys, "pack", photos, "--out", tmp_path / "pack", "--side", 32)[0] == 0
    whole = load_task("folder", root=str(photos))
    files = {role: sorted(map(str, (tmp_path / "pack").glob(f"{role}-*.tar"))) for role in ("train", "test")}
    read = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert sorted(read["train"]["cls"]) == sorted(whole.train.labels.tolist())
    for name in (HEAD, INDEX):
        (tmp_path / "pack" / name).unlink()
    plain = load_task("folder", root=str(tmp_path / "pack"))
    assert plain.classes == whole.classes and plain.counts.tolist() == whole.counts.tolist()
    assert len(plain.test) == len(whole.test) and len(plain.unlabeled) == 4


def test_images_that_are_small_enough_keep_their_bytes(tmp_path):
    picture(1, 20, 30).save(tmp_path / "a.png")
    picture(1, 20, 30).save(tmp_path / "b.gif")
    kept = shrunk(File("a", str(tmp_path / "a.png")), 20)
    assert kept == ((tmp_path / "a.png").read_bytes(), "png")
    content, ending = shrunk(File("b", str(tmp_path / "b.gif")), 20)
    assert ending == "jpg" and decoded(File("b", content)).size == (30, 20)
    assert decoded(File("a", shrunk(File("a", str(tmp_path / "a.png")), 16)[0])).size == (24, 16)


def test_published_sets_and_own_lists_are_packed_under_their_names(tmp_path, monkeypatch, capsys):
    root = tmp_path / "imagenet"
    monkeypatch.setitem(lists.PUBLISHED, "imagenet-lt", miniature("imagenet-lt", root))
    config = ROOT / "configs/imagenet_lt/adaptformer_la_in21k.yaml"
    code, _, err = command(capsys, "pack", config, f"data.root={root}", "--out", tmp_path / "pack", "--side", 16)
    assert code == 0, err
    whole = load_task("imagenet-lt", root=str(root))
    assert same_split(whole, load_task("imagenet-lt", root=str(tmp_path / "pack")))
    assert same_split(whole, load_task("folder", root=str(tmp_path / "pack")))
    assert load_task("imagenet-lt", root=str(tmp_path / "pack"), group_rule="le20").group_rule == "le20"
    with pytest.raises(lpt.LptError, match="is a pack of imagenet-lt and not of places-lt"):
        load_task("places-lt", root=str(tmp_path / "pack"))
    own = {"train": f"{root}/ImageNet_LT_train.txt", "test": f"{root}/ImageNet_LT_test.txt", "val_per_class": 1}
    task = load_task("lists", root=str(root), **own)
    pack(task, tmp_path / "own", side=16, settings={"seed": 0, "val_per_class": 1})
    assert same_split(task, load_task("lists", root=str(tmp_path / "own"), **own))
    with pytest.raises(lpt.LptError, match=r"split with data\.val_per_class=1, and data\.val_per_class is 2"):
        load_task("lists", root=str(tmp_path / "own"), **{**own, "val_per_class": 2})
    assert same_split(task, load_task("folder", root=str(tmp_path / "own")))


def test_a_split_by_seed_stays_what_it_was(tmp_path, capsys):
    root = fill(tmp_path / "photos", {"a": 10, "b": 5}, kind="jpg")
    words = ["data.seed=3", "data.val_per_class=1"]
    assert command(capsys, "pack", root, *words, "--out", tmp_path / "pack", "--side", 24)[0] == 0
    given = {"seed": 3, "val_per_class": 1}
    whole, packed = (load_task("folder", root=str(place), **given) for place in (root, tmp_path / "pack"))
    assert same_split(whole, packed) and whole.train.ids != load_task("folder", root=str(root)).train.ids
    with pytest.raises(lpt.LptError, match=r"was split with data\.seed=3, and data\.seed is 0: set it to that"):
        load_task("folder", root=str(tmp_path / "pack"), val_per_class=1)
    code, said, _ = command(capsys, "doctor", tmp_path / "pack", *words)
    assert code == 0 and f"{len(whole.train)} training" in said


def test_a_run_trains_from_a_pack(photos, tmp_path, capsys):
    assert command(capsys, "pack", photos, "--out", tmp_path / "pack", "--side", 32)[0] == 0
    config = tmp_path / "c.yaml"
    config.write_text("backbone: {name: nano}\ndata: {name: folder}\nmethod: {name: linear_probe, epochs: 1}\n")
    reports = []
    for name, place in (("whole", photos), ("packed", tmp_path / "pack")):
        code, _, err = command(capsys, "train", config, f"data.root={place}", "--out", tmp_path / name)
        assert code == 0, err
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert reports[0]["group_sizes"] == reports[1]["group_sizes"]
    assert abs(reports[0]["nll"] - reports[1]["nll"]) < 0.2


KILLED = """
import sys, time
from lpt.data import packing
packing.IN_A_SHARD = 4
slow = packing.shrunk
def shrunk(file, side):
    time.sleep(0.03)
    return slow(file, side)
packing.shrunk = shrunk
from lpt.cli import main
main()
"""


@pytest.mark.parametrize("shards", [0, 5])
def test_after_a_kill_the_same_command_goes_on_to_the_same_bytes(photos, tmp_path, shards, monkeypatch):
    words = [sys.executable, "-c", KILLED, "pack", photos, "--side", "32", "--out"]
    monkeypatch.setattr(packing, "IN_A_SHARD", 4)
    given = check_data({"name": "folder", "root": str(photos)})
    settings = {key: value for key, value in given.items() if key not in (*LOCATION_SETTINGS, "name")}
    pack(load_task("folder", root=str(photos)), tmp_path / "whole", side=32, settings=settings)
    process = subprocess.Popen([*words, tmp_path / "killed"], stdout=subprocess.DEVNULL, cwd=ROOT)
    out = tmp_path / "killed"
    while process.poll() is None and (not out.exists() or len(list(out.glob(".packing/*.tar.json"))) < shards):
        time.sleep(0.01)
    time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    if (out / ".packing/plan.json").exists():
        with pytest.raises(lpt.LptError, match="is a pack that is not finished: the same lpt pack continues with it"):
            load_task("folder", root=str(out))
    done = subprocess.run([*words, out], check=True, capture_output=True, text=True, cwd=ROOT)
    assert "read back" in done.stdout
    recorded = {name: path.stat().st_mtime_ns for name in before if (path := out / name).exists()}
    assert sum(before[name] == recorded[name] for name in before) >= shards
    wholes = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == wholes


def changed(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


@pytest.mark.usefixtures("small_shards")
def test_what_was_damaged_is_seen_and_made_anew(photos, tmp_path, capsys):
    out = tmp_path / "pack"
    words = ("pack", photos, "--side", "32", "--out", out)
    assert command(capsys, *words)[0] == 0
    shard = out / "train-00001.tar"
    intact = shard.read_bytes()
    changed(shard, lambda content: content.__setitem__(700, content[700] ^ 1))
    code, _, err = command(capsys, *words)
    assert code == 2 and "train-00001.tar does not hold what was written: remove it" in err and err.count("\n") == 1
    shard.unlink()
    with pytest.raises(lpt.LptError, match=r"shard train-00001\.tar is missing: copy it again"):
        load_task("folder", root=str(out))
    assert command(capsys, *words)[0] == 0 and shard.read_bytes() == intact
    shard.write_bytes(intact[:-100])
    with pytest.raises(lpt.LptError, match=r"has [\d,]+ bytes and not [\d,]+: copy it again"):
        load_task("folder", root=str(out))
    assert command(capsys, *words)[0] == 0 and shard.read_bytes() == intact
    changed(out / INDEX, lambda content: content.clear())
    with pytest.raises(lpt.LptError, match=r"pack\.index cannot be read"):
        load_task("folder", root=str(out))
    for text in ("", "{}", "[1]", '{"format": 1}', '{"format": 9}'):
        (out / HEAD).write_text(text)
        with pytest.raises(lpt.LptError, match=r"is damaged: pack the images again|format 9, this lpt reads 1"):
            load_task("folder", root=str(out))


def test_what_cannot_be_packed_is_refused_in_a_sentence(photos, tmp_path, capsys):
    code, _, err = command(capsys, "pack", ROOT / "configs/digits_lt/lpt.yaml", "--out", tmp_path / "a")
    assert code == 2 and "train images in memory: only image files are packed" in err and not (tmp_path / "a").exists()
    with pytest.raises(lpt.LptError, match="in memory"):
        pack(toy_task(), tmp_path / "a", side=16, settings={})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    code, _, err = command(capsys, "pack", photos, "--out", tmp_path / "full")
    assert code == 2 and "is not empty and no pack: give a new folder" in err
    assert command(capsys, "pack", photos, "--out", tmp_path / "pack", "--side", 32)[0] == 0
    for words in (["--side", 16], ["--side", 32, "data.val_per_class=1"]):
        code, _, err = command(capsys, "pack", photos, "--out", tmp_path / "pack", *words)
        assert code == 2 and "has a pack of other images, or one that was made otherwise: give a new folder" in err
    shutil.copytree(photos, tmp_path / "broken")
    (tmp_path / "broken/train/b/1.jpg").write_bytes(b"\xff\xd8\xff nothing")
    code, _, err = command(capsys, "pack", tmp_path / "broken", "--out", tmp_path / "b")
    assert code == 2 and "image train/b/1.jpg cannot be decoded" in err and err.count("\n") == 1
    code, _, err = command(capsys, "pack", tmp_path / "broken", "--out", tmp_path / "c", "data.on_error=skip")
    assert code == 0 and len(load_task("folder", root=str(tmp_path / "c")).train) == 18
    with pytest.raises(lpt.LptError, match="is a pack without unlabeled images"):
        own = fill(tmp_path / "own", {"a": 4, "b": 4})
        assert command(capsys, "pack", own, "--out", tmp_path / "d")[0] == 0
        load_task("folder", root=str(tmp_path / "d"), unlabeled=str(photos))


def test_two_cannot_pack_into_one_folder(photos, tmp_path):
    task = load_task("folder", root=str(photos))
    from filelock import FileLock

    (tmp_path / "pack/.packing").mkdir(parents=True)
    with FileLock(tmp_path / "pack/.packing/lock"), pytest.raises(lpt.LptError, match="another process is packing"):
        pack(task, tmp_path / "pack", side=32, settings={})
    assert pack(task, tmp_path / "pack", side=32, settings={})["images"]["train"] == 19
    with tarfile.open(tmp_path / "pack/train-00000.tar") as archive:
        assert len(archive.getnames()) == 2 * 19
    assert isinstance(load_task("folder", root=str(tmp_path / "pack")).train, Files)
