"""The accuracy runner: rows, skipping, and the table."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from benchmarks.accuracy import __main__ as accuracy
from lpt.config import load_config


@pytest.mark.parametrize("suite", sorted((accuracy.HERE / "suites").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_row_of_every_suite_resolves(suite):
    rows = yaml.safe_load(suite.read_text())["rows"]
    assert len({row["method"] for row in rows}) == len(rows)
    hashes = {accuracy.config_hash(row["config"], row.get("set", [])) for row in rows}
    assert len(hashes) == len(rows)
    for row in rows:
        load_config(row["config"], row.get("set", []))


def test_the_hash_ignores_places_and_sees_settings():
    config = "configs/digits_lt/lpt.yaml"
    base = accuracy.config_hash(config, [])
    assert base == accuracy.config_hash(config, ["train.device=cpu"])
    assert base != accuracy.config_hash(config, ["train.seed=1"])


def test_a_suite_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    (tmp_path / "suites").mkdir()
    rows = [
        {"method": "a", "config": "configs/digits_lt/lpt.yaml"},
        {"method": "b", "config": "configs/digits_lt/lpt.yaml", "set": ["method.epochs=[1, 0]"]},
    ]
    (tmp_path / "suites" / "toy.yaml").write_text(yaml.safe_dump({"rows": rows}))
    monkeypatch.setattr(accuracy, "HERE", tmp_path)
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    asked = []

    commits = ["c"]
    monkeypatch.setattr(accuracy, "commit_of_the_package", lambda: commits[-1])

    def run(config, overrides, out, threads):
        asked.append(overrides)
        if len(asked) == 2:
            raise KeyboardInterrupt
        metrics = dict.fromkeys(accuracy.COLUMNS, 0.5) | {"few": None}
        facts = {"prompt_bytes": 9000, "trainable_parameters": 7, "seconds": 1.0, "seed": int(overrides[-1][-1])}
        return {**metrics, **facts, "versions": {}, "processor": "p"}

    monkeypatch.setattr(accuracy, "run", run)
    monkeypatch.setattr(sys, "argv", ["x", "--suite", "toy", "--seeds", "0,1"])
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    assert len(json.loads((tmp_path / "results" / "toy.json").read_text())) == 1
    accuracy.main()
    assert len(asked) == 5  # one done, one interrupted, three left
    table = (tmp_path / "results" / "toy.md").read_text()
    assert "| a | 2 | 50.0 ± 0.0 |" in table and "n/a" in table
    lines = (tmp_path / "results" / "toy.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("method,seed,accuracy") and lines[1].startswith("a,0,0.5")
    commits.append("d")  # results of another commit do not count, and are replaced
    accuracy.main()
    assert len(asked) == 9 and len(json.loads((tmp_path / "results" / "toy.json").read_text())) == 4
    capsys.readouterr()


def test_two_rows_are_compared_by_a_paired_bootstrap(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RUNS", tmp_path)
    labels, rng = np.repeat(np.arange(4), 50), np.random.default_rng(0)
    results = []
    for seed in (0, 1):
        for name, chance in (("good", 0.9), ("bad", 0.5)):
            predicted = np.where(rng.random(200) < chance, labels, (labels + 1) % 4)
            results.append({"method": name, "seed": seed, "config_hash": "h", "commit": "c"})
            place = accuracy.folder("toy", name, seed, "h", "c")
            place.mkdir(parents=True)
            save_file({"labels": labels, "predicted": predicted}, place / "predictions.safetensors")
    said = accuracy.compared("toy", results, "good", "bad")
    low, high = map(float, re.search(r"within ([+-][\d.]+) and ([+-][\d.]+)", said).groups())
    assert 25 < low < 40 < high < 55 and "by seed (0, 1)" in said
    same = accuracy.compared("toy", results, "good", "good")
    assert "+0.00 points" in same and "within +0.00 and +0.00" in same
    with pytest.raises(SystemExit, match="no seed in common"):
        accuracy.compared("toy", results[:1] + results[3:], "good", "bad")


def test_the_bootstrap_covers_a_known_interval():
    rng = np.random.default_rng(1)
    values, labels = rng.choice([-1.0, 0.0, 1.0], 4000), np.repeat(np.arange(4), 1000)
    low, middle, high = accuracy.bootstrap(values, labels)
    half = 1.96 * values.std() / 4000**0.5
    assert middle == pytest.approx(values.mean()) and high - low == pytest.approx(2 * half, rel=0.1)


def test_a_row_can_start_from_another_rows_phase_1(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RUNS", tmp_path)
    small = ["method.epochs=[2, 1]", "method.pool_size=5", "train.precision=fp32"]
    config, other = "configs/digits_lt/lpt.yaml", [*small, "method.topk=1"]
    first, second, alone = tmp_path / "first", tmp_path / "second", tmp_path / "alone"
    accuracy.run(config, small, first)
    accuracy.share_phase1(first, second, config, other)
    began = (second / "checkpoints" / "phase1.safetensors").stat().st_mtime_ns
    shared = accuracy.run(config, other, second)
    assert (second / "checkpoints" / "phase1.safetensors").stat().st_mtime_ns == began
    with pytest.raises(AssertionError, match="differ in phase 1"):
        accuracy.share_phase1(first, tmp_path / "third", config, [*small, "method.loss=ce"])
    with pytest.raises(SystemExit, match="has to be run first"):
        accuracy.share_phase1(tmp_path / "absent", tmp_path / "third", config, other)
    whole = accuracy.run(config, other, alone)
    assert {k: shared[k] for k in accuracy.COLUMNS} == {k: whole[k] for k in accuracy.COLUMNS}


def test_intervals_are_student_ts():
    assert accuracy.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 · 1 / √3
    assert accuracy.interval([1.0]) == "1.0" and accuracy.interval([]) == "n/a"


def test_without_the_querys_pass_inference_does_the_work_of_a_plain_forward():
    from benchmarks.speed.__main__ import compare_queries
    from tests.support.toy import small_backbone

    found = compare_queries(small_backbone(width=64, size=96), batch=1, pairs=1, device=torch.device("cpu"))
    work = {query: measured["flops_over_forward"] for query, measured in found.items()}
    assert work["none"] < work["early"] < 1.1 < work["full"] and all(r["over_forward"] > 0 for r in found.values())
