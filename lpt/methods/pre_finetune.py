"""Pre-finetuning with data augmentation: a balanced augmented set first, then the original data (PMLR 183:68-82, 2022).

The paper translates texts back and forth; for images the augmenter is TrivialAugment, RandAugment or plain crop,
flip and colour (ours, as is every default here that the paper does not state).
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lpt.data.augment import Augmenter
from lpt.data.balanced import balanced
from lpt.data.task import Task
from lpt.engine.phase import Phase, Recipe
from lpt.engine.session import Session
from lpt.errors import LptError
from lpt.methods.method import Resolve
from lpt.methods.supervised import stage, tunable_names
from lpt.model.backbones.base import Backbone
from lpt.settings import Count, FractionBelowOne, Positive


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    resolve: Resolve,
    *,
    epochs_stage1: Count = 1,
    per_class: Literal["min", "median", "max"] | Positive = "median",
    views: Positive = 2,
    augmenter: Augmenter = "trivial",
    include_original: bool = False,
    stage1_train: Literal["head", "all"] = "all",
    stage1_lr: FractionBelowOne = 1e-2,
    then: Mapping[str, Any] = {"name": "fine_tune", "loss": "ce"},
) -> Recipe:
    """Cross-entropy on `views` augmented views of `per_class` images of every class, drawn with repetition where a
    class has fewer; then `then`, a method's name and settings, on the original data with a fresh optimizer.

    The paper trains the topmost layer and the classifier first. What may train here is all small, so `all` is what
    the second step trains, and `head` the classifier alone (ours). `min` is the likely reading of the paper;
    `median` is ours, since a long tail's smallest class would leave a handful of images. `epochs_stage1=0` is
    `then` alone.
    """
    second = resolve(then)
    if any(step.name == "pre_finetune" for step in second.chain):
        raise LptError("method.then: pre_finetune cannot run inside pre_finetune")
    recipe = second.build()
    model, phases = recipe.model, recipe.phases
    if not epochs_stage1:
        return recipe
    if phases is None:
        raise LptError(f"method.then.name={second.name} trains nothing that could be pre-finetuned")

    def both() -> Iterator[Phase]:
        images = balanced(
            task.train,
            len(task.classes),
            per_class,
            views,
            augmenter,
            seed=session.seed,
            originals=include_original,
            workers=session.workers,
        )
        yield stage(
            session,
            "augmented",
            model,
            task,
            train=tunable_names(model) if stage1_train == "all" else ["head."],
            loss="ce",
            epochs=epochs_stage1,
            lr=stage1_lr,
            clip=1.0,
            images=images,
        )
        yield from phases

    return Recipe(model, both())
