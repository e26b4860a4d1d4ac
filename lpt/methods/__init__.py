"""Methods by name; each is one function whose keyword arguments are its settings."""

from collections.abc import Callable
from typing import Any

from lpt.backbones.base import Backbone
from lpt.classifier import PromptedClassifier
from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.errors import ConfigError, LptError, did_you_mean
from lpt.methods import baselines, lpt
from lpt.settings import settings_of, validated

METHODS: dict[str, Callable[..., Any]] = {
    "lpt": lpt.tune,
    "linear_probe": baselines.linear_probe,
}


def tune(
    task: Task,
    backbone: Backbone,
    *,
    method: str = "lpt",
    batch_size: int = 256,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> PromptedClassifier:
    """Adapts `backbone` to `task` in this process, without a run folder. `settings` are the method's own.

    Raises LptError for an unknown method, ConfigError for settings that it does not have or take, all at once.
    """
    if method not in METHODS:
        raise LptError(f"method {method!r} is unknown ({', '.join(METHODS)}){did_you_mean(method, METHODS)}")
    settings, mistakes = validated("method", settings_of(METHODS[method]), settings)
    if mistakes:
        raise ConfigError(mistakes)
    fit = Fit(task.train, backbone.preprocess, batch_size, seed=seed, dtype=backbone.dtype, say=say)
    model = METHODS[method](task, backbone, fit, **settings)
    return model.only_train().eval()
