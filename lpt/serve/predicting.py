"""A prompt file's answers on image files.

Shapes: views [B 3 S S] uint8.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.data.preprocess import File, Preprocess
from lpt.data.task import remarks
from lpt.data.walk import as_text, joined, walk
from lpt.engine.evaluate import no_answer
from lpt.errors import DataError, quoted, short
from lpt.memory import naming_lack_of_memory
from lpt.model.classifier import PromptedClassifier


def predict_files(
    model: PromptedClassifier, paths: Sequence[Path], *, topk: int = 5, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """For each image `{"image", "classes", "probabilities"}`, or `{"image", "error"}` where it cannot be read.

    Classes are the `topk` most probable ones, the best first.
    """
    device, preprocess = next(model.parameters()).device, model.backbone.preprocess
    topk = min(topk, len(model.classes))
    for start in range(0, len(paths), batch_size):
        batch_paths = paths[start : start + batch_size]
        answers: list[dict[str, Any]] = [{"image": as_text(str(path))} for path in batch_paths]
        views, errors = _test_views(preprocess, batch_paths)
        for i, error in errors.items():
            answers[i]["error"] = error
        readable = [answer for answer in answers if "error" not in answer]
        if views is not None:
            where = f"in a prediction of {len(views)} images"
            with torch.no_grad(), naming_lack_of_memory(lambda where=where: where):
                batch = preprocess.normalized(views.to(device), dtype=model.backbone.dtype)
                best = model.probabilities(model(batch).logits).topk(topk)
            for answer, values, ids in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True):
                if not all(map(math.isfinite, values)):
                    answer["error"] = no_answer(answer["image"])
                    continue
                answer["classes"] = [short(model.classes[i]) for i in ids]
                answer["probabilities"] = values
        yield from answers


def _test_views(preprocess: Preprocess, paths: Sequence[Path]) -> tuple[Tensor | None, dict[int, str]]:
    """(views of the files that can be decoded, None where none can, the error of each other by its index)."""
    files = [File(as_text(str(path)), path) for path in paths]
    try:
        return preprocess.cut(files), {}
    except DataError:  # at least one file is broken, which does not say whether others are: decode them one by one
        pass
    views: list[Tensor] = []
    errors: dict[int, str] = {}
    for i, file in enumerate(files):
        try:
            views.append(preprocess.cut([file]))
        except DataError as error:
            errors[i] = str(error)
    return torch.cat(views) if views else None, errors


class ImageFiles(NamedTuple):
    """Images to predict, and a sentence on each kind of file beside them."""

    paths: list[Path]
    remarks: list[str]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The images of `find_images`."""
    return find_images(paths).paths


def find_images(paths: Sequence[Path]) -> ImageFiles:
    """Files as they are, folders as the images that training would find in them. Links that lead to nothing count as
    images, which cannot be read. Raises DataError for a path that is not there, and for a folder without images."""
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        if path.is_dir():
            walked = walk(path)
            lost_links = walked.left_out.get("lost_links", [])
            names = {reason: [joined(name) for name in below] for reason, below in walked.left_out.items()}
            if not walked.images and not lost_links:
                reasons = [text for _, text in remarks(names, most=1)]
                raise DataError("; ".join([f"folder {quoted(path)} holds no image", *reasons]))
            files += [path.joinpath(*name) for name in sorted([*walked.images, *lost_links])]
            for reason, below in names.items():
                left_out.setdefault(reason, []).extend(as_text(str(path / name)) for name in below)
        elif path.exists() or path.is_symlink():
            files.append(path)
        else:
            raise DataError(f"image {quoted(path)} does not exist")
    said = [f"{'warning' if remark.is_problem else 'note'}: {text}" for remark, text in remarks(left_out, most=1)]
    return ImageFiles(files, said)
