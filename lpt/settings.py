"""Settings: the schema of a function's keyword arguments is its signature, and every mistake gets a sentence."""

import inspect
import numbers
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, create_model

from lpt.errors import ConfigError, did_you_mean, quoted

Positive = Annotated[int, Field(ge=1)]
MAX_ADAPTER_WIDTH = 4096
"""Of what a prompt file may hold, and so of what is trained."""
AdapterWidth = Annotated[int, Field(ge=0, le=MAX_ADAPTER_WIDTH)]
Rank = Annotated[int, Field(ge=1, le=MAX_ADAPTER_WIDTH)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31 - 1)]
"""A number that every library takes as a seed, as it does the next one."""
Factor = Annotated[float, Field(ge=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
"""As far as a prompt file stores one: beyond, numbers of 32 bits are 0 or infinite."""
Threshold = Annotated[float, Field(gt=0, le=1)]
LARGEST_BITS = 63
"""Of a whole number: what tensors can hold."""


def renamed(old: str, new: str) -> BeforeValidator:
    """Of a setting whose value `old` is spelled `new` now: it is read with a warning."""

    def respelled(value: Any, info: ValidationInfo) -> Any:
        if value != old:
            return value
        warnings.warn(
            f"{info.field_name}={old} is spelled {new} now; lpt 0.3 will not read it", FutureWarning, stacklevel=2
        )
        return new

    return BeforeValidator(respelled)


@dataclass(frozen=True)
class Without:
    """On a parameter that is a group of settings: fields that this function does not offer."""

    names: tuple[str, ...]


class NamedSettings(BaseModel):
    """What `settings_of` returns. Beside these settings a config's section has the function's own `name`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def settings_of(function: Callable[..., Any]) -> type[NamedSettings]:
    """The keyword arguments of a method or of a dataset function, as a schema. A parameter whose type is a dataclass is
    a group of settings: its fields stand in the schema by themselves, with the defaults of the parameter's default."""
    hints = get_type_hints(function, include_extras=True)
    schema: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(parameter.default):
            schema |= _group_fields(hints[name], parameter.default)
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY or name == "root":
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            schema[name] = (hints[name], default)
    return create_model(function.__name__, __base__=NamedSettings, **schema)


def _group_fields(hint: Any, default: Any) -> dict[str, tuple[Any, Any]]:
    hidden = {name for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Without) for name in mark.names}
    hints = get_type_hints(type(default), include_extras=True)
    return {f.name: (hints[f.name], getattr(default, f.name)) for f in fields(default) if f.name not in hidden}


def call_with(function: Callable[..., Any], *arguments: Any, settings: Mapping[str, Any]) -> Any:
    """Calls `function` with settings as its schema has them: those of a group become the group again."""
    keywords = dict(settings)
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(parameter.default):
            given = {f.name: keywords.pop(f.name) for f in fields(parameter.default) if f.name in keywords}
            keywords[name] = replace(parameter.default, **given)  # type: ignore[type-var]
    return function(*arguments, **keywords)


def validated(section: str, model: type[BaseModel], given: Any) -> tuple[dict[str, Any], list[str]]:
    """(`given` checked and filled in with the defaults, what is wrong with it, a sentence each); one of the two is
    empty, unless the schema has no setting. `section` begins the path of each setting in a sentence."""
    if not isinstance(given, dict):
        return {}, [f"{section}: expected settings, got {quoted(repr(given))}"]
    given = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in given.items()}
    try:
        values = model.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        return {}, [_sentence(section, model, mistake) for mistake in error.errors()]
    mistakes = [m for key, value in given.items() for m in _of_another_kind(f"{section}.{key}", value, values[key])]
    return ({}, mistakes) if mistakes else (values, [])


def checked_arguments(function: Callable[..., Any], **given: Any) -> list[Any]:
    """Arguments of a public function, checked as settings of a config are and as they are meant. Raises ConfigError
    with all mistakes.

    Parameters of `function` that are not given are not looked at.
    """
    hints = get_type_hints(function, include_extras=True)
    schema: dict[str, Any] = {name: (hints[name], ...) for name in given}
    model = create_model(function.__name__, __base__=NamedSettings, **schema)
    settings, mistakes = validated(function.__name__, model, given)
    if mistakes:
        raise ConfigError(mistakes)
    return [settings[name] for name in given]


def _of_another_kind(path: str, given: Any, value: Any) -> list[str]:
    """What is wrong where a setting was `given` as a truth or a fraction and has become the number or truth `value`:
    pydantic takes one for the other, but whoever writes `batch_size: true` means something else."""
    if isinstance(value, list) and isinstance(given, Sequence) and len(given) == len(value):
        parts = [(f"{path}.{i}", one, value[i]) for i, one in enumerate(given)]
        return [mistake for part in parts for mistake in _of_another_kind(*part)]
    needed = ""
    if isinstance(value, bool):
        needed = "" if isinstance(given, bool) else "true or false is needed"
    elif isinstance(value, int):
        if isinstance(given, bool) or (isinstance(given, numbers.Real) and not isinstance(given, numbers.Integral)):
            needed = "a whole number is needed" if isinstance(given, bool) else f"a whole number is needed: {value}"
        elif value.bit_length() > LARGEST_BITS:
            needed = f"numbers have at most {LARGEST_BITS} bits"
    elif isinstance(value, float) and isinstance(given, bool):
        needed = "a number is needed"
    return [f"{quoted(path, 100)}: got {quoted(repr(given))}; {needed}"] if needed else []


def _sentence(section: str, model: type[BaseModel], mistake: Any) -> str:
    """One of pydantic's errors in our words, with the path of the setting."""
    keys = [str(key) for key in mistake["loc"]]
    path = quoted(".".join([section, *keys]), 100)
    if mistake["type"] == "extra_forbidden":
        known = [
            *(["name"] if issubclass(model, NamedSettings) else []),
            *(field.alias or key for key, field in model.model_fields.items()),
        ]
        hint = did_you_mean(keys[-1][:99], known) or f"; there are {', '.join(known)}"
        return f"{path}: there is no such setting{hint}"
    if mistake["type"] == "missing":
        return f"{path} is missing"
    reason = mistake["msg"]
    return f"{path}: got {quoted(repr(mistake['input']))}; {reason[0].lower()}{quoted(reason[1:])}"
