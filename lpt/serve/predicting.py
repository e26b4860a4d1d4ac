"""A prompt file's answers on image files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lpt.data.folder import SUFFIXES
from lpt.data.preprocess import File
from lpt.errors import DataError
from lpt.model.classifier import PromptedClassifier


def predict_files(
    model: PromptedClassifier, paths: Sequence[Path], *, topk: int = 5, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """For each image `{"image", "classes", "probabilities"}`, or `{"image", "error"}` where it cannot be read."""
    device, preprocess = next(model.parameters()).device, model.backbone.preprocess
    topk = min(topk, len(model.classes))

    def cut(some: Sequence[Path]) -> torch.Tensor:
        return preprocess.cut([File(str(path), path) for path in some])

    for first in range(0, len(paths), batch_size):
        part = paths[first : first + batch_size]
        answers: list[dict[str, Any]] = [{"image": str(path)} for path in part]
        try:
            views = [cut(part)]
        except DataError:  # one of them, or more: find out which
            views = []
            for path, answer in zip(part, answers, strict=True):
                try:
                    views.append(cut([path]))
                except DataError as error:
                    answer["error"] = str(error)
        good = [a for a in answers if "error" not in a]
        if good:
            with torch.no_grad():
                batch = preprocess.normalized(torch.cat(views).to(device), dtype=model.backbone.dtype)
                top = model.probabilities(model(batch).logits).topk(topk)
            for answer, values, ids in zip(good, top.values.tolist(), top.indices.tolist(), strict=True):
                answer["classes"] = [model.classes[i] for i in ids]
                answer["probabilities"] = values
        yield from answers


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images inside them, sorted. Raises DataError for a path that is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
            if not inside:
                raise DataError(f"folder {path} holds no image")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"image {path} does not exist")
    return found
