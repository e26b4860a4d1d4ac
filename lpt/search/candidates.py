"""What `lpt fit` tries, in order of cost, with the settings that follow from counts, backbone and device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lpt.data.task import Task
from lpt.errors import ConfigError
from lpt.methods import METHODS, described
from lpt.settings import settings_of, validated

BACKBONES = {
    "cpu": "timm:deit_tiny_patch16_224.fb_in1k",  # 5.7 million parameters, ImageNet-1k
    "cuda": "timm:vit_base_patch16_224.augreg_in21k",  # LPT's own
}
"""By kind of device, where no `backbone.name` is given."""
BATCHES = {"cpu": 32, "cuda": 128}
"""Images of a step that goes through the backbone, at most, by kind of device."""
REFERENCE = "probe"
"""The candidate that others have to beat: a logit-adjusted linear probe on the features of the backbone's own size."""
PROBE_STEPS, PROBE_EPOCHS, PROBE_RATE = 1000, (20, 400), 5e-3
"""Steps of a probe at least, how many epochs that may be, and their rate: chosen on held-out training images of digits
on nano and of CIFAR-100-LT on DeiT-Tiny. A step on cached features costs a millisecond."""
WIDTH = 192
"""Of DeiT-Tiny, which the rates of prompts and adapters were chosen on."""


@dataclass(frozen=True)
class Candidate:
    """A method with its settings but for the epochs, which are of `epochs` where they are given and else follow from
    the budget. `larger` is on images larger than the backbone's own."""

    name: str
    label: str
    method: Mapping[str, Any]
    batch_size: int
    epochs: int = 0
    larger: bool = False
    seconds: float = field(default=0.0, compare=False)
    """That its training on all images takes, by the plan."""
    image_size: int = 0
    """0 until the plan says it."""

    @property
    def on_features(self) -> bool:
        """Whether no step of it sees an image: features of the bare backbone are enough."""
        return self.method["name"] in ("class_mean", "knn", "linear_probe")

    @property
    def settings(self) -> dict[str, Any]:
        """The section `method:` of a config."""
        return {**self.method, **_epochs(self)}


def _epochs(candidate: Candidate) -> dict[str, Any]:
    """Its `epochs` as its method takes them."""
    epochs = candidate.epochs
    if "epochs" in candidate.method or not epochs:
        return {}
    if candidate.method["name"] != "lpt":
        return {"epochs": epochs}
    return {"epochs": [epochs, 0]}


def candidates(task: Task, device: torch.device, *, width: int, batch_size: int | None = None) -> list[Candidate]:
    """All of them for a backbone of that `width`; `batch_size` is in place of theirs."""
    images = len(task.train)
    for_probe = batch_size or min(128, max(4, images // 16))
    for_images = batch_size or min(BATCHES[device.type], max(4, images // 4))
    steps = max(1, images // for_probe)
    probe = {"name": "linear_probe", "loss": "la", "lr": PROBE_RATE}
    probe_epochs = min(max(-(-PROBE_STEPS // steps), PROBE_EPOCHS[0]), PROBE_EPOCHS[1])
    # AdamW moves each number by its rate, whatever the gradient: rates go down with the width (Yang 2022, muP).
    rate = min(1.0, WIDTH / width)
    tuned = {"name": "fine_tune", "loss": "la", "optimizer": "adamw", "weight_decay": 0.01}
    # Phase 2 is not tried: it buys nothing over phase 1 for as many steps (benchmarks/accuracy/README.md). What follows
    # the head is for `method.epochs` with a second number.
    lpt = {
        "name": "lpt",
        "optimizer": "adamw",
        "lr": [5e-3 * rate, 5e-3 * rate],
        "head_init": "class_mean",
        "pool_size": max(2, min(20, len(task.classes), images // 10)),
        "query_centering": "mean",
        "key_init": "kmeans",
        "query_head": True,
    }
    return [
        Candidate("class-mean", "class means", {"name": "class_mean"}, for_probe),
        Candidate("knn", "nearest neighbours", {"name": "knn"}, for_probe),
        Candidate(REFERENCE, "linear probe, logit-adjusted", probe, for_probe, probe_epochs),
        Candidate("probe-larger", "linear probe, larger images", probe, for_probe, probe_epochs, larger=True),
        Candidate("vpt", "VPT-deep, logit-adjusted", {**tuned, "tuning": "vpt_deep", "lr": 5e-3 * rate}, for_images),
        Candidate("lora", "LoRA, logit-adjusted", {**tuned, "tuning": "lora", "lr": 3e-3 * rate}, for_images),
        Candidate("lpt", "LPT, phase 1 alone", lpt, for_images),
    ]


def narrowed(found: Sequence[Candidate], given: Mapping[str, Any]) -> tuple[list[Candidate], list[str]]:
    """(the candidates that can have the method settings `given`, with them; the labels of the others).

    A method, or a tuning, that is no candidate becomes the only one, with its own defaults. Raises ConfigError with the
    mistakes where no candidate takes the settings.
    """
    wanted = {key: given[key] for key in ("name", "tuning") if key in given}
    agreeing = [one for one in found if wanted.items() <= one.method.items()]
    if not agreeing:
        method = {"name": "fine_tune", **given}
        return [Candidate("given", described(str(method["name"]), method), method, found[-1].batch_size)], []
    kept: list[Candidate] = []
    mistakes: list[str] = []
    for one in agreeing:
        method = {**one.method, **given}
        settings = {key: value for key, value in method.items() if key != "name"}
        wrong = validated("method", settings_of(METHODS[method["name"]].build), settings)[1]
        mistakes += wrong
        if wrong:
            continue
        label = described("lpt", method) if one.name == "lpt" and "epochs" in given else one.label
        kept.append(replace(one, method=method, label=label))
    if not kept:
        raise ConfigError(list(dict.fromkeys(mistakes)))
    labels = {one.label for one in kept}
    return kept, [one.label for one in found if one.label not in labels]
