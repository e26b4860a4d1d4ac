"""The main run, on real CIFAR-100-LT with a really pretrained DeiT-Tiny (slow: minutes)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_main_run_reaches_its_accuracy_in_its_time(tmp_path, cifar100_root, deit_tiny_weights):
    out = tmp_path / "run"
    where = [f"data.root={cifar100_root}", f"backbone.weights={deit_tiny_weights}"]
    config = ROOT / "configs/cifar100_lt/lpt_deit_tiny.yaml"
    subprocess.run([sys.executable, "-m", "lpt", "train", config, *where, "--out", out], check=True)
    report = json.loads((out / "report.json").read_text())
    assert report["class_accuracy"] >= 0.67 and report["few"] >= 0.58
    assert report["prompt_bytes"] <= 1_000_000
    assert report["data"]["counts"][0] == 500 and sum(report["data"]["counts"]) == 10_847

    again = tmp_path / "again.json"
    command = [sys.executable, "-m", "lpt", "evaluate", out / "prompt.safetensors", *where, "--json", again]
    subprocess.run(command, check=True)
    metrics = json.loads(again.read_text())
    for key in ("accuracy", "class_accuracy", "many", "medium", "few", "per_class", "ece", "nll"):
        assert metrics[key] == report[key], key
