"""A model's answers to images in whatever form somebody has them, and its test view for a loader of one's own.

Shapes: images [B 3 h w] uint8, views [B 3 S S] float, probabilities [N C].
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpt.data.given import IMAGE_KEYS, as_content, item_image
from lpt.data.loader import Workers, cut_ahead
from lpt.data.preprocess import File, Preprocess
from lpt.data.task import Files, Images
from lpt.errors import DataError, TrainingError, quoted

if TYPE_CHECKING:
    from lpt.model.classifier import PromptedClassifier


class Predicted(NamedTuple):
    """What a model says of N images: the most probable class of each by name and by number [N], and the probabilities
    of all classes [N C], on the CPU."""

    classes: list[str]
    labels: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Transform:
    """The test view of one image [3 S S], as the model is given it: a callable for `transform=` of a torchvision
    dataset, which can be sent to worker processes."""

    preprocess: Preprocess

    def __call__(self, image: Any) -> Tensor:
        """`image` is in any form that `lpt.task_from` takes. Raises DataError for one that cannot be decoded."""
        view = self.preprocess.cut_one(File("the image", as_content(image)), None)
        return self.preprocess.normalized(view[None])[0]


@torch.no_grad()
def predicted(
    model: "PromptedClassifier", images: Any, *, batch_size: int = 64, workers: Workers = "auto"
) -> Predicted:
    """`PromptedClassifier.predict`."""
    device, dtype, parts = next(model.parameters()).device, model.backbone.dtype, []
    was_training = model.training
    model.eval()
    try:
        for views in views_of(images, model.backbone.preprocess, batch_size=batch_size, workers=workers):
            logits = model(views.to(device, dtype, non_blocking=True)).logits.float()
            parts.append(model.probabilities(logits).cpu())
    finally:
        model.train(was_training)
    if not parts:
        raise DataError("predict: no image is given")
    probabilities = torch.cat(parts)
    if bad := (~torch.isfinite(probabilities).all(1)).nonzero().flatten().tolist():
        raise TrainingError(no_answer(f"number {bad[0]} of {len(probabilities)}"))
    labels = probabilities.argmax(1)
    return Predicted([model.classes[k] for k in labels.tolist()], labels, probabilities)


def no_answer(image: str) -> str:
    """The message where the model's numbers leave their range: a mean of them would be a NaN beside plausible ones."""
    return (
        f"the model's prediction for image {quoted(image)} is not finite: it is no model of images; with "
        "train.precision=fp32 it may be, else train it again with a lower method.lr"
    )


def views_of(images: Any, preprocess: Preprocess, *, batch_size: int, workers: Workers = "auto") -> Iterator[Tensor]:
    """Test views [B 3 S S], normalized, of `images` in any form. Raises DataError for what are none."""
    if isinstance(images, Images):
        images = images.pixels
    if isinstance(images, str | Path | bytes | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    if isinstance(images, Tensor):
        yield from _views_of_tensor(images, preprocess, batch_size)
    elif isinstance(images, Files):
        files = (images.take(rows) for rows in torch.arange(len(images)).split(batch_size))
        yield from _views_of_files(files, preprocess, len(images), workers)
    elif hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, Mapping):
        named = (_named(i, images[i]) for i in range(len(images)))
        yield from _views_of_files(_in_batches(named, batch_size), preprocess, len(images), workers)
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        for batch in images:
            yield from _views_of_tensor(_tensor_of(batch), preprocess, batch_size)
    else:
        raise DataError(
            f"predict: images are a {type(images).__name__}: give images, paths, bytes, a list or dataset of them, or "
            "a DataLoader of views"
        )


def _named(i: int, item: Any) -> File:
    """Image i of a list or dataset. Raises DataError."""
    try:
        content = as_content(item_image(item))
    except DataError as error:
        raise DataError(f"predict: image {i}: {error}") from None
    name = str(content) if isinstance(content, str | Path) else f"number {i}"
    if isinstance(content, str | Path) and Path(content).is_dir():
        raise DataError(f"predict: {quoted(name)} is a folder: give its files, for example Path(...).rglob('*.jpg')")
    return File(name, content)


def _in_batches(files: Iterator[File], size: int) -> Iterator[list[File]]:
    while batch := list(islice(files, size)):
        yield batch


def _views_of_files(batches: Iterable[Any], preprocess: Preprocess, number: int, workers: Workers) -> Iterator[Tensor]:
    with cut_ahead(batches, preprocess, images=number, workers=workers) as made:
        for one in made:
            yield preprocess.normalized(one.checked())


def _views_of_tensor(images: Tensor, preprocess: Preprocess, batch_size: int) -> Iterator[Tensor]:
    """Of pixels [B 3 h w] uint8; views [B 3 S S] are what they are."""
    images = images[None] if images.dim() == 3 else images
    if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3:
        yield from (preprocess.test(rows) for rows in images.split(batch_size))
        return
    view = [3, preprocess.size, preprocess.size]
    if not images.is_floating_point() or list(images.shape[1:]) != view:
        raise DataError(
            f"predict: a tensor of {images.dtype} and shape {list(images.shape)} is neither uint8 pixels [B, 3, h, w] "
            f"nor views {['B', *view]} as model.transform makes them".replace("'", "")
        )
    yield from images.split(batch_size)


def _tensor_of(batch: Any) -> Tensor:
    """The images of a loader's batch: itself, its first entry, or the one that is called so. Raises DataError."""
    if isinstance(batch, Mapping):
        batch = next((batch[key] for key in IMAGE_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise DataError(
            f"predict: a batch is a {type(batch).__name__} where a tensor of views is needed: give a DataLoader of a "
            "dataset with transform=model.transform"
        )
    return batch
