"""Datasets by name; each entry is a function whose keyword arguments are the settings of `data:`."""

from collections.abc import Callable
from typing import Any

from lpt.data.cifar import cifar10_lt, cifar100_lt
from lpt.data.digits import digits_lt
from lpt.data.folder import folder
from lpt.data.lists import imagenet_lt, inat2018, own_lists, places_lt
from lpt.data.semi import cifar10_semi, cifar100_semi
from lpt.data.task import Files, Images, Task
from lpt.errors import ConfigError, DataError, did_you_mean, quoted
from lpt.settings import settings_of, validated

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
    """The task `name`, for example `load_task("cifar100-lt", root="data/cifar100")`.

    Raises DataError for data that is not there or not what its name promises, ConfigError for settings that this
    dataset does not have or take, all at once.

    >>> import lpt
    >>> task = lpt.load_task("digits-lt", imbalance_factor=10)
    >>> len(task.classes), int(task.counts.max()), int(task.counts.min())
    (10, 110, 11)
    """
    if not isinstance(name, str) or name not in DATA:
        hint = did_you_mean(str(name)[:99], DATA)
        raise DataError(f"data.name {quoted(repr(name))} is not known ({', '.join(DATA)}){hint}")
    checked, mistakes = validated("data", settings_of(DATA[name]), settings)
    if mistakes:
        raise ConfigError(mistakes)
    return DATA[name](**checked)


__all__ = ["DATA", "LOCATION_SETTINGS", "Files", "Images", "Task", "load_task"]
