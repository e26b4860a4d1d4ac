"""What `lpt list` shows, read from the source: importing the methods would import torch, which takes seconds."""

import ast
import re
from functools import cache
from itertools import takewhile
from pathlib import Path

from lpt.shipped import shipped

PACKAGE = Path(__file__).parent


def tables() -> dict[str, dict[str, str]]:
    """By kind, the description of each by its name."""
    return {
        "methods": _first_sentences(PACKAGE / "methods/__init__.py", "METHODS"),
        "backbones": ast.literal_eval(_assigned(PACKAGE / "model/backbones/__init__.py", "FAMILIES")),
        "data": _first_sentences(PACKAGE / "data/__init__.py", "DATA"),
        "losses": ast.literal_eval(_assigned(PACKAGE / "losses.py", "LOSSES")),
        "presets": ast.literal_eval(_assigned(PACKAGE / "presets.py", "PRESETS")),
        "configs": {name: _heading(path) for name, path in shipped("config").items()},
        "suites": {name: _heading(path) for name, path in shipped("suite").items()},
    }


def first_sentence(text: str | None) -> str:
    """Of a docstring, up to the period at the end of a line or before a space and a capital letter.

    >>> first_sentence("kNN (Wu 2018, Sec. 3 of it),\\n    cosine. It holds\\n    all.")
    'kNN (Wu 2018, Sec. 3 of it), cosine.'
    """
    paragraph = " ".join((text or "").strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


def _first_sentences(path: Path, table: str) -> dict[str, str]:
    """The first sentence of the docstring of each function in a `table` of functions, or of calls with one.

    Of a function `tune` it is the docstring of its module.
    """
    homes = _imported(path)
    lines = {}
    entries = _assigned(path, table)
    assert isinstance(entries, ast.Dict)
    for key, value in zip(entries.keys, entries.values, strict=True):
        function = value.args[0] if isinstance(value, ast.Call) else value
        if isinstance(function, ast.Attribute):  # page.function
            assert isinstance(function.value, ast.Name)
            home, name = ".".join(homes[function.value.id]), function.attr
        else:
            assert isinstance(function, ast.Name)
            home, name = homes[function.id]
        page = _parsed(PACKAGE.parent / (home.replace(".", "/") + ".py"))
        lines[ast.literal_eval(key or function)] = first_sentence(_docstring(page, name))
    return lines


def _docstring(page: ast.Module, name: str) -> str | None:
    if name == "tune":
        return ast.get_docstring(page)
    (function,) = (node for node in page.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_docstring(function)


def _imported(path: Path) -> dict[str, tuple[str, str]]:
    """Name → (module, name there) of `from module import name` in a file."""
    imports = [node for node in _parsed(path).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}


def _assigned(path: Path, name: str) -> ast.expr:
    """What a file assigns to `name`."""
    for node in _parsed(path).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        value = getattr(node, "value", None)
        if value and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return value
    raise AssertionError(f"{path} assigns nothing to {name}")


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _heading(path: Path) -> str:
    """The first sentence of the comments that a YAML file begins with."""
    comments = takewhile(lambda line: line.startswith("# "), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("# ") for line in comments).partition(". ")[0].removesuffix(".") + "."
