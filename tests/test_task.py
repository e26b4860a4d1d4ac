import dataclasses

import numpy as np
import pytest
import torch

from lpt.data.task import Images, Task, hold_out
from lpt.errors import DataError
from tests.support.toy import toy_images, toy_task


def test_counts_come_from_training_labels_and_keep_absent_classes():
    task = toy_task((5, 0, 2))
    assert task.counts.tolist() == [5, 0, 2]
    assert task.absent_classes() == ["class 1"]
    assert task.imbalance_factor == 2.5


def test_a_task_with_one_class_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        toy_task((5,))


def test_the_hash_ignores_the_order_of_rows_and_sees_every_change():
    task = toy_task()
    base = task.manifest()["sha256"]
    shuffled = dataclasses.replace(task, train=task.train.subset(torch.randperm(len(task.train)).tolist()))
    assert shuffled.manifest()["sha256"] == base

    fewer = dataclasses.replace(task, train=task.train.subset(range(len(task.train) - 1)))
    pixels = task.train.pixels.clone()
    pixels[0, 0, 0, 0] ^= 1
    repainted = dataclasses.replace(task, train=Images(pixels, task.train.labels, task.train.ids))
    labels = task.train.labels.clone()
    labels[0] = 1
    relabeled = dataclasses.replace(task, train=Images(task.train.pixels, labels, task.train.ids))
    moved = dataclasses.replace(task, val=task.test)
    hashes = {t.manifest()["sha256"] for t in (task, fewer, repainted, relabeled, moved)}
    assert len(hashes) == 5


def test_the_manifest_lists_what_is_in_the_split():
    manifest = toy_task().manifest()
    assert manifest["counts"] == [30, 12, 5, 2]
    assert manifest["parts"]["train"]["images"] == 49 and len(manifest["parts"]["train"]["ids"]) == 49
    assert "val" not in manifest["parts"]


def test_held_out_images_come_from_what_the_tail_leaves_out_first():
    labels = np.repeat(np.arange(3), 20)
    chosen = np.concatenate([np.arange(0, 20), np.arange(20, 30), np.arange(40, 42)])  # 20, 10 and 2 of 20
    kept, held = hold_out(np.arange(60), chosen, labels, per_class=4, seed=0)
    assert np.bincount(labels[held]).tolist() == [4, 4, 4]
    assert np.bincount(labels[kept]).tolist() == [16, 10, 2]  # only the full class had to give its own
    assert not set(kept) & set(held)


def test_a_class_never_gives_away_its_last_image():
    labels = np.array([0, 0, 0, 1])
    kept, held = hold_out(np.arange(4), np.arange(4), labels, per_class=3, seed=0)
    assert np.bincount(labels[kept], minlength=2).tolist() == [1, 1]
    assert np.bincount(labels[held], minlength=2).tolist() == [2, 0]


def test_subset_keeps_pixels_labels_and_ids_together():
    images = toy_images(torch.tensor([0, 1, 2]))
    part = images.subset([2, 0])
    assert part.labels.tolist() == [2, 0] and part.ids == (images.ids[2], images.ids[0])
    assert torch.equal(part.pixels, images.pixels[[2, 0]])
    assert isinstance(toy_task(), Task)
