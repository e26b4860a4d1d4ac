"""Facts about a long tail: how many images each class has, and what follows from that alone.

Shapes: counts [C].
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lpt.errors import DataError, quoted
from lpt.terms import GroupRule as GroupRule

GROUPS = ("many", "medium", "few")
Profile = Literal["exponential", "step"]
MOST_IMAGES = 10**12
"""Of a class: more can only be a mistake."""


def long_tail(num_classes: int, largest: int, imbalance_factor: float, profile: Profile = "exponential") -> list[int]:
    """Images of each class, in order of rank.

    `exponential`: n_k = int(n_max · μ^(k/(C-1))) with μ = 1/IF (Cui 2019; Cao 2019, LDAM-DRW). `step`: the first half
    n_max, the rest int(n_max · μ) (Buda 2018). A factor below 1 is n_min / n_max, as some papers have it. Raises
    DataError for one that is not positive.

    >>> counts = long_tail(100, 500, 100)
    >>> sum(counts), counts[0], counts[-1]
    (10847, 500, 5)
    >>> long_tail(4, 50, 0.1, "step")
    [50, 50, 5, 5]
    """
    if not imbalance_factor > 0:
        raise DataError(f"imbalance_factor {imbalance_factor} is not positive: it is n_max / n_min, for example 100")
    mu = min(imbalance_factor, 1 / imbalance_factor)
    if profile == "step":
        num_head = math.ceil(num_classes / 2)
        return [largest] * num_head + [int(largest * mu)] * (num_classes - num_head)
    last_rank = max(num_classes - 1, 1)
    return [int(largest * mu ** (rank / last_rank)) for rank in range(num_classes)]


def training_counts(counts: Any, num_classes: int) -> Tensor:
    """`counts` as whole numbers [C]. Raises DataError for what cannot be the training images of `num_classes` classes.

    >>> training_counts([5, 2.0], 2)
    tensor([5, 2])
    """
    way_out = f"give one whole number for each of the {num_classes} classes, as task.counts has them"
    try:
        numbers = torch.as_tensor(counts)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DataError(f"counts {quoted(repr(counts), 80)} are no numbers: {way_out}") from None
    if numbers.shape != (num_classes,) or numbers.dtype == torch.bool or numbers.is_complex():
        raise DataError(f"counts have shape {list(numbers.shape)} and type {numbers.dtype}: {way_out}")
    wrong = [n for n in numbers.tolist() if not 0 <= n < MOST_IMAGES or n != int(n)]  # a NaN is in no range
    if wrong:
        raise DataError(f"counts hold {wrong[0]}: {way_out}")
    return numbers.long()


def shot_groups(counts: Sequence[int] | Tensor, rule: str = "lt20") -> dict[str, Tensor]:
    """Class ids of the many-, medium- and few-shot groups, by *training* counts [C].

    `lt20` (OLTR, LIFT): many n > 100, medium 20 ≤ n ≤ 100, few n < 20. `le20` (LPT's code): few n ≤ 20.
    `thirds` (DARP family): first and last int(C/3) classes by rank; ties keep label order.
    """
    n = torch.as_tensor(counts)
    if rule == "thirds":
        by_count = torch.argsort(n, descending=True, stable=True)
        third = len(n) // 3
        sizes = [third, len(n) - 2 * third, third]
        many, medium, few = (classes.sort().values for classes in by_count.split(sizes))
        return {"many": many, "medium": medium, "few": few}
    if rule not in ("lt20", "le20"):
        raise DataError(f"unknown group rule {rule!r}: use lt20, le20 or thirds")
    is_many = n > 100
    is_few = n < 20 if rule == "lt20" else n <= 20
    masks = (is_many, ~is_many & ~is_few, is_few)
    many, medium, few = (mask.nonzero().flatten() for mask in masks)
    return {"many": many, "medium": medium, "few": few}


def usual_group_rule(counts: Sequence[int] | Tensor) -> GroupRule:
    """`lt20` where each of its groups has a class, else rank thirds: the rule for counts that no benchmark has one for.

    >>> usual_group_rule([200, 50, 5]), usual_group_rule([60, 50, 40])
    ('lt20', 'thirds')
    """
    return "lt20" if all(len(classes) for classes in shot_groups(counts, "lt20").values()) else "thirds"


def count_fingerprint(counts: Sequence[int]) -> str:
    """First 16 hex digits of SHA-256 over the counts, sorted descending and joined by commas.

    >>> count_fingerprint(long_tail(100, 500, 100))
    'a86899e02756da51'
    """
    text = ",".join(str(int(n)) for n in sorted(counts, reverse=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
