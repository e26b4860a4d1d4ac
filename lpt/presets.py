"""Published recipes as settings: a config that names one gets every number of it, and what it says itself wins.

LIFT (Shi 2024), LIFT+ (Shi 2025) and LPT's code (Dong 2023). What they give is written out in the run's config.yaml,
and so is in its hash. Rates of SGD are per 256 images here: twice those at 128.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lpt.errors import did_you_mean, quoted

PRESETS = {
    "lift": "LIFT (Shi 2024): SGD 0.01 at batch 128 for 10 epochs, logit adjustment, cosine head x 25, five crops",
    "lift_plus": "LIFT+ (Shi 2025): twice the rate for half the epochs, MDA crops without flips, bicubic, five crops",
    "lpt_published": "LPT as its code has it (Dong 2023): 40 and 90 epochs, square test views, few up to 20 images",
}
Tree = dict[str, dict[str, Any]]
WIDTHS = {"cifar100-lt": 4, "imagenet-lt": 32, "places-lt": 8, "inat2018": 256}
"""LIFT's width of adapters and rank by dataset; of others 0, which is its rule for the number of classes."""
CLASSES = {"cifar100-lt": 100, "imagenet-lt": 1000, "places-lt": 365, "inat2018": 8142}
LIFT_PLUS_PROMPTS = {"cifar100-lt": 8, "imagenet-lt": 64, "places-lt": 16, "inat2018": 512}
FULL_RATES = {"imagenet-lt": 5e-4, "places-lt": 1e-3, "inat2018": 5e-3}
"""LIFT's rates at batch 128 where everything trains."""
BLOCKS = 12
"""Of the ViT-B/16 that both are published on."""


def expanded(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(`given` with the settings of the preset that it names where it is silent, what is wrong with that).

    A preset is of one method: `given` may not name another. Without a preset `given` is returned as it is.
    """
    tree = {key: value for key, value in given.items() if key != "preset"}
    if "preset" not in given:
        return tree, []
    name = given["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        hint = did_you_mean(str(name)[:99], PRESETS)
        return tree, [f"preset: {quoted(repr(name), 100)} is unknown ({', '.join(PRESETS)}){hint}"]
    sections = {key: dict(value) for key, value in tree.items() if isinstance(value, Mapping)}
    preset = _SETTINGS[name](sections)
    own = sections.get("method", {}).get("name", preset["method"]["name"])
    if own != preset["method"]["name"]:
        return tree, [
            f"preset={name} is of method {preset['method']['name']}, and method.name is {quoted(repr(own), 100)}: "
            "leave one of them out"
        ]
    for section, settings in preset.items():
        if section in tree and section not in sections:
            continue  # what it is in place of settings is said later
        tree[section] = {**settings, **sections.get(section, {})}
    return tree, []


def _lift(sections: Tree) -> Tree:
    data, method, clip = _facts(sections)
    width = WIDTHS.get(data, 0)
    full = method.get("tuning") == "full"
    return {
        "backbone": {
            "transform": "lift",
            "min_area": 0.08,
            "interpolation": "bilinear",
            "crop_schedule": "fixed",
            "flip": True,
        },
        "method": {
            "name": "fine_tune",
            "tuning": "adaptformer",
            "epochs": 20 if data == "inat2018" else 10,
            "loss": "la",
            "tau": 1.0,
            "sampler": "instance",
            "head": "cosine",
            "head_init": "prototypes" if clip else "class_mean",
            "scale": 25.0,
            "bottleneck": width,
            "rank": width,
            "prompt_length": 10,
            "prompt_init": "uniform",
            "optimizer": "sgd",
            "lr": 2 * (FULL_RATES.get(data, 0.01) if full else 0.01),
            "weight_decay": 5e-4,
            "warmup": "none",
        },
        "train": {"batch_size": 128, "tta": "five_crop", "select": "last"},
    }


def _lift_plus(sections: Tree) -> Tree:
    data, method, _ = _facts(sections)
    lift = _lift(sections)
    full = method.get("tuning") == "full"
    rate = FULL_RATES.get(data, 0.01) if full else 0.02
    return {
        "backbone": {**lift["backbone"], "interpolation": "bicubic", "crop_schedule": "mda", "flip": False},
        "method": {
            **lift["method"],
            "epochs": 15 if data == "inat2018" else 5,
            # K/2L of AdaptFormer, a power of two or not; half of LIFT's width as LoRA's rank.
            "bottleneck": CLASSES[data] // (2 * BLOCKS) if data in CLASSES else 0,
            "rank": WIDTHS[data] // 2 if data in WIDTHS else 0,
            "prompt_length": LIFT_PLUS_PROMPTS.get(data, 10),
            "prompt_init": "normal",
            "lr": 2 * rate,
        },
        "train": lift["train"],
    }


def _lpt_published(sections: Tree) -> Tree:
    """Their phase 1 has no script: it is the recipe of phase 2 for 40 epochs (unverified). Theirs chooses the best
    epoch on the test set, which is left out."""
    data: dict[str, Any] = {"group_rule": "le20"} if _facts(sections)[0] in CLASSES else {}
    return {
        "backbone": {
            "name": "timm:vit_base_patch16_224.augreg_in21k",
            "norm_eps": 1e-5,  # theirs; timm's ViTs have 1e-6
            "transform": "lpt",
            "min_area": 0.08,
            "flip": True,
        },
        "data": data,
        "method": {
            "name": "lpt",
            "prompt_length": 10,
            "prefix_blocks": 6,
            "pool_size": 20,
            "topk": 2,
            "epochs": [40, 90],
            "optimizer": "sgd",
            "lr": [0.02, 0.02],
            "weight_decay": 0.01,
            "warmup": "first_epoch_1e-6",
            "loss": "agcl",
            "agcl_form": "code",
            "gammas_bal": [0.0, 4.0],
            "gammas_ins": [0.5, 8.0],
            "scale": 20.0,
            "margin": 0.1,
            "noise": 0.5,
            "label_smoothing": 0.1,
            "head_dropout": 0.1,
            "head_init": "random",
            "beta": 0.5,
            "eta0": 0.5,
            "query_centering": "off",
            "key_init": "tn",
            "pool_init": "tn",
            "query_head": False,
            "instance_stream": "per_step",
            "steps_per_epoch": "floor_plus_1",
        },
        "train": {"batch_size": 256, "precision": "fp32", "seed": 42, "select": "last"},
    }


def _facts(sections: Tree) -> tuple[str, dict[str, Any], bool]:
    """(name of the data, what is reported about the method, whether the backbone has texts)."""
    backbone = str(sections.get("backbone", {}).get("name", ""))
    return str(sections.get("data", {}).get("name", "")), sections.get("method", {}), backbone.startswith("open_clip:")


_SETTINGS: dict[str, Callable[[Tree], Tree]] = {
    "lift": _lift,
    "lift_plus": _lift_plus,
    "lpt_published": _lpt_published,
}
