"""`lpt list`: it fits a terminal, prints JSON, and shows the settings of a method; completion of names in a shell."""

import json
import os
import subprocess
import sys

import pytest

from lpt import listing
from lpt.commands.arguments import complete_setting, named_things
from lpt.methods import METHODS
from lpt.methods.settings_table import DESCRIPTIONS, settings_table
from lpt.settings import settings_of
from tests.support.command_line import lpt
from tests.support.shared import ROOT


@pytest.mark.parametrize("columns", [60, 100])
def test_lists_fit_a_terminal_and_cut_nothing(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = lpt(capsys, "list")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= columns
    shown = " ".join(out.split())
    for kind, table in listing.tables().items():
        assert f"{kind}:" in shown
        for name, text in table.items():
            assert f"{name} {' '.join(text.split())}" in shown and text, name


def test_elsewhere_an_entry_is_one_line(capsys):
    _, out, _ = lpt(capsys, "list", "methods")
    assert [line.split()[0] for line in out.splitlines()] == list(METHODS)


def test_sentences_are_whole():
    for kind in ("methods", "data", "configs", "suites"):
        for name, text in listing.tables()[kind].items():
            assert text.endswith((".", "?")), (kind, name, text)


def test_lists_as_json(capsys):
    _, out, _ = lpt(capsys, "list", "methods", "--json")
    assert json.loads(out) == listing.tables()["methods"]
    _, out, _ = lpt(capsys, "list", "--json")
    assert json.loads(out) == listing.tables()


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_has_type_default_and_description(method, capsys):
    schema = settings_of(METHODS[method].build).model_fields
    rows = settings_table(method)
    assert [row.name for row in rows] == list(schema)
    assert all(row.type and row.default and row.description for row in rows)
    code, out, _ = lpt(capsys, "list", "methods", method)
    assert code == 0
    for row in rows:
        assert f"  {row.name}={row.default}  ({row.type})\n      {row.description}\n" in out
    _, out, _ = lpt(capsys, "list", "methods", method, "--json")
    assert json.loads(out) == [row._asdict() for row in rows]


def test_no_description_is_of_a_setting_that_is_not_there():
    names = {
        name for method in METHODS for row in settings_table(method) for name in (row.name, f"{method}.{row.name}")
    }
    assert set(DESCRIPTIONS) <= names


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["methods", "ltp"], "did you mean lpt"),
        (["losses", "ce"], "settings are listed of methods, not of losses"),
        (["losses", "--all"], "--all is for backbones"),
    ],
)
def test_what_cannot_be_listed_is_one_sentence(capsys, words, says):
    code, out, err = lpt(capsys, "list", *words)
    assert code == 2 and not out and says in err and err.count("\n") == 1


def test_names_are_completed(tmp_path, monkeypatch):
    assert named_things("methods")("fi") == ["fixmatch", "finessl", "fine_tune"]
    assert complete_setting("method.name=li") == ["method.name=linear_probe"]
    (tmp_path / "digits.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert named_things("configs")("digits") == ["digits_lt/linear_probe", "digits_lt/lpt", "digits.yaml"]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("lpt train digits_lt/lp", ["digits_lt/lpt"]), ("lpt list methods lp", ["lpt"]), ("lpt pla", ["plan"])],
)
def test_a_shell_completes_commands_methods_and_configs(typed, completed):
    words = {"_LPT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    program = "import sys; sys.argv = ['lpt']; from lpt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **words}, capture_output=True, text=True
    )
    assert done.stdout.split() == completed, done.stderr
