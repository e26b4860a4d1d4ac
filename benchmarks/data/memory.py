"""Peak memory of code in a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]


def measured(code: str, *words: str) -> Any:
    """What `code` prints last, as JSON, run on one thread with `words` as its arguments; it may ask `peak()` for the
    most bytes of main memory that it has had."""
    first = "import json, resource, sys\ndef peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", first + code, *words], env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def row(check: str, began: float, **what: Any) -> dict[str, Any]:
    """A row of the table of `benchmarks.data`."""
    commit = subprocess.run(["git", "log", "-1", "--format=%h"], cwd=REPO, capture_output=True, text=True).stdout
    return {"check": check, **what, "seconds": round(time.perf_counter() - began, 1), "commit": commit.strip()}
