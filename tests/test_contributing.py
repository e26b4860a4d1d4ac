"""CONTRIBUTING's method is added exactly as it says, and run."""

import json
import re
from pathlib import Path

from lpt import run
from lpt.config import load_config
from lpt.methods import METHODS, baselines
from lpt.methods.method import Method
from lpt.serve.evaluating import evaluate_prompt

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def test_a_method_is_one_function_and_one_config(tmp_path, monkeypatch):
    section = TEXT[TEXT.index("## Adding a method") :]
    (code,), (config,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
    assert len(code.splitlines()) + len(config.splitlines()) < 40
    namespace = dict(vars(baselines))
    exec(compile(code, "CONTRIBUTING.md", "exec"), namespace)
    monkeypatch.setitem(METHODS, "bias_then_head", Method(namespace["bias_then_head"]))
    (tmp_path / "config.yaml").write_text(config)
    report = run.train(load_config(tmp_path / "config.yaml", ["train.precision=fp32"]), tmp_path / "run")
    assert report["method"] == "bias_then_head" and report["accuracy"] > 0.1
    phases = [json.loads(line)["phase"] for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert phases == ["all", "head", "head"]
    again = evaluate_prompt(tmp_path / "run" / "prompt.safetensors", {})
    assert again["class_accuracy"] == report["class_accuracy"]
