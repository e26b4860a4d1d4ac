"""A prompt file and its backbone as one model that runs without lpt: a program of `torch.export`, or ONNX.

Shapes: images [B 3 s s] uint8 of any side s, logits and probabilities [B C]. Both B and s are free.
"""

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lpt.device import versions
from lpt.engine.evaluate import mean_logits
from lpt.errors import LptError, quoted, require
from lpt.files import write_atomic
from lpt.model.backbones.published import licence
from lpt.model.backbones.timm_vit import quiet
from lpt.model.classifier import PromptedClassifier
from lpt.prompt_header import Header
from lpt.serve.opening import open_prompt
from lpt.serve.peft_folder import write_peft
from lpt.serve.streaming import file_sha256
from lpt.terms import Ensemble

Form = Literal["torch", "onnx", "peft"]
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
OPSET = 20
"""Of ONNX: what onnxruntime reads since 1.17."""
LARGEST_DIFFERENCE = 1e-3
"""Of logits times their scale, between an exported model and what it was made of; rounding alone makes 1e-5."""


LARGEST_SIDE = 4096
"""Pixels of an image that an exported model takes."""
MOST_IN_ONNX = 2 * 10**9
"""Bytes that one ONNX file can hold."""
OUTPUTS = ("logits", "probabilities")


class Exported(NamedTuple):
    """What was written: the model (for peft its folder), its size, the file that says what it is, and by how much the
    model's scaled logits differ from lpt's own at most; None where it was not run."""

    model: Path
    bytes: int
    facts: Path
    difference: float | None = None


