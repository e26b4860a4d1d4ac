"""Exported models: the logits of lpt's own predictions, for every kind of prompt, head and tuning, in every form."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lpt.data.task import Images
from lpt.engine.evaluate import predict
from lpt.errors import LptError
from lpt.model.adapters import with_adapter
from lpt.model.backbones import load_backbone, timm_vit
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import Calibration, CosineHead, FusedHead, LinearHead, NeighbourHead
from lpt.model.matching import match
from lpt.model.prompts import ShallowPrompt
from lpt.prompt_file import load_prompt, save_prompt
from lpt.prompt_header import read_header
from lpt.serve import exporting
from lpt.serve.exporting import export_model
from tests.support.command_line import lpt
from tests.support.shared import ROOT
from tests.support.toy import of_mode, prompted, small_backbone

COUNTS = torch.tensor([10, 8, 7, 6, 5, 3, 1])
CLASSES = tuple(str(k) for k in range(len(COUNTS)))


@pytest.fixture
def backbone():
    return small_backbone(depth=2, width=16)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(kind, backbone):
    number, width = len(CLASSES), backbone.feature_width
    if kind == "cosine":
        return CosineHead(num_classes=number, width=width, scale=20, generator=torch.Generator().manual_seed(1))
    if kind == "knn":
        return NeighbourHead(bank=F.normalize(normal(int(COUNTS.sum()), width), dim=1), counts=COUNTS, k=5)
    if kind == "linear":
        head = LinearHead(num_classes=number, width=width)
        head.bias.data.copy_(normal(number))
    else:
        head = FusedHead(num_classes=number, width=width, joint_width=width, fusion=kind)
        head.prototypes.copy_(normal(number, width, seed=2))
        head.frequency.copy_(normal(number).softmax(0))
    head.weight.data.copy_(normal(number, width))
    return head


def classifier(backbone, head="cosine", **parts):
    return PromptedClassifier(backbone, head_of(head, backbone), classes=CLASSES, **parts)


def calibrated(model):
    model.calibration = Calibration(len(CLASSES))
    model.calibration.scale.data.copy_(1 + 0.1 * normal(len(CLASSES)))
    model.calibration.offset.data.copy_(normal(len(CLASSES)))
    return model


def with_query_head(model):
    width = model.backbone.feature_width
    model.query_head = CosineHead(num_classes=len(CLASSES), width=width, scale=20, generator=torch.Generator())
    return calibrated(model)


def adapted(backbone, kind, head="cosine"):
    copy = with_adapter(backbone, kind)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if name in copy.learned:
                parameter.add_(0.2 * normal(*parameter.shape))
    return classifier(copy, head)


def early(model):
    width = model.backbone.width
    return of_mode(model, "early", query_map=normal(width, 2 * width + 1))


KINDS = {
    "cosine": lambda b: classifier(b),
    "linear": lambda b: calibrated(classifier(b, "linear")),
    "knn": lambda b: classifier(b, "knn"),
    **{f"fused_{kind}": lambda b, kind=kind: classifier(b, kind) for kind in ("scale", "zscore", "prob", "daso")},
    "vpt_shallow": lambda b: classifier(b, shared=ShallowPrompt(length=3, width=b.width)),
    "vpt_deep": lambda b: prompted(b, pool=False),
    "lpt": lambda b: with_query_head(prompted(b)),
    "lpt_early": lambda b: early(prompted(b)),
    "lpt_none": lambda b: of_mode(prompted(b), "none", ids=torch.tensor([1, 3])),
    **{
        kind: lambda b, kind=kind: adapted(b, kind)
        for kind in ("bias", "norm", "adaptformer", "lora", "lora_qv", "full")
    },
}


def opened(model, backbone, folder):
    """(prompt file, its model on the same backbone, its header)."""
    path = folder / "prompt.safetensors"
    save_prompt(path, model, method="toy", counts=COUNTS, storage="fp32")
    return path, load_prompt(path, backbone), read_header(path)[0]


def pictures(number, side, seed=0):
    return torch.randint(
        0, 256, (number, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def logits_of(model, pixels):
    labels = torch.zeros(len(pixels), dtype=torch.long)
    return predict(model, Images(pixels, labels, tuple(map(str, range(len(pixels)))))).logits


def loaded(path):
    """Images [B 3 s s] to (logits, probabilities), by what the form's own library reads."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return module
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install lpt[onnx]")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]


def same(run, model, sizes=((1, 32), (5, 47))):
    for number, side in sizes:
        images = pictures(number, side)
        logits, probabilities = run(images)
        expected = logits_of(model, images)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(probabilities, model.probabilities(expected), atol=1e-4, rtol=0)


