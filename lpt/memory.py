"""How much memory a step takes, from shapes alone, before anything is allocated; the message where it ends.

The numbers are those of measured peaks on a CPU (nano, DeiT-Tiny; fp32, bf16; 32 to 448 pixels): a little below them,
so that nothing that fits is refused. Shapes: tokens [B N D], prompt [n D] in each of L blocks, pool [K L n D].
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lpt.errors import LptError, TrainingError
from lpt.model.backbones.base import Backbone

MAX_PATCHES = 2**14
"""Of a view, 128 × 128: each asks each in every block, so that many more would never end."""
LEARNING, ANSWERING = 14, 14
"""Tensors [B N D] that are held for a step's backward, in each block; and in a forward without one, in all."""
FEW_TOKENS = 100 * 100
"""Up to which a CPU makes the matrix of attention (`lpt.model.backbones.timm_vit.attend`)."""
PREDICTED_AT_ONCE = 128
"""Images of an evaluation, or whose features are computed, at a time."""
ON_FEATURES = ("linear_probe", "class_mean", "knn", "zero_shot")
"""Methods whose steps see features that are computed before, and no images."""
USABLE = 0.9
"""The rest is the system's, the libraries' and the data's."""
COPIES = 4
"""Of each trainable parameter: its value, its gradient, and two moments; all in fp32."""


