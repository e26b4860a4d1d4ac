"""Memory is counted before it is taken, and where it ends it is one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lpt
from benchmarks.reliability.subjects import prompt_on_nano
from lpt import tune
from lpt.config import load_config
from lpt.errors import LptError, PromptFileError, TrainingError
from lpt.files import read_tensors, to_bytes
from lpt.memory import MAX_PATCHES, Step, available, naming_lack_of_memory
from lpt.model.backbones import load_backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.prompt_file import load_prompt
from lpt.serve.evaluating import evaluate_prompt
from lpt.serve.opening import open_prompt
from lpt.setup import Setup
from tests.support.command_line import lpt as command
from tests.support.small_fit import fit
from tests.support.toy import small_backbone, toy_task

CONFIG = Path(__file__).parents[1] / "configs/digits_lt/lpt.yaml"
GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """A machine of 8 GiB, whatever this one has."""
    monkeypatch.setattr("lpt.memory.available", lambda device: 8 * GIB)


TOO_LARGE = [
    (["train.batch_size=1000000000"], "step of lpt of 1,000,000,000 images", "train.batch_size="),
    (["train.batch_size=100000"], "step of lpt of 100,000 images of 32 pixels needs about", "train.batch_size="),
    (["method.prompt_length=2000", "train.batch_size=512"], "on this machine it can have 8.0 GiB", "prompt_length="),
    (["method.pool_size=100000000"], "step of lpt of", "method.pool_size="),
    (["backbone.image_size=512", "train.batch_size=64"], "images of 512 pixels", "image_size="),
    (["backbone.image_size=1024"], "65,536 patches of 4 on nano, 16,384 are the most", "up to 512 pixels"),
    (["method.name=linear_probe", "train.batch_size=1000000000"], "step of linear_probe", "train.batch_size="),
    (["method.name=fine_tune", "method.tuning=lora", "method.rank=1000000000"], "to 4096", "method.rank"),
    (
        ["method.name=fine_tune", "method.tuning=adaptformer", "method.bottleneck=99999999"],
        "less than or equal to 4096",
        "method.bottleneck",
    ),
    (["method.name=two_stage", "train.batch_size=200000"], "step of fine_tune", "train.batch_size="),
]


@pytest.mark.parametrize(("settings", "says", "way_out"), TOO_LARGE)
def test_a_step_that_cannot_fit_is_refused_with_a_value_that_does(machine, settings, says, way_out):
    given = ["train.precision=fp32", *settings]
    with pytest.raises(LptError, match=says) as refusal:
        Setup(load_config(CONFIG, given))
    text = str(refusal.value)
    assert way_out in text and "\n" not in text and len(text) < 400
    if " would fit" not in text:
        return
    for value in text.rpartition(": ")[2].removesuffix(" would fit").split(" or "):  # and so it does
        Setup(load_config(CONFIG, [*given, value]))


@pytest.mark.parametrize("settings", [TOO_LARGE[i][0] for i in (0, 2, 5)])
def test_by_command_line_it_is_one_sentence_and_nothing_is_written(machine, tmp_path, capsys, settings):
    out = tmp_path / "run"
    for words in (["train", CONFIG, *settings, "--out", out], ["plan", CONFIG, *settings]):
        code, _, err = command(capsys, *words, "train.precision=fp32")
        assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert not out.exists()


@pytest.mark.parametrize(
    "settings", [{"batch_size": 10**9}, {"prompt_length": 10**7}, {"method": "fine_tune", "batch_size": 10**7}]
)
def test_python_is_told_too(machine, settings):
    with pytest.raises(LptError, match=r"step of \w+ of [\d,]+ images of 32 pixels needs about"):
        tune(toy_task(), small_backbone(), **settings)


def test_what_fits_is_not_refused_and_more_of_anything_needs_more():
    bare = load_backbone("nano")
    step = Step(bare, bytes_each=4, on_cpu=True, classes=10, batch_size=256, image_size=32, prompt_length=10)
    assert 0.5 * GIB < step.needed < 1.3 * GIB  # measured: 1110 MiB beyond the model
    for name, value in (("batch_size", 257), ("image_size", 36), ("prompt_length", 11), ("pool_size", 9),
                        ("adapter_width", 4), ("rows", 1.5), ("bytes_each", 8)):  # fmt: skip
        more = Step(**{**vars(step), name: value})
        assert more.needed > step.needed, name
    answering = Step(**{**vars(step), "learns": False})
    assert 0.05 * GIB < answering.needed < 0.25 * GIB  # measured: 196 MiB
    assert available(torch.device("cpu")) > GIB


def resealed(path, change=lambda tensors: None, **fields):
    metadata, tensors = read_tensors(path)
    header = {key: value for key, value in json.loads(metadata["lpt"]).items() if key != "sha256"}
    for key, value in fields.items():
        header[key] = header[key] | value if isinstance(value, dict) else value
    change(tensors)
    path.write_bytes(to_bytes(tensors, lpt=header))
    return path


@pytest.fixture
def nano(tmp_path):
    prompt_on_nano(tmp_path / "nano.safetensors")
    return tmp_path / "nano.safetensors"


def sized(path, size):
    return resealed(path, backbone={"image_size": size}, preprocess={"size": size})


@pytest.mark.parametrize("size", [516, 768, 1024])
def test_a_prompt_file_cannot_ask_for_views_that_end_never(nano, tmp_path, capsys, size):
    path = sized(nano, size)
    with pytest.raises(LptError, match=rf"views of {size} pixels are .* patches of 4 on nano, {MAX_PATCHES:,}"):
        open_prompt(path)
    for words in (["predict", path, path], ["evaluate", path]):
        code, said, err = command(capsys, *words)
        assert code == 2 and said.count("\n") <= 12 and len(err.splitlines()) == 1 and str(path) in err


@pytest.mark.parametrize(("size", "there"), [(512, 2), (256, 1), (128, 0.1)])
def test_a_prompt_file_whose_answers_do_not_fit_is_refused_with_the_numbers(nano, monkeypatch, size, there):
    monkeypatch.setattr("lpt.memory.available", lambda device: int(there * GIB))
    with pytest.raises(LptError, match=rf"128 images of {size} pixels need .* are there"):
        evaluate_prompt(sized(nano, size), {})


@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_prompts_of_another_number_of_blocks_are_refused_before_they_are_made(nano, blocks):
    bare = load_backbone("nano")

    def with_pool(tensors):
        tensors["pool.tokens"] = torch.zeros(2, blocks, 3, bare.width)
        tensors["pool.keys"], tensors["pool.centre"] = torch.ones(2, bare.width), torch.zeros(bare.width)

    path = resealed(nano, with_pool, topk=1, first=bare.depth - 2)
    with pytest.raises(PromptFileError, match=f"group prompts for {blocks} blocks from block 6 on"):
        load_prompt(path, bare)


ENDS = [
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 309237645312 bytes. Error code 12 (Cannot allocate memory)"), r" \(288 GiB more"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), ""),
    (MemoryError("Unable to allocate 3 TiB for an array"), ""),
    (RuntimeError("std::bad_alloc"), ""),
]  # fmt: skip


@pytest.mark.parametrize(("error", "says"), ENDS)
def test_the_end_of_memory_names_the_step_and_what_lowers_it(error, says):
    def step(model, batches, progress):
        if progress.step == 5:
            raise error
        return {"loss": model.weight.sum()}

    with pytest.raises(
        TrainingError, match=rf"memory has ended in step 5 of \w+ \(4 images\){says}.*train\.batch_size"
    ):
        fit(step=step)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), naming_lack_of_memory(lambda: "here"):
        raise RuntimeError("shapes do not match")


def test_a_prediction_without_memory_is_named(monkeypatch):
    bare, task = small_backbone(), toy_task()
    model = PromptedClassifier(bare, CosineHead(num_classes=4, width=32, scale=9.0), classes=task.classes)
    monkeypatch.setattr(model, "prefix", lambda views: (_ for _ in ()).throw(ENDS[0][0]))
    with pytest.raises(TrainingError, match=r"memory has ended in a prediction of 128 images \(288 GiB more"):
        lpt.evaluate(model, task)


def test_by_command_line_a_run_that_runs_out_ends_in_one_sentence(tmp_path):
    limited = (
        "import resource, sys; import lpt.memory, lpt.run, torch; torch.set_num_threads(1); "
        "lpt.memory.available = lambda device: 2**50; used = int(open('/proc/self/statm').read().split()[0]) * 4096; "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1)); from lpt.cli import main; main()"
    )
    settings = ["train.batch_size=1500", "train.precision=fp32", "method.epochs=[1, 0]"]
    words = [sys.executable, "-c", limited, "train", str(CONFIG), *settings, "--out", str(tmp_path / "run")]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr[-2000:]
    (line,) = [line for line in ended.stderr.splitlines() if not line.startswith("warning")]
    assert line.startswith("error: memory has ended in step 0 of phase1 (3000 images)") and "train.batch_size" in line
