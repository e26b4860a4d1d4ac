"""Numbers that are no numbers, in untrusted files and in our own: refused when read, or named with the image."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.reliability.subjects import prompt_on_nano
from lpt.data import load_task
from lpt.data.preprocess import File, decoded
from lpt.engine.evaluate import evaluate, predict
from lpt.errors import DataError, PromptFileError, TrainingError
from lpt.files import read_tensors, to_bytes
from lpt.model.adapters import with_adapter
from lpt.model.backbones import load_backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import FusedHead, LinearHead
from lpt.prompt_file import read_prompt, save_prompt
from lpt.serve.evaluating import evaluate_prompt
from lpt.serve.opening import open_prompt
from lpt.serve.predicting import predict_files
from tests.support.command_line import lpt
from tests.support.toy import small_backbone, toy_task


@pytest.fixture
def nano(tmp_path):
    path = tmp_path / "nano.safetensors"
    prompt_on_nano(path)
    return path


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 8), (200, 10, 60)).save(tmp_path / "i.png")
    return tmp_path / "i.png"


def resealed(path, change=None, **fields):
    """The same prompt file with other fields or tensors, sealed anew, as anyone can."""
    metadata, tensors = read_tensors(path)
    header = {key: value for key, value in json.loads(metadata["lpt"]).items() if key != "sha256"}
    for key, value in fields.items():
        header[key] = header[key] | value if isinstance(value, dict) and header.get(key) else value
    if change:
        change(tensors)
    path.write_bytes(to_bytes(tensors, lpt=header))
    return path


NO_PIXELS = [
    ({"mean": [math.nan, 0.5, 0.5]}, "it holds NaN"),
    ({"mean": [1e30, 0.5, 0.5]}, r"preprocess\.mean is \[1e\+30, 0\.5, 0\.5\], three numbers up to 10"),
    ({"mean": [0.5, 0.5]}, r"preprocess\.mean"),
    ({"std": [0.5, math.inf, 0.5]}, "it holds Infinity"),
    ({"std": [0.5, 1e-45, 0.5]}, r"preprocess\.std is .*three numbers from 0\.001 to 1000"),
    ({"std": [0.5, 0.5, 1e30]}, r"preprocess\.std"),
    ({"std": [0.5, 0.5, -0.5]}, r"preprocess\.std"),
]


@pytest.mark.parametrize(("pixels", "says"), NO_PIXELS)
def test_pixels_of_no_image_are_refused_when_they_are_read(nano, pixels, says):
    with pytest.raises(PromptFileError, match=says):
        read_prompt(resealed(nano, preprocess=pixels))


@pytest.mark.parametrize("number", ["1e999", "-Infinity", "NaN"])
@pytest.mark.parametrize("field", ["scale", "settings", "metrics", "later"])
def test_a_header_holds_no_number_that_is_none(nano, number, field):
    metadata, tensors = read_tensors(nano)
    header = json.loads(metadata["lpt"]) | {field: "here" if field == "scale" else {"a": ["here"]}}
    text = json.dumps(header).replace('"here"', number)
    save_file(tensors, nano, metadata={"lpt": text})
    with pytest.raises(PromptFileError, match=f"damaged header: it holds {number}"):
        read_prompt(nano)


@pytest.mark.parametrize("command", ["inspect", "predict", "evaluate"])
@pytest.mark.parametrize("pixels", [NO_PIXELS[i][0] for i in (0, 1, 4)])
def test_by_command_line_they_are_one_sentence(nano, picture, capsys, command, pixels):
    rest = {"inspect": [], "predict": [picture], "evaluate": ["data.name=digits-lt"]}[command]
    code, said, err = lpt(capsys, command, resealed(nano, preprocess=pixels), *rest)
    assert code == 2 and said == "" and len(err.splitlines()) == 1 and "damaged header" in err


def overflowing(path, kind="adaptformer"):
    """A sealed prompt file on nano of permitted numbers, with which the blocks' own leave the range of fp32."""
    bare = load_backbone("nano")
    inside, generator = with_adapter(bare, kind, bottleneck=2, rank=2), torch.Generator().manual_seed(0)
    head = LinearHead(num_classes=10, width=bare.feature_width)
    model = PromptedClassifier(inside, head, classes=load_task("digits-lt").classes)
    with torch.no_grad():
        for value in model.learned_state().values():
            value.copy_(1e6 * torch.randn(value.shape, generator=generator).sign())
    data = {"name": "digits-lt", "settings": {"name": "digits-lt"}}
    save_prompt(path, model, method="x", counts=torch.ones(10).long(), storage="fp32", data=data)
    return path


