"""The documentation: commands exist and run, tables agree with the code, every public name has an entry."""

import importlib
import re
import shlex
import sys

import pytest
import yaml
from PIL import Image

import lpt
from docs.settings_tables import filled
from lpt.cli import COMMANDS, main
from lpt.config import load_config
from lpt.losses import LOSSES
from lpt.methods import METHODS
from tests.support.shared import ROOT

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
BLOCK = re.compile(r"(<!-- slow -->\n)?```sh\n(.*?)```", re.DOTALL)
FASTER = {
    "plan": {"": ["--steps", "0"]},
    "train": {"linear_probe": ["method.epochs=1"], "": ["method.epochs=[1, 1]"]},
    "fit": {"": ["method.name=class_mean"]},
}


def commands(page, *, slow):
    """The lines of a page's shell blocks that call lpt; of those marked slow, or of the others."""
    for mark, block in BLOCK.findall(PAGES[page]):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("lpt ") and bool(mark) == slow:
                yield line


EVERY_COMMAND = [(page, line) for page in PAGES for slow in (False, True) for line in commands(page, slow=slow)]


@pytest.mark.parametrize(("page", "command"), EVERY_COMMAND)
def test_every_command_exists(page, command):
    words = [word for word in shlex.split(command, comments=True) if word != "srun"]
    assert words[1] in {*COMMANDS, "library"}
    if words[1] == "train" and not words[2].startswith(("CONFIG", "my")):
        load_config(words[2], [w for w in words[3:] if "=" in w and not w.startswith("--")])


def run(monkeypatch, command):
    """A command of a page in this process, with few epochs; its exit code."""
    words = shlex.split(command, comments=True)[1:]
    faster = FASTER.get(words[0], {})
    more = next((settings for part, settings in faster.items() if part in command), [])
    monkeypatch.setattr(sys, "argv", ["lpt", *words, *more])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_five_minute_start_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = list(commands("start.md", slow=False))
    assert [line.split()[1] for line in done][:4] == ["list", "plan", "train", "inspect"] and len(done) == 10
    for line in done:
        assert run(monkeypatch, line) == 0, (line, capsys.readouterr().err)
    assert (tmp_path / "runs/digits/report.html").exists() and (tmp_path / "runs/fit/prompt.safetensors").exists()


@pytest.mark.slow
def test_the_commands_on_own_images_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digits = lpt.load_task("digits-lt", imbalance_factor=1)
    for k, n in enumerate((30, 12, 6, 4)):
        (tmp_path / "photos" / digits.classes[k]).mkdir(parents=True)
        for row in (digits.train.labels == k).nonzero().flatten()[:n].tolist():
            image = Image.fromarray(digits.train.pixels[row].permute(1, 2, 0).numpy()).resize((40, 40))
            image.save(tmp_path / "photos" / digits.classes[k] / f"{row}.jpg")
    for line in commands("own_images.md", slow=False):
        assert run(monkeypatch, line) == 0, (line, capsys.readouterr().err)
    assert "by_hand" in capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("methods/")])
def test_tables_of_settings_are_those_of_the_signatures(page):
    assert filled(PAGES[page]) == PAGES[page], "python docs/settings_tables.py writes them"


def test_every_method_and_loss_has_a_place():
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("methods/"))
    assert sorted(re.findall(r"<!-- settings: (\w+) -->", pages)) == sorted(METHODS)
    for page, text in PAGES.items():
        if "<!-- settings: " in text and page != "methods/frozen.md":
            assert "```text\n" in text or "| equation |" in text, page
            assert all(part in text for part in ("## Deviations", "## Settings", "ode:")), page
    assert all(f"`{name}`" in PAGES["methods/losses.md"] for name in LOSSES)


def test_every_public_name_has_an_entry():
    entries = re.findall(r"^::: (lpt[\w.]*)\.(\w+)$", PAGES["api.md"], re.MULTILINE)
    assert sorted(name for _, name in entries) == sorted(lpt.__all__)
    for home, name in entries:
        assert callable(getattr(importlib.import_module(home), name))


def test_the_site_has_every_page_and_no_other():
    def files(entries):
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from files(value) if isinstance(value, list) else [value]

    nav = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(PAGES), "a page belongs in the nav of mkdocs.yml"
