"""Settings: the schema of a function's keyword arguments is its signature, and every mistake gets a sentence."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lpt.errors import did_you_mean, quoted

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31 - 1)]
"""What every library takes, and the number after it."""
Factor = Annotated[float, Field(ge=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Scale = Annotated[float, Field(gt=0)]
Threshold = Annotated[float, Field(gt=0, le=1)]


class NamedSettings(BaseModel):
    """What `settings_of` returns. Beside these settings a config's section has the function's own `name`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def settings_of(function: Callable[..., Any]) -> type[NamedSettings]:
    """The keyword arguments of a `tune` or of a dataset function, as a schema."""
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or name == "root":
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints[name], default)
    return create_model(function.__name__, __base__=NamedSettings, **fields)


def validated(section: str, model: type[BaseModel], given: Any) -> tuple[dict[str, Any], list[str]]:
    """`given` checked and filled in with the defaults, and what is wrong with it, a sentence each."""
    if not isinstance(given, dict):
        return {}, [f"{section}: expected settings, got {quoted(repr(given))}"]
    try:
        return model.model_validate(given).model_dump(mode="json"), []
    except ValidationError as error:
        return {}, [_mistake(section, model, one) for one in error.errors()]


def _mistake(section: str, model: type[BaseModel], error: Any) -> str:
    where = quoted(".".join([section, *(str(part) for part in error["loc"])]), 100)
    if error["type"] == "extra_forbidden":
        known = ["name"] if issubclass(model, NamedSettings) else []
        known += model.model_fields
        key = str(error["loc"][-1])
        return f"{where}: there is no such setting{did_you_mean(key[:99], known) or '; there are ' + ', '.join(known)}"
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: got {quoted(repr(error['input']))}; {error['msg'][0].lower()}{quoted(error['msg'][1:])}"
