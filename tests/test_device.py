"""What is reported about the machine."""

import subprocess
import sys

import numpy as np
import pytest

SAYS = "import torch; from lpt.device import peak_memory, used_memory; cpu = torch.device('cpu'); {}"


def said(code):
    done = subprocess.run([sys.executable, "-c", SAYS.format(code)], check=True, capture_output=True, text=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process begins with its own peak")
def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it():
    (alone,) = said("print(peak_memory(cpu))")
    large = np.ones(2**28, dtype=np.uint8)  # 256 MiB
    (beside,) = said("print(peak_memory(cpu))")
    assert large.any() and abs(beside - alone) < 2**27


def test_peak_memory_stays_when_memory_is_given_back():
    before, peak, used = said(
        "before = used_memory(cpu); x = torch.ones(2**26); del x; print(before, peak_memory(cpu), used_memory(cpu))"
    )
    assert peak - before > 2**27 > used - before
