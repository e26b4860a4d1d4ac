"""Methods by name; each is one function whose keyword arguments are its settings, and returns a recipe."""

from collections.abc import Iterator, Mapping
from typing import Any

from lpt.data.task import Task
from lpt.engine.phase import Recipe
from lpt.engine.session import Session
from lpt.errors import quoted
from lpt.methods import baselines, daso, decoupled, finessl, fixmatch, lpt, pre_finetune, two_stage, ulfine
from lpt.methods.method import Method, resolver
from lpt.methods.own import find_method
from lpt.model.backbones.base import Backbone

METHODS: dict[str, Method] = {
    "lpt": Method(lpt.tune, head=lambda settings: "pool" if settings["epochs"][1] else "cosine"),
    "ulfine": Method(ulfine.tune, head=lambda settings: "fused"),
    "fixmatch": Method(fixmatch.tune),
    "finessl": Method(finessl.tune),
    "daso": Method(daso.tune, head=lambda settings: "fused"),
    "two_stage": Method(two_stage.tune, inner="then"),
    "pre_finetune": Method(pre_finetune.tune, inner="then"),
    "decoupled": Method(decoupled.tune, inner="first", ends_in_epochs=False),
    "fine_tune": Method(baselines.fine_tune),
    "linear_probe": Method(baselines.linear_probe),
    "class_mean": Method(baselines.class_mean, ends_in_epochs=False),
    "knn": Method(baselines.knn, ends_in_epochs=False, head=lambda settings: "neighbors"),
    "zero_shot": Method(baselines.zero_shot, ends_in_epochs=False),
}


def find(name: Any) -> Method:
    """The method of that name: of METHODS, or `module:function`. Raises LptError."""
    return find_method(name, METHODS)


def described(name: str, settings: Mapping[str, Any]) -> str:
    """A method by what sets it apart from others of its name, for the row of a table. `settings` may come from a file
    of unknown origin.

    >>> described("fine_tune", {"tuning": "lora"}), described("lpt", {"epochs": [8, 0]})
    ('fine_tune lora', 'lpt phase 1')
    >>> described("two_stage", {"then": {"name": "knn"}}), described("knn", {})
    ('two_stage knn', 'knn')
    """
    parts = [quoted(name, 40)]
    tuning, adjust, epochs = settings.get("tuning"), settings.get("adjust"), settings.get("epochs")
    if name == "lpt" and tuning == "vpt_deep":  # as it is usually
        tuning = None
    parts += [quoted(one, 40) for one in (tuning, adjust) if isinstance(one, str)]
    if name == "lpt" and isinstance(epochs, list | tuple) and len(epochs) == 2 and 0 in epochs:
        parts.append("phase 1" if epochs[1] == 0 else "phase 2")
    known = METHODS.get(name)
    inner = settings.get(known.inner) if known and known.inner else None
    if isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
        parts.append(quoted(described(inner["name"], inner), 80))
    return " ".join(parts)


def build_recipe(config: Mapping[str, Any], task: Task, backbone: Backbone, session: Session) -> Recipe:
    """The recipe of the method that `config` names and sets. Nothing is trained yet.

    Raises LptError for an unknown method, ConfigError for settings that it does not have or take, all at once, and
    whatever the method itself refuses.
    """
    return resolver(find, task, backbone, session)(config).build()


def nested_methods(config: Mapping[str, Any]) -> Iterator[tuple[str, Method]]:
    """(name, method) of the method that `config` names, and of those inside it, the innermost last. Raises LptError
    where one is unknown or has no name, ConfigError for settings that it does not take."""
    for step in resolver(find)(config).chain:
        yield step.name, step.method


def nested_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, settings with their defaults) of the same methods. Raises what `nested_methods` does."""
    for step in resolver(find)(config).chain:
        yield step.name, step.settings
