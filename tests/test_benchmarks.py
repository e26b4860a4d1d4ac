"""The accuracy runner: rows, skipping, and the table."""

import json
import sys

import pytest
import yaml

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

    def run(config, overrides, out):
        asked.append(overrides)
        if len(asked) == 2:
            raise KeyboardInterrupt
        metrics = dict.fromkeys(accuracy.COLUMNS, 0.5) | {"few": None}
        facts = {"prompt_bytes": 9000, "trainable_parameters": 7, "seconds": 1.0, "seed": 0}
        return {**metrics, **facts, "versions": {}, "commit": "c", "processor": "p"}

    monkeypatch.setattr(accuracy, "run", run)
    monkeypatch.setattr(sys, "argv", ["x", "--suite", "toy", "--seeds", "0,1"])
    with pytest.raises(KeyboardInterrupt):
        accuracy.main()
    assert len(json.loads((tmp_path / "results" / "toy.json").read_text())) == 1
    accuracy.main()
    assert len(asked) == 5  # one done, one interrupted, three left
    table = (tmp_path / "results" / "toy.md").read_text()
    assert "| a | 2 | 50.0 ± 0.0 |" in table and "n/a" in table
    capsys.readouterr()


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
