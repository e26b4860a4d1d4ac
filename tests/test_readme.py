"""README and configs keep their word: every command there is one that exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lpt
from lpt.cli import app
from lpt.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_exists(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "python":
        assert words[1] == "-m" and (ROOT / words[2].replace(".", "/")).exists()
    else:
        assert words[0] == ".venv/bin/lpt" or words[0] == "lpt"
        verb, rest = words[1], words[2:]
        if verb == "train":
            settings = [w for w in rest[1:] if "=" in w and not w.startswith("--")]
            load_config(ROOT / rest[0], settings)
        else:
            assert verb in {command.name or command.callback.__name__ for command in app.registered_commands}


def test_the_python_of_the_readme_runs(tmp_path, cifar100_root, deit_tiny_weights, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = code.replace("../shared/data/cifar100", str(cifar100_root)).replace(
        "../shared/weights/deit_tiny_patch16_224.fp16.safetensors", str(deit_tiny_weights)
    )
    # The same five lines on a tenth of the test images and one step an epoch: their names and arguments count here.
    real_task = lpt.load_task

    def small(*args, **kwargs):
        import dataclasses

        task = real_task(*args, **kwargs)
        part = task.train.subset(range(0, len(task.train), 300))
        return dataclasses.replace(task, train=part, test=task.test.subset(range(0, 10_000, 250)))

    monkeypatch.setattr(lpt, "load_task", small)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("epochs=(4, 2)", "epochs=(1, 1)"), {})
    assert list(tmp_path.glob("*.safetensors"))


def test_the_public_names_are_few_and_there():
    names = [n for n in re.findall(r" as (\w+)\n", Path(lpt.__file__).read_text())]
    assert 10 <= len(names) <= 16 and all(hasattr(lpt, n) for n in names)


def test_importing_lpt_costs_what_torch_costs():
    """Heavy libraries are imported inside the function that needs them."""
    heavy = {"timm", "datasets", "pandas", "matplotlib", "faiss", "sklearn", "accelerate", "torchvision", "open_clip"}
    command = [sys.executable, "-c", "import sys, lpt; print(*sys.modules)"]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded and heavy.isdisjoint(loaded)
