"""Datasets that somebody has in Python become tasks: labels where they are, images when they are needed, by workers."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import lpt
from lpt.data.preprocess import File, decoded
from lpt.engine.evaluate import predict
from tests.support.pictures import fill, picture, png
from tests.support.toy import small_backbone, toy_task

TOY = toy_task((20, 8, 4, 2))


class Counting(Dataset):
    """PIL images and labels, as torchvision has them; how often items were asked for, in this process."""

    def __init__(self, images=TOY.train, *, targets=True):
        self.images, self.asked = images, 0
        if targets:
            self.targets = images.labels.tolist()
        self.classes = list(TOY.classes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.asked += 1
        return Image.fromarray(self.images.pixels[i].permute(1, 2, 0).numpy()), int(self.images.labels[i])


def refused(says, dataset, **settings):
    with pytest.raises(lpt.LptError, match=says) as error:
        lpt.task_from(dataset, **settings)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_labels_are_found_without_decoding_and_each_class_is_split():
    dataset = Counting()
    task = lpt.task_from(dataset)
    assert dataset.asked == 1  # the first, to see that it is an image
    assert task.classes == TOY.classes and task.counts.tolist() == [16, 6, 3, 1]
    assert torch.bincount(task.test.labels).tolist() == [4, 2, 1, 1]
    assert not set(task.train.ids) & set(task.test.ids)
    assert lpt.task_from(dataset).train.ids == task.train.ids != lpt.task_from(dataset, seed=1).train.ids


def test_without_targets_items_are_asked_for_their_labels():
    dataset = Counting(targets=False)
    assert lpt.task_from(dataset).counts.tolist() == [16, 6, 3, 1] and dataset.asked == len(dataset) + 1


def test_pixels_and_labels_arrive_together():
    task = lpt.task_from(Counting(), val_per_class=1)
    assert task.val is not None and torch.bincount(task.val.labels, minlength=4).tolist() == [1, 1, 1, 0]
    for part in (task.train, task.val, task.test):
        for file, label in zip(part.take(torch.arange(len(part))), part.labels.tolist(), strict=True):
            row = int(file.name)
            assert TOY.train.labels[row] == label
            assert np.array_equal(np.asarray(decoded(file)), TOY.train.pixels[row].permute(1, 2, 0).numpy())


def test_the_hash_is_of_names_labels_and_pixels():
    def sha256(**settings):
        return lpt.task_from(**{"dataset": Counting(), **settings}).manifest()["sha256"]

    first = sha256()
    assert first == sha256() == sha256(dataset=Subset(Counting(), range(len(TOY.train))))
    changed = TOY.train.pixels.clone()
    changed[3, 0, 0, 0] += 1
    others = [
        sha256(dataset=Counting(lpt.Images(changed, TOY.train.labels, TOY.train.ids))),
        sha256(seed=1),
        sha256(classes=["a", "b", "c", "d"]),
        sha256(labels=TOY.train.labels.flip(0)),
    ]
    assert len({first, *others}) == 5


def test_it_is_tuned_on_and_workers_read_what_was_made_after_them():
    backbone = small_backbone()
    model = lpt.tune(lpt.task_from(Counting()), backbone, method="class_mean")
    asked = Counting(TOY.test)
    task = lpt.task_from(Counting(), test=asked)
    here, there = (predict(model, task.test, workers=workers).logits for workers in (0, 2))
    assert torch.equal(here, there) and len(here) == len(TOY.test)
    again = Counting(TOY.test)
    other = lpt.task_from(again, test=again)  # the same workers would not know of it
    before = again.asked
    assert torch.equal(predict(model, other.test, workers=2).logits, here) and again.asked == before
    assert lpt.evaluate(model, other, workers=0)["accuracy"] > 0.5 and again.asked > before


@pytest.mark.parametrize("form", ["array", "gray", "tensor", "floats", "bytes", "path", "dict"])
def test_an_image_in_any_form_is_the_same_image(form, tmp_path):
    pixels = TOY.train.pixels[:4]
    gray = pixels[:, 0]
    forms = {
        "array": [image.permute(1, 2, 0).numpy() for image in pixels],
        "gray": [image.numpy() for image in gray],
        "tensor": TensorDataset(pixels, torch.tensor([0, 1, 0, 1])),
        "floats": TensorDataset(pixels / 255, torch.tensor([0, 1, 0, 1])),
        "bytes": [png(image) for image in pixels],
        "path": [tmp_path / f"{i}.png" for i in range(4)],
        "dict": [{"image": png(image), "label": i % 2} for i, image in enumerate(pixels)],
    }
    for i, image in enumerate(pixels):
        (tmp_path / f"{i}.png").write_bytes(png(image))
    task = lpt.task_from(forms[form], labels=None if form in ("tensor", "floats", "dict") else [0, 1, 0, 1])
    for part in (task.train, task.test):
        for file in part.take(torch.arange(len(part))):
            want = gray[int(file.name)].expand(3, -1, -1) if form == "gray" else pixels[int(file.name)]
            assert np.array_equal(np.asarray(decoded(file)).transpose(2, 0, 1), want.numpy())


def test_a_dataset_of_the_hub_is_read_encoded_whatever_its_transform(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "species": datasets.ClassLabel(names=["owl", "crane"]),
            "note": datasets.Value("string"),
        }
    )
    rows = {"img": [picture(i) for i in range(6)], "species": [0, 0, 0, 1, 1, 1], "note": list("abcdef")}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.set_transform(lambda batch: 1 / 0)
    task = lpt.task_from(dataset)
    assert task.classes == ("owl", "crane") and task.counts.tolist() == [2, 2]
    (file,) = task.test.take(torch.tensor([1]))
    assert isinstance(file.content, bytes) and decoded(file).size == (60, 40)
    assert lpt.task_from(dataset, labels="note", test=dataset).classes == tuple("abcdef")
    refused("no column of labels that is known among img, note", dataset.remove_columns("species"))
    refused("no column specie among img", dataset, labels="specie")
    refused(r"has parts \(train\)", datasets.DatasetDict(train=dataset))


def test_class_folders_of_torchvision_are_files(tmp_path):
    from torchvision.datasets import ImageFolder

    fill(tmp_path, {"crane": 5, "owl": 3})
    task = lpt.task_from(ImageFolder(str(tmp_path)))
    (file,) = task.train.take(torch.tensor([0]))
    assert task.classes == ("crane", "owl") and file.content == str(tmp_path / "crane" / "0.png")
    changed = lpt.task_from(ImageFolder(str(tmp_path), target_transform=lambda k: 1 - k), classes=["owl", "crane"])
    assert changed.counts.tolist() == [2, 4]


class Endless(IterableDataset):
    def __iter__(self):
        yield from Counting()


def test_what_is_no_dataset_of_labeled_images_is_one_sentence():
    images = [np.zeros((4, 4, 3), np.uint8)] * 4
    refused("2 labels for the 4 images of dataset: give one each", images, labels=[0, 1])
    refused("label 7 of image 3 of dataset is none of 0 to 1", images, labels=[0, 1, 0, 7], classes=["a", "b"])
    refused("label -1 is below 0", images, labels=[0, 1, 0, -1])
    refused("label 'c' of image 3 of dataset is none of 2 classes", images, labels=list("abac"), classes=["a", "b"])
    refused("some labels are numbers and some are names", images, labels=[0, 1, 0, "a"])
    refused("label 0.5 of image 0 of dataset is neither", images, labels=[0.5, 1, 0, 1])
    refused("item 0 has no label that is known", images)
    refused("image 0 of dataset: it is a float", [0.5] * 4, labels=[0, 1, 0, 1])
    refused("floats that are not from 0 to 1", [torch.randn(3, 4, 4)] * 4, labels=[0, 1, 0, 1])
    refused(r"shape \[4, 4, 4\]", [torch.zeros(4, 4, 4)] * 4, labels=[0, 1, 0, 1])
    refused("no length", Endless())
    refused("dataset has no image", [], labels=[])
    refused("test_share=0 of 4 images leaves none", images, labels=[0, 1, 0, 1], test_share=0)
    refused("give a tuple of names", images, labels=[0, 1, 0, 1], classes="ab")
    refused("1 class", images, labels=[0] * 4)
    refused(r"task_from\.test_share: got 2", images, labels=[0, 1, 0, 1], test_share=2)


def test_an_item_that_turns_out_to_be_no_image_is_named_when_it_is_needed():
    items = [(np.zeros((4, 4, 3), np.uint8), i % 2) for i in range(8)]
    items[5] = ("nowhere.png", 1)
    task = lpt.task_from(items)
    model = lpt.model(lpt.task_from(items[:4]), small_backbone(), method="class_mean")
    with pytest.raises(lpt.LptError, match=r"image 0000005 cannot be decoded \(there is no such file as nowhere.png\)"):
        predict(model, task.train if "0000005" in task.train.ids else task.test)


def test_pillow_images_stay_what_they_are():
    image = picture(0).convert("P")
    assert decoded(File("x", image)).mode == "RGB" and image.mode == "P"