@dataclass(frozen=True)
class Step:
    """What decides the memory of a step. `rows` are views that go through the model together for one image of the
    batch. `learns` says whether anything in front of the head does; `group_prompts` whether there is a pool."""

    backbone: Backbone
    bytes_each: int
    on_cpu: bool
    classes: int
    batch_size: int
    image_size: int
    prompt_length: int = 0
    pool_size: int = 0
    prefix_blocks: int = 0
    adapter_width: int = 0
    rows: float = 1.0
    learns: bool = True
    on_images: bool = True

    @property
    def fixed(self) -> int:
        """Bytes whatever the batch: weights, and trainable parameters."""
        backbone = self.backbone
        group_blocks = max(0, backbone.depth - self.prefix_blocks)
        learned = self.prompt_length * backbone.width * (backbone.depth + self.pool_size * group_blocks)
        learned += self.pool_size * backbone.feature_width + self.classes * backbone.feature_width
        learned += 2 * self.adapter_width * backbone.width * backbone.depth
        weights = sum(parameter.numel() for parameter in backbone.parameters())
        return weights * self.bytes_each + learned * 4 * (COPIES if self.learns else 1)

    @property
    def each(self) -> float:
        """Bytes for each image of the batch."""
        index_and_logits = 100 + 8 * self.backbone.feature_width + 12 * self.classes
        if not self.on_images:
            return index_and_logits
        return index_and_logits + self.rows * (3 * self.image_size**2 * (4 + self.bytes_each) + self._activations())

    @property
    def needed(self) -> int:
        return round(self.fixed + self.each * self.batch_size)

    def _activations(self) -> float:
        backbone = self.backbone
        tokens = (self.image_size // patch_of(backbone)) ** 2 + backbone.prefix
        # A prompt is keys and values; a group prompt is another one for each image.
        prompt = 2 * self.prompt_length * (2 if self.pool_size else 1)
        vit: Any = backbone.vit
        heads: int = vit.blocks[0].attn.num_heads
        pairs = tokens * (tokens + prompt // 2)
        scores = heads * pairs if self.on_cpu and (self.bytes_each == 2 or pairs <= FEW_TOKENS) else 0
        if self.learns:
            kept = (LEARNING * tokens + prompt) * backbone.width + 2 * tokens * self.adapter_width + scores
            return backbone.depth * self.bytes_each * kept
        return self.bytes_each * ((ANSWERING * tokens + prompt) * backbone.width + scores)


def patch_of(backbone: Backbone) -> int:
    """Pixels of a patch's side; 0 for a backbone of one's own, of which nothing is known."""
    vit: Any = getattr(backbone, "vit", None)
    return vit.patch_embed.patch_size[0] if vit is not None else 0


def check_run(
    backbone: Backbone,
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    batch_size: int,
    classes: int,
    dtype: torch.dtype,
    device: torch.device,
    world: int = 1,
) -> None:
    """Raises LptError where a step of one of `methods`, (name, settings) from the outermost to the innermost, or an
    evaluation, needs more memory than there is, with the number and the largest values that fit. `batch_size` is of all
    `world` processes."""
    if not patch_of(backbone):
        return
    size = backbone.preprocess.size
    check_patches(backbone, size, "backbone.image_size")
    common: dict[str, Any] = {"bytes_each": dtype.itemsize, "on_cpu": device.type == "cpu", "classes": classes}
    answering = Step(backbone, **common, batch_size=PREDICTED_AT_ONCE, image_size=size, learns=False)
    evaluation_fits = answering.needed <= available(device)
    for depth, (name, settings) in enumerate(methods):
        if "then" in settings or "first" in settings:  # its own steps are on features, or as those of the one inside
            continue
        section = ".".join(["method", *_inside(methods[:depth])])
        names = {
            "batch_size": "train.batch_size",
            "image_size": "backbone.image_size",
            "prompt_length": f"{section}.prompt_length",
            "pool_size": f"{section}.pool_size",
            "adapter_width": f"{section}.{_adapter_setting(settings) or 'bottleneck'}",
        }
        if not evaluation_fits:  # then a smaller batch alone is no way out
            names = {"image_size": names["image_size"]}
        of_method = _of_method(name, settings)
        step = Step(backbone, **common, batch_size=-(-batch_size // world), image_size=size, **of_method)
        _check(step, device, f"a step of {name}", names, world)
    _check(answering, device, "an evaluation", {"image_size": "backbone.image_size"}, 1)


def _inside(outer: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return ["then" if "then" in settings else "first" for _, settings in outer]


def _adapter_setting(settings: Mapping[str, Any]) -> str | None:
    """The setting that says how wide adapters are, None where there are none."""
    kind = settings.get("tuning", "").rpartition("+")[2]  # of vpt_deep+lora the second
    names = {"lora": ("rank",), "lora_qv": ("rank",), "adaptformer": ("bottleneck", "adapter_dim")}.get(kind, ())
    return next((name for name in names if name in settings), None)


def _of_method(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a method's settings say of its step."""
    tuning = settings.get("tuning", "vpt_deep" if name == "lpt" else "head")
    facts: dict[str, Any] = {
        "learns": tuning != "head",
        "on_images": name not in ON_FEATURES and not settings.get("cached_views"),
        "prompt_length": settings.get("prompt_length", 0) if tuning.startswith("vpt") else 0,
    }
    if setting := _adapter_setting(settings):
        width = settings[setting]
        facts["adapter_width"] = width if isinstance(width, int) else 0  # else it is a small one by rule
    if name == "lpt" and settings["epochs"][1]:
        size = settings["topk"] if settings["query"] == "none" else settings["pool_size"]
        facts |= {"pool_size": size, "prefix_blocks": max(0, settings["prefix_blocks"])}
    if "ratio" in settings:
        strong = settings["ratio"] * settings["strong_views"] if settings.get("lambda_u", 1) else 0
        facts["rows"] = (1 + strong) / settings.get("micro_batches", 1)
    return facts


def check_serving(backbone: Backbone, *, classes: int, batch_size: int, device: torch.device, what: str) -> None:
    """Raises LptError where `backbone` cannot answer `batch_size` images at once, or a view has too many patches.
    `what` begins the sentence."""
    if not patch_of(backbone):
        return
    size = backbone.preprocess.size
    check_patches(backbone, size, what)
    step = Step(
        backbone,
        bytes_each=backbone.dtype.itemsize,
        on_cpu=device.type == "cpu",
        classes=classes,
        batch_size=batch_size,
        image_size=size,
        learns=False,
    )
    if step.needed > (there := available(device)):
        raise LptError(
            f"{what}: {batch_size} images of {size} pixels need {_size(step.needed)}, {_size(there)} are there"
        )


def check_patches(backbone: Backbone, size: int, what: str) -> None:
    """Raises LptError for a view of too many patches."""
    patch = patch_of(backbone)
    if patch and (size // patch) ** 2 > MAX_PATCHES:
        raise LptError(
            f"{what}: views of {size} pixels are {(size // patch) ** 2:,} patches of {patch} on {backbone.name}, "
            f"{MAX_PATCHES:,} are the most: use up to {patch * int(MAX_PATCHES**0.5)} pixels"
        )


def _check(step: Step, device: torch.device, what: str, names: Mapping[str, str], world: int) -> None:
    there = available(device)
    if step.needed <= there:
        return
    fitting = [f"{name}={value}" for key, name in names.items() if (value := _largest(step, key, there, world))]
    way_out = " or ".join(fitting) + " would fit" if fitting else "use a smaller backbone, or another machine"
    where = "this machine" if device.type == "cpu" else f"the GPU ({device})"
    raise LptError(
        f"{what} of {step.batch_size * world:,} images of {step.image_size} pixels needs about {_size(step.needed)} of "
        f"memory, on {where} it can have {_size(there)}: {way_out}"
    )


def _largest(step: Step, key: str, there: int, world: int) -> int:
    """The largest value of one number with which a step fits, 0 where none does. Of a batch a multiple of `world`, of
    an image's side a multiple of the patch."""
    unit = patch_of(step.backbone) if key == "image_size" else 1
    low, high = 0, getattr(step, key) // unit
    while low < high:  # what is needed grows with the value
        middle = (low + high + 1) // 2
        if replace(step, **{key: middle * unit}).needed <= there:
            low = middle
        else:
            high = middle - 1
    return low * unit * (world if key == "batch_size" else 1)


def available(device: torch.device) -> int:
    """Bytes of memory that a step may take: USABLE of the GPU's, of this machine's, or of what this container has."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            limits.append(int(Path(file).read_text()))
    return int(USABLE * min(limits))


def _size(number: float) -> str:
    """As people say it.

    >>> _size(3 * 2**30), _size(309.4e9), _size(5e6)
    ('3.0 GiB', '288 GiB', '5 MiB')
    """
    if number < 2**30:
        return f"{number / 2**20:.0f} MiB"
    return f"{number / 2**30:.1f} GiB" if number < 100 * 2**30 else f"{number / 2**30:,.0f} GiB"


@contextlib.contextmanager
def naming_lack_of_memory(where: Callable[[], str]) -> Iterator[None]:
    """Raises TrainingError where memory has ended inside, on the CPU or the GPU, in place of the allocator's own error,
    with what `where` says of the moment and the settings that lower it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        signs = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in text for sign in signs):
            raise
        wanted = text.partition("ou tried to allocate ")[2].partition(" bytes")[0]
        detail = f" ({_size(int(wanted))} more were wanted)" if wanted.isdigit() else ""
        raise TrainingError(
            f"memory has ended {where()}{detail}: lower train.batch_size, backbone.image_size or method.prompt_length, "
            "or raise method.micro_batches where there is one; with the batch as it was, --resume goes on from what is "
            "saved"
        ) from None
