"""A model in this process, without a run's folder: tuned by a method, or at its start for a loop of one's own."""

from collections.abc import Mapping
from typing import Any

from lpt.data.task import Task
from lpt.engine.loop import follow
from lpt.engine.phase import Recipe
from lpt.engine.session import Log, OnStep, Session
from lpt.errors import check_kind
from lpt.methods import build_recipe
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.progress import Bar
from lpt.settings import Positive, Seed, Weight, checked_arguments
from lpt.setup import check_memory


def tune(
    task: Task,
    backbone: Backbone,
    *,
    method: str = "lpt",
    batch_size: Positive = 256,
    seed: Seed = 0,
    gnm: Weight = 0.0,
    say: Log = lambda text: None,
    progress: bool | None = None,
    **settings: Any,
) -> PromptedClassifier:
    """Adapts `backbone` to `task` in this process, without a run folder; its model is in eval mode.

    `settings` are the method's own (`lpt list methods`); `batch_size` counts images of one stream; `gnm` is train.gnm
    of a config; `say` takes lines of text for people. `progress` shows a bar: None in notebooks alone, True on a
    terminal too. Raises LptError for an unknown method, for a task or backbone that is none, and where memory does not
    suffice; ConfigError for settings that the method does not have or take, all at once.

    >>> import lpt
    >>> task, backbone = lpt.load_task("digits-lt"), lpt.load_backbone("nano")
    >>> model = lpt.tune(task, backbone, method="linear_probe", epochs=2)
    >>> model.classes == task.classes, model.trainable_parameters
    (True, 1290)
    """
    batch_size, seed, gnm = checked_arguments(tune, batch_size=batch_size, seed=seed, gnm=gnm)
    named = {"name": method, **settings}
    with Bar(progress) as bar:
        session, recipe = _begun("tune", task, backbone, named, batch_size, seed, gnm=gnm, log=say, on_step=bar.show)
        trained = follow(recipe, session)
    _remember(trained, task)
    trained.task_means = session.task_means(task, backbone)
    return trained.only_train().eval()


def model(
    task: Task,
    backbone: Backbone,
    *,
    method: str = "lpt",
    batch_size: Positive = 256,
    seed: Seed = 0,
    **settings: Any,
) -> PromptedClassifier:
    """The model of a method as it is before the first step, for a loop of one's own: an `nn.Module` from views
    [B 3 S S] to an output whose `logits` are [B C].

    Those of its parameters require a gradient that the method's first phase trains: prompts and head, for example, and
    never the backbone's own. `only_train("head.")` chooses others by the beginnings of their names. What it has become
    is evaluated and saved as a tuned one. Arguments and errors are those of `tune`. Source of the methods: their pages.

    >>> import lpt, torch
    >>> model = lpt.model(lpt.load_task("digits-lt"), lpt.load_backbone("nano"), method="lpt")
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['head.weight', 'shared.tokens']
    >>> model(torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 10])
    """
    batch_size, seed = checked_arguments(model, batch_size=batch_size, seed=seed)
    named = {"name": method, **settings}
    _, recipe = _begun("model", task, backbone, named, batch_size, seed)
    first = next(iter(recipe.phases or ()), None)
    _remember(recipe.model, task)
    return recipe.model.only_train(*(first.trains if first else ())).train()


def _begun(
    what: str,
    task: Task,
    backbone: Backbone,
    named: Mapping[str, Any],
    batch_size: int,
    seed: int,
    *,
    gnm: float = 0.0,
    log: Log = lambda text: None,
    on_step: OnStep = lambda phase, step, steps, rates: None,
) -> tuple[Session, Recipe]:
    """The session and the recipe of a method by name and settings. Raises LptError."""
    check_kind(f"{what}: task", task, Task, "give what lpt.load_task returns")
    check_kind(f"{what}: backbone", backbone, Backbone, "give what lpt.load_backbone returns")
    device = next(backbone.parameters()).device
    check_memory(named, task, backbone, batch_size, dtype=backbone.dtype, device=device)
    session = Session(
        images=task.train,
        preprocess=backbone.preprocess,
        batch_size=batch_size,
        seed=seed,
        dtype=backbone.dtype,
        gnm=gnm,
        log=log,
        on_step=on_step,
    )
    return session, build_recipe(named, task, backbone, session)


def _remember(trained: PromptedClassifier, task: Task) -> None:
    """What a prompt file says of the task."""
    trained.group_rule, trained.trained_on = task.group_rule, task
