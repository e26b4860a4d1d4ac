"""Small models by open_clip's own code, stored as its files are."""

import json

import pytest
import torch
from safetensors.torch import save_file

open_clip = pytest.importorskip("open_clip")

VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"width": 32, "heads": 2, "layers": 2}
CONFIG = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT}


def stored(folder, config=CONFIG, *, name="small", seed=0, quick_gelu=None):
    """(a model by open_clip's own code, its name there, its weights as a file)."""
    config = json.loads(json.dumps(config if quick_gelu is None else {**config, "quick_gelu": quick_gelu}))
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(name, force_quick_gelu=bool(config.get("quick_gelu"))).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 1:  # zero biases and unit norms would hide mistakes
                    parameter.normal_(mean=float(key.endswith(("weight", "gamma"))), std=0.3)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")
    return model.requires_grad_(False), name, folder / f"{name}.safetensors"
