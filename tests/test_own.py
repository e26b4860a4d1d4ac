"""A method of one's own, from the command line and from configs, without a line in lpt; prompt files import nothing."""

import json
import sys

import pytest
import yaml

from lpt.config import load_config, resolve
from lpt.errors import ConfigError, LptError
from lpt.methods import METHODS, build_recipe, find
from lpt.prompt_file import read_prompt
from lpt.serve.evaluating import evaluate_prompt
from lpt.tuning import tune
from tests.support.command_line import lpt as command
from tests.support.toy import small_backbone, toy_task
from tests.support.training import bind

PAGE = '''
"""Pages of somebody else."""

from typing import Literal

from lpt import Recipe
from lpt.methods.method import Method
from lpt.methods.supervised import build_model, stage, tunable_names
from lpt.settings import FractionBelowOne

def tune(task, backbone, session, *, epochs: int = 2, lr: FractionBelowOne = 1e-2, loss: Literal["ce", "la"] = "ce"):
    """A head, and no more."""
    model = build_model(task, backbone, session, tuning="head", head="cosine", scale=25.0)

    def phases():
        yield stage(session, "all", model, task, train=tunable_names(model), loss=loss, epochs=epochs, lr=lr)

    return Recipe(model, phases())

NEVER_ENDS = Method(tune, ends_in_epochs=False)
NUMBER = 3
def two(task, backbone, *, epochs: int = 1): ...
def untyped(task, backbone, session, *, epochs=1): ...
def any_settings(task, backbone, session, **settings): ...
def unknown_type(task, backbone, session, *, epochs: "Nothing" = 1): ...
def odd_type(task, backbone, session, *, epochs: object() = 1): ...
def named(task, backbone, session, *, name: str = "x"): ...
def nothing(task, backbone, session, *, epochs: int = 1): return None
'''
CONFIG = {
    "backbone": {"name": "nano", "flip": False},
    "data": {"name": "digits-lt", "imbalance_factor": 100},
    "method": {"name": "stranger.pages:tune", "epochs": 1},
    "train": {"batch_size": 32, "precision": "fp32"},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a package in it, to run lpt in; what is imported of it is forgotten at the end."""
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "pages.py").write_text(PAGE)
    (tmp_path / "stranger" / "broken.py").write_text("import a_module_that_is_nowhere\n")
    (tmp_path / "stranger" / "raises.py").write_text("raise SystemError('no\\nmore')\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "stranger"]:
        del sys.modules[name]


def test_a_config_or_an_override_names_it_and_its_file_loads_without_it(folder, capsys, monkeypatch):
    code, _, err = command(capsys, "train", "config.yaml", "method.loss=la")
    assert code == 0, err
    out = folder / "runs" / "digits_lt_stranger_pages_tune"
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "stranger.pages:tune" and report["accuracy"] > 0.1
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == {
        "name": "stranger.pages:tune", "epochs": 1, "lr": 1e-2, "loss": "la",
    }  # fmt: skip
    del sys.modules["stranger.pages"], sys.modules["stranger"]
    (folder / "stranger").rename(folder / "gone")
    header = read_prompt(out / "prompt.safetensors").header
    assert (header.method, header.settings["loss"]) == ("stranger.pages:tune", "la")
    assert evaluate_prompt(out / "prompt.safetensors", {})["class_accuracy"] == report["class_accuracy"]
    (folder / "gone").rename(folder / "stranger")  # it could be imported again, and is not
    for words in (["inspect", out / "prompt.safetensors"], ["report", out]):
        code, said, err = command(capsys, *words)
        assert code == 0 and "stranger.pages:tune" in said + (out / "report.html").read_text(), err
    assert not any(name.startswith("stranger") for name in sys.modules)

    given = ["method.name=stranger.pages:tune", "method.epochs=3"]
    assert load_config("digits_lt/lpt", given).method == {
        "name": "stranger.pages:tune", "epochs": 3, "lr": 1e-2, "loss": "ce",
    }  # fmt: skip


def test_it_is_taken_inside_others_in_python_and_planned(folder, capsys):
    inner = {"name": "decoupled", "first": {"name": "stranger.pages:tune", "epochs": 1}, "adjust": "crt"}
    task, backbone = toy_task(), small_backbone()
    recipe = build_recipe(inner, task, backbone, bind(task, backbone))
    assert next(iter(recipe.phases)).name == "all"
    assert "stranger.pages:tune" in resolve({**CONFIG, "method": inner}).method["first"]["name"]
    model = tune(task, backbone, method="stranger.pages:tune", batch_size=8, epochs=1)
    assert model.classes == task.classes
    assert find("stranger.pages:NEVER_ENDS").ends_in_epochs is False
    code, said, err = command(capsys, "plan", "config.yaml", "--steps", 0)
    assert code == 0 and "all trains head.weight" in said, err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stranger.pages:tun", "stranger.pages has no tun; did you mean tune?"),
        ("stranger.page:tune", "cannot be imported (ModuleNotFoundError: No module named 'stranger.page')"),
        ("nowhere:tune", "No module named 'nowhere'); it has to be installed, or lie in the folder that lpt is run in"),
        ("stranger.broken:tune", "No module named 'a_module_that_is_nowhere'"),
        ("stranger.raises:tune", "cannot be imported (SystemError: no more)"),
        ("stranger.pages:NUMBER", "is 3 and no function"),
        ("os:system", "is <built-in function system> and no function"),
        ("stranger.pages:two", "takes 2 arguments before its settings and not 3"),
        ("stranger.pages:untyped", "has a setting epochs without a type: a method is a function (task, backbone,"),
        ("stranger.pages:any_settings", "takes any number of settings, which nothing can check"),
        ("stranger.pages:unknown_type", "has settings of types that nothing can check (name 'Nothing' is not defined)"),
        ("stranger.pages:odd_type", "has settings of types that nothing can check"),
        ("stranger.pages:named", "has a setting `name`"),
        ("stranger/pages.py:tune", "is unknown"),
        ("lpd", "is unknown"),
    ],
)
def test_what_is_no_method_is_refused_in_one_sentence(folder, capsys, name, says):
    code, _, err = command(capsys, "train", "config.yaml", f"method.name={name}", "--out", "out")
    assert code == 2 and says in err and err.count("\n") == 1 and not (folder / "out").exists()
    with pytest.raises(LptError) as error:
        find(name)
    assert says in str(error.value)


def test_its_settings_are_checked_by_its_signature(folder):
    wrong = ["method.epocs=3", "method.lr=2", "method.loss=focal", "method.epochs=true"]
    with pytest.raises(ConfigError) as error:
        load_config("config.yaml", wrong)
    said = "\n".join(error.value.mistakes)
    assert "method.epocs: there is no such setting; did you mean epochs?" in said
    assert "method.lr: got 2" in said and "method.loss: got 'focal'" in said
    with pytest.raises(ConfigError, match=r"method\.epochs: got True"):
        load_config("config.yaml", wrong[3:])
    with pytest.raises(LptError, match=r"stranger\.pages:nothing returned a NoneType, which trains nothing"):
        build_recipe({"name": "stranger.pages:nothing"}, toy_task(), small_backbone(), None)


def test_what_is_installed_wins_over_the_folder(folder):
    (folder / "json.py").write_text("raise RuntimeError\n")
    with pytest.raises(LptError, match="json has no tune"):
        find("json:tune")
    assert set(METHODS) == {name for name in METHODS if ":" not in name}
