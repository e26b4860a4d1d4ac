"""Two-stage fine-tuning: a reweighted head first, then standard fine-tuning (Taha Aslani 2022, arXiv 2207.10858).

Stage 1 trains the head alone under LDAM times class-balanced weights. Stage 2 is any other method, from that head on,
with a fresh optimiser. The paper's recipe is for text; what is ours for images is said in the docstring.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.errors import LptError
from lpt.losses import LossName
from lpt.methods.supervised import Second, chain, head_features, train_stage
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.settings import Count, FractionBelowOne

LONG = 5
"""Epochs of cross-entropy in stage 2 after which little of stage 1 is left (measured: strategies, section 4)."""


def tune(
    task: Task,
    backbone: Backbone,
    fit: Fit,
    second: Second,
    *,
    epochs_stage1: Count = 10,
    stage1_train: Literal["head", "last_block"] = "head",
    stage1_loss: LossName = "ldam_cb",
    stage1_lr: FractionBelowOne = 1e-2,
    beta: FractionBelowOne = 0.9999,
    margin: float = 0.5,
    stage2_loss: Literal["ce", "la"] | None = None,
    then: Mapping[str, Any] = {"name": "fine_tune", "epochs": 3, "loss": "ce"},
) -> PromptedClassifier:
    """`then` is stage 2: a method's name and settings; `stage2_loss` replaces its loss. Cross-entropy is the paper's;
    it erases what stage 1 has balanced, and more the longer it runs: `la` keeps it (ours).

    Stage 1 takes AdamW with a clipped norm of 1, as the authors' code does; 10 epochs instead of 1, since its features
    are cached (ours): those of the model as stage 2 will start it. `last_block` adds what is learned in the backbone's
    last block, and runs on images. `epochs_stage1=0` is stage 2 alone. Raises LptError where stage 2 has nothing to
    learn in the last block.
    """
    if any(of.get("name") == "two_stage" for of in chain(then)):
        raise LptError("method.then: two_stage cannot run inside two_stage")
    if stage2_loss is not None:
        if then["name"] not in ("fine_tune", "linear_probe", "lpt"):
            raise LptError(
                f"method.stage2_loss: {then['name']} has no loss of its own, set that of the method inside it"
            )
        then = {**then, "loss": stage2_loss}
    given = then.get("epochs", 10)
    epochs2 = max(given) if isinstance(given, list | tuple) else given
    if then.get("loss") == "ce" and epochs_stage1 and epochs2 > LONG:
        fit.say(
            f"warning: {epochs2} epochs of cross-entropy in stage 2 erase what stage 1 has balanced: "
            f"use up to {LONG}, or method.stage2_loss=la"
        )

    def first(model: PromptedClassifier) -> None:
        last = f"backbone.vit.blocks.{model.backbone.depth - 1}."
        train = ["head.", last] if stage1_train == "last_block" else ["head."]
        if last in train and not any(f"backbone.{name}".startswith(last) for name in model.backbone.learned):
            raise LptError("method.stage1_train=last_block needs a tuning with parameters there: bias, norm, ...")
        fit.go_before(model)  # a step that another method puts before this one: the features below depend on it
        cached = None if last in train else head_features(fit, "features-reweighted", model, task)
        train_stage(
            fit,
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

    if not epochs_stage1:
        return second(then, fit)
    following = replace(fit, before=first)
    model = second(then, following)
    if following.before is not None:
        raise LptError(f"method.then.name={then['name']} trains nothing: there is no stage 2")
    return model
