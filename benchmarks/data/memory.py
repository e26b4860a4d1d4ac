"""Peak memory of code in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.data.turns import ROOT


def measured(code: str, *words: str) -> Any:
    """What `code` prints last, as JSON, run on one thread with `words` as its arguments; it may ask `peak()` for the
    most bytes of main memory that it has had."""
    first = "import json, resource, sys\ndef peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", first + code, *words], env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
