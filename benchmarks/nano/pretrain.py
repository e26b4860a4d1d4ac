"""Pretrains `nano`, the backbone that comes with lpt: a small ViT at 32 px, distilled from DeiT-Tiny on CIFAR-100.

    python -m benchmarks.nano.pretrain --data ../shared/data/cifar100 \\
        --teacher ../shared/weights/deit_tiny_patch16_224.fp16.safetensors --epochs 24 --out runs/nano

Targets are the labels of the full, balanced training set and, for each image and its mirror image, the teacher's
feature, computed once. What is stored is the ViT alone, in fp16. Killed, it continues at the last epoch.

Shapes: images [N 3 32 32] uint8, features [2 N D] (as they are, then mirrored), logits [B 100].
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from lpt.data.cifar import cifar100_lt
from lpt.device import pick_device, pick_precision
from lpt.files import write_atomic
from lpt.model.backbones import load_backbone
from lpt.model.backbones.nano import FILE, PREPROCESS, architecture

CLASSES = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nano.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-100, as data.root of cifar100-lt")
    parser.add_argument("--teacher", required=True, help="safetensors of timm's deit_tiny_patch16_224")
    parser.add_argument("--teacher-size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--images", type=int, help="only the first so many, for a trial")
    parser.add_argument("--out", type=Path, default=Path("runs/nano"))
    parser.add_argument("--install", action="store_true", help=f"write {FILE.name} into the package at the end")
    given = parser.parse_args()
    device = pick_device("auto")
    dtype = torch.bfloat16 if pick_precision("auto", device) == "bf16" else torch.float32
    task = cifar100_lt(given.data, imbalance_factor=1)  # all 500 images of every class
    images, labels = task.train.pixels[: given.images], task.train.labels[: given.images]

    torch.manual_seed(0)
    features = teacher_features(given, images, device, dtype)
    student = Student(features.shape[1]).to(device)
    seconds = train(student, given, images, labels, features, dtype)

    weights = {name: value.detach().cpu().half().contiguous() for name, value in student.vit.state_dict().items()}
    class_names = json.dumps([name.replace("_", " ").lower() for name in task.classes])
    content = to_bytes(weights, {"made": f"benchmarks.nano.pretrain, {given.epochs} epochs", "labels": class_names})
    write_atomic(given.out / FILE.name, content)
    if given.install:
        write_atomic(FILE, content)
    result = {
        "epochs": given.epochs,
        "seconds": round(seconds),
        "bytes": len(content),
        "test_accuracy_of_its_own_head": accuracy(student, task.test.pixels, task.test.labels),
    }
    print(json.dumps(result))


def train(
    student: "Student",
    given: argparse.Namespace,
    images: Tensor,
    labels: Tensor,
    features: Tensor,
    dtype: torch.dtype,
) -> float:
    """Trains `student` and keeps its state after every epoch; returns the seconds that it took, over all starts."""
    device = next(student.parameters()).device
    optimizer = optimizer_of(student)
    checkpoint, first_epoch, seconds = given.out / "state.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, seconds = state["epochs"], state["seconds"]

    steps_per_epoch = len(images) // given.batch
    for epoch in range(first_epoch, given.epochs):
        began, total_loss = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(1000 + epoch)  # each epoch's own, so that a resumed run is the same
        order = torch.randperm(len(images), generator=generator)
        for i in range(steps_per_epoch):
            rate = lr_at(epoch * steps_per_epoch + i, given.epochs * steps_per_epoch, steps_per_epoch, given.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = order[i * given.batch : (i + 1) * given.batch]
            views, mirrored = augmented(images[rows], generator)
            target = features[rows + mirrored * len(images)].to(device).float()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits, imitation = student(views.to(device))
            loss = F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.1)
            loss = loss + 2 * (1 - F.cosine_similarity(imitation.float(), target)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            total_loss += loss.item()
        seconds += time.perf_counter() - began
        mean_loss = total_loss / max(steps_per_epoch, 1)
        print(f"epoch {epoch + 1}/{given.epochs}  loss {mean_loss:.4f}  {seconds:.0f} s", flush=True)
        given.out.mkdir(parents=True, exist_ok=True)
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
        unfinished = checkpoint.with_suffix(".tmp")  # a kill while it is written leaves the last checkpoint intact
        torch.save({**state, "epochs": epoch + 1, "seconds": seconds}, unfinished)
        unfinished.replace(checkpoint)
    return seconds


def optimizer_of(student: "Student") -> torch.optim.Optimizer:
    """AdamW, whose weight decay leaves biases and the scales of norms alone. `lr_at` gives the rate of each step."""
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}])


@torch.no_grad()
def accuracy(student: "Student", pixels: Tensor, labels: Tensor) -> float:
    """Of the classifier that is dropped afterwards, on test images [N 3 32 32] uint8."""
    student.eval()
    device = next(student.parameters()).device
    views = PREPROCESS.test(pixels).to(device)
    predicted = torch.cat([student(part)[0].argmax(1) for part in views.split(500)]).cpu()
    return (predicted == labels).double().mean().item()


class Student(nn.Module):
    """nano with a classifier and a map to the teacher's feature, both dropped afterwards."""

    def __init__(self, teacher_width: int):
        super().__init__()
        self.vit: Any = architecture()
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # torch's fused kernel is half as fast on CPUs in bf16
        self.head = nn.Linear(self.vit.embed_dim, CLASSES)
        self.imitate = nn.Linear(self.vit.embed_dim, teacher_width)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.vit(views)
        return self.head(feature), self.imitate(feature)


@torch.no_grad()
def teacher_features(given: argparse.Namespace, images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Features of each image and of its mirror image [2 N D], kept in the out-folder."""
    path = given.out / f"teacher-{given.teacher_size}-{len(images)}.safetensors"
    if path.exists():
        return load_file(path)["features"]
    teacher = load_backbone("timm:deit_tiny_patch16_224", weights=given.teacher, image_size=given.teacher_size)
    teacher = teacher.to(device, dtype)
    parts = []
    for part in torch.cat([images, images.flip(3)]).split(256):
        tokens = teacher.embed(teacher.preprocess.test(part.to(device), dtype=dtype))
        for i in range(teacher.depth):
            tokens = teacher.block(i, tokens)
        parts.append(teacher.pool(tokens).half().cpu())
    features = torch.cat(parts)
    write_atomic(path, to_bytes({"features": features}))
    return features


def augmented(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shift by up to 4 pixels and mirror. [B 3 32 32] uint8 → (views, mirrored [B] as 0 or 1)."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    mirrored = torch.randint(0, 2, (n,), generator=generator)
    columns = torch.where(mirrored[:, None].bool(), columns.flip(1), columns)
    views = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    return PREPROCESS.normalized(views.contiguous()), mirrored


def lr_at(step: int, steps: int, ramp: int, lr: float) -> float:
    """A linear ramp over the first `ramp` steps, then a cosine to 0."""
    if step < ramp:
        return lr * (step + 1) / ramp
    return lr * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(steps - ramp, 1)))


if __name__ == "__main__":
    main()
