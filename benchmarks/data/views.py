"""Views a second, against torchvision's pipelines and against the commit before."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data.photos import fill
from benchmarks.data.turns import BEFORE, Pipeline, checkout, rate, rates, ratio
from lpt.data.preprocess import available_cores


def decode_train(*, quick: bool) -> list[dict[str, Any]]:
    return _decode("train", quick)


def decode_test(*, quick: bool) -> list[dict[str, Any]]:
    return _decode("test", quick)


def _decode(view: str, quick: bool) -> list[dict[str, Any]]:
    """JPEG photos of about 500 × 375 from the disk's cache to views of 224, on all cores."""
    cores = available_cores()
    with tempfile.TemporaryDirectory() as folder, checkout() as old:
        fill(Path(folder), 64 if quick else 512)
        same: dict[str, Any] = {"view": view, "folder": folder}
        measured = rates(
            {
                "ours": Pipeline("ours", workers=cores, **same),
                "pillow": Pipeline("torchvision", workers=cores, decoder="pillow", **same),
                "io": Pipeline("torchvision", workers=cores, decoder="io", **same),
                "before": Pipeline("before", source=old, **same),
            },
            turns=2 if quick else 9,
        )
    compared = {
        "pillow": "torchvision's DataLoader (ImageFolder)",
        "io": "torchvision's DataLoader (ImageFolder, torchvision.io)",
        "before": f"our own at {BEFORE}",
    }
    rows: list[dict[str, Any]] = []
    for name, text in compared.items():
        value = ratio(measured, "ours", name, of="a_core_second")
        rows.append({"ratio": value, "unit": f"images/s per core, of {text}"})
    for name in measured:
        value = rate(measured, name, of="a_core_second")
        rows.append({"value": value, "unit": f"images/s per core, {compared.get(name, 'ours')}"})
    for name, text in compared.items():
        value = ratio(measured, "ours", name)
        rows.append({"ratio": value, "unit": f"images/s on {cores} cores, of {text}"})
    return rows


def strong_views(*, quick: bool) -> list[dict[str, Any]]:
    """RandAugment and a gray square: of images of 32 pixels in memory, and of photos with crop and flip."""
    cores, rows = available_cores(), []
    with tempfile.TemporaryDirectory() as folder, checkout() as old:
        fill(Path(folder), 64 if quick else 256)
        for of, number in (("memory", 128 if quick else 1024), ("files", 64 if quick else 256)):
            same: dict[str, Any] = {"of": of, "folder": folder, "number": number}
            measured = rates(
                {
                    "ours": Pipeline("strong", workers=cores, **same),
                    "one": Pipeline("strong", workers=1, **same),
                    "before": Pipeline("strong_before", source=old, **same),
                },
                turns=2 if quick else 7,
            )
            what = "images of 32 pixels in memory" if of == "memory" else "photos"
            rows += [
                {
                    "ratio": ratio(measured, "ours", "before"),
                    "unit": f"views/s of {what}, {cores} cores, of {BEFORE}",
                },
                {"ratio": ratio(measured, "ours", "one"), "unit": f"views/s of {what} on {cores} cores, of one worker"},
                {"value": rate(measured, "ours"), "unit": f"views/s of {what} on {cores} cores"},
                {"value": rate(measured, "ours", of="a_core_second"), "unit": f"views/s of {what} per core"},
                {"value": rate(measured, "before"), "unit": f"views/s of {what} at {BEFORE}"},
            ]
    return rows
