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

# A header is parsed whole before it can be looked at, and takes a kilobyte of memory for each tensor that it names.
MAX_HEADER = 4 * 2**20
"""Bytes of a tensor file's header."""
MAX_TENSORS = 10_000
MAX_AXES = 8


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to the disk, rename: a kill leaves the old file or the new one.

    Raises DiskError where it cannot be written, a full disk for example.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(path, error) from error


def to_bytes(tensors: Mapping[str, Tensor], **header: Any) -> bytes:
    """A safetensors file, the same bytes for the same tensors.

    `header` is at most one keyword. Its value stands in the metadata as JSON under its name, with a seal: a SHA-256
    over itself and the tensors. (Two names would come in an order by chance.)
    """
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata: dict[str, str] = {}
    for name, content in header.items():
        metadata[name] = json.dumps({**content, "sha256": seal(content, stored)})
    return save(stored, metadata=metadata or None)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file. Raises ValueError with a short reason for whatever is wrong."""
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
        if header_size > MAX_HEADER:
            raise ValueError(f"a header of {header_size:,} bytes, {MAX_HEADER:,} are the most")
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            if len(names) > MAX_TENSORS:
                raise ValueError(f"{len(names):,} tensors, {MAX_TENSORS:,} are the most")
            tensors = {name: opened.get_tensor(name) for name in names}
            metadata = opened.metadata() or {}
        for name, value in tensors.items():
            if value.dim() > MAX_AXES:
                raise ValueError(f"{name} has {value.dim()} axes, {MAX_AXES} are the most")
        return metadata, tensors
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(quoted(error) or type(error).__name__) from None


def is_intact(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether `header`, with its seal, and `tensors` are what was sealed."""
    sealed = {key: value for key, value in header.items() if key != "sha256"}
    return header.get("sha256") == seal(sealed, tensors)


def seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header as JSON and name, type, shape and bytes of every tensor, in hex."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