@pytest.mark.parametrize("kind", ["adaptformer", "full"])
def test_an_answer_that_is_not_finite_is_said_with_its_image(tmp_path, picture, kind):
    path = overflowing(tmp_path / "p.safetensors", kind)
    model, _ = open_prompt(path)
    paths = [picture, tmp_path / "none.png", picture]
    answers = list(predict_files(model, paths))
    texts = json.dumps(answers, allow_nan=False)
    assert len(answers) == 3 and "NaN" not in texts
    assert f"the model's prediction for image {picture} is not finite" in answers[0]["error"]
    assert "does not exist" in answers[1]["error"] or "no such file" in answers[1]["error"]
    with pytest.raises(TrainingError, match=r"prediction for image .* \(one of \d+ of \d+\) is not finite"):
        evaluate_prompt(path, {})


def test_by_command_line_no_nan_is_printed_or_written(tmp_path, picture, capsys):
    path, out = overflowing(tmp_path / "p.safetensors"), tmp_path / "a.json"
    code, said, err = lpt(capsys, "predict", path, picture, "--json", out)
    assert code == 1 and said == "" and "i.png is not finite" in err and " nan" not in (said + err).lower()
    (answer,) = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert set(answer) == {"image", "error"}
    out.unlink()
    code, said, err = lpt(capsys, "evaluate", path, "--json", out)
    assert code == 2 and " nan" not in (said + err).lower() and not out.exists()
    assert len(err.splitlines()) == 1 and "is not finite" in err


@pytest.mark.parametrize("head", ["linear", "fused", "similarity"])
def test_evaluation_has_no_nan_whatever_the_head(head):
    task = toy_task()
    if head == "linear":
        classifier = LinearHead(num_classes=4, width=32)
        classifier.bias.data[1] = math.inf
    else:  # of a fused one also what one head would say by itself
        classifier = FusedHead(num_classes=4, width=32, joint_width=32, fuse=head == "fused")
        classifier.prototypes[2] = math.nan
    model = PromptedClassifier(small_backbone(), classifier, classes=task.classes)
    with pytest.raises(TrainingError, match=r"image toy/1-0000 \(one of 24 of 24\) is not finite"):
        evaluate(model, task)
    with pytest.raises(TrainingError, match="toy/0-0003 is not finite"):
        predict(model, task.train.subset([3]))


def test_evaluation_of_cached_features_looks_too(tmp_path):
    task, head = toy_task(), LinearHead(num_classes=4, width=32)
    head.weight.data[0] = math.nan
    model = PromptedClassifier(small_backbone(), head, classes=task.classes)
    for _ in range(2):  # computed, then read
        with pytest.raises(TrainingError, match="one of 24 of 24"):
            predict(model, task.test, folder=tmp_path)


def float_tiff(path, *bad, shape=(9, 7)):
    pixels = np.linspace(0, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    for i, value in enumerate(bad):
        pixels.flat[2 * i] = value
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("bad", "count"), [([math.nan], 1), ([math.inf, -math.inf], 2), ([math.nan, math.inf, -math.inf], 3)]
)
def test_a_float_image_with_numbers_that_are_none_is_named(tmp_path, recwarn, bad, count):
    path = float_tiff(tmp_path / "depth.tiff", *bad)
    with pytest.raises(
        DataError, match=rf"depth\.tiff cannot be decoded \({count} of its 63 pixels are NaN or infinite"
    ):
        decoded(File(str(path), path))
    assert not recwarn.list


