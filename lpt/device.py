"""Where a run computes and in which precision, and what it says of the machine and the libraries."""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from lpt.errors import LptError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first GPU if there is one. Raises LptError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LptError(f"train.device {name!r} is no device: use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise LptError(f"train.device {name!r} is not supported: use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LptError(f"train.device is {name}, but torch sees {torch.cuda.device_count()} GPUs: use cpu or auto")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """A key of `PRECISIONS`; `auto` is bf16 where the processor computes in it, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if has_bf16 else "fp32"


def allow_tf32(device: torch.device, allowed: bool) -> None:
    """Whether `device`, a GPU, may compute matrix products of fp32 numbers in TF32, in this process from now on."""
    torch.set_float32_matmul_precision("high" if allowed and device.type == "cuda" else "highest")


def versions() -> dict[str, str]:
    """Of Python and of the libraries that results may depend on."""
    names = ("lpt", "torch", "torchvision", "timm", "faiss-cpu", "numpy", "safetensors", "accelerate")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds now: on the GPU where it runs there, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: on the GPU where it ran there, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux's ru_maxrss begins with what the process had that started this one
    if status.exists() and (peak_line := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(peak_line[1])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes elsewhere
