"""Semi-supervised long tails: a small labelled and a large unlabelled set of CIFAR, in the splits of the literature.

(N1, M1) are the largest labelled and unlabelled class, γ_l and γ_u their imbalance factors (protocols, section 6).
"""

from typing import Literal

import numpy as np

from lpt.data.cifar import parts_of
from lpt.data.task import Task
from lpt.errors import DataError
from lpt.settings import Count, Factor, Positive, Seed

Shape = Literal["consistent", "uniform", "reversed", "middle", "head-tail"]
Preset = Literal["acr", "simpro", "daso", "usb"]
"""Whose rules: acr and simpro take images in file order, daso and usb shuffle them by seed. Only acr has the labelled
images among the unlabelled, only daso holds out a tenth of every class, and in usb's `uniform` M1 is the total."""


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
    indices = range(len(counts))
    even, odd = [k for k in indices if k % 2 == 0], [k for k in indices if k % 2]
    if shape == "uniform":
        return [counts[0] // len(counts) if total else counts[0]] * len(counts)
    orders = {
        "consistent": list(indices),
        "reversed": list(indices)[::-1],
        "middle": [*even[::-1], *odd],
        "head-tail": [*odd, *even[::-1]],
    }
    return [counts[k] for k in orders[shape]]


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
    """CIFAR-100-LT with unlabelled images: n1 and m1 of the first class, gamma_l and gamma_u times less of the last;
    `val_per_class` are held out from the end of each class's images."""
    return _semi("cifar100-semi", 100, root, n1, m1, gamma_l, gamma_u, shape, preset, val_per_class, seed, download)


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
    """CIFAR-10-LT with unlabelled images: n1 and m1 of the first class, gamma_l and gamma_u times less of the last;
    `val_per_class` are held out from the end of each class's images."""
    return _semi("cifar10-semi", 10, root, n1, m1, gamma_l, gamma_u, shape, preset, val_per_class, seed, download)


def _semi(
    name: str,
    num_classes: int,
    root: str | None,
    n1: int,
    m1: int,
    gamma_l: float,
    gamma_u: float | None,
    shape: Shape,
    preset: Preset,
    val_per_class: int,
    seed: int,
    download: bool,
) -> Task:
    gamma_u = gamma_l if gamma_u is None else gamma_u
    for setting, value in {"n1": n1, "m1": m1, "gamma_l": gamma_l, "gamma_u": gamma_u}.items():
        if not value >= 1:  # nan too
            raise DataError(f"{name}: data.{setting} is {value}: use 1 or more")
    wanted = semi_counts(num_classes, n1, gamma_l)
    more = shaped(semi_counts(num_classes, m1, gamma_u), shape, total=preset == "usb")
    if not any(more):
        raise DataError(
            f"{name}: data.m1 {m1} in all is less than one unlabelled image for each of {num_classes} classes: use "
            f"{num_classes} or more"
        )
    classes, labels, train, test, official = parts_of(name, num_classes, root, download)
    labelled: list[int] = []
    unlabelled: list[int] = []
    held: list[int] = []
    for k, (n, m) in enumerate(zip(wanted, more, strict=True)):
        own = np.where(labels == k)[0]
        if preset in ("daso", "usb"):
            own = np.random.default_rng((seed, 19, k)).permutation(own)
        spare = len(own) // 10 if preset == "daso" and not val_per_class else val_per_class
        if n + m > len(own) - spare:
            raise DataError(
                f"{name}: class {classes[k]!r} needs {n} labelled and {m} unlabelled images, {len(own) - spare} are "
                f"there: lower data.m1 (now {m1}) or data.n1 (now {n1})"
                + f", or hold out less than {spare}"
                * bool(spare)
            )
        labelled += own[:n].tolist()
        unlabelled += own[0 if preset == "acr" else n : n + m].tolist()
        held += own[len(own) - spare :].tolist()
    return Task(
        name=name,
        classes=tuple(classes),
        train=train(sorted(labelled)),
        unlabeled=train(sorted(unlabelled)),
        val=train(sorted(held)) if held else None,
        test=test,
        group_rule="thirds",
        facts={
            "variant": f"{preset}{'' if official else '-reordered'}",
            "profile": f"{shape}, unlabelled {m1} / {gamma_u:g}",
            "seed": seed,
            "unlabeled_counts": np.bincount(labels[unlabelled], minlength=num_classes).tolist(),
        },
    )
