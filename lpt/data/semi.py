"""Semi-supervised long tails: a small labeled and a large unlabeled set of CIFAR, in the splits of the literature.

(N1, M1) are the largest labeled and unlabeled class, γ_l and γ_u their imbalance factors (protocols, section 6).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lpt.data.cifar import open_cifar
from lpt.data.task import Task
from lpt.errors import DataError
from lpt.settings import Count, Factor, Positive, Seed

Shape = Literal["consistent", "uniform", "reversed", "middle", "head-tail"]
Preset = Literal["acr", "simpro", "daso", "usb"]
"""Whose rules: acr and simpro take images in file order, daso and usb shuffle them by seed. Only acr has the labeled
images among the unlabeled, only daso holds out a tenth of every class, and in usb's `uniform` M1 is the total."""


def semi_counts(num_classes: int, largest: int, factor: float) -> list[int]:
    """N_k = int(N1 γ^(-k/(C-1))), the last class int(N1/γ): the two families of formulas in use agree on every split
    that is published.

    >>> sum(semi_counts(10, 500, 100)), sum(semi_counts(100, 50, 20))
    (1236, 1545)
    """
    ratio = factor ** (-1 / (num_classes - 1))
    counts = [int(largest * ratio**k) for k in range(num_classes)]
    counts[-1] = int(largest / factor)
    return counts


def shaped(counts: list[int], shape: Shape, *, total: bool = False) -> list[int]:
    """Consistent counts in another order over the classes; `uniform` is M1 for each class, or with `total` over all.

    >>> shaped([4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40], "middle")
    [66, 185, 516, 1437, 4000, 2397, 861, 309, 111, 40]
    """
    if shape == "uniform":
        largest = counts[0] // len(counts) if total else counts[0]
        return [largest] * len(counts)
    ranks = list(range(len(counts)))
    even, odd = ranks[::2], ranks[1::2]
    orders = {
        "consistent": ranks,
        "reversed": ranks[::-1],
        "middle": even[::-1] + odd,
        "head-tail": odd + even[::-1],
    }
    return [counts[rank] for rank in orders[shape]]


def cifar100_semi(
    root: str | None = None,
    *,
    n1: Positive = 50,
    m1: Positive = 400,
    gamma_l: Factor = 10,
    gamma_u: Factor | None = None,
    shape: Shape = "consistent",
    preset: Preset = "acr",
    val_per_class: Count = 0,
    seed: Seed = 0,
    download: bool = False,
) -> Task:
    """CIFAR-100-LT with unlabeled images: n1 and m1 of the first class, gamma_l and gamma_u times less of the last;
    `val_per_class` are held out from the end of each class's images."""
    rules = SemiRules(
        n1=n1,
        m1=m1,
        gamma_l=gamma_l,
        gamma_u=gamma_l if gamma_u is None else gamma_u,
        shape=shape,
        preset=preset,
        val_per_class=val_per_class,
        seed=seed,
    )
    return _semi("cifar100-semi", 100, rules, root=root, download=download)


def cifar10_semi(
    root: str | None = None,
    *,
    n1: Positive = 500,
    m1: Positive = 4000,
    gamma_l: Factor = 100,
    gamma_u: Factor | None = None,
    shape: Shape = "consistent",
    preset: Preset = "acr",
    val_per_class: Count = 0,
    seed: Seed = 0,
    download: bool = False,
) -> Task:
    """CIFAR-10-LT with unlabeled images: n1 and m1 of the first class, gamma_l and gamma_u times less of the last;
    `val_per_class` are held out from the end of each class's images."""
    rules = SemiRules(
        n1=n1,
        m1=m1,
        gamma_l=gamma_l,
        gamma_u=gamma_l if gamma_u is None else gamma_u,
        shape=shape,
        preset=preset,
        val_per_class=val_per_class,
        seed=seed,
    )
    return _semi("cifar10-semi", 10, rules, root=root, download=download)


@dataclass(frozen=True, kw_only=True)
class SemiRules:
    """What a split is drawn by: the settings of `cifar100_semi`, with γ_u filled in."""

    n1: int
    m1: int
    gamma_l: float
    gamma_u: float
    shape: Shape
    preset: Preset
    val_per_class: int
    seed: int

    def check(self, name: str) -> None:
        """Raises DataError, with the `name` of the dataset, for a setting below 1."""
        for setting in ("n1", "m1", "gamma_l", "gamma_u"):
            value = getattr(self, setting)
            if not value >= 1:  # nan too
                raise DataError(f"{name}: data.{setting} is {value}: use 1 or more")


def _semi(name: str, num_classes: int, rules: SemiRules, *, root: str | None, download: bool) -> Task:
    rules.check(name)
    labeled_counts = semi_counts(num_classes, rules.n1, rules.gamma_l)
    consistent = semi_counts(num_classes, rules.m1, rules.gamma_u)
    unlabeled_counts = shaped(consistent, rules.shape, total=rules.preset == "usb")
    if not any(unlabeled_counts):
        raise DataError(
            f"{name}: data.m1 {rules.m1} in all is less than one unlabeled image for each of {num_classes} classes: "
            f"use {num_classes} or more"
        )
    cifar = open_cifar(name, num_classes, root, download)
    labeled: list[int] = []
    unlabeled: list[int] = []
    held_out: list[int] = []
    for k in range(num_classes):
        rows = np.where(cifar.train_labels == k)[0]
        if rules.preset in ("daso", "usb"):
            rows = np.random.default_rng((rules.seed, 19, k)).permutation(rows)
        num_held = len(rows) // 10 if rules.preset == "daso" and not rules.val_per_class else rules.val_per_class
        n, m, available = labeled_counts[k], unlabeled_counts[k], len(rows) - num_held
        if n + m > available:
            raise DataError(_too_few(name, cifar.classes[k], rules, n, m, available, num_held))
        first_unlabeled = 0 if rules.preset == "acr" else n
        labeled += rows[:n].tolist()
        unlabeled += rows[first_unlabeled : n + m].tolist()
        held_out += rows[available:].tolist()
    return Task(
        name=name,
        test_is_official=True,
        classes=cifar.classes,
        train=cifar.train_images(sorted(labeled)),
        unlabeled=cifar.train_images(sorted(unlabeled)),
        val=cifar.train_images(sorted(held_out)) if held_out else None,
        test=cifar.test,
        group_rule="thirds",
        facts={
            "variant": rules.preset if cifar.official_order else f"{rules.preset}-reordered",
            "profile": f"{rules.shape}, unlabeled {rules.m1} / {rules.gamma_u:g}",
            "seed": rules.seed,
            "unlabeled_counts": np.bincount(cifar.train_labels[unlabeled], minlength=num_classes).tolist(),
        },
    )


def _too_few(name: str, class_name: str, rules: SemiRules, n: int, m: int, available: int, num_held: int) -> str:
    sentence = (
        f"{name}: class {class_name!r} needs {n} labeled and {m} unlabeled images, {available} are there: lower "
        f"data.m1 (now {rules.m1}) or data.n1 (now {rules.n1})"
    )
    return sentence + f", or hold out less than {num_held}" if num_held else sentence
