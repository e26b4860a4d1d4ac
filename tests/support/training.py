"""Methods run in tests: their recipes built, watched and followed without a run folder."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lpt.data.task import Task
from lpt.engine.loop import follow
from lpt.engine.phase import Phase, Recipe, Step
from lpt.engine.session import Session
from lpt.methods import build_recipe
from lpt.model.backbones.base import Backbone


def bind(task: Task, backbone: Backbone, *, batch_size: int = 8, **changes: Any) -> Session:
    return Session(images=task.train, preprocess=backbone.preprocess, batch_size=batch_size, **changes)


def recipe_of(method: str, task: Task, backbone: Backbone, session: Session | None = None, **settings: Any) -> Recipe:
    return build_recipe({"name": method, **settings}, task, backbone, session or bind(task, backbone))


def train(method: str, task: Task, backbone: Backbone, session: Session | None = None, **settings: Any) -> Any:
    session = session or bind(task, backbone)
    return follow(recipe_of(method, task, backbone, session, **settings), session)


def with_steps(recipe: Recipe, change: Callable[[Phase], Step]) -> Recipe:
    """The same recipe with other steps."""
    return Recipe(recipe.model, (replace(phase, step=change(phase)) for phase in recipe.phases or ()))
