"""A method of one's own as `module:function`: imported where a config names it, and its shape checked.

A prompt file says the name too, but what reads prompt files does not come here: only what checks or runs a method does.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic.errors import PydanticUserError

from lpt.errors import LptError, did_you_mean, quoted
from lpt.methods.method import Method
from lpt.settings import settings_of

OWN_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""`package.module:function`"""
SHAPE = "(task, backbone, session, *, settings) -> Recipe, each setting with its type"


def find_method(name: Any, methods: Mapping[str, Method]) -> Method:
    """The method `name` of `methods`, or of a module. Raises LptError for one that is unknown, cannot be imported, or
    is none."""
    if isinstance(name, str) and name in methods:
        return methods[name]
    if not isinstance(name, str) or not OWN_NAME.fullmatch(name):
        hint = did_you_mean(str(name)[:99], methods)
        known = ", ".join([*methods, "or module:function for one's own"])
        raise LptError(f"method {quoted(repr(name))} is unknown ({known}){hint}")
    module, _, attribute = name.partition(":")
    page = _imported(name, module)
    if not hasattr(page, attribute):
        hint = did_you_mean(attribute, [key for key in vars(page) if not key.startswith("_")])
        raise LptError(f"method {quoted(name)}: {module} has no {attribute}{hint}")
    method = getattr(page, attribute)
    method = method if isinstance(method, Method) else Method(method)
    if problem := _problem_with(method):
        raise LptError(f"method {quoted(name)} {problem}: a method is a function {SHAPE}")
    return method


def _imported(name: str, module: str) -> Any:
    """The module, also of the folder that lpt is run in. Raises LptError."""
    here = os.getcwd()
    if module.partition(".")[0] not in sys.modules and here not in sys.path:
        sys.path.append(here)  # at the end: what is installed wins
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except Exception as error:  # an imported module may raise anything
        reason = quoted(f"{type(error).__name__}: {error}")
        raise LptError(
            f"method {quoted(name)}: {module} cannot be imported ({reason}); it has to be installed, or lie in the "
            "folder that lpt is run in"
        ) from error


def _problem_with(method: Method) -> str | None:
    """What of a method's shape is wrong, if anything."""
    build: Callable[..., Any] = method.build
    if not inspect.isfunction(build):
        return f"is {quoted(repr(build), 80)} and no function"
    named = {name: p for name, p in inspect.signature(build).parameters.items()}
    if variable := [name for name, p in named.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        return f"takes any number of {variable[0]}, which nothing can check"
    leading = [name for name, p in named.items() if p.kind is not p.KEYWORD_ONLY]
    wanted = 4 if method.inner else 3
    if len(leading) != wanted:
        return f"takes {len(leading)} arguments before its settings and not {wanted}"
    if "name" in named:
        return "has a setting `name`, which is the method's own"
    try:
        hints = get_type_hints(build, include_extras=True)
        if untyped := [name for name in named if name not in leading and name not in hints]:
            return f"has a setting {untyped[0]} without a type"
        settings_of(build)
    except (NameError, TypeError, PydanticUserError) as error:
        return f"has settings of types that nothing can check ({quoted(str(error).splitlines()[0])})"
    return None
