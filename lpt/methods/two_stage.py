"""Two-stage fine-tuning: a reweighted head first, then standard fine-tuning (Taha Aslani 2022, arXiv 2207.10858).

Stage 1 trains the head alone under LDAM times class-balanced weights. Stage 2 is any other method, from that head on,
with a fresh optimizer. The paper's recipe is for text; what is ours for images is said in the docstring.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lpt.data.task import Task
from lpt.engine.phase import Phase, Recipe
from lpt.engine.session import Session
from lpt.errors import LptError
from lpt.losses import LossName
from lpt.methods.method import InnerMethod, Resolve
from lpt.methods.supervised import head_features, stage
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.settings import Count, FractionBelowOne

LONG = 5
"""Epochs of cross-entropy in stage 2 after which little of stage 1 is left (measured: strategies, section 4)."""


def tune(
    task: Task,
    backbone: Backbone,
    session: Session,
    resolve: Resolve,
    *,
    epochs_stage1: Count = 10,
    stage1_train: Literal["head", "last_block"] = "head",
    stage1_loss: LossName = "ldam_cb",
    stage1_lr: FractionBelowOne = 1e-2,
    beta: FractionBelowOne = 0.9999,
    margin: float = 0.5,
    stage2_loss: Literal["ce", "la"] | None = None,
    then: Mapping[str, Any] = {"name": "fine_tune", "epochs": 3, "loss": "ce"},
) -> Recipe:
    """`then` is stage 2: a method's name and settings; `stage2_loss` replaces its loss. Cross-entropy is the paper's;
    it erases what stage 1 has balanced, and more the longer it runs: `la` keeps it (ours).

    Stage 1 takes AdamW with a clipped norm of 1, as the authors' code does; 10 epochs instead of 1, since its features
    are cached (ours): those of the model as stage 2 will start it. `last_block` adds the trainable parameters in the
    backbone's last block, and runs on images. `epochs_stage1=0` is stage 2 alone. Raises LptError where stage 2 has
    nothing to learn in the last block.
    """
    second = _stage2(resolve(then), stage2_loss, resolve)
    if epochs_stage1:
        _warn_of_long_cross_entropy(second, session)
    recipe = second.build()
    model, phases = recipe.model, recipe.phases
    if not epochs_stage1:
        return recipe
    if phases is None:
        raise LptError(f"method.then.name={second.name} trains nothing: there is no stage 2")
    train = ["head.", *_last_block(model)] if stage1_train == "last_block" else ["head."]

    def both() -> Iterator[Phase]:
        cached = head_features(session, "features-reweighted", model, task) if stage1_train == "head" else None
        yield stage(
            session,
            "reweighted",
            model,
            task,
            train=train,
            loss=stage1_loss,
            epochs=epochs_stage1,
            lr=stage1_lr,
            weight_decay=0.0,
            clip=1.0,
            cached=cached,
            beta=beta,
            margin=margin,
        )
        yield from phases

    return Recipe(model, both())


def _stage2(second: InnerMethod, loss: str | None, resolve: Resolve) -> InnerMethod:
    """The second stage, with `loss` in place of its own. Raises LptError where that makes no sense."""
    if any(step.name == "two_stage" for step in second.chain):
        raise LptError("method.then: two_stage cannot run inside two_stage")
    if loss is None:
        return second
    if "loss" not in second.settings:
        raise LptError(f"method.stage2_loss: {second.name} has no loss of its own, set that of the method inside it")
    return resolve(second.with_settings(loss=loss))


def _warn_of_long_cross_entropy(second: InnerMethod, session: Session) -> None:
    if second.settings.get("loss") != "ce" or "epochs" not in second.settings:
        return
    given = second.settings["epochs"]
    epochs = given if isinstance(given, int) else max(given)
    if epochs > LONG:
        session.log(
            f"warning: {epochs} epochs of cross-entropy in stage 2 erase what stage 1 has balanced: "
            f"use up to {LONG}, or method.stage2_loss=la"
        )


def _last_block(model: PromptedClassifier) -> list[str]:
    """The prefix of the trainable parameters in the backbone's last block. Raises LptError where nothing is."""
    prefix = f"backbone.vit.blocks.{model.backbone.depth - 1}."
    if not any(f"backbone.{name}".startswith(prefix) for name in model.backbone.learned):
        raise LptError("method.stage1_train=last_block needs a tuning with parameters there: bias, norm, ...")
    return [prefix]
