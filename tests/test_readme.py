"""README and configs keep their word: every command there is one that exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import lpt
from benchmarks.serving.demo import main as draw_tasks
from lpt.cli import app, main
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
    elif words[0] == "curl":
        assert words[-1].endswith("/v1/predict")  # `tests/test_server.py` runs those of docs/serving.md
    else:
        assert words[0] == ".venv/bin/lpt" or words[0] == "lpt"
        verb, rest = words[1], words[2:]
        if verb == "train":
            settings = [w for w in rest[1:] if "=" in w and not w.startswith("--")]
            load_config(rest[0], settings)
        else:
            assert verb in {command.name or command.callback.__name__ for command in app.registered_commands}


def say_it(monkeypatch, command, *more):
    """A command of the README as a person gives it, in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lpt", *shlex.split(command)[1:], *more])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the configs and a long tail of photos: real digits as files, 40 to 3 each."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    digits = lpt.load_task("digits-lt", imbalance_factor=1)
    for k, n in enumerate((40, 20, 9, 5, 3)):
        (tmp_path / "photos" / digits.classes[k]).mkdir(parents=True)
        for row in (digits.train.labels == k).nonzero().flatten()[:n].tolist():
            image = Image.fromarray(digits.train.pixels[row].permute(1, 2, 0).numpy()).resize((40, 40))
            image.save(tmp_path / "photos" / digits.classes[k] / f"{row}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_on_own_images_run(workplace, monkeypatch, capsys):
    """Exactly as they stand, but for two epochs instead of many."""
    mine = [command for command in COMMANDS if "photos" in command and "shared" not in command]
    assert [shlex.split(command)[1] for command in mine] == ["doctor", "fit", "train", "predict", "report"]
    for command in mine:
        fewer = ["method.epochs=[1, 1]"] if shlex.split(command)[1] in ("fit", "train") else []
        assert say_it(monkeypatch, command, *fewer) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "photos_by_hand" in said and "runs/photos/report.html" in said
    assert (workplace / "runs" / "photos" / "prompt.safetensors").exists()


@pytest.mark.slow
def test_the_commands_of_the_main_run_run(workplace, monkeypatch, capsys, cifar100_root):
    for name in ("data", "weights"):
        (workplace.parent / "shared").mkdir(exist_ok=True)
        (workplace.parent / "shared" / name).symlink_to(cifar100_root.parents[1] / name)
    section = README[README.index("## Results") : README.index("## Five lines of Python")]
    of_the_section = [command for command in COMMANDS if command.split("  ")[0] in section.replace("\\\n", " ")]
    assert [shlex.split(command)[1] for command in of_the_section] == [
        "plan",
        "train",
        "evaluate",
        "inspect",
        "list",
    ]
    for command in of_the_section:
        assert say_it(monkeypatch, command) == 0, capsys.readouterr().err


def test_the_demo_is_what_the_readme_says(tmp_path, monkeypatch, capsys):
    """The Makefile's commands with one epoch each; their table has the README's rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    text = (ROOT / "Makefile").read_text()
    recipe = (
        text[text.index("\ndemo:") : text.index("\ntest:")]
        .replace("\\\n", " ")
        .replace("$(DIGITS)", "configs/digits_lt")
    )
    commands = re.findall(r"\$\(BIN\)/(lpt .*)", recipe)
    assert len(commands) == 5
    for command in commands:
        short = "method.epochs=1" if "linear_probe.yaml" in command else "method.epochs=[1, 1]"
        assert say_it(monkeypatch, command, *([short] if " train " in command else [])) == 0, capsys.readouterr().err
    table = capsys.readouterr().out[-1200:]
    rows = re.findall(r"^\| (\w+) +\|", README[README.index("linear_probe_ce") - 40 :], re.MULTILINE)[:4]
    assert rows == ["linear_probe_ce", "linear_probe_la", "lpt_phase1", "lpt"]
    assert all(f"| {row} " in table for row in rows) and "runs/demo/lpt/report.html" in table


def test_the_demo_of_the_server_runs(tmp_path, monkeypatch, capsys):
    """The Makefile's commands with one epoch each, up to a server that would answer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    recipe = (ROOT / "Makefile").read_text().replace("\\\n", " ").partition("\nserve-demo:")[2].partition("\n\n")[0]
    recipe = recipe.replace("$(DIGITS)", "configs/digits_lt").replace("$(SERVE)", "runs/serve_demo")
    commands = re.findall(r"\$\(BIN\)/(lpt .*)", recipe)
    assert [shlex.split(command)[1] for command in commands] == [*["train"] * 4, "library", "serve"]
    tasks = []
    monkeypatch.setattr("lpt.server.running.run", lambda app, listening: tasks.extend(app.state.service.bank.tasks))
    draw_tasks(Path("runs/serve_demo"))
    for command in commands:
        epochs = "[1, 1]" if "lpt.yaml" in command else "1"
        more = [f"method.epochs={epochs}"] if " train " in command else []
        if " library " in command:
            command, _, pattern = command.rpartition(" ")
            more = [str(path) for path in sorted(tmp_path.glob(pattern))]
        if " serve " in command:
            more = ["--port", "0"]
        assert say_it(monkeypatch, command, *more) == 0, capsys.readouterr().err
    assert tasks == ["colours", "digits", "shapes", "textures"]
    assert len(list(tmp_path.glob("runs/serve_demo/images/*.png"))) == 20


def test_pictures_of_the_readme_are_small():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).stat().st_size < 200_000


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


def test_it_is_short():
    assert len(README.splitlines()) < 150


def test_the_public_names_are_few_and_there():
    assert 10 <= len(lpt.__all__) <= 21 and all(hasattr(lpt, name) for name in lpt.__all__)


def test_importing_its_names_costs_what_torch_costs():
    """Heavy libraries are imported inside the function that needs them."""
    heavy = {"timm", "datasets", "pandas", "matplotlib", "faiss", "sklearn", "accelerate", "torchvision", "open_clip"}
    command = [sys.executable, "-c", "import sys; from lpt import *; print(*sys.modules)"]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded and heavy.isdisjoint(loaded)
