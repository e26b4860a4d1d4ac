"""Arguments and options that several commands share, and their parsing."""

import os
from collections.abc import Callable, Mapping, Sequence
from glob import escape, glob
from pathlib import Path
from typing import Annotated, Any

import typer

from lpt.errors import LptError, quoted

OutFile = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="output file, FILE.parquet or FILE.jsonl")]


def named_things(kind: str) -> Callable[[str], list[str]]:
    """Completes the names of a list, or of the lists themselves; of configs and suites also paths."""

    def complete(incomplete: str) -> list[str]:
        from lpt.listing import tables

        lists = tables()
        names = [name for name in (lists if kind == "lists" else lists[kind]) if name.startswith(incomplete)]
        return names + (sorted(glob(f"{escape(incomplete)}*")) if kind in ("configs", "suites") else [])

    return complete


def complete_setting(incomplete: str) -> list[str]:
    """Completes `method.name=NAME`, and the names of backbones and datasets likewise."""
    from lpt.listing import tables

    lists = tables()
    kinds = {"method": "methods", "backbone": "backbones", "data": "data"}
    settings = [f"{section}.name={name}" for section, kind in kinds.items() for name in lists[kind]]
    return [setting for setting in settings if setting.startswith(incomplete)]


ConfigName = Annotated[
    Path,
    typer.Argument(
        help="a YAML file, or a name from `lpt list configs`: digits_lt/lpt", autocompletion=named_things("configs")
    ),
]


Tta = Annotated[
    str,
    typer.Option(
        metavar="none|five_crop", help="test-time augmentation; five_crop: mean over five crops of each image"
    ),
]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="for example train.seed=1", autocompletion=complete_setting),
]


def ensemble_of(text: str) -> Any:
    """The views that --tta asks for. Raises LptError."""
    from typing import get_args

    from lpt.terms import Ensemble

    if text not in get_args(Ensemble):
        raise LptError(f"--tta {quoted(text, 40)}: there are {', '.join(get_args(Ensemble))}")
    return text


def paths_and_settings(
    words: Sequence[Path], *, sections: Sequence[str] = ("backbone", "train")
) -> tuple[list[Path], dict[str, Any]]:
    """The `words` of a command, divided into paths of images and settings of `sections`."""
    from lpt.config import nested
    from lpt.serve.opening import check_loading
    from lpt.serve.predicting import check_there

    texts = [str(path) for path in words]
    settings = nested([t for t in texts if _is_setting(t)])
    check_loading(settings, sections=sections)
    paths = [Path(t) for t in texts if not _is_setting(t)]
    check_there(paths)
    return paths, settings


def _is_setting(text: str) -> bool:
    return text.partition(".")[0] in ("backbone", "train", "data") and "=" in text and not os.path.exists(text)


def open_model(prompt: Path, settings: Mapping[str, Any], *, at_once: int) -> tuple[Any, Any]:
    """(the model of a prompt file, the processes that decode its images), as the sections `backbone` and `train` of
    `settings` have it."""
    from lpt.serve.opening import check_loading, open_prompt, workers_in

    loading = check_loading(settings, sections=("backbone", "train"))
    return open_prompt(prompt, **loading, at_once=at_once)[0], workers_in(settings)
