"""What needs no torch does not import it: help, lists and a look into a prompt file; nano needs no timm."""

import ast
import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lpt
from lpt import listing
from lpt.data import DATA
from lpt.data.preprocess import Preprocess
from lpt.files import read_arrays, read_tensors, seal, to_bytes
from lpt.losses import LOSSES
from lpt.methods import METHODS
from lpt.model.backbones import FAMILIES, load_backbone, nano
from lpt.model.backbones.base import fill, without_numbers
from lpt.prompt_file import save_prompt
from lpt.terms import Pixels
from tests.support.shared import ROOT
from tests.support.toy import prompted, small_backbone, toy_task

WATCHED = """
import json, sys
from lpt.cli import main
code = 0
try:
    main()
except SystemExit as leave:
    code = leave.code or 0
heavy = ["torch", "timm", "torchvision", "accelerate", "datasets", "sklearn"]
print(json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def run(*words):
    """(exit code, heavy libraries that were imported, what was printed) of a command in a process of its own."""
    done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    *printed, watched = done.stdout.splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    return *json.loads(watched), "\n".join(printed) + done.stderr


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "p.safetensors"
    model = prompted(small_backbone(), num_classes=4).only_train().eval()
    save_prompt(path, model, method="lpt", counts=toy_task().counts, metrics={"few": 0.5, "nll": 1.0})
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["predict", "--help"],
        ["list"],
        ["list", "methods"],
        ["list", "backbones"],
        ["list", "data"],
        ["list", "losses"],
        ["list", "configs"],
    ],
)
def test_help_and_lists_import_nothing_heavy(words):
    code, heavy, printed = run(*words)
    assert (code, heavy) == (0, []) and len(printed) > 100


def test_an_unknown_list_is_one_sentence():
    code, heavy, printed = run("list", "method")
    assert (code, heavy) == (2, []) and "did you mean methods" in printed and printed.count("\n") == 1


def test_a_prompt_file_is_looked_into_without_torch(prompt, tmp_path):
    code, heavy, printed = run("inspect", prompt)
    assert (code, heavy) == (0, [])
    assert "classes   4: 0, 1, 2, 3; 30 to 2 training images" in printed
    assert "shared.tokens [4, 3, 32]" in printed and "measured  nll 1.0000" in printed


def damaged(path, change):
    metadata, tensors = read_tensors(path)
    header = json.loads(metadata["lpt"])
    change(header, tensors)
    path.write_bytes(to_bytes(tensors, lpt={key: value for key, value in header.items() if key != "sha256"}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "does not exist"),
        (lambda header, tensors: header.update(format=4), "format 4, this lpt reads up to 3"),
        (lambda header, tensors: tensors.pop("pool.keys"), "a pool needs tokens, keys and centre"),
        (lambda header, tensors: header.update(trained_on="AAAA"), "3 bytes are no hashes of 5"),
        (lambda header, tensors: tensors["shared.tokens"].fill_(float("nan")), "not finite"),
        (lambda header, tensors: tensors.update({"pool.keys": tensors["pool.keys"].bfloat16()}), "stored as BF16"),
    ],
)
def test_mistakes_in_a_file_are_seen_without_torch(prompt, tmp_path, change, says):
    path = tmp_path / "p.safetensors"
    if change:
        path.write_bytes(prompt.read_bytes())
        damaged(path, change)
    code, heavy, printed = run("inspect", path)
    assert (code, heavy) == (2, []) and says in printed and printed.count("\n") == 1


def test_a_changed_bit_is_seen_without_torch(prompt, tmp_path):
    content = bytearray(prompt.read_bytes())
    content[-3] ^= 1
    (tmp_path / "p.safetensors").write_bytes(content)
    code, heavy, printed = run("inspect", tmp_path / "p.safetensors")
    assert (code, heavy) == (2, []) and "it does not hold what was written (SHA-256)" in printed


def test_arrays_are_sealed_as_tensors_are(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor(7),
        "c": torch.zeros(0, 4),
        "d": torch.ones(2) > 0,
        "e": torch.ones(3).half(),
        "f": torch.arange(3, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "x")
    arrays = read_arrays(tmp_path / "x")[1]
    assert all(np.array_equal(arrays[name], value.numpy()) for name, value in tensors.items())
    assert seal({"é": 1}, arrays) == seal({"é": 1}, tensors)


def test_lists_say_what_the_tables_say():
    tables = listing.tables()
    first_sentence = listing.first_sentence
    assert tables["methods"] == {name: first_sentence(method.description) for name, method in METHODS.items()}
    assert tables["data"] == {name: first_sentence(function.__doc__) for name, function in DATA.items()}
    assert tables["losses"] == LOSSES and tables["backbones"] == FAMILIES
    assert all(all(table.values()) for table in tables.values())


def test_view_settings_have_one_list_of_fields():
    """A field of `Preprocess` alone would be in no prompt file, as five crops are: they are of a use of a model."""
    assert [f.name for f in fields(Preprocess)] == [*(f.name for f in fields(Pixels)), "five_crops"]


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "lpt/__init__.py").read_text())
    (for_checkers,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {}
    for node in for_checkers.body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: node.module.removeprefix("lpt.") for alias in node.names}
    assert homes.pop("model") == "tuning"  # the name of a package, which is what is found under it, and called
    assert homes == lpt.HOMES and sorted([*homes, "LptError", "model"]) == sorted(lpt.__all__)
    assert {*lpt.__all__, "__version__", "moved"} <= set(dir(lpt))
    for name in lpt.__all__:
        assert getattr(lpt, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="module 'lpt' has no attribute 'nothing'"):
        _ = lpt.nothing


def test_names_come_when_they_are_asked_for():
    program = (
        "import sys, lpt\n"
        "assert 'torch' not in sys.modules and lpt.__version__ and 'tune' in dir(lpt)\n"
        "assert not hasattr(lpt, 'nothing') and not hasattr(lpt, '__wrapped__') and 'torch' not in sys.modules\n"
        "assert lpt.model.classifier.PromptedClassifier is lpt.PromptedClassifier\n"  # by attributes alone, as before
        "from lpt import *\n"
        "assert tune is lpt.tune and Backbone is lpt.Backbone and LptError is lpt.LptError\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nano_is_timms_vit_to_the_bit():
    """With and without prompts, in both precisions, at another size; and with gradients."""
    mine, theirs = load_backbone("nano"), load_backbone("nano", image_size=48)
    for backbone, size in ((mine, 32), (theirs, 48)):
        timms = nano.architecture()
        timms.load_state_dict({name: value.float() for name, value in nano.read_weights(nano.FILE).items()})
        if size != 32:
            timms.set_input_size((size, size))
        assert {name: value.shape for name, value in timms.state_dict().items()} == {
            name: value.shape for name, value in backbone.vit.state_dict().items()
        }
        images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16):
            timms, backbone = timms.eval().to(dtype), backbone.to(dtype)
            inputs = images.to(dtype).requires_grad_()
            expected = timms(inputs)
            (wanted,) = torch.autograd.grad(expected.float().sum(), [inputs])
            answer = backbone.vit(inputs)
            (gradient,) = torch.autograd.grad(answer.float().sum(), [inputs])
            assert torch.equal(answer, expected) and torch.equal(gradient, wanted)
            prompt = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
            tokens = backbone.embed(images)
            plain = type(backbone)(timms, name="nano", preprocess=backbone.preprocess, fingerprint="")
            assert torch.equal(backbone.block(2, tokens, prompt, keep=5), plain.block(2, tokens, prompt, keep=5))


def test_one_prediction_on_nano_imports_no_timm(tmp_path):
    program = (
        "import sys, torch, lpt\n"
        "from lpt.serve.opening import open_prompt\n"
        "from lpt.serve.predicting import predict_files\n"
        "model = lpt.load_backbone('nano')\n"
        "heavy = [name for name in ('timm', 'torchvision', 'accelerate', 'datasets', 'sklearn', 'faiss')\n"
        "         if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_that_computes_what_is_in_no_file_is_built_as_ever():
    class WithTable(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))
            self.register_buffer("table", torch.arange(3), persistent=False)

    module = without_numbers(WithTable)
    fill(module, {"weight": torch.ones(2)})
    assert module.table.tolist() == [0, 1, 2] and module.weight.tolist() == [1, 1]
    linear = without_numbers(lambda: torch.nn.Linear(2, 1))
    stored = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    fill(linear, stored)
    stored["weight"].zero_()
    assert linear.weight.tolist() == [[1, 1]] and linear.weight.requires_grad
