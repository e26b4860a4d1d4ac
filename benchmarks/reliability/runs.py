"""Runs as processes of their own: what they are, how they start, what they leave, and whether two left the same."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

REPO = Path(__file__).parents[2]
SHARED = REPO.parent / "shared"
TIMES = ("seconds", "peak_memory_bytes")


class Plan(NamedTuple):
    """A run: what `lpt train` is told, without --out."""

    name: str
    words: tuple[str, ...]

    def with_(self, *more: str) -> "Plan":
        return self._replace(words=(*self.words, *more))


def started(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    first: Sequence[str] = ("-m", "lpt"),
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    **how: Any,
) -> subprocess.Popen[str]:
    """`python -m lpt train ...` on one thread, with its output in pipes. `first` are other words before `train`."""
    words = [sys.executable, *first, "train", *plan.words, "--out", str(out), *["--resume"] * resume]
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    around["PYTHONUNBUFFERED"] = "1"  # what a killed process has said must not be lost
    return subprocess.Popen(
        words,
        cwd=cwd or REPO,
        env=around | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What it said of its mistake, if that is one sentence, exit code 2 and no traceback; else nothing."""
        said = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return said[0] if self.code == 2 and len(said) == 1 and "Traceback" not in self.err else ""


def ended(process: subprocess.Popen[str], *, timeout: float = 600) -> Ended:
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def finished(plan: Plan, out: Path, **how: Any) -> Ended:
    """One whole run. Raises AssertionError with what it said where it fails."""
    end = ended(started(plan, out, **how))
    assert end.code == 0, f"{plan.name} ended with {end.code}: {end.out}{end.err}"
    return end


# What is in a folder.


def broken(folder: Path) -> list[str]:
    """Artefacts in `folder` that do not parse. The last line of a history may be cut: it is written again."""
    return [
        f"{path.relative_to(folder)}: {error}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and (error := _unreadable(path))
    ]


def _unreadable(path: Path) -> str:
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines()[:-1]:
                json.loads(line)
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    file.get_tensor(name)
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".md":
            assert path.read_text().endswith("\n")
    except (OSError, ValueError, AssertionError, SafetensorError, yaml.YAMLError) as error:
        return f"{type(error).__name__} {error}"
    return ""


def half_written(folder: Path) -> int:
    """Temporary files that killed processes have left."""
    return sum(path.suffix == ".tmp" for path in folder.rglob("*"))


