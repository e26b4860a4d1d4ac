"""What surrounds the code: the hooks before a commit are the linters, the package says that it is typed."""

import re
import tomllib

import yaml

from tests.support.shared import ROOT


def test_the_hooks_before_a_commit_are_the_linters():
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == commands
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])


def test_the_package_is_typed_and_says_so():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["lpt"] and (ROOT / "lpt/py.typed").exists()


def test_every_tool_of_the_dev_group_has_a_tested_version():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    names = [re.split(r"[<>=]", requirement)[0] for requirement in groups["dev"]]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert not set(names) - pinned


def test_workflows_run_what_the_makefile_runs_on_every_python_that_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
    makefile = (ROOT / "Makefile").read_text()
    jobs = workflows["ci"]["jobs"]
    promised = re.findall(r"Python :: (\d\.\d+)$", "\n".join(project["classifiers"]), re.MULTILINE)
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == promised and len(matrix["os"]) == 3
    commands = [step.get("run", "") for step in jobs["test"]["steps"]]
    for command in commands[-2:]:  # install, and test
        assert command.removeprefix("python -m").replace('"', "") in re.sub(
            "[\"']| --quiet| --disable-\\S+", "", makefile
        )
    assert jobs["lint"]["steps"][-1]["run"] == "make lint"
    build, publish = workflows["release"]["jobs"]["build"], workflows["release"]["jobs"]["publish"]
    said = " ".join(step.get("run", "") for step in build["steps"])
    assert "build" in said and "twine check --strict" in said and "tests/test_wheel.py" in said
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"  # trusted: no password
    assert "secrets" not in (ROOT / ".github/workflows/release.yml").read_text()
