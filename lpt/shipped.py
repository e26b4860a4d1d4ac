"""Configs and suites that come with the package, by name; a checkout has them in folders of its own."""

import os
from pathlib import Path
from typing import Literal

from lpt.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).parent
IN_CHECKOUT = {"config": "configs", "suite": "benchmarks/accuracy/suites"}
"""Where the repository has them, which pyproject.toml maps to packages."""

Kind = Literal["config", "suite"]


def shipped(kind: Kind) -> dict[str, Path]:
    """Name → file of every config or suite that comes with lpt: `cifar100_lt/lpt_deit_tiny`, for example."""
    installed = PACKAGE / f"{kind}s"
    folder = installed if installed.is_dir() else PACKAGE.parent / IN_CHECKOUT[kind]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def file_of(kind: Kind, given: str | Path) -> Path:
    """The file that `given` means: that path where there is one, else the shipped one of that name. Raises ConfigError.

    `configs/digits_lt/lpt.yaml`, as a checkout has it, is `digits_lt/lpt` where there is no such file.
    """
    if os.path.isfile(given):
        return Path(given)
    files, name = shipped(kind), Path(given).as_posix()
    name = name.removeprefix(f"{IN_CHECKOUT[kind]}/").removesuffix(".yaml")
    if name in files:
        return files[name]
    alike = [known for known in files if known.rpartition("/")[2] == name.rpartition("/")[2]]
    hint = f"; did you mean {', '.join(alike[:3])}?" if alike else did_you_mean(name[:99], files)
    way_out = hint or f"; `lpt list {kind}s` shows those that come with lpt"
    raise ConfigError([f"{kind} {given} does not exist{way_out}"])
