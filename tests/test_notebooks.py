"""The notebooks of the docs run from beginning to end; what is committed is small and says nothing of a machine."""

import json
import re

import pytest

from tests.support.notebooks import MOST_BYTES, NOTEBOOKS, executed

PATHS = re.compile(r"/(?:home|root|tmp|usr|work|opt|Users|private)/\w")


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["own_photos", "pseudo_labels"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_committed_with_outputs_small_and_without_paths(path):
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(text) < MOST_BYTES and not PATHS.search(text)
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("text/html" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path):
    pytest.importorskip("duckdb")
    cells = [cell for cell in executed(path).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
