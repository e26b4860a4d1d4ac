"""Peak memory of code in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.data.turns import ROOT

FIRST = """
import json, sys, torch
from lpt.device import peak_memory
def peak(): return peak_memory(torch.device("cpu"))
"""


def measured(code: str, *words: str) -> Any:
    """What `code` prints last, as JSON, run on one thread with `words` as its arguments; it may ask `peak()` for the
    most bytes of main memory that it has had."""
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST + code, *words], env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