def test_float_images_of_numbers_are_read_as_before(tmp_path):
    for white in (0.5, 1.0, 3e38):
        path = tmp_path / "fine.tiff"
        Image.fromarray(np.array([[0, white]], dtype=np.float32)).save(path)
        image = decoded(File("fine", path))
        assert image.mode == "RGB" and image.getpixel((1, 0))[0] == (128 if white == 0.5 else 255)


def test_by_command_line_a_float_image_is_named_and_the_others_go_on(nano, picture, tmp_path, capsys):
    bad = float_tiff(tmp_path / "depth.tiff", math.nan)
    code, said, err = lpt(capsys, "predict", nano, picture, bad)
    assert code == 1 and len(said.splitlines()) == 1 and said.startswith(str(picture))
    assert err.splitlines() == [
        f"error: image {bad} cannot be decoded (1 of its 63 pixels are NaN or infinite: replace them by numbers)"
    ]


LARGE = {
    "settings": {f"s{i}": "x" * 100 for i in range(5000)},
    "versions": {f"v{i}": "1" * 5000 for i in range(100)},
    "metrics": {f"m{i}": 1e300 for i in range(90)},
    "data": {"name": ["y" * 500_000], "split_sha256": {"a" * 500_000: 1}},
    "method": "z" * 500_000,
}


@pytest.mark.parametrize("fields", [{key: value} for key, value in LARGE.items()] + [LARGE])
def test_inspect_prints_a_screenful_whatever_a_header_holds(nano, capsys, fields):
    code, said, err = lpt(capsys, "inspect", resealed(nano, **fields))
    assert code == 0, err
    assert len(said) < 8000 and len(said.splitlines()) <= 40 and "nan" not in said.replace("nano", "").lower()


def test_inspect_prints_a_screenful_of_any_number_of_tensors_and_classes(nano, tmp_path, capsys):
    def more(tensors):
        tensors |= {f"backbone.part{i}.{'n' * 300}": torch.zeros(1) for i in range(2000)}

    path = resealed(nano, more, inside={"kind": "norm", "bottleneck": 1, "rank": 1})
    code, said, _ = lpt(capsys, "inspect", path)
    assert code == 0 and len(said) < 8000 and "... and 1990 more" in said
    overflowing(tmp_path / "p.safetensors")
    code, said, _ = lpt(capsys, "inspect", tmp_path / "p.safetensors")
    assert code == 0 and "blocks.*." in said and len(said.splitlines()) < 20


def test_answers_hold_no_name_of_megabytes(nano, picture, tmp_path, capsys):
    names = ["w" * 300_000, *load_task("digits-lt").classes[1:]]
    path, out = resealed(nano, classes=names), tmp_path / "a.json"
    assert lpt(capsys, "predict", path, picture, "--topk", 10, "--json", out)[0] == 0
    (answer,) = json.loads(out.read_text())
    assert max(map(len, answer["classes"])) == 1000 and len(answer["classes"]) == 10
    code, said, err = lpt(capsys, "evaluate", path, "--json", out)
    assert code == 0 and len(said + err) < 8000 and out.stat().st_size < 20_000, err


@pytest.mark.parametrize("scale", ["1e-9", "1e9", "0"])
def test_a_scale_that_no_prompt_file_can_hold_is_refused_before_training(scale, capsys, tmp_path):
    code, _, err = lpt(
        capsys, "train", "configs/digits_lt/lpt.yaml", f"method.scale={scale}", "--out", tmp_path / "run"
    )
    assert code == 2 and "method.scale" in err and not (tmp_path / "run").exists()
