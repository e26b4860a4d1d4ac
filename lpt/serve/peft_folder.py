"""A prompt file of LoRA as a folder that peft loads onto the timm model: the same logits, without lpt.

Shapes: A [r D], B [3D r], head [C D'].
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from lpt.errors import LptError, quoted
from lpt.files import write_atomic
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead, LinearHead
from lpt.prompt_header import Header

KINDS = ("lora", "lora_qv")
WAY_OUT = "--to torch and --to onnx take every prompt file"
PREFIX = "base_model.model."
"""How names begin in peft's files."""

Adapter = tuple[dict[str, Any], dict[str, Tensor]]
"""(fields of adapter_config.json that say what the update is, its tensors by their names in the timm model)."""


def write_peft(
    path: str | Path, out: Path, model: PromptedClassifier, header: Header, facts: Mapping[str, Any]
) -> None:
    """Writes the model of the prompt file `path` as the folder `out`: adapter_config.json, adapter_model.safetensors,
    README.md, and `facts` as lpt.json. Raises LptError for a prompt file that is more than LoRA and a cosine or linear
    head, and for a backbone that is no model of timm; DiskError."""
    check_exportable(path, model, header)
    kind = str((model.backbone.recipe or {})["kind"])
    update, tensors = _lora(model) if kind == "lora" else _query_value_lora(model)
    tensors |= head_of(model)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": header.backbone.name.partition(":")[2],
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": ["head"],
        **update,
    }
    stored = {f"{PREFIX}{key}": value.contiguous() for key, value in tensors.items()}
    files = {
        "adapter_model.safetensors": save(stored, metadata={"format": "pt"}),
        "README.md": readme(model, header).encode(),
        "lpt.json": json.dumps(facts, indent=1).encode(),
        "adapter_config.json": json.dumps(config, indent=1).encode(),  # last: without it the folder is none of peft's
    }
    for file, content in files.items():
        write_atomic(out / file, content)


def check_exportable(path: str | Path, model: PromptedClassifier, header: Header) -> None:
    """Raises LptError for what peft has no place for."""
    backbone = model.backbone
    kind = (backbone.recipe or {}).get("kind")
    if kind not in KINDS:
        raise LptError(f"prompt file {path} is no LoRA ({header.method}), which alone peft has a place for: {WAY_OUT}")
    if model.shared is not None or model.pool is not None:
        raise LptError(f"prompt file {path} has prompts beside its LoRA, which peft has no place for: {WAY_OUT}")
    if not isinstance(model.head, CosineHead | LinearHead):
        raise LptError(
            f"prompt file {path} has a {type(model.head).__name__}, and a timm model's head is linear: {WAY_OUT}"
        )
    if header.backbone.name.partition(":")[0] not in ("timm", "untrained"):
        raise LptError(
            f"prompt file {path} is for {quoted(header.backbone.name)}, which is no model of timm's: {WAY_OUT}"
        )
    if backbone.norm_eps is not None:
        raise LptError(
            f"prompt file {path} has ε = {backbone.norm_eps} in its LayerNorms, timm's model another: {WAY_OUT}"
        )
    vit: Any = getattr(backbone, "vit", None)
    if getattr(vit.blocks[0].attn, "q_bias", None) is not None and getattr(vit.blocks[0].attn, "qkv", None) is not None:
        raise LptError(
            f"prompt file {path} is for {quoted(header.backbone.name)}, whose own forward reads past what peft adds to "
            f"it: {WAY_OUT}"
        )


def _lora(model: PromptedClassifier) -> Adapter:
    """As peft has made it."""
    backbone: Any = model.backbone
    rank = int(backbone.recipe["rank"])
    tensors = {
        name.removeprefix("backbone.vit.").replace(".default", ""): value
        for name, value in model.learned_state().items()
        if ".lora_" in name
    }
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": [*backbone.projections]}, tensors


