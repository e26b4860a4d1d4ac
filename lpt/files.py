"""Files on disk: written whole or not at all; tensor files opened with limits, and sealed so that damage shows."""

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from lpt.errors import DiskError, PromptFileError, quoted

if TYPE_CHECKING:  # torch takes seconds to load, and what a file says of itself needs none of it
    from torch import Tensor

# A header is parsed whole before it can be looked at, and takes a kilobyte of memory for each tensor that it names.
MAX_HEADER = 4 * 2**20
"""Bytes of a tensor file's header."""
MAX_TENSORS = 10_000
MAX_AXES = 8


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to the disk, rename: a kill leaves the old file or the new one.

    Raises DiskError where it cannot be written, a full disk for example.
    """
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """`write_atomic` of what is written into the file, for more than is to be held at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(path, error) from error


def to_bytes(tensors: "Mapping[str, Tensor]", **header: Any) -> bytes:
    """A safetensors file, the same bytes for the same tensors.

    `header` is at most one keyword. Its value stands in the metadata as JSON under its name, with a seal: a SHA-256
    over itself and the tensors. (Two names would come in an order by chance.)
    """
    from safetensors.torch import save

    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata: dict[str, str] = {}
    for name, content in header.items():
        metadata[name] = json.dumps({**content, "sha256": seal(content, stored)})
    return save(stored, metadata=metadata or None)


ON_THE_HUB = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>[^/].*)")
"""`hf://owner/name/file`, or `hf://owner/name@revision/file`; a `Path` of it has lost a slash."""


def local_file(path: str | Path) -> Path:
    """Where a file is on this machine: a path as it is, and of `hf://owner/name/file` the copy that the Hub's client
    keeps, which is downloaded if it is new. Raises PromptFileError where it cannot be had."""
    text = str(path)
    if not text.startswith("hf:/"):
        return Path(path)
    named = ON_THE_HUB.fullmatch(text)
    if named is None:
        raise PromptFileError(f"{quoted(text)} names no file of the Hub: write hf://owner/name/file.safetensors")
    from huggingface_hub import hf_hub_download

    repo, file = named["repo"], named["file"]
    try:
        return Path(hf_hub_download(repo, file, revision=named["revision"]))
    except Exception as error:  # of its client, of the network, of the disk: of any class
        reason = why_not_downloaded(error)
        raise PromptFileError(f"prompt file hf://{repo}/{file} could not be downloaded ({reason})") from None


def read_tensors(path: Path) -> "tuple[dict[str, str], dict[str, Tensor]]":
    """(metadata, tensors) of a safetensors file. Raises ValueError with a short reason for whatever is wrong."""
    return _read(path, "pt")