class WholeModel(nn.Module):
    """Pixels in, logits and probabilities out: the test view is a part of it."""

    def __init__(self, model: PromptedClassifier, tta: Ensemble = "none") -> None:
        super().__init__()
        self.model, self.preprocess = model, model.backbone.preprocess.seen_as(tta)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B 3 s s] uint8 → (logits, probabilities) [B C]."""
        logits = mean_logits(self.model, self.preprocess.test(images))
        return logits, self.model.probabilities(logits)


def export_prompt(
    path: str | Path,
    out: str | Path,
    *,
    to: Form,
    weights: str | None = None,
    name: str | None = None,
    tta: Ensemble = "none",
) -> Exported:
    """Writes the model of a prompt file, in fp32, and beside it (in `out`.json) or in it (peft) what it is.

    `weights` and `name` are of the backbone, by default what the file says; `tta` as in `lpt predict`. Raises LptError
    for a name without the suffix of its form, for what the form has no place for, and for a model that answers
    otherwise than lpt does; NotInstalled; DiskError; and what `open_prompt` does.
    """
    out = Path(out)
    _check(out, to, tta)
    model, header = open_prompt(path, weights=weights, name=name, precision="fp32", device="cpu")
    return export_model(path, model, header, out, to=to, tta=tta)


def export_model(
    path: str | Path, model: PromptedClassifier, header: Header, out: Path, *, to: Form, tta: Ensemble = "none"
) -> Exported:
    """As `export_prompt`, of a prompt file that has been opened, in fp32 and on the CPU."""
    model.only_train().eval()
    facts = {"form": to, **facts_of(header, path, out)}
    if to == "peft":
        write_peft(path, out, model, header, facts)
        return Exported(out, sum(file.stat().st_size for file in out.iterdir()), out / "lpt.json")
    whole = WholeModel(model, tta).eval()
    program = traced(whole)
    content, run = _as_torch(program) if to == "torch" else _as_onnx(program, str(out))
    difference = None if run is None else _difference(whole, run, float(header.scale), str(out))
    facts |= {
        "sha256": hashlib.sha256(content).hexdigest(),
        "input": {"images": {"type": "uint8", "shape": ["batch", 3, "side", "side"], "side": [1, LARGEST_SIDE]}},
        "outputs": {name: {"type": "float32", "shape": ["batch", len(header.classes)]} for name in OUTPUTS},
        "tta": tta,
        "largest_difference": difference,
    }
    beside = out.with_name(f"{out.name}.json")
    write_atomic(out, content)
    write_atomic(beside, json.dumps(facts, indent=1).encode())
    return Exported(out, len(content), beside, difference)


def _check(out: Path, to: Form, tta: Ensemble) -> None:
    """Before anything is loaded. Raises LptError and NotInstalled."""
    if to == "peft":
        if tta != "none":
            raise LptError(f"--tta {tta} is for torch and onnx: a timm model sees one view")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise LptError(f"--out {quoted(str(out))} is there already: give the name of a new folder")
    elif out.suffix != SUFFIXES[to]:
        raise LptError(f"--out {quoted(str(out))}: a model for {to} is a file called NAME{SUFFIXES[to]}")
    if to == "onnx":
        for package in ("onnx", "onnxscript"):
            require(package, extra="onnx", gives="lpt export --to onnx")


def facts_of(header: Header, path: str | Path, out: Path) -> dict[str, Any]:
    """What is said of an exported model, whatever its form is."""
    return {
        "model": out.name,
        "prompt_file": {"name": Path(path).name, "sha256": file_sha256(Path(path))},
        "method": header.method,
        "backbone": header.backbone.model_dump(),
        "licence_of_backbone": licence(header.backbone.name),
        "preprocess": asdict(header.preprocess),
        "classes": header.classes,
        "counts": header.counts,
        "scale": header.scale,
        "metrics": header.metrics,
        "versions": versions(),
    }


@torch.no_grad()
def traced(whole: WholeModel) -> torch.export.ExportedProgram:
    """The graph of a model, for any number of square images of any size."""
    images = _images(whole, 2)
    whole(images)  # what is computed once in a process is there now, and does not become a part of the graph
    side = torch.export.Dim("side", min=1, max=LARGEST_SIDE)
    shapes = {"images": {0: torch.export.Dim("batch", min=1), 2: side, 3: side}}
    with _quiet():
        return torch.export.export(whole, (images,), dynamic_shapes=shapes)


def _images(whole: WholeModel, number: int, larger: int = 5) -> Tensor:
    side = whole.preprocess.size + larger
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=generator)


Run = Callable[[Tensor], Tensor]
"""Images to logits."""


def _as_torch(program: torch.export.ExportedProgram) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer)
    module = program.module()
    return buffer.getvalue(), lambda images: module(images)[0]


def _as_onnx(program: torch.export.ExportedProgram, what: str) -> tuple[bytes, Run | None]:
    size = sum(value.nbytes for value in program.state_dict.values())
    if size > MOST_IN_ONNX:
        most = f"{MOST_IN_ONNX:,} are the most of one ONNX file"
        raise LptError(f"{what} is not written: it would have {size:,} bytes, {most}: use --to torch")
    with _quiet():
        made: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=[*OUTPUTS],
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            verbose=False,
        )
        content: bytes = made.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        return content, None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """`torch.sort(..., stable=True)`, which the exporter does not know: ONNX's TopK has ties in the order of places."""
    from onnxscript import opset20 as op

    number = op.Shape(self, start=dim, end=dim + 1 if dim != -1 else None)
    return op.TopK(self, number, axis=dim, largest=int(descending), sorted=1)


@torch.no_grad()
def _difference(whole: WholeModel, run: Run, scale: float, what: str) -> float:
    """By how much scaled logits of images differ at most. Raises LptError where it is more than rounding makes."""
    found = 0.0
    for number, larger in ((1, 0), (3, 11)):
        images = _images(whole, number, larger)
        found = max(found, scale * (run(images) - whole(images)[0]).abs().max().item())
    if not found <= LARGEST_DIFFERENCE:
        raise LptError(f"{what} is not written: its logits differ from lpt's by {found:.2g}; please report this model")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves: of a model that they cannot take they raise an exception."""
    with warnings.catch_warnings(), contextlib.ExitStack() as loggers:
        warnings.simplefilter("ignore")
        for library in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export"):
            loggers.enter_context(quiet(library))
        yield
