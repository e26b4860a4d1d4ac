"""Real files of every sort that anyone could send, made here to be damaged."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lpt.data import load_task
from lpt.data.samplers import InstanceBalanced
from lpt.data.task import Images
from lpt.engine.batches import Stream
from lpt.engine.loop import run_phase
from lpt.engine.phase import Phase
from lpt.engine.session import Session
from lpt.engine.step_memory import StepMemory
from lpt.model.adapters import with_adapter
from lpt.model.backbones import load_backbone, timm_vit
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import Calibration, CosineHead, FusedHead, LinearHead, NeighbourHead
from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt
from lpt.prompt_file import save_prompt

CLASSES = ("ant", "bee", "cat", "dog")
COUNTS = torch.tensor([30, 12, 5, 2])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backbone(image_size: int = 32) -> Any:
    """A tiny ViT with a projection to a joint space, always the same."""
    small = timm_vit.untrained("vit_tiny_patch16_224", image_size=image_size, depth=2, embed_dim=32, num_heads=2)
    small.projection = torch.randn(32, 16, generator=seeded(5))
    return small


def models() -> dict[str, PromptedClassifier]:
    """A model of every sort that a prompt file can hold."""
    bare, generator = backbone(), seeded(0)
    fused = {"num_classes": 4, "width": 32, "joint_width": 16, "project": bare.project}
    bank = F.normalize(torch.randn(49, 32, generator=generator), dim=1)

    def cosine(width: int = 32, project: Any = None) -> CosineHead:
        return CosineHead(num_classes=4, width=width, scale=20.0, generator=generator, project=project)

    def model(head: Any, inside: Any = bare, **parts: Any) -> PromptedClassifier:
        return PromptedClassifier(inside, head, classes=CLASSES, **parts)

    shallow = ShallowPrompt(length=3, width=32, generator=generator)
    deep = DeepPrompt(layers=2, length=3, width=32, generator=generator)
    pool = PromptPool(size=5, topk=2, prefix_blocks=1, depth=2, length=3, width=32, key_width=32, generator=generator)
    every = {
        "lpt": model(cosine(), shared=deep, pool=pool, query_head=cosine()),
        "shallow": model(cosine(), shared=shallow),
        "adaptformer": model(cosine(), with_adapter(bare, "adaptformer", bottleneck=2)),
        "lora": model(cosine(), with_adapter(bare, "lora", rank=2)),
        "norm": model(LinearHead(num_classes=4, width=32), with_adapter(bare, "norm")),
        "knn": model(NeighbourHead(bank=bank, counts=COUNTS, k=5)),
        "fused": model(FusedHead(**fused, fusion="daso", temperature=0.3)),
        "zscore": model(FusedHead(**fused, fusion="zscore"), shared=deep),
        "zero_shot": model(cosine(16, bare.project)),
        "calibrated": model(cosine(), calibration=Calibration(4), shared=deep),
    }
    with torch.no_grad():  # as if it had learned something
        for one in every.values():
            for value in one.learned_state().values():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return {name: one.only_train().eval() for name, one in every.items()}


def make_subjects(folder: Path) -> None:
    """Every file that is going to be damaged, in `folder`."""
    (folder / "prompts").mkdir()
    settings = {"epochs": [1, 1], "lr": [0.02, 0.02], "inside": {"deep": [1, {"a": None}]}}
    facts: dict[str, Any] = {"settings": settings, "data": {"name": "digits-lt", "settings": {"name": "digits-lt"}}}
    facts["metrics"] = {"few": 0.5, "many": None, "nll": 1.25}
    for name, model in models().items():
        storage = "fp32" if name in ("lora", "shallow") else "fp16"
        path = folder / "prompts" / f"{name}.safetensors"
        save_prompt(path, model, method=name, counts=COUNTS, storage=storage, **facts)
    rows, names = torch.randn(4, 16, generator=seeded(1)), json.dumps(CLASSES)
    save_file({"prototypes": rows}, folder / "prototypes.safetensors", metadata={"classes": names})
    save_file(backbone().vit.state_dict(), folder / "weights.safetensors", metadata={"about": "{}"})
    with contextlib.suppress(_Killed):
        resumed(folder, backbone(), killed_at=2)


def prompt_on_nano(path: Path) -> bytes:
    """A prompt file for the backbone that comes with the package, and for digits."""
    bare, task = load_backbone("nano"), load_task("digits-lt")
    head = CosineHead(num_classes=10, width=bare.feature_width, scale=20.0)
    shared = DeepPrompt(layers=bare.depth, length=3, width=bare.width)
    model = PromptedClassifier(bare, head, classes=task.classes, shared=shared).only_train().eval()
    data = {"name": task.name, "settings": {"name": "digits-lt"}}
    save_prompt(path, model, method="lpt", counts=task.counts, data=data, metrics={"few": 0.5})
    return path.read_bytes()


class _Killed(Exception):
    pass


def resumed(folder: Path, bare: Any, *, killed_at: int | None = None) -> torch.Tensor:
    """A run of three steps from the checkpoint in `folder`, if there is one; the weights that it ends with."""
    pixels = torch.randint(0, 255, (12, 3, 16, 16), generator=seeded(2)).to(torch.uint8)
    images = Images(pixels, torch.arange(4).repeat(3), tuple(str(i) for i in range(12)))
    head = CosineHead(num_classes=4, width=32, scale=20.0, generator=seeded(0))
    model = PromptedClassifier(bare, head, classes=CLASSES).only_train("head.")
    session = Session(
        images=images,
        preprocess=bare.preprocess,
        batch_size=4,
        checkpoints=folder,
        checkpoint_seconds=0.0,
        run_hash="a",
        count_flops=False,
    )
    memory = StepMemory()

    def step(model: Any, batches: Any, progress: Any) -> dict[str, Any]:
        if progress.step == killed_at:
            raise _Killed
        memory.note(rows=batches["all"].rows)
        memory.tensors["queue"] = torch.ones(3)
        return {"loss": F.cross_entropy(20 * model(batches["all"].views).logits, batches["all"].labels)}

    stream = {"all": Stream(InstanceBalanced(images.labels, batch_size=4, seed=0))}
    rates: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0}
    phase = Phase(
        name="phase1", trains=("head.",), step=step, streams=stream, steps=3, steps_per_epoch=3, memory=memory, **rates
    )
    run_phase(phase, model, session)
    return head.weight.detach()
