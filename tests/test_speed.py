"""What `benchmarks.speed` counts, which does not depend on the machine."""

import torch

from benchmarks.speed.__main__ import compare_queries
from tests.support.toy import small_backbone


def test_without_the_querys_pass_inference_does_the_work_of_a_plain_forward():
    found = compare_queries(small_backbone(width=64, size=96), batch=1, pairs=1, device=torch.device("cpu"))
    work = {query: measured["flops_over_forward"] for query, measured in found.items()}
    assert work["none"] < work["early"] < 1.1 < work["full"] and all(r["over_forward"] > 0 for r in found.values())
