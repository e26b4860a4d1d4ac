"""A prompt file's answers on image files.

Shapes: views [B 3 S S] uint8.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpt.data.folder import SUFFIXES
from lpt.data.preprocess import File, Preprocess
from lpt.engine.evaluate import no_answer
from lpt.errors import DataError, short
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
        answers: list[dict[str, Any]] = [{"image": str(path)} for path in batch_paths]
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
    files = [File(str(path), path) for path in paths]
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


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images inside them, sorted. Raises DataError for a path that is not there."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            images = sorted(p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
            if not images:
                raise DataError(f"folder {path} holds no image")
            files += images
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"image {path} does not exist")
    return files
