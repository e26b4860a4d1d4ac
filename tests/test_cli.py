"""The commands as a person types them, each in a process of its own or through `main`."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpt.prompt_file import read_prompt
from tests.support.command_line import lpt
from tests.support.pictures import fill

ROOT = Path(__file__).parents[1]
SMALL = [
    str(ROOT / "configs/digits_lt/lpt.yaml"),
    "method.epochs=[2, 2]",
    "train.batch_size=16",
    "data.imbalance_factor=10",
    "data.val_per_class=2",
    "train.precision=fp32",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "digits"
    done = subprocess.run([sys.executable, "-m", "lpt", "train", *SMALL, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout)
    return out


def test_train_fills_the_folder(run_folder):
    names = {p.name for p in run_folder.iterdir()}
    assert names >= {"config.yaml", "split.json", "history.jsonl", "report.json", "report.md", "prompt.safetensors"}
    report = json.loads((run_folder / "report.json").read_text())
    keys = "accuracy class_accuracy many medium few per_class ece nll method backbone data seed"
    for key in f"{keys} trainable_parameters seconds peak_memory_bytes versions".split():
        assert key in report, key
    assert set(report["backbone"]) == {"name", "fingerprint"}
    assert {"name", "imbalance_factor", "split_sha256", "counts"} <= set(report["data"])
    assert 0 <= report["accuracy"] <= 1 and len(report["per_class"]) == 10
    split = json.loads((run_folder / "split.json").read_text())
    assert split["sha256"] == report["data"]["split_sha256"]
    header = read_prompt(run_folder / "prompt.safetensors").header
    assert header.metrics["few"] == report["few"] and header.data["split_sha256"] == split["sha256"]
    assert "| lpt |" in (run_folder / "report.md").read_text()


def test_history_tells_losses_keys_and_held_out_accuracy(run_folder):
    lines = [json.loads(text) for text in (run_folder / "history.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        ("phase1", 1), ("phase1", 2), ("phase2", 1), ("phase2", 2),
    ]  # fmt: skip
    assert all(0 <= line["val"]["class_accuracy"] <= 1 for line in lines)
    usage = lines[-1]["key_usage"]
    assert sum(usage["selections"]) == 2 * 2 * 16 * (lines[-1]["step"] - lines[-2]["step"])
    assert 1 <= usage["perplexity"] <= 5


def test_off_a_terminal_progress_is_plain_lines(run_folder):
    said = (run_folder / "stdout.txt").read_text()
    assert "phase1 epoch 2/2" in said and "phase2 epoch 2/2" in said and "\x1b" not in said
    assert "prompt file" in said and "| lpt |" in said


def test_evaluate_prints_the_numbers_of_the_run(run_folder, tmp_path, capsys):
    out = tmp_path / "e.json"
    code, _, _ = lpt(capsys, "evaluate", run_folder / "prompt.safetensors", "--json", out)
    assert code == 0
    again, report = json.loads(out.read_text()), json.loads((run_folder / "report.json").read_text())
    for key in ("accuracy", "class_accuracy", "many", "medium", "few", "per_class", "ece", "nll", "brier"):
        assert again[key] == report[key], key


def test_predict_names_classes_and_goes_on_after_a_broken_image(run_folder, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, mode in (("a.png", "RGB"), ("b.png", "L"), ("c.jpg", "CMYK")):
        Image.new(mode, (20, 12), 80 if mode == "L" else (80, 10, 30, 0)[: len(mode)]).save(folder / name)
    prompt = run_folder / "prompt.safetensors"
    code, said, _ = lpt(capsys, "predict", prompt, folder, "--topk", 3, "--json", tmp_path / "p.json")
    answers = json.loads((tmp_path / "p.json").read_text())
    assert code == 0 and [Path(a["image"]).name for a in answers] == ["a.png", "b.png", "c.jpg"]
    assert all(len(a["classes"]) == 3 and a["probabilities"] == sorted(a["probabilities"])[::-1] for a in answers)
    assert said.count("\n") == 3

    (folder / "b.png").write_bytes(b"\x89PNG cut short")
    code, said, err = lpt(capsys, "predict", prompt, folder, "--json", tmp_path / "p.json")
    after = json.loads((tmp_path / "p.json").read_text())
    assert code == 1 and "b.png cannot be decoded" in err and "Traceback" not in err
    assert "error" in after[1] and after[0]["probabilities"][0] == pytest.approx(answers[0]["probabilities"][0])


def test_inspect_on_a_strangers_file(run_folder, tmp_path, capsys):
    with safe_open(run_folder / "prompt.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["lpt"])
    del header["sha256"]
    header |= {"format": 1, "metrics": {"nll": None}, "inside": {"kind": "lora", "bottleneck": 4, "rank": 8}}
    tensors["backbone.\x1b[2J"] = tensors["head.weight"].clone()
    save_file(tensors, tmp_path / "p.safetensors", metadata={"lpt": json.dumps(header)})
    code, said, err = lpt(capsys, "inspect", tmp_path / "p.safetensors")
    assert code == 0 and "measured  nll" in said and "backbone.?[2J" in said and "\x1b" not in said, err


def test_inspect_and_list_say_what_there_is(run_folder, capsys):
    code, said, _ = lpt(capsys, "inspect", run_folder / "prompt.safetensors")
    assert code == 0
    for part in ("format 3", "nano", "classes   10", "pool.tokens", "measured  few"):
        assert part in said
    settings = [line for line in said.splitlines() if line.startswith("settings  ")]
    assert "epochs=[2, 2]" in settings[0] and "topk=2" in " ".join(settings)
    assert 2 < len(settings) < 10 and max(map(len, settings)) <= 110  # one line of 700 letters before
    for what, part in (
        ("methods", "lpt"), ("backbones", "timm"), ("data", "cifar100-lt"), ("losses", "agcl"),
    ):  # fmt: skip
        assert f"  {part}  " in lpt(capsys, "list", what)[1]
    assert all(
        f"{k}:" in lpt(capsys, "list")[1] for k in ("methods", "backbones", "data", "losses", "presets", "configs")
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "nowhere.yaml"], "config nowhere.yaml does not exist"),
        (["train", SMALL[0], "method.epocs=3", "train.sed=1"], "did you mean epochs"),
        (["train", SMALL[0], "data.imbalance_factor=-1"], "imbalance_factor -1.0 is not positive"),
        (
            ["train", SMALL[0], "data.name=cifar100-lt", "data.root=nowhere", "data.imbalance_factor=10"],
            "nowhere holds",
        ),
        (["train", SMALL[0], "backbone.name=timm:resnet18.a1_in1k"], "cannot take prompts; supported"),
        (["train", SMALL[0], "backbone.name=timm:vit_tiny_patch16_224"], "bare name"),
        (["train", SMALL[0], "backbone.name=vit_tiny_patch16_224"], "no known family"),
        (["train", SMALL[0], "method.prefix_blocks=8"], "has 8 blocks, use 0 to 7"),
        (["train", SMALL[0], "method.topk=9"], "topk 9 does not fit a pool of 5"),
        (["train", SMALL[0], "method.epochs=[0, 0]"], "trains nothing"),
        (["train", SMALL[0], "data.name=cifar10-semi", "data.n1=0"], "data.n1: got 0"),
        (["train", SMALL[0], "data.name=cifar10-semi", "data.gamma_u=.5"], "data.gamma_u: got 0.5"),
        (["train", SMALL[0], "train.device=cuda:x"], "train.device"),
        (["train", SMALL[0], "train.device=mps"], "train.device 'mps' is not supported"),
        (["train", SMALL[0], "method.scale=0"], "method.scale: got 0"),
        (["train", SMALL[0], "method.prompt_length=0"], "method.prompt_length: got 0"),
        (["train", SMALL[0], "method.weight_decay=-1"], "method.weight_decay: got -1"),
        (["train", SMALL[0], "method.pool_size=900"], "needs as many training images, there are 305"),
        (["train", SMALL[0], "data.val_per_class=-1"], "data.val_per_class: got -1"),
        (["train", SMALL[0], "data.seed=-1"], "data.seed: got -1"),
        (["train", SMALL[0], "data.name=[a]"], "data.name: ['a'] is unknown"),
        (["train", SMALL[0], "--resum"], "--resum"),
        (["evaluate", "nowhere.safetensors"], "prompt file nowhere.safetensors does not exist"),
        (["evaluate", SMALL[0]], "damaged or no safetensors file"),
        (["inspect", SMALL[0]], "damaged or no safetensors file"),
        (["list", "method"], "did you mean methods"),
    ],
)
def test_bad_input_gets_one_sentence_exit_code_2_and_nothing_half_written(tmp_path, capsys, words, says):
    out = tmp_path / "out"
    code, _, err = lpt(capsys, *words, *(["--out", out] if words[0] == "train" else []))
    assert code == 2 and says in err and "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone", "gone does not exist: give a folder of images, or a list of them"),
        ("empty", "empty holds no image"),
        ("blank.txt", "blank.txt is empty"),
        ("lost.txt", "lost.txt names 1 files that are not there, the first is gone.png"),
        ("wrong.txt", "wrong.txt, line 1: label 7, and classes are 0 to 1"),
    ],
)
def test_unlabeled_images_that_cannot_be_had_are_told(tmp_path, capsys, name, says):
    photos = fill(tmp_path / "photos", {"cat": 3, "dog": 3})
    (tmp_path / "empty").mkdir()
    for file, text in (("blank.txt", ""), ("lost.txt", "gone.png"), ("wrong.txt", "photos/cat/0.png 7")):
        (tmp_path / file).write_text(text)
    data = [f"data.root={photos}", f"data.unlabeled={tmp_path / name}"]
    out = tmp_path / "out"
    code, _, err = lpt(capsys, "train", SMALL[0], "data.name=folder", *data, "--out", out)
    assert code == 2 and says in err and "Traceback" not in err and err.count("\n") == 1 and not out.exists()
    assert lpt(capsys, "doctor", photos, data[1])[0] == 2


def test_predicting_a_path_that_is_not_there_is_told(run_folder, tmp_path, capsys):
    prompt = run_folder / "prompt.safetensors"
    assert "does not exist" in lpt(capsys, "predict", prompt, tmp_path / "no.png")[2]
    assert "holds no image" in lpt(capsys, "predict", prompt, tmp_path)[2]


def test_a_prompt_for_another_backbone_or_task_is_refused(run_folder, tmp_path, capsys):
    prompt = run_folder / "prompt.safetensors"
    code, _, err = lpt(capsys, "evaluate", prompt, "backbone.name=untrained:deit3_small_patch16_224")
    assert code == 2 and "is for backbone nano (" in err and "untrained:deit3_small_patch16_224" in err
    code, _, err = lpt(capsys, "evaluate", prompt, "data.nam=x", "method.topk=1")
    assert code == 2 and "method: there is no such section here" in err


def test_settings_that_evaluate_and_predict_do_not_know_are_told(run_folder, capsys):
    prompt = run_folder / "prompt.safetensors"
    code, _, err = lpt(capsys, "evaluate", prompt, "train.precison=bf16", "train.precision=fp16", "backbone.name=3")
    assert code == 2 and "did you mean precision" in err and "got 'fp16'" in err and "backbone.name: got 3" in err
    code, _, err = lpt(capsys, "evaluate", prompt, "train.seed=3")
    assert code == 2 and "train.seed: there is no such setting; there are precision, device" in err
    assert lpt(capsys, "evaluate", prompt, "--json", run_folder)[0] == 2  # a folder is no file


def test_a_run_killed_in_its_first_epoch_is_recognised(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    before = (out / "config.yaml").read_text()
    code, _, err = lpt(capsys, "train", *SMALL, "train.seed=7", "--out", out)
    assert code == 2 and "already holds a run" in err and (out / "config.yaml").read_text() == before


def test_a_used_folder_is_not_overwritten(run_folder, capsys):
    before = (run_folder / "prompt.safetensors").read_bytes()
    code, _, err = lpt(capsys, "train", *SMALL, "--out", run_folder)
    assert code == 2 and "already holds a run: add --resume" in err
    assert (run_folder / "prompt.safetensors").read_bytes() == before
    settings = (run_folder / "config.yaml").read_text()
    code, _, err = lpt(capsys, "train", *SMALL, "train.seed=5", "--out", run_folder, "--resume")
    assert code == 2 and "holds a run with other settings" in err
    assert (run_folder / "config.yaml").read_text() == settings


def test_kill_9_at_any_moment_and_resume_ends_in_the_same_bits(run_folder, tmp_path):
    """LPT on the digits, killed three times; the last start ends with the prompts of the undisturbed run."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "lpt", "train", *SMALL, "--out", out, "--resume"]
    for pause in (0.4, 1.0, 1.6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.time()
        while not (out / "config.yaml").exists() and process.poll() is None and time.time() - began < 60:
            time.sleep(0.05)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, resumed = (load_file(folder / "prompt.safetensors") for folder in (run_folder, out))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    numbers = [json.loads((folder / "report.json").read_text()) for folder in (run_folder, out)]
    for report in numbers:
        del report["seconds"], report["peak_memory_bytes"]
    assert numbers[0] == numbers[1]