def read_arrays(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The same without torch. Raises ValueError for numbers of a type that numpy does not have, too."""
    return _read(path, "np")


def read_names(path: Path) -> tuple[dict[str, str], list[str]]:
    """(metadata, names of tensors) of a safetensors file, of which nothing else is read. Raises ValueError."""
    return _read(path, "np", with_tensors=False)


def _read(path: Path, framework: str, *, with_tensors: bool = True) -> tuple[dict[str, str], Any]:
    try:
        other = other_format(path)
        if other:
            raise ValueError(f"it is {other}")
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
        if header_size > MAX_HEADER:
            raise ValueError(f"a header of {header_size:,} bytes, {MAX_HEADER:,} are the most")
        with safe_open(path, framework=framework) as opened:
            names = list(opened.keys())
            if len(names) > MAX_TENSORS:
                raise ValueError(f"{len(names):,} tensors, {MAX_TENSORS:,} are the most")
            for name in names:
                stored = opened.get_slice(name)
                if len(stored.get_shape()) > MAX_AXES:
                    raise ValueError(f"{name} has {len(stored.get_shape())} axes, {MAX_AXES} are the most")
                if framework == "np" and stored.get_dtype() not in NUMPY_TYPES:
                    raise ValueError(f"{name} is stored as {stored.get_dtype()}, which numpy does not have")
            tensors = {name: opened.get_tensor(name) for name in names} if with_tensors else names
            return opened.metadata() or {}, tensors
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(quoted(error) or type(error).__name__) from None


NUMPY_TYPES = ("BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "U64", "I64", "F64", "C64")


BEGINNINGS = {
    b"\x80\x02": "a pickle, such as a PyTorch checkpoint",  # of torch before 1.6; tried before an archive's
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file, such as Keras weights",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a compressed file: unpack it",
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: fetch that with git lfs pull",
    b"<!": "a web page, perhaps of a download that asks for a login",
    b"<html": "a web page, perhaps of a download that asks for a login",
}
"""How files begin that people give in the place of safetensors. None of these is the length of a header that is read,
but for a pickle's by chance, whose next bytes are no JSON."""


def other_format(path: Path) -> str | None:
    """What a file is that is no safetensors file, where its first bytes say it. Raises OSError."""
    with path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":  # a header of safetensors, whatever its length is
        return None
    if start.startswith(b"PK\x03\x04"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, OSError, ValueError):
            names = []
        if any(name.endswith("data.pkl") for name in names):
            return "a PyTorch checkpoint"
        return "an archive of NumPy arrays" if any(name.endswith(".npy") for name in names) else "a zip archive"
    return next((kind for beginning, kind in BEGINNINGS.items() if start.startswith(beginning)), None)


def why_not_downloaded(error: BaseException, *, cached: bool = True) -> str:
    """Why a file could not be had from the Hub, in few words, from the many exceptions of its client. `cached` says
    that a cache has been asked, too."""
    in_no_cache = ", and it is in no cache on this machine" if cached else ""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 20:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = " ".join(kind.__name__ for one in causes for kind in type(one).__mro__) + f" {error}"
    if "OfflineModeIsEnabled" in kinds:
        return f"HF_HUB_OFFLINE is set{in_no_cache}"
    if "Invalid credentials" in kinds or "Invalid user token" in kinds:
        return "the Hub does not know the token that it was given: hf auth login stores another one, as does HF_TOKEN"
    if "RemoteEntryNotFound" in kinds:
        return "the repository is there, without such a file"
    if "RevisionNotFound" in kinds:
        return "the repository is there, without such a revision"
    if "401 Unauthorized" in kinds:
        return "the Hub wants to know who asks: hf auth login, or HF_TOKEN"
    if "403 Forbidden" in kinds:
        return "the token that was given has no right to do this"
    if any(name in kinds for name in ("RepositoryNotFound", "DatasetNotFound", "GatedRepo")):
        return "the Hub has none of this name, or only for those who have logged in (hf auth login)"
    if any(name in kinds for name in ("LocalEntryNotFound", "ConnectionError", "ConnectError", "Timeout")):
        return f"the Hub cannot be reached{in_no_cache}"
    return quoted(str(error).strip().partition(". ")[0], 300) or type(error).__name__  # a sentence, not cut within


def is_intact(header: Mapping[str, Any], tensors: "Mapping[str, Tensor | np.ndarray]") -> bool:
    """Whether `header`, with its seal, and `tensors` are what was sealed."""
    sealed = {key: value for key, value in header.items() if key != "sha256"}
    return header.get("sha256") == seal(sealed, tensors)


def seal(header: Mapping[str, Any], tensors: "Mapping[str, Tensor | np.ndarray]") -> str:
    """SHA-256 over the header as JSON and name, type, shape and bytes of every tensor, in hex.

    Arrays of the same numbers have the same seal as tensors.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name}\0{dtype_name(value)}\0{tuple(value.shape)}\0".encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()


def dtype_name(value: "Tensor | np.ndarray") -> str:
    """What torch calls the type of its numbers."""
    return f"torch.{value.dtype}" if isinstance(value, np.ndarray) else str(value.dtype)


def _bytes_of(value: "Tensor | np.ndarray") -> memoryview:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    import torch

    return value.flatten().view(torch.uint8).numpy().data
