"""Configs: YAML that says only what differs; the schema of `method:` and `data:` is a function's signature.

All mistakes are found at once, each with its path and a suggestion.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lpt.data import DATA, LOCATION_SETTINGS
from lpt.data.preprocess import MAX_VIEW, Transform
from lpt.errors import ConfigError, LptError, check_kind, did_you_mean, quoted
from lpt.model.backbones.clip_text import TEMPLATE
from lpt.presets import expanded
from lpt.settings import Seed, Weight, settings_of, validated
from lpt.shipped import Kind, file_of
from lpt.terms import Crops, Ensemble, TrackerName

MAX_LETTERS, MAX_VALUES, MAX_DEPTH = 2**16, 100_000, 50
"""Letters and values in a config, and how deep they may be nested."""
MAX_OVERRIDE = 4096
"""Letters of an override. What is longer is for a file."""
MAX_BITS = 256
"""Of a whole number that is read at all; whether a setting takes it is its schema's matter."""
HASHED_SPELLING = {("la_on", "labeled"): "labelled"}
"""Values of methods' settings as hashes of runs have always spelled them: a run of before can be resumed."""

LATER_SETTINGS = {"split_column": None, "split_by": "position"}
"""Settings of `data:` that came after run folders were written, and what a run of before has in their place: with that
its hash is the one of before."""
Trackers = Annotated[list[TrackerName], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
LATER_METHOD_SETTINGS = {
    "cue_zero_shot": 0.0,
    "cue_neighbors": 0.0,
    "cue_top": 5,
    "cue_near": 4,
    "cue_random": False,
    "cue_tau": 1.0,
    "cue_from": "prototypes",
    "distill": 0.0,
    "distill_scale": 100.0,
    "smooth_targets": 0.0,
    "prompt_init": "normal",
}
"""The same of every method, and of those inside it: left at this they are neither in hashes nor in prompt files."""
LATER_SETTINGS_OF = {"lpt": {"query": "full", "tuning": "vpt_deep", "bottleneck": 0, "rank": 8}}
"""And of one method."""
LATER_SECTION_SETTINGS: dict[str, dict[str, Any]] = {
    "train": {"tf32": False, "gnm": 0.0, "tta": "none", "start_seed": None},
    "backbone": {"crop_schedule": "fixed", "interpolation": None},
    "prototypes": {"from": "texts"},
}
"""And of other sections."""
WorkerCount = Literal["auto"] | Annotated[int, Field(ge=0, le=1024)]


class BackboneSettings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    weights: str | None = None
    image_size: int | None = Field(default=None, ge=1, le=MAX_VIEW)
    norm_eps: float | None = Field(default=None, ge=1e-12, le=0.1)
    """ε of the backbone's LayerNorms; by default the model's own, 1e-6 in timm's ViTs. LPT was published with 1e-5."""
    transform: Transform = "timm"
    """Whose pixels: the backbone's own (timm), or those of LIFT's or LPT's code."""
    min_area: float | None = Field(default=None, gt=0, le=1)
    """Smallest area of the random crop of a training view, as a share of the image; by default the transform's."""
    crop_schedule: Crops = "fixed"
    """`mda`: square crops whose least area grows with the epochs of a phase, from `min_area` (by default 0.08) to the
    whole image (LIFT+, Shi 2025)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How pixels are resampled; by default the transform's."""
    flip: bool = True
    """Whether half of the training views are mirrored: off where left and right differ, as in digits and letters."""


class PrototypeSettings(BaseModel):
    """Class prototypes in the joint space of images and texts, for zero-shot and as a start of the head."""

    model_config = ConfigDict(extra="forbid", serialize_by_alias=True)

    source: Literal["texts", "classifier"] = Field(default="texts", alias="from")
    """Texts, or the rows of a supervised checkpoint's own classifier for classes whose names match."""

    weights: str | None = None
    """A safetensors file: `prototypes` [C J], and the class names as a JSON list under `classes` in its metadata. In
    place of texts; beside a classifier for the classes that match none of its own."""
    template: str = TEMPLATE
    """Where no file is given and the backbone has a text tower: a text with {} for the class name, `ensemble` for
    OpenAI's 80 of ImageNet, or a file with one template a line."""


class TrainSettings(BaseModel):
    """`batch_size` counts the images of one stream over all processes; LPT has two streams."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=256, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: Seed = 0
    start_seed: Seed | None = None
    """The seed of prompts, adapters and head as they start, where it is to be another than `seed`: runs that see the
    images in other orders, and can be averaged all the same (`lpt soup`)."""
    device: str = "auto"
    storage: Literal["fp16", "fp32"] = "fp16"
    compile: bool = False
    """Blocks through torch.compile: exact up to rounding, a minute or two of compiling first."""
    select: Literal["last", "best_val"] = "last"
    """Which weights are evaluated and stored: the last, or the last phase's best epoch on held-out images."""
    watch_test: int = Field(default=0, ge=0)
    """After how many of the last epochs the test set is evaluated, to report last, mean, median and best of them."""
    feature_cache: str | None = None
    """A folder where features of fixed views are kept for later runs."""
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    """Seconds between two checkpoints within a phase: what a kill can cost of its steps. 0 is one after every step."""
    gnm: Weight = 0.0
    """Gaussian neighborhood minimization: every gradient is taken so far beside the weights, by chance; 0 is off, 0.005
    its authors' (Li 2024)."""
    tta: Ensemble = "none"
    """Of the report: `five_crop` adds a row of predictions that are means over five crops (TTE of LIFT)."""
    tf32: bool = False
    """Whether a GPU may round the factors of fp32 matrix products to 10 bits (TF32): several times as fast, and other
    numbers. Off as torch has it; products in bf16 do not depend on it."""
    workers: WorkerCount = "auto"
    """Processes that decode files and make strong views: what this machine has for this process, 0 for threads alone.
    No number depends on it."""
    track: Trackers = []
    """Experiment trackers that log the run: [tensorboard], [mlflow, wandb]. No number depends on them."""


class Config(BaseModel):
    """A run's parts, resolved. `method` and `data` hold `name` and that function's own settings."""

    model_config = ConfigDict(extra="forbid")

    backbone: BackboneSettings
    data: dict[str, Any]
    method: dict[str, Any]
    train: TrainSettings = TrainSettings()
    prototypes: PrototypeSettings = PrototypeSettings()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def stored_method_settings(self) -> dict[str, Any]:
        """The method's settings as prompt files have them: without later ones that are left at their defaults."""
        return {key: value for key, value in _as_stored(self.method).items() if key != "name"}

    def run_hash(self, split_sha256: str, backbone: str) -> str:
        """What a checkpoint must agree with: every setting that moves a number, the split and the weights.

        Neither the places of files nor the device nor how often checkpoints are written are.
        """
        parts = self.model_dump()
        parts["method"] = _as_stored(self.method, HASHED_SPELLING)
        for part, key in (
            ("backbone", "weights"),
            ("backbone", "norm_eps"),  # part of `backbone` where it is not the model's own
            ("train", "device"),
            ("train", "feature_cache"),
            ("train", "checkpoint_seconds"),
            ("train", "workers"),
            ("train", "track"),
            ("prototypes", "weights"),
            *(("data", place) for place in LOCATION_SETTINGS),
        ):
            parts[part].pop(key, None)
        for section, settings in LATER_SECTION_SETTINGS.items():
            for key, before in settings.items():
                if parts[section][key] == before:
                    del parts[section][key]
        for key, before in LATER_SETTINGS.items():
            if key in parts["data"] and parts["data"][key] == before:
                del parts["data"][key]
        text = json.dumps([parts, split_sha256, backbone], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config at `path`, or that of this name which comes with lpt, with `key=value` overrides. Raises ConfigError
    with every mistake at once.

    >>> import lpt
    >>> lpt.load_config("digits_lt/lpt", ["train.seed=3"]).train.seed
    3
    """
    check_kind("config", path, (str, Path), "give the path of a YAML file")
    return resolve(read_yaml("config", file_of("config", path)), overrides)


def load_config_of_run(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a run has written, perhaps one of before `LATER_SETTINGS`, with `key=value` overrides. Raises
    ConfigError."""
    raw = read_yaml("config", path)
    if isinstance(raw.get("data"), dict):
        raw["data"] = with_later_settings(raw["data"])
    return resolve(raw, overrides)


def data_of_run(path: Path) -> dict[str, Any]:
    """The data of the config that a run has written. Its method may be someone else's, and is not looked at: to check
    it would import it. Raises ConfigError."""
    data = read_yaml("config", path).get("data")
    return check_data(with_later_settings(data) if isinstance(data, dict) else {})


def with_later_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `data:` that a run or a prompt file has stored, with what it had in place of later ones."""
    name = stored.get("name")
    if not isinstance(name, str) or name not in DATA:
        return dict(stored)
    known = settings_of(DATA[name]).model_fields
    return {**{key: before for key, before in LATER_SETTINGS.items() if key in known}, **stored}


def read_yaml(kind: Kind, path: Path) -> dict[str, Any]:
    """The settings in a config or a suite. Raises ConfigError where it is none."""
    if not os.path.isfile(path):
        raise ConfigError([f"{kind} {path} does not exist; `lpt list {kind}s` shows those that come with lpt"])
    try:
        raw = _yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError([f"{kind} {path} is not YAML: {quoted(error, 300)}"]) from None
    if not isinstance(raw, dict):
        needed = "the sections backbone, data, method, train" if kind == "config" else "rows"
        raise ConfigError([f"{kind} {path} holds {type(raw).__name__}, not {needed}"])
    return raw


def resolve(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Checks a config given as nested dicts, fills in every default, and returns it. Raises ConfigError."""
    tree, mistakes = merged(raw, overrides)
    tree, unknown = expanded(tree)
    mistakes += unknown
    resolved: dict[str, Any] = {}
    for section, check in (("data", _data_section), ("method", _method_section)):
        resolved[section], wrong = check(tree.get(section))
        mistakes += wrong
    for section, model in (
        ("backbone", BackboneSettings),
        ("train", TrainSettings),
        ("prototypes", PrototypeSettings),
    ):
        settings, wrong = validated(section, model, tree.get(section, {}))
        resolved[section] = settings
        mistakes += wrong
    sections = list(Config.model_fields)
    for key in (str(key)[:99] for key in tree if key not in sections):
        hint = did_you_mean(key, sections) or "; sections are " + ", ".join([*sections, "preset"])
        mistakes.append(f"{quoted(key)}: there is no such section{hint}")
    if mistakes:
        raise ConfigError(mistakes)
    return Config.model_validate({key: resolved[key] for key in sections})


def merged(raw: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(`raw` with its overrides, the overrides that make no sense).

    Where `data.name`, `method.name` or the name of a method inside it is overridden by another one, what `raw` says of
    the first does not apply and is left out.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    names = {path: text for text in overrides if NAME_OF_A_FUNCTION.fullmatch(path := text.partition("=")[0])}
    for path, text in sorted(names.items(), key=lambda item: item[0].count(".")):  # from the outside in
        _leave_out_settings_of_another(tree, path.split(".")[:-1], text)
    first = list(names.values())
    rest = [text for text in overrides if text.partition("=")[0] not in names]
    return tree, [m for text in [*first, *rest] if (m := _override(tree, text))]


NAME_OF_A_FUNCTION = re.compile(r"(data|method(\.\w+)*)\.name")
"""Paths of settings that say which function a section is for."""


def _leave_out_settings_of_another(tree: dict[str, Any], sections: Sequence[str], text: str) -> None:
    """Empties the part of `tree` at `sections` where the override `text` of its name gives it another one than it has.

    Names are compared as they are read: quotes and spaces around one make no other of it.
    """
    try:
        name = _yaml(text.partition("=")[2])
    except ValueError:
        return  # `_override` says what is wrong
    part: dict[str, Any] = tree
    for section in sections:
        inside = part.get(section)
        if not isinstance(inside, dict):
            return
        part[section] = part = dict(inside)
    if part.get("name") != name:
        part.clear()


def check_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` section alone, checked and filled in. Raises ConfigError."""
    settings, mistakes = _data_section(dict(given))
    if mistakes:
        raise ConfigError(mistakes)
    return settings


def nested(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`section.key=value` texts as nested dicts. Raises ConfigError.

    >>> nested(["train.seed=1", "backbone.weights=w.safetensors"])
    {'train': {'seed': 1}, 'backbone': {'weights': 'w.safetensors'}}
    """
    tree: dict[str, Any] = {}
    if mistakes := [m for text in overrides if (m := _override(tree, text))]:
        raise ConfigError(mistakes)
    return tree


def _named_section(
    section: str, given: Any, functions: Mapping[str, Callable[..., Any]]
) -> tuple[dict[str, Any], list[str]]:
    """(name and settings of one of `functions`, checked and filled in; what is wrong with them)."""
    if not isinstance(given, dict) or "name" not in given:
        return {}, [f"{section}.name is missing: one of {', '.join(functions)}"]
    name = given["name"]
    if not isinstance(name, str) or name not in functions:
        hint = did_you_mean(str(name)[:99], functions)
        return {}, [f"{section}.name: {quoted(repr(name))} is unknown ({', '.join(functions)}){hint}"]
    rest = {key: value for key, value in given.items() if key != "name"}
    settings, mistakes = validated(section, settings_of(functions[name]), rest)
    return {"name": name, **settings}, mistakes


def _data_section(given: Any) -> tuple[dict[str, Any], list[str]]:
    return _named_section("data", given, DATA)


def _method_section(given: Any, section: str = "method") -> tuple[dict[str, Any], list[str]]:
    """The method, and those inside it."""
    from lpt.methods import METHODS, find  # a third of what there is to import, and predictions need no method

    methods = dict(METHODS)
    if isinstance(given, dict) and isinstance(name := given.get("name"), str) and ":" in name:
        try:
            methods[name] = find(name)
        except LptError as error:
            return {}, [f"{section}.name: {error}"]
    settings, mistakes = _named_section(section, given, {name: method.build for name, method in methods.items()})
    inner = methods[settings["name"]].inner if settings else None
    if inner and isinstance(settings.get(inner), dict):
        settings[inner], wrong = _method_section(settings[inner], f"{section}.{inner}")
        mistakes += wrong
    return settings, mistakes


def _as_stored(settings: Mapping[str, Any], spelling: Mapping[tuple[str, str], str] = {}) -> dict[str, Any]:
    """Settings of a method, and of those inside it, but for later ones with the values of before; (setting, value)
    pairs in `spelling` are replaced by other values."""
    stored, later = {}, {**LATER_METHOD_SETTINGS, **LATER_SETTINGS_OF.get(settings.get("name", ""), {})}
    for key, value in settings.items():
        if key in later and later[key] == value:
            continue
        if isinstance(value, Mapping):
            stored[key] = _as_stored(value, spelling)
        else:
            stored[key] = spelling.get((key, value), value) if isinstance(value, str) else value
    return stored


def _override(tree: dict[str, Any], text: str) -> str | None:
    """Puts `section.key=value` into `tree`; a mistake comes back as its sentence."""
    if not isinstance(text, str):
        return f"{quoted(repr(text))} is not of the form section.key=value, for example train.seed=1"
    path, equals, value = text.partition("=")
    if path == "preset" and value:
        tree["preset"] = value
        return None
    *sections, key = path.split(".")
    if not equals or not sections or not all((*sections, key)):
        return f"{quoted(repr(text))} is not of the form section.key=value, for example train.seed=1"
    if len(text) > MAX_OVERRIDE:
        return f"{quoted(path)}: {len(text)} letters, {MAX_OVERRIDE} are the most: write it into the config file"
    is_path_in_bytes = any("\udc80" <= letter <= "\udcff" for letter in value)  # a name that is no UTF-8
    try:
        parsed = value if is_path_in_bytes else _yaml(value) if value else None
    except TooMuch as error:
        return f"{quoted(path)}: got {quoted(repr(value))}; no setting takes so much: {error}"
    except ValueError:
        return f"{quoted(path)}: the value {quoted(repr(value))} is not YAML"
    part = tree
    for section in sections:
        inside = part.setdefault(section, {})
        if not isinstance(inside, dict):
            return f"{quoted(section)}: expected settings, got {quoted(repr(inside))}"
        part[section] = part = dict(inside)
    part[key] = _number(parsed)
    return None


class _Plain(yaml.SafeLoader):
    """Without merge keys, which copy what they merge: a few hundred letters of them fill the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", node.start_mark)


def _yaml(text: str) -> Any:
    """What `text` says. Raises ValueError where it is not YAML, or so much that it can be no config: aliases of aliases
    make gigabytes of a few lines."""
    if len(text) > MAX_LETTERS:
        raise ValueError(f"{len(text)} letters, {MAX_LETTERS} are the most")
    try:
        content = _Plain(text).get_single_data()
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(error if isinstance(error, yaml.YAMLError) else type(error).__name__) from None
    _check_size(content)
    return content


class TooMuch(ValueError):
    """YAML that says more than a config can hold."""


def _check_size(content: Any) -> None:
    """Raises TooMuch for more values, a deeper nesting or a longer number than a config can have."""
    values_left, waiting = MAX_VALUES, [(content, 0)]
    while waiting:
        part, depth = waiting.pop()
        inside: list[Any] = []
        if isinstance(part, dict):
            inside = [*part, *part.values()]
        elif isinstance(part, list | tuple):
            inside = list(part)
        values_left -= 1 + len(inside)
        if values_left < 0 or depth > MAX_DEPTH or (isinstance(part, int) and part.bit_length() > MAX_BITS):
            raise TooMuch(
                f"more than {MAX_VALUES} values, deeper than {MAX_DEPTH}, or a number of more than {MAX_BITS} bits"
            )
        waiting += [(item, depth + 1) for item in inside]


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-3 (without a dot) as text; people mean a number."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value
