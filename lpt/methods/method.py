"""What is known of a method before it is built: its function and settings, how it ends, and the method inside it."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lpt.engine.phase import Recipe, checked_recipe
from lpt.errors import ConfigError, LptError
from lpt.settings import call_with, settings_of, validated

HeadKind = Literal["cosine", "linear", "neighbors", "fused", "pool"]
"""Which head a trained model has: `fused` is of two, `pool` a cosine head behind group prompts."""


@dataclass(frozen=True)
class Method:
    """A method: `(task, backbone, session, *, settings) -> Recipe`, and what others may know of it.

    `inner` names the setting that holds another method, which it runs inside; such a function takes that one, an
    `InnerMethod`, as its fourth argument. `ends_in_epochs` says whether the last thing that happens to the model is an
    epoch of training, so that the best epoch can be chosen. `head` says which head it leaves, by its settings; None
    where that is the inner method's.
    """

    build: Callable[..., Recipe]
    ends_in_epochs: bool = True
    inner: Literal["then", "first"] | None = None
    head: Callable[[Mapping[str, Any]], HeadKind | None] = lambda settings: settings.get("head", "cosine")

    @property
    def description(self) -> str:
        """Of its page, where it has one for itself: its function is called `tune` there."""
        page = sys.modules[self.build.__module__]
        return (page.__doc__ if self.build.__name__ == "tune" else self.build.__doc__) or ""


@dataclass(frozen=True)
class InnerMethod:
    """A method by name, with its settings checked and filled in; `build` makes its recipe, on the same task, backbone
    and session as the method around it. `inner` is the one inside it, if there is one."""

    name: str
    settings: Mapping[str, Any]
    method: Method
    inner: "InnerMethod | None"
    build: Callable[[], Recipe]

    @property
    def chain(self) -> Iterator["InnerMethod"]:
        """Itself, and the methods inside it, the innermost last."""
        yield self
        if self.inner:
            yield from self.inner.chain

    @property
    def innermost(self) -> "InnerMethod":
        return self.inner.innermost if self.inner else self

    @property
    def head(self) -> HeadKind | None:
        """Which head the innermost method leaves."""
        return self.innermost.method.head(self.innermost.settings)

    def with_settings(self, **changes: Any) -> dict[str, Any]:
        """Name and settings as a config has them, with `changes`."""
        return {"name": self.name, **self.settings, **changes}


Resolve = Callable[[Mapping[str, Any]], InnerMethod]
"""Name and settings of a method, as a config has them → that method, checked."""


def resolver(find: Callable[[Any], Method], *context: Any) -> Resolve:
    """Finds methods by `find`; their recipes are built with `context`, which is (task, backbone, session).

    What it returns raises LptError for a method that is unknown or has no name, and ConfigError with all mistakes in
    the settings of one.
    """

    def resolve(config: Mapping[str, Any]) -> InnerMethod:
        if "name" not in config:
            raise LptError(f"method: {dict(config)} has no name, which says what is to run")
        name = config["name"]
        method = find(name)
        given = {key: value for key, value in config.items() if key != "name"}
        settings, mistakes = validated("method", settings_of(method.build), given)
        if mistakes:
            raise ConfigError(mistakes)
        inner = resolve(settings[method.inner]) if method.inner else None

        def build() -> Recipe:
            arguments = (*context, resolve) if method.inner else context
            return checked_recipe(name, call_with(method.build, *arguments, settings=settings))

        return InnerMethod(name, settings, method, inner, build)

    return resolve
