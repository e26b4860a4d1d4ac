"""The wheel is whole: built from its own sdist, installed elsewhere, it does there what README shows."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
import torch
from PIL import Image

from lpt import errors
from lpt.data import load_task
from lpt.errors import NotInstalled, require
from lpt.listing import tables
from lpt.model.adapters import with_adapter
from lpt.model.backbones import load_backbone
from lpt.shipped import shipped
from tests.support.command_line import lpt as command
from tests.support.shared import ROOT
from tests.support.toy import small_backbone

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "lpt", "configs", "benchmarks/accuracy/suites")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*words, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel), the second from the first and not from the checkout."""
    place = tmp_path_factory.mktemp("built")
    without = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILT_FROM:
        target = place / "source" / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=without)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=place / "source")
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "--wheel-dir", place, unpacked, cwd=place)
    (wheel,) = place.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    place = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", place, built[1], cwd=place)
    return place


def test_the_wheel_holds_what_the_repository_has(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    wanted = {f"lpt/{path.relative_to(ROOT / 'lpt').as_posix()}" for path in (ROOT / "lpt").rglob("*.py")}
    wanted |= {
        "lpt/py.typed",
        "lpt/model/backbones/nano.safetensors",
        "lpt/model/backbones/sizes.tsv",
        "lpt/server/page.html",
    }
    wanted |= {f"lpt/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    wanted |= {f"lpt/suites/{path.name}" for path in (ROOT / "benchmarks/accuracy/suites").glob("*.yaml")}
    about = fnmatch.filter(names, "lpt-*.dist-info/*")
    assert sorted(names - {*about}) == sorted(wanted)
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_its_metadata_says_what_an_index_shows(built):
    wheel = zipfile.ZipFile(built[1])
    (name,) = fnmatch.filter(wheel.namelist(), "*/METADATA")
    head, _, body = wheel.read(name).decode().partition("\n\n")
    assert body.strip() == (ROOT / "README.md").read_text().strip()
    assert "Description-Content-Type: text/markdown" in head and "License-Expression: Apache-2.0" in head
    assert "Author: The lpt developers" in head and "Classifier: Typing :: Typed" in head
    extras = set(re.findall(r"^Provides-Extra: (\S+)", head, re.MULTILINE))
    assert {"serve", "ray", "onnx", "track", "all"} <= extras
    everything = set(re.findall(r"[\w-]+", re.findall(r"^Requires-Dist: lpt\[(.*?)\]", head, re.MULTILINE)[0]))
    assert everything == extras - {"all"}


def test_links_of_the_readme_hold_outside_of_the_repository():
    """Only pictures may be relative, and they only as long as no address of the repository is known."""
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    relative = [(mark, target) for mark, target in links if not target.startswith(("https://", "#"))]
    assert all(mark and (ROOT / target).exists() for mark, target in relative)
    assert not relative or "urls" not in PROJECT["project"]


def test_configs_and_suites_have_names_that_are_no_places(installed, tmp_path):
    program = (
        "from lpt.listing import tables; import json; t = tables(); print(json.dumps([t['configs'], t['suites']]))"
    )
    there = json.loads(run("-c", program, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert there == [tables()["configs"], tables()["suites"]]
    assert "cifar100_lt/lpt_deit_tiny" in there[0] and there[1].keys() == shipped("suite").keys()
    assert not any(str(ROOT) in text or text.endswith(".yaml") for part in there for text in (*part, *part.values()))


COMMANDS = """
import sys
import lpt
assert lpt.__file__.startswith(sys.argv[1]), lpt.__file__
from lpt.cli import main

def say(*words):
    sys.argv = ["lpt", *words]
    try:
        main()
    except SystemExit as leave:
        assert not leave.code, (words, leave.code)

photos = ("data.name=folder", "data.root=photos", "method.epochs=1", "train.batch_size=8")
say("fit", "photos", "backbone.name=nano", "--out", "run", "method.epochs=[1, 1]", "train.precision=fp32")
say("predict", "run/prompt.safetensors", "photos/cat/0.png")
say("train", "digits_lt/linear_probe", "--out", "by_name", *photos)
say("report", "run")
"""


def test_it_fits_predicts_reports_and_trains_by_name_far_from_the_checkout(installed, tmp_path):
    for k, (name, number) in enumerate({"cat": 12, "dog": 8, "owl": 5}.items()):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (40, 40), (80 * k, 5 * i, 120)).save(tmp_path / "photos" / name / f"{i}.png")
    printed = run("-W", "error", "-c", COMMANDS, installed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "photos/cat/0.png" in printed and "linear_probe la" not in printed
    for name in ("run", "by_name"):
        assert (tmp_path / name / "prompt.safetensors").exists() and (tmp_path / name / "report.html").exists()


def test_the_script_says_its_version_and_prints_a_config(installed, tmp_path):
    script = installed / "bin" / "lpt"
    if not script.exists():
        pytest.skip("pip makes another script here")
    environment = {"PYTHONPATH": str(installed)}
    assert run(script, "--version", cwd=tmp_path, **environment) == f"lpt {PROJECT['project']['version']}\n"
    text = run(script, "config", "digits_lt/lpt", cwd=tmp_path, **environment)
    assert text == (ROOT / "configs/digits_lt/lpt.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("digits_lt/lpd", "did you mean digits_lt/lpt?"),
        ("lpt_deit_tiny_224", "did you mean cifar100_lt/lpt_deit_tiny_224?"),
        ("configs/cifar10_lt/lpt_vit_b16.yaml", "did you mean cifar100_lt/lpt_vit_b16?"),
        ("qqq", "`lpt list configs` shows those that come with lpt"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(capsys, name, says):
    for verb in ("config", "train", "plan"):
        code, out, err = command(capsys, verb, name)
        assert code == 2 and out == "" and err == f"error: config {name} does not exist; {says}\n"


def test_a_path_wins_over_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_lt").mkdir()
    (tmp_path / "digits_lt" / "lpt").write_text("# mine\n")
    assert command(capsys, "config", "digits_lt/lpt") == (0, "# mine\n", "")
    assert command(capsys, "config", "configs/digits_lt/lpt.yaml")[1].startswith("# LPT on scikit-learn's digits")


def absent(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)


def test_an_absent_package_is_told_with_what_it_gives(monkeypatch, tmp_path):
    for package in ("datasets", "open_clip", "peft", "sklearn"):
        absent(monkeypatch, package)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    for ask, says in (
        (lambda: load_task("digits-lt"), "digits-lt, the digits of scikit-learn, needs sklearn"),
        (lambda: load_task("folder", root="owner/name"), "a dataset of the Hub, needs datasets"),
        (lambda: with_adapter(small_backbone(), "lora", rank=2), "LoRA (method.tuning=lora) needs peft"),
        (lambda: load_backbone("open_clip:ViT-B-16/openai"), "backbone open_clip:ViT-B-16/openai needs open_clip"),
    ):
        with pytest.raises(NotInstalled) as error:
            ask()
        assert says in str(error.value)
        extra = re.search(r"which is not installed: pip install 'lpt\[(\w+)\]'$", str(error.value)).group(1)
        assert extra in PROJECT["project"]["optional-dependencies"]
    assert require("numpy", extra="none", gives="nothing") is None and errors.NotInstalled is NotInstalled


def test_what_is_optional_is_imported_late_and_its_extra_is_there():
    """Every `require` of the package names an extra; what it asks for is no required dependency."""
    asked = {}
    for path in (ROOT / "lpt").rglob("*.py"):
        asked |= dict(re.findall(r'require\(\s*"(\w+)", extra="(\w+)"', path.read_text()))
    extras = PROJECT["project"]["optional-dependencies"]
    assert len(asked) >= 4 and set(asked.values()) <= set(extras)
    required = {re.split(r"[<>=\[]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert required.isdisjoint({"datasets", "peft", "open_clip_torch", "scikit-learn"})
    assert torch.__name__ in required
