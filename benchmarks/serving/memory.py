"""Memory of a thousand tasks on DeiT-Tiny beyond the backbone, in a process of its own."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data.memory import measured
from benchmarks.serving.libraries import Kind, backbone_of, fill

CODE = """
import gc, time, torch
from benchmarks.serving.libraries import backbone_of
from lpt.device import used_memory
from lpt.serve.bank import Asked, TaskBank
folder, warm, size, memory = sys.argv[1:5]
backbone = backbone_of("deit_tiny", "fp32", image_size=int(size))
view = torch.randn(3, int(size), int(size))
first = TaskBank(backbone, warm)
first.answer([Asked(task, view) for task in first.hold(first.tasks)])
del first
gc.collect()
before = used_memory(torch.device("cpu"))
began = time.perf_counter()
bank = TaskBank(backbone, folder, memory=int(memory) or None)
opened = time.perf_counter() - began
names = bank.tasks
began = time.perf_counter()
for start in range(0, len(names), 50):
    bank.answer([Asked(task, view) for task in bank.hold(names[start : start + 50])])
asked = time.perf_counter() - began
gc.collect()
used = used_memory(torch.device("cpu")) - before
print(json.dumps({"used": used, "peak": peak() - before, "tensors": bank.bytes, "loaded": len(bank.loaded),
                  "opened": opened, "tasks": len(bank), "asked": asked}))
"""


def memory_1000(*, quick: bool) -> list[dict[str, Any]]:
    """Deep prompts of 10 tokens, all in memory; LPT's pools, all in memory and within 400 MB."""
    rows = []
    number, size = (20, 32) if quick else (1000, 224)
    backbone = backbone_of("deit_tiny", "fp32", image_size=size)
    kinds: list[tuple[Kind, str, int]] = [("deep", "memory-1000", 0), ("pool", "memory-1000-pool", 0)]
    kinds.append(("pool", "memory-1000-pool/budget", 400_000_000))
    for kind, check, memory in kinds:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as warm:
            fill(Path(folder), backbone, kind, number)
            fill(Path(warm), backbone, kind, min(50, number), first=number)
            found = measured(CODE, folder, warm, str(size), str(memory))
        assert found["tasks"] == number
        rows.append({
            "check": check,
            "value": round(found["used"] / 1e9, 3),
            "unit": f"GB of {number} tasks beyond the backbone"
            + (f" with a budget of {memory / 1e9:g} GB" if memory else ""),
            "peak": round(found["peak"] / 1e9, 3),
            "tensors": round(found["tensors"] / 1e9, 3),
            "kB_a_task": round(found["used"] / number / 1e3, 1),
            "in_memory": found["loaded"],
            "seconds_to_open": round(found["opened"], 1),
            "seconds_to_ask_each": round(found["asked"], 1),
        })  # fmt: skip
    return rows
