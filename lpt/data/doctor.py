"""What to know about a dataset before training on it: its tail, its broken files, and what leaks from train to test."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lpt.data import load_task
from lpt.data.folder import folder_with_mistakes
from lpt.data.longtail import shot_groups
from lpt.data.preprocess import readable
from lpt.data.task import Files, Images, Task, first_few, remarks
from lpt.errors import DataError, quoted


@dataclass
class Findings:
    """`problems` make numbers wrong or runs fail; `notes` are worth knowing. A sentence each."""

    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load_with_mistakes(name: str, **settings: Any) -> Task:
    """The task `name` for `examine`: of what ends a run, all that one can continue after is in its facts. Raises
    DataError for the rest."""
    return folder_with_mistakes(**settings) if name == "folder" else load_task(name, **settings)


def examine(task: Task) -> Findings:
    """Looks at every image of `task` once."""
    findings = Findings()
    _describe(task, findings)
    _repeat_remarks(task, findings)
    _check_classes(task, findings)
    _check_images(task, findings)
    return findings


def _parts(task: Task) -> dict[str, Images | Files]:
    parts = {"training": task.train, "unlabeled": task.unlabeled, "held-out": task.val, "test": task.test}
    return {role: images for role, images in parts.items() if images is not None}


# The long tail.


def _describe(task: Task, findings: Findings) -> None:
    key_of = {"training": "train", "unlabeled": "unlabeled", "held-out": "val", "test": "test"}
    sizes = ", ".join(f"{len(images)} {role}{task.source_of(key_of[role])}" for role, images in _parts(task).items())
    by_count = _by_count(task)
    groups = shot_groups(task.counts, task.group_rule)
    group_sizes = ", ".join(f"{name} {len(classes)}" for name, classes in groups.items())
    findings.facts += [
        f"{len(task.classes)} classes; images: {sizes}",
        f"imbalance factor {task.imbalance_factor:g}: {_counted(task, by_count[:3])} ... "
        f"{_counted(task, by_count[-3:])}",
        f"groups by training count ({task.group_rule}): {group_sizes} classes",
    ]


def _by_count(task: Task) -> list[int]:
    """Class numbers from the largest class to the rarest."""
    return task.counts.argsort(descending=True, stable=True).tolist()


def _repeat_remarks(task: Task, findings: Findings) -> None:
    """What a run would report of the data, or end with."""
    findings.problems += [f"a run ends here: {sentence}" for sentence in task.facts.get("refused", ())]
    for remark, text in remarks(task.facts, most=5):
        (findings.problems if remark.is_problem else findings.notes).append(text)


def _check_classes(task: Task, findings: Findings) -> None:
    """What is wrong with the number of images per class."""
    absent = task.absent_classes()
    if absent:
        findings.problems.append(f"{len(absent)} classes have no training image: {first_few(absent)}")
    by_count = _by_count(task)
    single = [task.classes[k] for k in by_count if task.counts[k] == 1]
    if single:
        findings.notes.append(f"{len(single)} classes have a single training image: {first_few(single)}")

    test_counts = torch.bincount(task.test.labels, minlength=len(task.classes))
    untested = [task.classes[k] for k in by_count if test_counts[k] == 0]
    if untested:
        findings.notes.append(f"{len(untested)} classes have no test image and count in no mean: {first_few(untested)}")
    most, least = int(test_counts.max()), int(test_counts[test_counts > 0].min())
    if most > 1.5 * least:
        findings.notes.append(
            f"the test part is not balanced ({least} to {most} images a class): read `class mean`, not `all`"
        )


# The images themselves.


class Appearance(NamedTuple):
    """Where some pixels are: in which part, under which id and label (-1: unknown)."""

    role: str
    image_id: str
    label: int


def _check_images(task: Task, findings: Findings) -> None:
    """Unreadable files, and the same pixels in training and test or under two labels."""
    broken: list[str] = []
    shorter_sides: list[int] = []
    by_pixels: dict[bytes, list[Appearance]] = defaultdict(list)
    for role, images in _parts(task).items():
        for i, scan in enumerate(_scans(images)):
            if scan.error:
                broken.append(scan.error)
                continue
            by_pixels[scan.digest].append(Appearance(role, images.ids[i], int(images.labels[i])))
            shorter_sides.append(scan.shorter_side)
    if broken:
        findings.problems.append(f"{len(broken)} files cannot be read: {first_few(broken, '; ')}")
    if shorter_sides:
        findings.facts.append(f"shorter sides from {min(shorter_sides)} to {max(shorter_sides)} pixels")
    _check_copies(task, [copies for copies in by_pixels.values() if len(copies) > 1], findings)


def _check_copies(task: Task, groups: list[list[Appearance]], findings: Findings) -> None:
    """Says where images with equal pixels are; each group has two appearances or more."""
    leaks: list[str] = []
    under_two_classes: list[str] = []
    also_unlabeled: list[str] = []
    within_a_part: list[str] = []
    for copies in groups:
        roles = {copy.role for copy in copies}
        labeled = [copy for copy in copies if copy.label >= 0]
        first, last = copies[0], copies[-1]
        if roles == {"training", "unlabeled"}:  # no leak: many splits of the literature have it
            also_unlabeled.append(f"{first.image_id} = {last.image_id}")
        elif len(roles) > 1:
            leaks.append(f"{first.image_id} ({first.role}) = {last.image_id} ({last.role})")
        if len({copy.label for copy in labeled}) > 1:
            two = [f"{copy.image_id} ({task.classes[copy.label]})" for copy in labeled[:2]]
            under_two_classes.append(" = ".join(two))
        elif len(roles) == 1:
            within_a_part.append(f"{first.image_id} = {copies[1].image_id}")
    if leaks:
        findings.problems.append(f"{len(leaks)} images are in more than one part: {first_few(leaks)}")
    if under_two_classes:
        findings.problems.append(
            f"{len(under_two_classes)} images stand under two classes: {first_few(under_two_classes)}"
        )
    if also_unlabeled:
        findings.notes.append(
            f"{len(also_unlabeled)} training images are among the unlabeled too: {first_few(also_unlabeled)}"
        )
    if within_a_part:
        findings.notes.append(
            f"{len(within_a_part)} images are there more than once within a part: {first_few(within_a_part)}"
        )


class Scan(NamedTuple):
    """What one look at an image gives: a hash of its pixels and its shorter side, or an error."""

    digest: bytes = b""
    shorter_side: int = 0
    error: str = ""


def _scans(images: Images | Files) -> Iterator[Scan]:
    """A look at each image, in order; files are decoded in threads."""

    def scan(i: int) -> Scan:
        (image,) = images.take(torch.tensor([i]))
        if isinstance(image, torch.Tensor):
            return Scan(hashlib.sha256(image.numpy().tobytes()).digest(), min(image.shape[-2:]))
        try:
            picture = readable(image)
        except DataError as error:
            return Scan(error=str(error))
        # The same bytes may be another image in another shape.
        digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
        return Scan(digest, min(picture.size))

    with ThreadPoolExecutor() as pool:
        yield from pool.map(scan, range(len(images)))


# Sentences.


def _counted(task: Task, classes: Sequence[int]) -> str:
    return ", ".join(f"{quoted(task.classes[k], 60)} {int(task.counts[k])}" for k in classes)
