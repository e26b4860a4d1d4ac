"""Whether `lpt predict --out` takes more memory for more images."""

import io
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data.memory import measured
from benchmarks.reliability.subjects import prompt_on_nano

CODE = """
from lpt.cli import app
folder, photos, name = sys.argv[1:]
words = ["predict", f"{folder}/prompt.safetensors", f"{folder}/{photos}", "--out", f"{folder}/{name}"]
app([*words, "--batch-size", "64"], standalone_mode=False)
print(json.dumps(peak()))
"""


def predict_memory(*, quick: bool = False) -> list[dict[str, Any]]:
    """Peak memory at ten times as many images over that at as many, in folders of a thousand and in one folder, into
    both kinds of file."""
    few, many = (300, 3000) if quick else (10_000, 100_000)
    rows = []
    with tempfile.TemporaryDirectory(prefix="lpt-predict-") as made:
        folder = Path(made)
        prompt_on_nano(folder / "prompt.safetensors")
        for each, suffix in ((1000, ".parquet"), (many, ".jsonl")):
            peaks = []
            for number in (few, many):
                name = f"{each}-{number}"
                make_files(folder / name, number, each=each)
                peaks.append(measured(CODE, str(folder), name, f"{name}{suffix}"))
            unit = (
                f"peak memory at {many:,} over {few:,} images in folders of {each:,}, {suffix[1:]} "
                f"({peaks[1] / 2**20:.0f} and {peaks[0] / 2**20:.0f} MiB)"
            )
            rows.append({"ratio": round(peaks[1] / peaks[0], 4), "unit": unit})
    return rows


def make_files(folder: Path, number: int, *, each: int) -> None:
    """So many times one small image, `each` in a folder."""
    from PIL import Image

    folder.mkdir()
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 90, 10)).save(content, "png")
    for i in range(number):
        path = folder / f"{i // each:04d}" / f"photograph {i:07d}.png"
        if i % each == 0:
            path.parent.mkdir()
        path.write_bytes(content.getvalue())
