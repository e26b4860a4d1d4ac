"""docs/architecture.md names every module once and no other, and the layers hold."""

import ast
import re
from collections import Counter

import pytest

from lpt import methods
from tests.support.shared import ROOT

TEXT = (ROOT / "docs/architecture.md").read_text()
MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "lpt").rglob("*.py"))
LONG = {
    # Signatures that are a config's schema, and docstrings that explain it: the code of each is below 80 lines.
    "lpt/methods/ulfine.py:tune",
    "lpt/methods/lpt.py:tune",
}


def test_every_module_is_named_once():
    table = TEXT[TEXT.index("## Every module, once") :]
    named = Counter(re.findall(r"^\| `(lpt/[\w/]+\.py)` \|", table, re.MULTILINE))
    assert sorted(named) == MODULES and set(named.values()) == {1}


def test_modules_that_the_stories_name_are_there():
    for name in re.findall(r"`((?:data|engine|methods|model|report|serve|server)/[\w/]+\.py)`", TEXT):
        assert f"lpt/{name}" in MODULES, name


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_long(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            docstring = ast.get_docstring(node, clean=False)
            code = node.body[1:] if docstring is not None else node.body
            start = code[0].lineno if code and f"{name}:{node.name}" in LONG else node.lineno
            assert node.end_lineno - start < 80, f"{name}:{node.name}"


def test_no_method_imports_the_loop():
    """Not by way of others either: the contract in pyproject.toml says so, and this that it is there."""
    contracts = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'source_modules = \["lpt\.methods"\]\s+forbidden_modules = \["lpt\.engine\.loop"\]', contracts)
    assert "follow" not in vars(methods)