OPERATORS = ("knn", "fused_daso", "vpt_shallow", "lpt", "lora")
"""Kinds that together have every operator of the others; the others as ONNX are slow tests: seconds for each."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_torch_program_answers_as_lpt_does(kind, tmp_path):
    answers_as_lpt_does(kind, tmp_path, "model.pt2")


@pytest.mark.parametrize(
    "kind", [kind if kind in OPERATORS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_an_onnx_model_answers_as_lpt_does(kind, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install lpt[onnx]")
    answers_as_lpt_does(kind, tmp_path, "model.onnx")


def answers_as_lpt_does(kind, folder, name):
    backbone = small_backbone(depth=2 if kind.startswith(("lpt", "vpt")) else 1, width=16)
    path, model, header = opened(KINDS[kind](backbone), backbone, folder)
    written = export_model(path, model, header, folder / name, to="torch" if name.endswith(".pt2") else "onnx")
    assert written.difference is not None and written.difference < exporting.LARGEST_DIFFERENCE
    same(loaded(written.model), model)


ROTARY = {
    "vit_small_patch16_dinov3": 64,  # one rotation for all blocks
    "vit_small_patch16_rope_mixed_224": 64,  # one for each block and head
    "eva02_tiny_patch14_224": 56,  # neighbours turn together; projections apart
}


@pytest.mark.parametrize("architecture", ROTARY)
def test_rotary_backbones(architecture, tmp_path):
    size = ROTARY[architecture]
    backbone = timm_vit.untrained(architecture, image_size=size, depth=2, embed_dim=96, num_heads=3)
    path, model, header = opened(prompted(backbone, num_classes=len(CLASSES)), backbone, tmp_path)
    written = export_model(path, model, header, tmp_path / "model.pt2", to="torch")
    same(loaded(written.model), model, sizes=((1, size), (3, size + 7)))


def test_clip_with_texts(clip, tmp_path):
    head = CosineHead(num_classes=len(CLASSES), width=clip.joint_width, scale=100, project=clip.project)
    path, model, header = opened(PromptedClassifier(clip, head, classes=CLASSES), clip, tmp_path)
    written = export_model(path, model, header, tmp_path / "model.pt2", to="torch")
    same(loaded(written.model), model)


def test_five_crops(backbone, tmp_path):
    path, model, header = opened(KINDS["vpt_deep"](backbone), backbone, tmp_path)
    written = export_model(path, model, header, tmp_path / "model.pt2", to="torch", tta="five_crop")
    images = pictures(3, 50)
    data = Images(images, torch.zeros(3, dtype=torch.long), ("a", "b", "c"))
    expected = predict(model, data, tta="five_crop").logits
    torch.testing.assert_close(loaded(written.model)(images)[0], expected, atol=1e-4, rtol=0)
    assert (expected - logits_of(model, images)).abs().max() > 1e-3


def test_a_large_pool_is_matched_without_an_index(backbone):
    """As an index would match it, equal keys to the first of them."""
    queries, keys = normal(9, 16), normal(300, 16, seed=2)
    keys[290] = keys[3]

    class Matching(torch.nn.Module):
        def forward(self, queries):
            return match(queries, keys, 4)

    program = torch.export.export(Matching(), (queries,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for found, expected in zip(program.module()(queries[:5]), match(queries[:5], keys, 4), strict=True):
        torch.testing.assert_close(found, expected)


DOCS = (ROOT / "docs" / "export.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL) for line in block.splitlines()]


def nano_prompt(path):
    save_prompt(path, classifier(load_backbone("nano")), method="class_mean", counts=COUNTS)


def test_the_commands_of_the_page_run(tmp_path, capsys, monkeypatch):
    """Exactly as they stand; what a model is stands beside it, and its answers are those of `lpt predict` on files."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install lpt[onnx]")
    monkeypatch.chdir(tmp_path)
    nano_prompt(Path("prompt.safetensors"))
    Image.fromarray(pictures(1, 32)[0].permute(1, 2, 0).numpy()).save("photo.png")
    Image.open("photo.png").save("photo.jpg", quality=95)
    for command in SHELL[:2]:
        code, said, wrong = lpt(capsys, *shlex.split(command)[1:])
        assert code == 0 and not wrong and ".json says what it is" in said, wrong
    facts, header = json.loads(Path("model.pt2.json").read_text()), read_header("prompt.safetensors")[0]
    assert facts["classes"] == header.classes and facts["backbone"]["fingerprint"] == header.backbone.fingerprint
    assert facts["sha256"] == exporting.file_sha256(Path("model.pt2")) and facts["form"] == "torch"
    assert facts["prompt_file"]["sha256"] == exporting.file_sha256(Path("prompt.safetensors"))
    code, _, wrong = lpt(capsys, "predict", "prompt.safetensors", "photo.jpg", "--topk", 7, "--json", "answers.json")
    assert code == 0, wrong
    (answer,) = json.loads(Path("answers.json").read_text())
    (program,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict = {}
    exec(program, names)
    assert capsys.readouterr().out.split() == [answer["classes"][0]] * 2
    by_name = dict(zip(answer["classes"], answer["probabilities"], strict=True))
    expected = [by_name[name] for name in facts["classes"]]  # of the view's own size: nothing is resized
    np.testing.assert_allclose(names["probabilities"][0], expected, atol=1e-4)


# peft.


def tuned_by_lora(kind, head, folder, architecture="vit_tiny_patch16_224"):
    """(weights of a model of timm, as a file; the classifier of a prompt file on it)."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vit = timm.create_model(architecture, num_classes=0)
    weights = folder / "vit.safetensors"
    save_file({name: value.contiguous() for name, value in vit.state_dict().items()}, weights)
    backbone = timm_vit.load(architecture, weights=weights)
    model = adapted(backbone, kind, head)
    path = folder / "lora.safetensors"
    save_prompt(path, calibrated(model) if head == "linear" else model, method="fine_tune", counts=COUNTS)
    return weights, load_prompt(path, backbone)


def logits_by_peft(folder, weights):
    """As the folder's README has it, with weights from a file in the place of a download."""
    from safetensors.torch import load_file

    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    made, rest = program.split("model = PeftModel")
    names = {}
    exec(made.replace("pretrained=True, ", ""), names)
    names["base"].load_state_dict(load_file(weights), strict=False)

    def logits(views):
        scope = dict(names, images=views)
        with torch.no_grad():
            exec("model = PeftModel" + rest, scope)
        return scope["logits"], scope["probabilities"]

    return logits


@pytest.mark.parametrize(("kind", "head"), [("lora", "cosine"), ("lora", "linear"), ("lora_qv", "cosine")])
def test_peft_loads_lora_on_the_timm_model(kind, head, tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft", reason="peft is not installed: pip install lpt[lora]")
    weights, model = tuned_by_lora(kind, head, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, said, wrong = lpt(capsys, *shlex.split(SHELL[2])[1:])
    out = tmp_path / "adapter"
    assert code == 0 and "README.md in it loads it" in said, wrong
    assert json.loads((out / "lpt.json").read_text())["classes"] == list(CLASSES)
    views = normal(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(views).logits
    logits, probabilities = logits_by_peft(out, weights)(views)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(probabilities, model.probabilities(expected), atol=1e-4, rtol=0)
    bare = classifier(timm_vit.load("vit_tiny_patch16_224", weights=weights), head)
    assert (bare.feature(views) - model.feature(views)).abs().max() > 0.01  # what LoRA has learned is something


REFUSED = {
    "is no LoRA": lambda b: classifier(b),
    "has a FusedHead": lambda b: adapted(b, "lora", "scale"),
    "has a NeighbourHead": lambda b: adapted(b, "lora_qv", "knn"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_peft_has_no_place_for_is_refused(reason, backbone, tmp_path):
    path, model, header = opened(REFUSED[reason](backbone), backbone, tmp_path)
    with pytest.raises(LptError, match=f"{reason}.*--to torch and --to onnx take every prompt file"):
        export_model(path, model, header, tmp_path / "folder", to="peft")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--to", "tensorrt", "--out", "a.pt2"], "--to tensorrt: there are torch, onnx, peft"),
        (["--to", "torch", "--out", "a.onnx"], "--out a.onnx: a model for torch is a file called NAME.pt2"),
        (["--to", "onnx", "--out", "a.onnx", "--tta", "ten"], "--tta ten: there are none, five_crop"),
        (["--to", "peft", "--out", "a", "--tta", "five_crop"], "--tta five_crop is for torch and onnx"),
        (["--to", "peft", "--out", "."], "--out . is there already: give the name of a new folder"),
        (["--to", "torch", "--out", "a.pt2", "train.seed=1"], "train: there is no such section here (backbone)"),
        (["--to", "peft", "--out", "a"], "is no LoRA (class_mean), which alone peft has a place for"),
    ],
)
def test_bad_input_gets_one_sentence(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nano_prompt(Path("prompt.safetensors"))
    code, said, wrong = lpt(capsys, "export", "prompt.safetensors", *words)
    assert code == 2 and not said and sentence in wrong and len(wrong.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_a_model_that_answers_otherwise_is_not_written(backbone, tmp_path, monkeypatch):
    path, model, header = opened(KINDS["cosine"](backbone), backbone, tmp_path)
    monkeypatch.setattr(exporting, "_as_torch", lambda program: (b"", lambda images: torch.zeros(len(images), 7)))
    with pytest.raises(LptError, match="is not written: its logits differ from lpt's by"):
        export_model(path, model, header, tmp_path / "model.pt2", to="torch")
    assert not (tmp_path / "model.pt2").exists()
