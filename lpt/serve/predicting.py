"""A prompt file's predictions on image files.

Shapes: views [B 3 S S] uint8.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.data.loader import Workers, cut_ahead
from lpt.data.preprocess import File, Preprocess
from lpt.data.task import remarks
from lpt.data.walk import RelativePath, Walk, as_text, joined, walk_by_folder
from lpt.engine.evaluate import mean_logits
from lpt.errors import DataError, quoted, short
from lpt.memory import naming_lack_of_memory
from lpt.model.classifier import PromptedClassifier
from lpt.model.predicting import no_answer
from lpt.terms import Ensemble

Content = str | Path | bytes
"""Where an image is, or its encoded bytes."""


class Answer(NamedTuple):
    """What a model says of one image: numbers of its most probable classes, the best first, and their probabilities;
    or why it says nothing."""

    classes: Sequence[int] = ()
    probabilities: Sequence[float] = ()
    error: str | None = None


def predict_files(
    model: PromptedClassifier,
    paths: Sequence[Path],
    *,
    topk: int = 5,
    batch_size: int = 32,
    workers: Workers = "auto",
    tta: Ensemble = "none",
) -> Iterator[dict[str, Any]]:
    """For each image `{"image", "classes", "probabilities"}`, or `{"image", "error"}` where it cannot be read.

    Classes are the `topk` most probable ones, the best first, by the mean of the logits of five crops with
    `tta="five_crop"`.
    """
    files, number = (as_file(path) for path in paths), len(paths)
    answered = answers(model, files, number=number, topk=topk, batch_size=batch_size, workers=workers, tta=tta)
    for file, answer in answered:
        if answer.error is not None:
            yield {"image": file.name, "error": answer.error}
        else:
            names = [short(model.classes[k]) for k in answer.classes]
            yield {"image": file.name, "classes": names, "probabilities": list(answer.probabilities)}


def as_file(path: Path) -> File:
    """An image file under a name that can be shown and written anywhere."""
    return File(as_text(str(path)), path)


def answers(
    model: PromptedClassifier,
    files: Iterable[File],
    *,
    number: int,
    topk: int,
    batch_size: int = 32,
    workers: Workers = "auto",
    tta: Ensemble = "none",
) -> Iterator[tuple[File, Answer]]:
    """Each of `files`, of which there are `number`, with what the model says of it, in order. A batch is held at a
    time, and a few more are decoded while the model works on it."""
    device, preprocess = next(model.parameters()).device, model.backbone.preprocess.seen_as(tta)
    topk = min(topk, len(model.classes))
    batches: deque[list[File]] = deque()

    def ahead() -> Iterator[list[File]]:
        for batch in _batches(files, batch_size):
            batches.append(batch)
            yield batch

    pinned = device.type == "cuda"
    with cut_ahead(ahead(), preprocess, images=number, workers=workers, pinned=pinned) as made:
        for views, errors in made:
            batch = batches.popleft()
            if errors:
                views = views[[i for i in range(len(batch)) if i not in errors]]
            good = iter(_top(model, preprocess, views.to(device, non_blocking=True), topk) if len(views) else ())
            for i, file in enumerate(batch):
                answer = Answer(error=str(errors[i])) if i in errors else next(good)
                if not all(map(math.isfinite, answer.probabilities)):
                    answer = Answer(error=no_answer(file.name))
                yield file, answer


@torch.no_grad()
def _top(model: PromptedClassifier, preprocess: Preprocess, views: Tensor, topk: int) -> list[Answer]:
    where = f"in a prediction of {len(views)} images"
    with naming_lack_of_memory(lambda: where):
        batch = preprocess.normalized(views, dtype=model.backbone.dtype)
        best = model.probabilities(mean_logits(model, batch)).topk(topk)
    return [Answer(*both) for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _batches(files: Iterable[File], size: int) -> Iterator[list[File]]:
    files = iter(files)
    while batch := list(islice(files, size)):
        yield batch


class ImageFiles(NamedTuple):
    """Images to predict, and a sentence on each kind of file beside them."""

    paths: list[Path]
    remarks: list[str]


class Met(NamedTuple):
    """An image that was met: the file or folder that was asked for, and the path below it, empty for a file."""

    asked: Path
    below: RelativePath = ()

    @property
    def path(self) -> Path:
        return self.asked.joinpath(*self.below)

    @property
    def name(self) -> RelativePath:
        """What it is called wherever the folder lies."""
        return self.below or (self.asked.name,)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The images of `find_images`."""
    return find_images(paths).paths


def find_images(paths: Sequence[Path]) -> ImageFiles:
    """Files as they are, folders as the images that training would find in them. Links that lead to nothing count as
    images, which cannot be read. Raises DataError for a path that is not there, and for a folder without images."""
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):  # of one folder in order of name, whatever the depth
        files += [met.path for met in sorted(meet_images([path], left_out))]
    return ImageFiles(files, said_of(left_out))


def meet_images(paths: Sequence[Path], left_out: dict[str, list[str]]) -> Iterator[Met]:
    """The images of `find_images`, folder by folder, for more of them than are to be held at once. Fills `left_out`
    with every other file, by why it is none."""
    check_there(paths)
    for path in dict.fromkeys(paths):
        if path.is_dir():
            yield from _images_below(path, left_out)
        else:
            yield Met(path)


def check_there(paths: Sequence[Path]) -> None:
    """Raises DataError for no path at all, and for one that is not there."""
    if not paths:
        raise DataError("no image is given: name files or folders")
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise DataError(f"image {quoted(path)} does not exist")


def _images_below(path: Path, left_out: dict[str, list[str]]) -> Iterator[Met]:
    walked, number = Walk(), 0
    lost_links = walked.left_out.setdefault("lost_links", [])
    for images in walk_by_folder(path, walked):
        number += len(images) + len(lost_links)
        yield from (Met(path, below) for below in sorted([*images, *lost_links]))
        lost_links.clear()
    names = {reason: [joined(name) for name in below] for reason, below in walked.left_out.items()}
    if not number:
        reasons = [text for _, text in remarks(names, most=1)]
        raise DataError("; ".join([f"folder {quoted(path)} holds no image", *reasons]))
    for reason, below in names.items():
        left_out.setdefault(reason, []).extend(as_text(str(path / name)) for name in below)


def said_of(left_out: dict[str, list[str]]) -> list[str]:
    """A sentence on each kind of file that is no image."""
    return [f"{'warning' if remark.is_problem else 'note'}: {text}" for remark, text in remarks(left_out, most=1)]
