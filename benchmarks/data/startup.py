"""What a command costs before it does anything: CPU seconds of `lpt --help`, `list`, `inspect`, and of one prediction.

The commands of this checkout and of the commit before run in turns; of each the smallest number counts, since what else
the machine does can only add to it.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data.turns import BEFORE, ROOT, checkout

LIGHT = {"help": ("--help",), "list": ("list",), "inspect": ("inspect", "{prompt}")}


def startup_help(*, quick: bool = False) -> list[dict[str, Any]]:
    """CPU seconds of what needs no torch, and how many times less they are than before."""
    with _subjects() as (prompt, _, before):
        return _compared(LIGHT, before, turns=1 if quick else 5, prompt=prompt)


def startup_predict(*, quick: bool = False) -> list[dict[str, Any]]:
    """CPU seconds of one image on nano, and how many times less they are than before."""
    with _subjects() as (prompt, image, before):
        commands = {"predict, nano, one image": ("predict", "{prompt}", image)}
        return _compared(commands, before, turns=1 if quick else 7, prompt=prompt)


def _compared(commands: dict[str, Sequence[str]], before: Path, *, turns: int, prompt: str) -> list[dict[str, Any]]:
    rows = []
    for name, words in commands.items():
        words = [word.format(prompt=prompt) for word in words]
        now_and_before = [(cpu_seconds(words, ROOT), cpu_seconds(words, before)) for _ in range(turns)]
        now, then = (min(column) for column in zip(*now_and_before, strict=True))
        rows.append({"value": round(now, 3), "unit": f"CPU seconds, {name}"})
        rows.append({"ratio": round(then / now, 2), "unit": f"less CPU than at {BEFORE} ({then:.2f} s), {name}"})
    return rows


def cpu_seconds(words: Sequence[str], source: Path) -> float:
    """Of `lpt` with these words from the checkout at `source`, the user's and the system's."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lpt", *words], cwd=source, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (words, process.returncode)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _subjects() -> Iterator[tuple[str, str, Path]]:
    """(a prompt file on nano, an image, a checkout of the commit before)."""
    import torch
    from PIL import Image

    import lpt

    with checkout() as before, tempfile.TemporaryDirectory() as folder:
        prompt, image = Path(folder, "prompt.safetensors"), Path(folder, "image.png")
        Image.frombytes("RGB", (64, 48), bytes(range(256)) * 36).save(image)
        pixels = torch.arange(8 * 3 * 32 * 32).view(8, 3, 32, 32).to(torch.uint8)
        images = lpt.Images(pixels, torch.arange(8) % 2, tuple(map(str, range(8))))
        task = lpt.Task("two", ("a", "b"), images, images)
        model = lpt.tune(task, lpt.load_backbone("nano"), method="class_mean")
        lpt.save_prompt(prompt, model, method="class_mean", counts=task.counts)
        yield str(prompt), str(image), before
