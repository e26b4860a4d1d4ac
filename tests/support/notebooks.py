"""The notebooks of the docs, executed: `python -m tests.support.notebooks` does it in place, for their outputs."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.shared import ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000


def executed(path: Path, *, timeout: int = 600) -> Any:
    """The notebook at `path` with the outputs of its cells, run in an empty folder; nothing of this machine is in it.
    Raises nbclient's CellExecutionError where a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = str(ROOT)  # the kernel is a process of its own, elsewhere
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:  # warnings of libraries have the paths of this machine
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    import nbformat

    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        nbformat.write(executed(path), path)
        print(f"{path.name}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
