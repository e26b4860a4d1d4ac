"""The balanced augmented set: equal counts, views that are functions of their seed, in memory and from files."""

import io

import pytest
import torch
from PIL import Image

from lpt.data.balanced import balanced
from lpt.data.loader import Order, close_workers, made_ahead
from lpt.data.preprocess import Preprocess
from lpt.data.task import Files
from tests.support.toy import toy_task

TASK = toy_task((30, 12, 5, 2))


@pytest.mark.parametrize(("per_class", "size"), [("min", 2), ("median", 5), ("max", 30), (7, 7)])
@pytest.mark.parametrize(("views", "originals"), [(2, False), (1, True)])
def test_every_class_has_exactly_the_same_number(per_class, size, views, originals):
    made = balanced(TASK.train, 4, per_class, views, "trivial", seed=0, originals=originals)
    assert torch.bincount(made.labels, minlength=4).tolist() == [size * (views + originals)] * 4
    by_id = dict(zip(TASK.train.ids, TASK.train.labels.tolist(), strict=True))
    assert [by_id[name.partition("#")[0]] for name in made.ids] == made.labels.tolist()


def test_a_class_without_images_stays_without():
    some = TASK.train.subset(range(42))  # classes 0 and 1 alone
    assert torch.bincount(balanced(some, 4, "min", 2, "weak", seed=0).labels, minlength=4).tolist() == [24, 24, 0, 0]


@pytest.mark.parametrize("augmenter", ["trivial", "rand", "weak"])
def test_a_view_is_a_function_of_seed_image_and_number(augmenter):
    one, again = (balanced(TASK.train, 4, 6, 2, augmenter, seed=3) for _ in range(2))
    other = balanced(TASK.train, 4, 6, 2, augmenter, seed=4)
    assert torch.equal(one.pixels, again.pixels) and one.ids == again.ids
    assert not torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape[1:] == TASK.train.pixels.shape[1:] and one.pixels.dtype == torch.uint8
    rare = [name for name, label in zip(one.ids, one.labels.tolist(), strict=True) if label == 3]
    assert len(set(rare)) == len(rare), "a repeated image has other views"


def test_views_of_files_are_augmented_as_images_in_memory_are_and_decoded_once():
    images, preprocess = TASK.train, Preprocess(size=16)

    def encoded(i):
        buffer = io.BytesIO()
        Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(buffer, format="png")
        return buffer.getvalue()

    files = Files(encoded, images.labels, images.ids, tuple("x" for _ in images.ids))
    inside, outside = (balanced(of, 4, 3, 2, "trivial", seed=1, originals=True) for of in (images, files))
    assert inside.ids == outside.ids and torch.equal(inside.labels, outside.labels)
    order = Order(files=outside.take(torch.arange(len(outside))), preprocess=preprocess)
    for workers in (0, 2):
        with made_ahead([(None, [order])], workers=workers) as made:
            ((_, (one,)),) = made
        assert torch.equal(one.checked(), inside.pixels)  # of test views as large as the image
    few = outside.subset([4, 1])
    assert [file.change for file in few.take(torch.arange(2))] == [outside.changes[4], outside.changes[1]]
    close_workers()


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_same_set(workers):
    one, other = (balanced(TASK.train, 4, "max", 2, "rand", seed=2, workers=number) for number in (0, workers))
    assert torch.equal(one.pixels, other.pixels) and one.ids == other.ids
    close_workers()
