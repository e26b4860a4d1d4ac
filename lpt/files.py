"""Files on disk: written whole or not at all; tensor files opened with limits, and sealed so that damage shows."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lpt.errors import DiskError, quoted

MAX_HEADER = 4 * 2**20
MAX_TENSORS, MAX_AXES = 10_000, 8
"""A header is parsed whole before it can be looked at, and takes a kilobyte of memory for each tensor that it names."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to the disk, rename: a kill leaves the old file or the new one.

    Raises DiskError where it cannot be written, a full disk for example.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(path, error) from error


def to_bytes(tensors: Mapping[str, Tensor], **header: Any) -> bytes:
    """A safetensors file. A `header` has one name, under which it stands in the metadata as JSON (two would come in an
    order by chance), with a seal: a SHA-256 over itself and the tensors."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    texts = {name: json.dumps({**of, "sha256": seal(of, whole)}) for name, of in header.items()}
    return save(whole, metadata=texts or None)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file. Raises ValueError with a short reason for whatever is wrong."""
    try:
        with path.open("rb") as file:
            if (size := int.from_bytes(file.read(8), "little")) > MAX_HEADER:
                raise ValueError(f"a header of {size:,} bytes, {MAX_HEADER:,} are the most")
        with safe_open(path, framework="pt") as opened:
            if len(names := list(opened.keys())) > MAX_TENSORS:
                raise ValueError(f"{len(names):,} tensors, {MAX_TENSORS:,} are the most")
            found = {name: opened.get_tensor(name) for name in names}
            if deep := [name for name, value in found.items() if value.dim() > MAX_AXES]:
                raise ValueError(f"{deep[0]} has {found[deep[0]].dim()} axes, {MAX_AXES} are the most")
            return opened.metadata() or {}, found
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(quoted(error) or type(error).__name__) from None


def is_intact(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether both are what was sealed."""
    bare = {key: value for key, value in header.items() if key != "sha256"}
    return header.get("sha256") == seal(bare, tensors)


def seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
