"""`lpt predict --out` over many images, killed at random moments and gone on with: no row is lost, and none doubled.

Kills fall while a process starts, while rows are written, and while the parts are joined, in turn; the end is compared
with the rows of an undisturbed process.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability.row import Row
from benchmarks.reliability.runs import REPO, Ended, ended
from benchmarks.reliability.subjects import prompt_on_nano

KINDS = ("rows", "rows", "start", "rows", "end")
"""When kills fall: after the next part, before the first one of a process, after the last image."""
BEGIN = "import lpt.serve.row_file as file; file.ROWS_A_PART = {rows}; from lpt.cli import main; main()"


def rows(quick: bool) -> list[Row]:
    images, part, kills = (300, 50, 3) if quick else (20_000, 2048, 20)
    with tempfile.TemporaryDirectory(prefix="lpt-answers-") as made:
        folder = Path(made)
        make_images(folder / "photos", images)
        prompt_on_nano(folder / "prompt.safetensors")
        suffixes = (".parquet",) if quick else (".parquet", ".jsonl")
        return [killed(folder, suffix, images=images, part=part, kills=kills) for suffix in suffixes]


def make_images(folder: Path, number: int) -> None:
    """Small images in some folders, one of them broken."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"{i % 7}" / f"{i:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((32, 32)).save(path, compress_level=1)
    (folder / "0" / "000000.png").write_bytes(b"no image")


def started(folder: Path, out: Path, part: int) -> subprocess.Popen[str]:
    """`lpt predict --out --resume` on one thread, which writes `part` rows at a time."""
    words = ["predict", "prompt.safetensors", "photos", "--out", out.name, "--resume", "--batch-size", "64"]
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN.format(rows=part), *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(folder: Path, suffix: str, *, images: int, part: int, kills: int) -> Row:
    """Kills processes until there have been `kills`, and lets the last one come to its end."""
    began, whole = time.perf_counter(), folder / f"whole{suffix}"
    process, seconds = started(folder, whole, part), time.perf_counter()
    while process.poll() is None and not parts(whole):
        time.sleep(0.01)
    starting = time.perf_counter() - seconds
    end = ended(process, timeout=3600)
    assert end.code == 0, end
    a_part = (time.perf_counter() - seconds - starting) / max(1, images // part)
    chance, where, wrong = random.Random(kills), Counter[str](), list[str]()
    survived = files = 0
    out = folder / f"killed 0{suffix}"
    while True:
        kind = KINDS[sum(where.values()) % len(KINDS)] if sum(where.values()) < kills else ""
        end, fell = life(folder, out, part, images, kind, chance, starting=starting, a_part=a_part)
        if end.code == -signal.SIGKILL:
            where[fell] += 1
            survived += 1
            continue
        files += 1
        if end.code:
            survived -= 1
            wrong.append(f"continued to exit code {end.code}: {end.err.strip().splitlines()[-1]}")
        else:
            wrong += differences(whole, out, images)
        if not kind:
            break
        out = folder / f"killed {files}{suffix}"
    fell = ", ".join(f"{number} {text}" for text, number in where.most_common())
    note = (
        f"{fell}; {images} images, {files} files to their end, equal to an undisturbed one where nothing else is said"
    )
    check = f"SIGKILL, predict --out {suffix[1:]}"
    return Row(check, kills, survived, len(wrong), time.perf_counter() - began, "; ".join([note, *wrong]))


def life(
    folder: Path,
    out: Path,
    part: int,
    images: int,
    kind: str,
    chance: random.Random,
    *,
    starting: float,
    a_part: float,
) -> tuple[Ended, str]:
    """One process, and where it was when it was killed, if it was."""
    before = parts(out)
    process = started(folder, out, part)
    if kind == "start":
        _wait(process, chance.uniform(0, starting))
    elif kind:
        # `end` waits for the last part, and kills while they are joined, or soon after that.
        while process.poll() is None and (parts(out) == before if kind == "rows" else written(out) < images):
            time.sleep(0.001)
        _wait(process, chance.uniform(0, 2 * a_part if kind == "rows" else 0.1))
    if kind:
        process.kill()
    end, after = ended(process, timeout=3600), parts(out)
    if out.exists():
        fell = "after the end"
    elif written(out) == images:
        fell = "while parts were joined"
    else:
        fell = "before a part" if after == before else "between parts"
    return end, fell


def parts(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.partial").glob("rows-*"))


def written(out: Path) -> int:
    """Rows that are in parts, all where the file is there."""
    return 10**9 if out.exists() else sum(int(name.split("-")[2]) for name in parts(out))


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    until = time.perf_counter() + seconds
    while process.poll() is None and time.perf_counter() < until:
        time.sleep(0.002)


def differences(whole: Path, out: Path, images: int) -> list[str]:
    """What is amiss with the rows of `out`, each of them by the path of its image."""
    expected, found = table(whole), table(out)
    times = Counter(row["path"] for row in found)
    wrong = [f"{path} is there {number} times" for path, number in times.items() if number != 1]
    wrong += [f"{row['path']} is lost" for row in expected if row["path"] not in times]
    if len(found) != images or found != expected:
        wrong.append(f"{len(found)} rows are not the {len(expected)} of an undisturbed process")
    left = out.with_name(f"{out.name}.partial")
    return [*wrong[:5], *([f"{left.name} is left"] if left.exists() else [])]


def table(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]
