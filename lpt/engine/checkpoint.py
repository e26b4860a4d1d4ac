"""Checkpoints for resuming: one safetensors file a phase, written whole or not at all, never pickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.errors import TrainingError, quoted
from lpt.files import is_intact, read_tensors, to_bytes, write_atomic


class Checkpoint(NamedTuple):
    """`tensors` are the model's adapted ones, `moments` the optimizer's by "<parameter>/<name>", `memory` what the
    method keeps between steps; `seconds` were spent on the phase so far, `flops` is what a step costs."""

    step: int
    finished: bool
    seconds: float
    tensors: dict[str, Tensor]
    moments: Mapping[str, Tensor] = MappingProxyType({})
    memory: Mapping[str, Tensor] = MappingProxyType({})
    flops: int = 0


def save_checkpoint(path: Path, checkpoint: Checkpoint, *, run_hash: str) -> None:
    """Writes the checkpoint whole or not at all. Raises DiskError where it cannot be written."""
    header = {
        "run": run_hash,
        "step": checkpoint.step,
        "finished": checkpoint.finished,
        "seconds": checkpoint.seconds,
        "flops": checkpoint.flops,
    }
    tensors: dict[str, Tensor] = {}
    for part, values in (("model", checkpoint.tensors), ("moment", checkpoint.moments), ("memory", checkpoint.memory)):
        tensors |= {f"{part}/{name}": value for name, value in values.items()}
    write_atomic(path, to_bytes(tensors, lpt_checkpoint=header))


def load_checkpoint(path: Path, *, run_hash: str) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none. Raises TrainingError for one of another run, and
    DamagedCheckpoint for one that is damaged."""
    if not path.exists():
        return None
    try:
        metadata, tensors = read_tensors(path)
        header = json.loads(metadata["lpt_checkpoint"])
        _check_content(header, tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise unreadable(path, error) from None
    if header["run"] != run_hash:
        raise TrainingError(
            f"checkpoint {path} was made with other settings, data, weights or precision: use another --out, or "
            f"the settings in {path.parent.parent / 'config.yaml'} with train.precision as it was"
        )

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}

    return Checkpoint(
        step=header["step"],
        finished=header["finished"],
        seconds=header["seconds"],
        tensors=part("model"),
        moments=part("moment"),
        memory=part("memory"),
        flops=header["flops"],
    )


def _check_content(header: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError with the reason for a checkpoint that is not as it was written."""
    kinds = {"run": str, "step": int, "finished": bool, "seconds": int | float, "flops": int}
    if not isinstance(header, dict) or not all(isinstance(header.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"its header lacks {', '.join(kinds)}, or they are of another kind")
    for name, value in tensors.items():
        # A memory may hold anything; what was learned was finite when it was written.
        if not name.startswith("memory/") and not bool(torch.isfinite(value.float()).all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    if not is_intact(header, tensors):
        raise ValueError("it does not hold what was written")


class DamagedCheckpoint(TrainingError):
    """A checkpoint that is not what was written, and not one of another run."""


def unreadable(path: Path, error: object) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {path} cannot be read ({quoted(error)}): delete it to start its phase again")


def optimizer_moments(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """The optimizer's state by name. Both optimizers keep tensors only (steps included)."""
    return {
        f"{names[parameter]}/{kind}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if value is not None
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor], parameters: Mapping[str, Any]
) -> None:
    """Raises KeyError or ValueError for moments of other parameters, or of another optimizer."""
    kinds = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    if len(moments) != len({key.rpartition("/")[0] for key in moments}) * len(kinds):
        raise ValueError(f"each parameter needs {', '.join(sorted(kinds))}")
    for key, value in moments.items():
        name, _, kind = key.rpartition("/")
        parameter = parameters[name]
        if kind not in kinds or value.shape != (() if kind == "step" else parameter.shape):
            raise ValueError(f"{key} has shape {list(value.shape)}")
        device = "cpu" if kind == "step" else parameter.device  # where torch's own optimizers keep them
        optimizer.state[parameter][kind] = value.to(device)
