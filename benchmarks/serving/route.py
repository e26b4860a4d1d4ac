"""Whose image is this? Over tasks made of CIFAR-100's superclasses, of digits and of halves of classes.

Means and thresholds are of training images, and what is routed are test images. A stranger is an image of a task that
the router does not know: each task is left out once.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.turns import ROOT
from lpt.data import load_task
from lpt.engine.evaluate import features
from lpt.model.backbones import load_backbone
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import bare_classifier
from lpt.model.task_means import TaskMeans, task_means
from lpt.serve.router import Router

SHARED = ROOT.parent / "shared"
SUPERCLASSES = (
    "beaver dolphin otter seal whale", "aquarium_fish flatfish ray shark trout", "orchid poppy rose sunflower tulip",
    "bottle bowl can cup plate", "apple mushroom orange pear sweet_pepper", "clock keyboard lamp telephone television",
    "bed chair couch table wardrobe", "bee beetle butterfly caterpillar cockroach", "bear leopard lion tiger wolf",
    "bridge castle house road skyscraper", "cloud forest mountain plain sea",
    "camel cattle chimpanzee elephant kangaroo",
    "fox porcupine possum raccoon skunk", "crab lobster snail spider worm", "baby boy girl man woman",
    "crocodile dinosaur lizard snake turtle", "hamster mouse rabbit shrew squirrel",
    "maple_tree oak_tree palm_tree pine_tree willow_tree", "bicycle bus motorcycle pickup_truck train",
    "lawn_mower rocket streetcar tank tractor",
)  # fmt: skip
"""Of CIFAR-100 (Krizhevsky 2009), five classes each."""


class Images:
    """Features of a dataset's images under the bare backbone, and the names of their classes."""

    def __init__(self, backbone: Backbone, task: Any, *, train: int, test: int) -> None:
        model = bare_classifier(backbone, task.classes)
        self.classes = [name.replace(" ", "_") for name in task.classes]
        self.train, self.test = (
            _features(model, part, number) for part, number in ((task.train, train), (task.test, test))
        )

    def task(self, names: list[str]) -> tuple[TaskMeans, Tensor]:
        """(its means, features of its test images)."""
        numbers = [self.classes.index(name) for name in names]
        own = {number: k for k, number in enumerate(numbers)}
        rows = torch.tensor([int(label) in own for label in self.train[1]])
        labels = torch.tensor([own[int(label)] for label in self.train[1][rows]])
        tested = torch.isin(self.test[1], torch.tensor(numbers))
        return task_means(self.train[0][rows], labels, len(names)), self.test[0][tested]


def _features(model: Any, part: Any, number: int) -> tuple[Tensor, Tensor]:
    """(features, labels) of at most `number` images of each class."""
    rows = [row for k in part.labels.unique() for row in (part.labels == k).nonzero().flatten()[:number].tolist()]
    sample = part.subset(rows)
    return features(model, sample, batch_size=64), sample.labels


def route(*, quick: bool) -> list[dict[str, Any]]:
    if not (SHARED / "data/cifar100/train.parquet").exists():
        raise SystemExit(f"{SHARED / 'data/cifar100'} is not at hand: routing is measured on CIFAR-100")
    rows = []
    for name, size in [("nano", 32)] if quick else [("nano", 32), ("timm:deit_tiny_patch16_224", 112)]:
        weights = None if name == "nano" else SHARED / "weights/deit_tiny_patch16_224.fp16.safetensors"
        backbone = load_backbone(name, weights=weights, image_size=size)
        rows += _rows(backbone, train=10 if quick else 50, test=4 if quick else 20)
    return rows


def _rows(backbone: Backbone, *, train: int, test: int) -> list[dict[str, Any]]:
    cifar = load_task("cifar100-lt", root=str(SHARED / "data/cifar100"), imbalance_factor=1)
    digits = load_task("digits-lt", imbalance_factor=1)
    photos = Images(backbone, cifar, train=train, test=test)
    numbers = Images(backbone, digits, train=train, test=test)
    halves = [numbers.classes[:5], numbers.classes[5:]]
    tasks = {f"superclass {k}": photos.task(names.split()) for k, names in enumerate(SUPERCLASSES)}
    tasks |= {f"digits {k}": numbers.task(names) for k, names in enumerate(halves)}
    of_all = {"cifar-100": photos.task(photos.classes), "digits": numbers.task(numbers.classes)}
    superclasses = {name: names.split() for name, names in zip(tasks, SUPERCLASSES, strict=False)}
    thirds = {f"{name} {part}": names for name, names in superclasses.items() for part in (0, 1)}
    halved = {name: photos.task(names[:3] if name.endswith("0") else names[3:]) for name, names in thirds.items()}
    rows = []
    for what, chosen in (("22 tasks", tasks), ("40 halves of superclasses", halved), ("2 datasets", of_all)):
        rows += _measured(f"{what}, {backbone.name} at {backbone.preprocess.size} px", chosen)
    return rows


def _measured(what: str, tasks: dict[str, tuple[TaskMeans, Tensor]]) -> list[dict[str, Any]]:
    right, accepted, wrongly = [], [], []
    router = Router({name: means for name, (means, _) in tasks.items()})
    for name, (_, images) in tasks.items():
        for found in router.routes(images):
            right.append(found.nearest == name)
            accepted.append(found.task is not None)
        others = {other: means for other, (means, _) in tasks.items() if other != name}
        wrongly += [found.task is not None for found in Router(others).routes(images)]
    facts = {"accepted": round(float(np.mean(accepted)), 4), "images": len(right)}
    return [
        {"check": "route", "value": round(float(np.mean(right)), 4), "unit": f"top-1 of {what}", **facts},
        {
            "check": "route-strangers",
            "value": round(float(np.mean(wrongly)), 4),
            "unit": f"strangers accepted at thresholds of 95 % of one's own, {what}",
            **facts,
        },
    ]