def saved(folder: Path) -> dict[str, tuple[int, bool]]:
    """By phase what its checkpoint in the run's `folder` says: the step, and whether the phase has finished."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        if "-" not in path.stem:  # others are of features, and of the best epoch
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["lpt_checkpoint"])
            found[path.stem] = (header["step"], header["finished"])
    return found


def forgot(before: Mapping[str, tuple[int, bool]], said: str) -> list[str]:
    """Phases that a run which `said` this did not continue with where the checkpoints from `before` it had left
    them."""
    return [
        f"{phase} did not continue at step {step}"
        for phase, (step, finished) in before.items()
        if f"{phase}: finished before" not in said and (finished or f"{phase}: continues at step {step} of" not in said)
    ]


def differences(one: Path, two: Path) -> list[str]:
    """Names of results that the two folders do not hold alike: prompt bytes, predictions, pseudo-labels, and report and
    history but for times. The page and the Markdown are made of these."""
    import pyarrow.parquet as pq

    found = []
    for name in ("prompt.safetensors", "predictions.safetensors", "split.json"):
        if (one / name).read_bytes() != (two / name).read_bytes():
            found.append(name)
    if _timeless(json.loads((one / "report.json").read_text())) != _timeless(
        json.loads((two / "report.json").read_text())
    ):
        found.append("report.json")
    histories = [
        [_timeless(json.loads(line)) for line in (folder / "history.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    if histories[0] != histories[1]:
        found.append("history.jsonl")
    tables = [folder / "pseudo_labels" for folder in (one, two)]
    there = [table.exists() for table in tables]
    if there[0] != there[1] or (all(there) and not pq.read_table(tables[0]).equals(pq.read_table(tables[1]))):
        found.append("pseudo_labels")
    return found


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in TIMES and not k.endswith("_seconds")}


# The runs.


def lpt_plan(*epochs: int) -> Plan:
    """LPT on the digits that come with scikit-learn, both phases, on nano."""
    return Plan("LPT", (str(REPO / "configs/digits_lt/lpt.yaml"), f"method.epochs=[{epochs[0]},{epochs[1]}]"))


def two_stage_plan(folder: Path) -> Plan:
    """A reweighted head, then adapters under cross-entropy, on the same digits."""
    then = {"name": "fine_tune", "tuning": "adaptformer", "bottleneck": 4, "epochs": 2, "loss": "ce"}
    config = {
        "backbone": {"name": "nano", "flip": False},
        "data": {"name": "digits-lt"},
        "method": {"name": "two_stage", "epochs_stage1": 8, "then": then},
        "train": {"batch_size": 16},
    }
    return Plan("two_stage", (_written(folder / "two_stage.yaml", config),))


def ulfine_plan(folder: Path, *, steps: int = 36) -> Plan:
    """ULFine on digits as image files, some without labels, with its best round on held-out images."""
    digits_as_files(folder)
    config = {
        "backbone": {"name": "nano", "flip": False},
        "data": {
            "name": "folder",
            "root": str(folder / "photos"),
            "unlabeled": str(folder / "more"),
            "val_per_class": 2,
        },
        "method": {"name": "ulfine", "steps": steps, "rounds": 4, "tau": 0.3, "tuning": "vpt_deep", "lr": 5e-3},
        "train": {"batch_size": 8, "select": "best_val", "watch_test": 2},
        "prototypes": {"weights": str(folder / "prototypes.safetensors")},
    }
    return Plan("ULFine", (_written(folder / "ulfine.yaml", config),))


def digits_as_files(folder: Path) -> None:
    """`photos` with labels, long-tailed, `more` without, and prototypes of nano's width: its class means."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    from lpt.data import load_task
    from lpt.engine.evaluate import features
    from lpt.model.backbones import load_backbone
    from lpt.model.classifier import PromptedClassifier
    from lpt.model.heads import CosineHead, class_means

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    for k in range(10):
        own = np.where(labels == k)[0]
        for part, chosen in (("photos", own[: 30 - 2 * k]), ("more", own[30:40])):
            (folder / part / f"digit {k}").mkdir(parents=True, exist_ok=True)
            for i in chosen.tolist():
                grey = Image.fromarray((pixels[i].reshape(8, 8) * (255 / 16)).round().astype(np.uint8))
                grey.resize((32, 32), Image.Resampling.NEAREST).save(folder / part / f"digit {k}" / f"{i:04d}.png")
    task, backbone = load_task("folder", root=str(folder / "photos")), load_backbone("nano")
    head = CosineHead(num_classes=10, width=backbone.feature_width, scale=1.0)
    model = PromptedClassifier(backbone, head, classes=task.classes)
    rows = class_means(features(model, task.train), task.train.labels, 10).contiguous()
    save_file({"prototypes": rows}, folder / "prototypes.safetensors", {"classes": json.dumps(task.classes)})


def deit_plan() -> Plan | None:
    """LPT on CIFAR-100-LT with a DeiT-Tiny at 64 px, an epoch each; None where data or weights are not at hand."""
    data, weights = SHARED / "data/cifar100", SHARED / "weights/deit_tiny_patch16_224.fp16.safetensors"
    if not (data / "train.parquet").exists() or not weights.exists():
        return None
    settings = ("backbone.image_size=64", "method.epochs=[1,1]", f"data.root={data}", f"backbone.weights={weights}")
    return Plan("LPT on DeiT-Tiny", (str(REPO / "configs/cifar100_lt/lpt_deit_tiny.yaml"), *settings))


def _written(path: Path, config: Mapping[str, Any]) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)
