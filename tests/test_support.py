"""Test modules stand alone: what they share is in `tests/support`."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path.name != "__init__.py"]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module_or_conftest(path):
    for name in imported_modules(path):
        parts = name.split(".")
        assert not any(part == "conftest" or part.startswith("test_") for part in parts), name
        assert not name.startswith("."), f"{name} is relative: write tests.support"
