"""CIFAR-LT from parquet and from torchvision's files, and the digits."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lpt.data import load_task
from lpt.data.cifar import cifar100_lt
from lpt.data.longtail import count_fingerprint, shot_groups
from lpt.errors import DataError
from tests.support.cifar import parquet_folder, png_of


def test_cifar100_lt_has_the_published_counts(cifar100_root):
    task = load_task("cifar100-lt", root=str(cifar100_root))
    assert (len(task.train), len(task.test)) == (10_847, 10_000)
    assert (task.counts.max(), task.counts.min()) == (500, 5)
    assert count_fingerprint(task.counts.tolist()) == "a86899e02756da51"
    assert [len(g) for g in shot_groups(task.counts, task.group_rule).values()] == [35, 35, 30]
    assert task.classes[:2] == ("apple", "aquarium_fish")
    assert torch.bincount(task.test.labels).unique().tolist() == [100]
    assert task.facts["variant"] == "cao-reordered"  # the parquet rows are not in the official order
    assert task.manifest()["sha256"].startswith("f7a5e18837fde491")

    held = load_task("cifar100-lt", root=str(cifar100_root), val_per_class=20)
    assert held.val is not None and torch.bincount(held.val.labels).tolist() == [20] * 100
    assert not set(held.val.ids) & set(held.train.ids)
    assert len(held.train) == 10_847 - 20  # class 0 gives 20 of its 500; class 1 has 23 spare images


def test_cifar10_lt_reads_the_hub_layout_and_its_class_names(tmp_path):
    names = [f"thing {k}" for k in range(10)]
    task = load_task("cifar10-lt", root=str(parquet_folder(tmp_path, names=names)), imbalance_factor=100)
    assert len(task.train) == 12_406 and task.counts.tolist()[-1] == 50
    assert task.classes == tuple(names) and task.group_rule == "thirds"
    assert task.train.pixels[task.train.labels == 3].unique().tolist() == [3]


def test_the_tail_is_drawn_by_the_seed_and_by_nothing_else(tmp_path):
    root = str(parquet_folder(tmp_path))
    one, again, other = (load_task("cifar10-lt", root=root, imbalance_factor=100, seed=s) for s in (0, 0, 42))
    assert one.train.ids == again.train.ids != other.train.ids
    rng = np.random.RandomState(0)  # LDAM-DRW's draw: one legacy generator, classes in ascending label
    first = np.arange(5000)
    rng.shuffle(first)
    second = np.arange(5000, 10_000)
    rng.shuffle(second)
    ids = [int(i.split("/")[1]) for i in one.train.ids]
    assert [i for i in ids if 5000 <= i < 10_000] == sorted(second[: one.counts[1]].tolist())
    assert other.facts["variant"] == "lpt42-reordered"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: None, "data.root is missing"),
        (lambda f: f / "nowhere", "neither train.parquet"),
        (lambda f: parquet_folder(f, label="target"), "label column"),
        (lambda f: parquet_folder(f, broken=True), "row 0 cannot be decoded"),
    ],
)
def test_a_bad_root_is_named(tmp_path, make, says):
    root = make(tmp_path)
    with pytest.raises(DataError, match=says):
        load_task("cifar10-lt", root=None if root is None else str(root), imbalance_factor=1)


def test_cells_and_labels_that_are_none_of_cifar_are_named(tmp_path):
    def written(change):
        for part, n in (("train", 5), ("test", 2)):
            cells = [{"bytes": png_of(k), "path": ""} for k in range(10 * n)]
            table = {"img": cells, "label": np.repeat(np.arange(10), n)}
            change(table)
            pq.write_table(pa.table(table), tmp_path / f"{part}.parquet")
        with pytest.raises(DataError) as error:
            load_task("cifar10-lt", root=str(tmp_path), imbalance_factor=1)
        return str(error.value)

    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert "row 0 cannot be decoded" in written(lambda t: t["img"].__setitem__(0, {"bytes": script, "path": ""}))
    assert "row 0: there is no image" in written(lambda t: t["img"].__setitem__(0, None))
    file = io.BytesIO()
    Image.new("RGB", (5, 4)).save(file, "PNG")
    assert "row 3: the image is not of the same size" in written(
        lambda t: t["img"].__setitem__(3, {"bytes": file.getvalue(), "path": ""})
    )
    assert "does not hold labels from 0 to 9" in written(lambda t: t.update(label=t["label"] + 1))


def test_a_truncated_parquet_and_the_wrong_dataset_are_named(tmp_path):
    parquet_folder(tmp_path)
    with pytest.raises(DataError, match="10 classes, cifar100-lt has 100"):
        load_task("cifar100-lt", root=str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read"):
        load_task("cifar10-lt", root=str(tmp_path))


def test_torchvision_files_are_in_the_official_order(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10), 5000))
    for part in range(5):
        rows = labels[part * 10_000 : (part + 1) * 10_000]
        data = np.repeat(rows.astype(np.uint8)[:, None], 3072, axis=1)
        (folder / f"data_batch_{part + 1}").write_bytes(pickle.dumps({"data": data, "labels": rows.tolist()}))
    test = {"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))}
    (folder / "test_batch").write_bytes(pickle.dumps(test))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"n{k}" for k in range(10)]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # made files have other checksums

    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *args, **kwargs: True)
    task = load_task("cifar10-lt", root=str(tmp_path), imbalance_factor=100)
    assert task.facts["variant"] == "cao" and task.classes[3] == "n3"
    assert torch.equal(task.train.pixels[:, 0, 0, 0].long(), task.train.labels)


def test_an_unknown_dataset_gets_a_suggestion():
    with pytest.raises(DataError, match="did you mean cifar100-lt"):
        load_task("cifar100_lt")


def test_digits_are_real_long_tailed_and_balanced_in_the_test_set():
    task = load_task("digits-lt", imbalance_factor=50)
    assert sorted(task.counts.tolist())[0] == 2 and task.counts.max() == 110
    assert torch.bincount(task.test.labels).tolist() == [60] * 10
    assert not set(task.train.ids) & set(task.test.ids)
    assert task.train.pixels.shape[1:] == (3, 8, 8) and task.train.pixels.max() == 255
    held = load_task("digits-lt", imbalance_factor=50, val_per_class=4)
    assert held.val is not None and not {*held.val.ids} & {*held.train.ids, *held.test.ids}


def test_ranks_by_seed_are_other_classes_with_the_same_counts(cifar100_root):
    plain, drawn = (cifar100_lt(str(cifar100_root), class_order=order) for order in ("label", "seed"))
    assert (
        sorted(plain.counts.tolist()) == sorted(drawn.counts.tolist())
        and plain.counts.tolist() != drawn.counts.tolist()
    )
    assert drawn.facts["variant"].endswith("-permuted")
    other = cifar100_lt(str(cifar100_root), class_order="seed", seed=1)
    assert other.counts.tolist() != drawn.counts.tolist()


def test_a_step_and_a_group_rule(cifar100_root):
    task = cifar100_lt(str(cifar100_root), imbalance_factor=10, profile="step", group_rule="le20")
    assert (
        task.counts.tolist() == [500] * 50 + [50] * 50 and task.group_rule == "le20" and task.facts["profile"] == "step"
    )
