"""What to know about a dataset before training on it: its tail, its broken files, and what leaks from train to test."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from lpt.data.longtail import shot_groups
from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images, Task
from lpt.errors import DataError


@dataclass
class Findings:
    """`problems` make numbers wrong or runs fail; `notes` are worth knowing. A sentence each."""

    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def examine(task: Task) -> Findings:
    """Looks at every image once."""
    findings = Findings()
    _tail(task, findings)
    _images(task, findings)
    return findings


def _parts(task: Task) -> dict[str, Images | Files]:
    parts = {"training": task.train, "unlabelled": task.unlabeled, "held-out": task.val, "test": task.test}
    return {role: part for role, part in parts.items() if part is not None}


def _tail(task: Task, found: Findings) -> None:
    counts, order = task.counts, task.counts.argsort(descending=True, stable=True).tolist()
    sizes = ", ".join(f"{len(part)} {name}" for name, part in _parts(task).items())
    groups = ", ".join(f"{name} {len(ids)}" for name, ids in shot_groups(counts, task.group_rule).items())
    found.facts += [
        f"{len(task.classes)} classes; images: {sizes}" + (f" ({p})" if (p := task.facts.get("test_part")) else ""),
        f"imbalance factor {task.imbalance_factor:g}: {_counted(task, order[:3])} ... {_counted(task, order[-3:])}",
        f"groups by training count ({task.group_rule}): {groups} classes",
    ]
    if left_out := task.facts.get("left_out"):
        found.problems.append(f"{len(left_out)} images belong to no class and are left out: {_some(left_out)}")
    if absent := task.absent_classes():
        found.problems.append(f"{len(absent)} classes have no training image: {_some(absent)}")
    if rare := [task.classes[k] for k in order if counts[k] == 1]:
        found.notes.append(f"{len(rare)} classes have a single training image: {_some(rare)}")
    tested = torch.bincount(task.test.labels, minlength=len(task.classes))
    if untested := [task.classes[k] for k in order if tested[k] == 0]:
        found.notes.append(f"{len(untested)} classes have no test image and count in no mean: {_some(untested)}")
    if int(tested.max()) > 1.5 * max(int(tested[tested > 0].min()), 1):
        found.notes.append(
            f"the test part is not balanced ({int(tested[tested > 0].min())} to {int(tested.max())} images a class): "
            "read `class mean`, not `all`"
        )


def _images(task: Task, found: Findings) -> None:
    """Unreadable files, and the same pixels in training and test or under two labels."""
    seen: dict[bytes, list[tuple[str, str, int]]] = defaultdict(list)
    broken: list[str] = []
    sides: list[int] = []
    for role, part in _parts(task).items():
        for i, (digest, side) in enumerate(_digests(part)):
            if isinstance(digest, str):
                broken.append(digest)
            else:
                seen[digest].append((role, part.ids[i], int(part.labels[i])))
                sides.append(side)
    if broken:
        found.problems.append(f"{len(broken)} files cannot be read: {_some(broken, '; ')}")
    if sides:
        found.facts.append(f"shorter sides from {min(sides)} to {max(sides)} pixels")
    leaks, two, both, same = [], [], [], []
    for group in (group for group in seen.values() if len(group) > 1):
        roles = {role for role, _, _ in group}
        known = [(name, label) for _, name, label in group if label >= 0]
        if roles == {"training", "unlabelled"}:  # as many splits have it
            both.append(f"{group[0][1]} = {group[-1][1]}")
        elif len(roles) > 1:
            leaks.append(f"{group[0][1]} ({group[0][0]}) = {group[-1][1]} ({group[-1][0]})")
        if len({label for _, label in known}) > 1:
            two.append(" = ".join(f"{name} ({task.classes[label]})" for name, label in known[:2]))
        elif len(roles) == 1:
            same.append(" = ".join(name for _, name, _ in group[:2]))
    if leaks:
        found.problems.append(f"{len(leaks)} images are in more than one part: {_some(leaks)}")
    if two:
        found.problems.append(f"{len(two)} images stand under two classes: {_some(two)}")
    if both:
        found.notes.append(f"{len(both)} training images are among the unlabelled too: {_some(both)}")
    if same:
        found.notes.append(f"{len(same)} images are there more than once within a part: {_some(same)}")


def _digests(part: Images | Files) -> Iterator[tuple[bytes | str, int]]:
    """(hash of the pixels, shorter side) of each image in order, or (its error, 0)."""

    def one(i: int) -> tuple[bytes | str, int]:
        (found,) = part.take(torch.tensor([i]))
        if isinstance(found, torch.Tensor):
            return hashlib.sha256(found.numpy().tobytes()).digest(), min(found.shape[-2:])
        try:
            image = decoded(found)
        except DataError as error:
            return str(error), 0
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest(), min(image.size)

    with ThreadPoolExecutor() as pool:
        yield from pool.map(one, range(len(part)))


def _counted(task: Task, classes: Sequence[int]) -> str:
    return ", ".join(f"{task.classes[k]} {int(task.counts[k])}" for k in classes)


def _some(items: Sequence[str], between: str = ", ", most: int = 5) -> str:
    rest = len(items) - most
    return between.join(items[:most]) + (f"{between}and {rest} more" if rest > 0 else "")
