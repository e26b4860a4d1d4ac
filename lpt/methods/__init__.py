"""Methods by name; each is one function whose keyword arguments are its settings."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lpt.data.task import Task
from lpt.engine.loop import Fit
from lpt.errors import ConfigError, LptError, did_you_mean
from lpt.methods import baselines, daso, decoupled, finessl, fixmatch, lpt, pre_finetune, two_stage, ulfine
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.settings import settings_of, validated


def _with_another(tune: Callable[..., PromptedClassifier]) -> Callable[..., PromptedClassifier]:
    """A method that runs another one inside is given that one as a function of its settings."""

    @functools.wraps(tune)
    def whole(task: Task, backbone: Backbone, fit: Fit, **settings: Any) -> PromptedClassifier:
        def second(of: Mapping[str, Any], fit: Fit) -> PromptedClassifier:
            function, checked = chosen(of.get("name"), {k: v for k, v in of.items() if k != "name"})
            return function(task, backbone, fit, **checked)

        return tune(task, backbone, fit, second, **settings)

    return whole


METHODS: dict[str, Callable[..., PromptedClassifier]] = {
    "lpt": lpt.tune,
    "ulfine": ulfine.tune,
    "fixmatch": fixmatch.fixmatch,
    "finessl": finessl.finessl,
    "daso": daso.daso,
    "two_stage": _with_another(two_stage.tune),
    "pre_finetune": _with_another(pre_finetune.tune),
    "decoupled": _with_another(decoupled.tune),
    "fine_tune": baselines.fine_tune,
    "linear_probe": baselines.linear_probe,
    "class_mean": baselines.class_mean,
    "knn": baselines.knn,
    "zero_shot": baselines.zero_shot,
}


def chosen(name: Any, settings: Mapping[str, Any]) -> tuple[Callable[..., PromptedClassifier], dict[str, Any]]:
    """A method and its settings, checked and filled in. Raises LptError for an unknown name, ConfigError with all
    mistakes in the settings."""
    if name not in METHODS:
        raise LptError(f"method {name!r} is unknown ({', '.join(METHODS)}){did_you_mean(str(name), METHODS)}")
    checked, mistakes = validated("method", settings_of(METHODS[name]), dict(settings))
    if mistakes:
        raise ConfigError(mistakes)
    return METHODS[name], checked


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
    function, checked = chosen(method, settings)
    fit = Fit(task.train, backbone.preprocess, batch_size, seed=seed, dtype=backbone.dtype, say=say)
    return function(task, backbone, fit, **checked).only_train().eval()
