"""Datasets by name; each entry is a function whose keyword arguments are the settings of `data:`."""

from collections.abc import Callable
from typing import Any

from lpt.data.cifar import cifar10_lt, cifar100_lt
from lpt.data.digits import digits_lt
from lpt.data.folder import folder
from lpt.data.lists import imagenet_lt, inat2018, own_lists, places_lt
from lpt.data.semi import cifar10_semi, cifar100_semi
from lpt.data.task import Files, Images, Task
from lpt.errors import DataError, did_you_mean

DATA: dict[str, Callable[..., Task]] = {
    "cifar100-lt": cifar100_lt,
    "cifar10-lt": cifar10_lt,
    "cifar100-semi": cifar100_semi,
    "cifar10-semi": cifar10_semi,
    "digits-lt": digits_lt,
    "imagenet-lt": imagenet_lt,
    "places-lt": places_lt,
    "inat2018": inat2018,
    "lists": own_lists,
    "folder": folder,
}
LOCATION_SETTINGS = ("root", "download", "train", "val", "test", "unlabeled", "classes", "lists", "table")
"""Settings that say where images and lists lie. They are no part of a run's identity, and stand in no prompt file: it
must not point anywhere on the disk of whoever opens it."""


def load_task(name: str, **settings: Any) -> Task:
    """The task `name`, for example `load_task("cifar100-lt", root="data/cifar100")`. Raises DataError."""
    if name not in DATA:
        raise DataError(f"data.name {name!r} is not known ({', '.join(DATA)}){did_you_mean(name, DATA)}")
    return DATA[name](**settings)


__all__ = ["DATA", "LOCATION_SETTINGS", "Files", "Images", "Task", "load_task"]