def _query_value_lora(model: PromptedClassifier) -> Adapter:
    """LIFT's two updates of a packed projection as one of twice the rank: A = [A_q; A_v], and B has B_q in the rows of
    q, B_v in those of v, zeros elsewhere. Its scale is 1 / r, as theirs are."""
    backbone: Any = model.backbone
    rank, state = int(backbone.recipe["rank"]), model.learned_state()
    tensors: dict[str, Tensor] = {}
    if backbone.projections != ("qkv",):
        for name, value in state.items():
            if ".lora_" in name:
                tensors[f"{name.removeprefix('backbone.vit.')}.weight"] = value
        return {"r": rank, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"]}, tensors
    for i in range(backbone.depth):
        of = f"blocks.{i}.attn.qkv."
        (a_q, b_q), (a_v, b_v) = ([state[f"backbone.vit.{of}lora_{x}.{part}"] for x in "AB"] for part in "qv")
        width = len(b_q)
        b = b_q.new_zeros(3 * width, 2 * rank)
        b[:width, :rank], b[2 * width :, rank:] = b_q, b_v
        tensors[f"{of}lora_A.weight"], tensors[f"{of}lora_B.weight"] = torch.cat([a_q, a_v]), b
    return {"r": 2 * rank, "lora_alpha": 2, "target_modules": ["qkv"]}, tensors


@torch.no_grad()
def head_of(model: PromptedClassifier) -> dict[str, Tensor]:
    """Rows and offsets of the timm model's `head`, with the calibration in them. Of a cosine head the rows are of unit
    length before that, and it is for features of unit length."""
    head, calibration = model.head, model.calibration
    assert isinstance(head, CosineHead | LinearHead)
    weight = head.weight.float()
    if isinstance(head, CosineHead):
        weight = F.normalize(weight, dim=1, eps=1e-12)
        bias = torch.zeros(len(weight))
    else:
        bias = head.bias.float()
    if calibration is not None:
        weight = calibration.scale[:, None] * weight
        bias = calibration.scale * bias + calibration.offset * calibration.unit
    return {"head.weight": weight, "head.bias": bias}


def readme(model: PromptedClassifier, header: Header) -> str:
    """How the folder is loaded."""
    name, pixels = header.backbone.name.partition(":")[2], header.preprocess
    is_cosine = isinstance(model.head, CosineHead)
    pretrained = "" if header.backbone.name.startswith("untrained:") else "pretrained=True, "
    if is_cosine:
        answer = [
            "feature = model.forward_head(model.forward_features(images), pre_logits=True)",
            "logits = model.get_classifier()(torch.nn.functional.normalize(feature, dim=1))",
        ]
    else:
        answer = ["logits = model(images)"]
    lines = [
        f"# {quoted(header.method, 60)} on {quoted(name, 100)}",
        "",
        f"LoRA and a head of {len(header.classes)} classes, which are named in `lpt.json`. Load it with timm and peft:",
        "",
        "```python",
        "import json",
        "from pathlib import Path",
        "import timm",
        "import torch",
        "from peft import PeftModel",
        "",
        f"size, classes = {header.backbone.image_size}, json.loads(Path('FOLDER/lpt.json').read_text())['classes']",
        f"base = timm.create_model({name!r}, {pretrained}img_size=size, num_classes=len(classes))",
        "model = PeftModel.from_pretrained(base, 'FOLDER').eval()",
        *answer,
        f"probabilities = ({model.head.scale:g} * logits).softmax(1)",
        "```",
        "",
        f"`images` are float [B 3 {pixels.size} {pixels.size}], (pixel / 255 - mean) / std with mean "
        f"{[*pixels.mean]} and std {[*pixels.std]}; the shorter side resized ({pixels.interpolation}) to "
        f"{int(pixels.size / pixels.crop_ratio)} pixels, and the center cropped.",
        "",
        f"The weights below it are {quoted(header.backbone.name, 100)}, by their fingerprint "
        f"{quoted(header.backbone.fingerprint, 40)}.",
        "",
    ]
    return "\n".join(lines)
