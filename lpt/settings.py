"""Settings: the schema of a function's keyword arguments is its signature, and every mistake gets a sentence."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lpt.errors import did_you_mean, quoted

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31 - 1)]
"""A number that every library takes as a seed, as it does the next one."""
Factor = Annotated[float, Field(ge=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Scale = Annotated[float, Field(gt=0)]
Threshold = Annotated[float, Field(gt=0, le=1)]


def settings_of(function: Callable[..., Any]) -> type[BaseModel]:
    """The schema of a `tune` or of a dataset function: its keyword arguments, and `root`."""
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and name != "root":
            continue
        is_required = parameter.default is inspect.Parameter.empty
        fields[name] = (hints[name], ... if is_required else parameter.default)
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def validated(section: str, model: type[BaseModel], given: Any) -> tuple[dict[str, Any], list[str]]:
    """(`given` checked and filled in with the defaults, what is wrong with it, a sentence each); one of the two is
    empty, unless the schema has no setting. `section` begins the path of each setting in a sentence."""
    if not isinstance(given, dict):
        return {}, [f"{section}: expected settings, got {quoted(repr(given))}"]
    try:
        return model.model_validate(given).model_dump(mode="json"), []
    except ValidationError as error:
        return {}, [_sentence(section, model, mistake) for mistake in error.errors()]


def _sentence(section: str, model: type[BaseModel], mistake: Any) -> str:
    """One of pydantic's errors in our words, with the path of the setting."""
    keys = [str(key) for key in mistake["loc"]]
    path = quoted(".".join([section, *keys]), 100)
    if mistake["type"] == "extra_forbidden":
        known = ["name", *model.model_fields]
        hint = did_you_mean(keys[-1][:99], known) or f"; there are {', '.join(known)}"
        return f"{path}: there is no such setting{hint}"
    if mistake["type"] == "missing":
        return f"{path} is missing"
    reason = mistake["msg"]
    return f"{path}: got {quoted(repr(mistake['input']))}; {reason[0].lower()}{quoted(reason[1:])}"
