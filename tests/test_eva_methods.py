"""Every tuning and every method on a rotary backbone, and their prompt files."""

from typing import Any

import pytest
import torch

from lpt.engine.loop import follow
from lpt.methods import METHODS
from lpt.model.backbones import timm_vit
from lpt.model.backbones.base import Backbone
from lpt.prompt_file import load_prompt, save_prompt
from tests.support.semi import FAST, semi_task
from tests.support.toy import toy_task
from tests.support.training import bind, recipe_of, train

TUNINGS = ["head", "vpt_shallow", "vpt_deep", "bias", "norm", "adaptformer", "lora", "full"]
FORMS = {"packed": "vit_tiny_patch16_dinov3_qkvb", "separate": "eva02_base_patch16_clip_224"}


def rotary(architecture: str = FORMS["packed"]) -> Backbone:
    """Two blocks of `architecture` at 32 pixels, in which blocks weigh as much as what they add to."""
    changes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "init_values": 0.5}
    backbone = timm_vit.untrained(architecture, image_size=32, **changes)
    generator = torch.Generator().manual_seed(1)
    names = [f"class {k}" for k in range(4)]
    backbone.prototypes = {name: torch.randn(32, generator=generator) for name in names}
    return backbone


def check_its_file(model: Any, method: str, counts: torch.Tensor, path: Any, architecture: str) -> None:
    """A model's prompt file gives the same bits on a backbone that is loaded anew."""
    model = model.only_train().eval()
    save_prompt(path, model, method=method, counts=counts, storage="fp32")
    again = load_prompt(path, rotary(architecture))
    views = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(again(views).logits, model(views).logits)


@pytest.mark.parametrize(
    ("form", "tuning"), [("packed", tuning) for tuning in TUNINGS] + [("separate", "bias"), ("separate", "lora")]
)
def test_every_tuning_learns_and_its_file_reloads_to_the_same_bits(form, tuning, tmp_path):
    task, backbone = toy_task((8, 4)), rotary(FORMS[form])
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    settings = {"tuning": tuning, "epochs": 1, "optimizer": "adamw", "lr": 1e-2, "prompt_length": 2}
    session = bind(task, backbone, batch_size=4)
    recipe = recipe_of("fine_tune", task, backbone, session, **settings)
    start = {name: value.clone() for name, value in recipe.model.learned_state().items()}
    model = follow(recipe, session)
    moved = {name for name, value in model.learned_state().items() if not torch.equal(value, start[name])}
    assert moved and (tuning == "head" or any(name != "head.weight" for name in moved))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    check_its_file(model, "fine_tune", task.counts, tmp_path / "p.safetensors", FORMS[form])


SETTINGS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "class_mean": {},
    "knn": {"k": 3},
    "linear_probe": {"epochs": 1},
    "lpt": {"epochs": (1, 1), "pool_size": 4, "prompt_length": 2, "prefix_blocks": 1},
    "two_stage": {"stage1_train": "last_block", "then": {"name": "fine_tune", "tuning": "norm", "epochs": 1}},
    "pre_finetune": {"then": {"name": "fine_tune", "tuning": "bias", "epochs": 1}},
    "decoupled": {"first": {"name": "linear_probe", "epochs": 1}},
    "ulfine": {**FAST, "bottleneck": None, "adapter_dim": 4},
    "fixmatch": FAST,
    "daso": FAST,
    "finessl": FAST,
}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fine_tune"])
def test_every_method_runs_and_its_file_reloads_to_the_same_bits(method, tmp_path):
    task, backbone = semi_task(), rotary()
    settings = {key: value for key, value in SETTINGS[method].items() if value is not None}
    model = train(method, task, backbone, bind(task, backbone, batch_size=8), **settings)
    check_its_file(model, method, task.counts, tmp_path / "p.safetensors", FORMS["packed"])
