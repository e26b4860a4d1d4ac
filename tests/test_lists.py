"""List files: names with spaces, published splits by their numbers, and what is wrong with a list in one sentence."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lpt.data import load_task
from lpt.data.lists import PUBLISHED, read_list, read_unlabeled
from lpt.data.preprocess import Preprocess
from lpt.errors import DataError


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for part, counts in (("train", (6, 3, 1)), ("val", (2, 2, 2))):
        lines = []
        for k, n in enumerate(counts):
            folder = root / part / ("red panda", "n015", "café")[k]
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(folder / f"an image {i}.png")
                lines.append(f"{folder.relative_to(root)}/an image {i}.png {k}\n")
        (root / f"{part}.txt").write_text("".join(lines))
    return root


def task(tree, **more):
    settings = {"root": str(tree), "train": str(tree / "train.txt"), "test": str(tree / "val.txt"), **more}
    return load_task("lists", **settings)


def test_paths_with_spaces_and_classes_by_their_folders(tree):
    found = task(tree)
    assert found.classes == ("red panda", "n015", "café") and found.counts.tolist() == [6, 3, 1]
    assert found.train.ids[0] == "train/red panda/an image 0.png" and len(found.test) == 6
    (file,) = found.train.take(torch.tensor([9]))
    assert file.content == str(tree / "train/café/an image 0.png")
    assert (
        found.manifest()["sha256"]
        == task(tree).manifest()["sha256"]
        != task(tree, val_per_class=1).manifest()["sha256"]
    )


def test_the_same_list_elsewhere_is_the_same_split_but_no_cache_is_trusted(tree, tmp_path):
    (tmp_path / "copy").symlink_to(tree)
    shutil.copytree(tree, tmp_path / "resized")
    one, link, copy = task(tree), task(tmp_path / "copy"), task(tmp_path / "resized")
    assert one.manifest()["sha256"] == link.manifest()["sha256"] == copy.manifest()["sha256"]
    assert one.train.digest == link.train.digest != copy.train.digest


def test_classes_from_a_file_or_by_number(tree, tmp_path):
    (tmp_path / "names").write_text("a\nb\nc d\n")
    assert task(tree, classes=str(tmp_path / "names")).classes == ("a", "b", "c d")
    (tmp_path / "names").write_text("a\nb\n")
    with pytest.raises(DataError, match="2 different names for 3 classes"):
        task(tree, classes=str(tmp_path / "names"))
    mixed = (tree / "train.txt").read_text().replace("n015/an image 2.png 1", "n015/an image 2.png 0")
    (tmp_path / "mixed.txt").write_text(mixed)
    assert task(tree, train=str(tmp_path / "mixed.txt")).classes == ("0", "1", "2")


def test_a_class_only_in_the_test_list_keeps_a_count_of_zero(tree, tmp_path):
    (tmp_path / "few.txt").write_text("".join((tree / "train.txt").read_text().splitlines(keepends=True)[:9]))
    found = task(tree, train=str(tmp_path / "few.txt"))
    assert found.counts.tolist() == [6, 3, 0] and found.absent_classes() == ["2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.png 0\nb.png one\n", r"line 2: 'b.png one' is not"),
        ("a.png\n", r"line 1: 'a.png' is not"),
        ("a.png -1\n", "line 1"),
        ("a.png 99999999999999999999\n", "line 1"),
        ("\n\n", "is empty"),
        ("train/red panda/an image 0.png 4000\n", "label 4000 with 1 training images"),
        ("nowhere.png 0\n", "has no nowhere.png, which the train list names"),
    ],
)
def test_a_list_that_is_none(tree, tmp_path, text, said):
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        task(tree, train=str(tmp_path / "x.txt"))


def test_roots_and_lists_that_are_not_there(tree, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        task(tree, train=str(tmp_path / "absent.txt"))
    for root, said in ((None, r"data\.root is missing"), (str(tmp_path / "no"), "is not a folder")):
        with pytest.raises(DataError, match=said):
            load_task("imagenet-lt", root=root)


def test_a_published_name_holds_what_was_published(tree, tmp_path):
    for word in ("train", "val", "test"):
        (tmp_path / f"ImageNet_LT_{word}.txt").write_text((tree / "train.txt").read_text())
    with pytest.raises(DataError, match=r"are not imagenet-lt: 3 classes .* published are 1000 classes") as error:
        load_task("imagenet-lt", root=str(tree), lists=str(tmp_path))
    assert "data.name=lists" in str(error.value)


def test_a_made_tree_with_the_published_counts_is_accepted(tmp_path, monkeypatch):
    """Places-LT by its counts alone: 62,500 lines over 365 classes, checked by total, extremes and fingerprint."""
    from lpt.data import lists as module
    from lpt.data.longtail import count_fingerprint

    counts = [4980, *np.linspace(310, 6, 363).astype(int).tolist(), 5]
    counts[1] += 62_500 - sum(counts)
    assert counts[0] > counts[1] > 5
    known = PUBLISHED["places-lt"]._replace(largest=max(counts), fingerprint=count_fingerprint(counts))
    monkeypatch.setitem(module.PUBLISHED, "places-lt", known)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0.jpg").write_bytes(b"")
    for word, n in (("train", None), ("val", 20), ("test", 100)):
        lines = [f"x/0.jpg {k}\n" * (c if n is None else n) for k, c in enumerate(counts)]
        (tmp_path / f"Places_LT_{word}.txt").write_text("".join(lines))
    found = load_task("places-lt", root=str(tmp_path), group_rule="le20")
    assert len(found.train) == 62_500 and len(found.val) == 7_300 and len(found.test) == 36_500
    assert found.group_rule == "le20" and found.facts["variant"] == "published"


def test_reading_splits_at_the_last_space(tmp_path):
    (tmp_path / "x.txt").write_text("a b/c  d.jpg 7\n\ne.jpg 0  \n")
    paths, labels = read_list(tmp_path / "x.txt")
    assert paths == ["a b/c  d.jpg", "e.jpg"] and labels.tolist() == [7, 0]


def test_unlabeled_lines_need_no_label(tree, tmp_path):
    lines = ["train/red panda/an image 1.png", "val/café/an image 0.png 2", "train/n015/an image 0.png -1", "", "x 1 y"]
    (tmp_path / "more.txt").write_text("\n".join(lines))
    paths, labels = read_unlabeled(tmp_path / "more.txt", 3)
    assert paths == [lines[0], "val/café/an image 0.png", "train/n015/an image 0.png", "x 1 y"]
    assert labels.tolist() == [-1, 2, -1, -1]


def test_an_unlabeled_list_is_a_part_of_the_task(tree, tmp_path):
    (tmp_path / "more.txt").write_text("train/red panda/an image 1.png\ntrain/./n015/an image 0.png 1\n")
    found = task(tree, unlabeled=str(tmp_path / "more.txt"))
    assert found.unlabeled.labels.tolist() == [-1, 1] and found.counts.tolist() == [6, 3, 1]
    assert Preprocess(size=8).cut(found.unlabeled.take(torch.arange(2))).shape == (2, 3, 8, 8)
    assert "2 unlabeled" in found.summary_lines()[0] and "leaked" not in found.facts
    assert found.manifest()["parts"]["unlabeled"]["images"] == 2
    assert found.manifest()["sha256"] != task(tree).manifest()["sha256"]
    (tmp_path / "more.txt").write_text("train/red panda/an image 1.png\nval/./n015/an image 0.png\n")
    warned = task(tree, unlabeled=str(tmp_path / "more.txt")).summary_lines()
    assert "warning: 1 unlabeled images are test images too, for example val/./n015/an image 0.png" in warned


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" \n\n", "more.txt is empty"),
        ("train/red panda/an image 1.png 1\nx.png 3\n", "line 2: label 3, and classes are 0 to 2: leave out the label"),
        ("nowhere.png\n", "has no nowhere.png, which the unlabeled list names"),
        (None, "more.txt cannot be read"),
    ],
)
def test_an_unlabeled_list_that_is_none(tree, tmp_path, text, said):
    if text is not None:
        (tmp_path / "more.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        task(tree, unlabeled=str(tmp_path / "more.txt"))


def test_an_unlabeled_image_that_cannot_be_decoded_is_named(tree, tmp_path):
    (tree / "broken one.png").write_bytes(b"no image")
    (tmp_path / "more.txt").write_text("broken one.png\n")
    found = task(tree, unlabeled=str(tmp_path / "more.txt"))
    with pytest.raises(DataError, match=r"image broken one\.png cannot be decoded"):
        Preprocess(size=8).cut(found.unlabeled.take(torch.arange(1)))


def test_paths_that_no_file_can_have_are_refused(tmp_path):
    for path in ("a" * 5000, "a\0b", "\x1b[2J"):
        (tmp_path / "l.txt").write_text(f"{path} 0\n{path} 1")
        with pytest.raises(DataError, match="which the train list names") as error:
            load_task("lists", root=str(tmp_path), train=str(tmp_path / "l.txt"), test=str(tmp_path / "l.txt"))
        assert len(str(error.value)) < 500 and str(error.value).isprintable()
