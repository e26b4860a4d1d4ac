"""`lpt sweep`: suites by name, rows that are done are skipped, phase 1 is shared, mistakes are sentences."""

import json
import subprocess
import sys

import pytest
import yaml

from benchmarks.accuracy import __main__ as accuracy
from lpt import sweep
from lpt.errors import ConfigError, LptError
from lpt.report.over_seeds import COLUMNS
from lpt.shipped import shipped
from tests.support.command_line import lpt as command
from tests.support.shared import ROOT


@pytest.mark.parametrize("name", shipped("suite"))
def test_every_row_of_every_suite_resolves(name):
    suite = sweep.load_suite(name)  # which resolves the configs of all
    keys = sweep.Running(suite, [], [], "c", 1, print)
    assert suite.name == name and len({row.method for row in suite.rows}) == len(suite.rows)
    assert len({keys.key(row, 0) for row in suite.rows}) == len(suite.rows)


def test_the_hash_ignores_places_and_sees_settings():
    base = sweep.config_hash("digits_lt/lpt", [])
    assert base == sweep.config_hash("digits_lt/lpt", ["train.device=cpu"])
    assert base == sweep.config_hash(str(ROOT / "configs/digits_lt/lpt.yaml"), ["train.track=[tensorboard]"])
    assert base != sweep.config_hash("digits_lt/lpt", ["train.seed=1"])


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The path of a suite of two rows; runs are answered without training, and say what they were asked."""
    rows = [
        {"method": "a", "config": "digits_lt/lpt"},
        {"method": "b", "config": "digits_lt/lpt", "set": ["method.epochs=[1, 0]"]},
    ]
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"rows": rows}))
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(config, overrides, out, threads):
        asked.append(overrides)
        if len(asked) == 2:
            raise KeyboardInterrupt
        metrics = dict.fromkeys(COLUMNS, 0.5) | {"few": None}
        seed = next(int(word[-1]) for word in overrides if word.startswith("train.seed="))
        facts = {"prompt_bytes": 9000, "trainable_parameters": 7, "seconds": 1.0, "seed": seed}
        return {**metrics, **facts, "versions": {}, "processor": "p"}

    monkeypatch.setattr(sweep, "run", run)
    return tmp_path / "toy.yaml", asked


def test_a_suite_goes_on_where_it_was(toy, tmp_path, monkeypatch, capsys):
    path, asked = toy
    commits = ["c"]
    monkeypatch.setattr(sweep, "version_of_the_code", lambda: commits[-1])
    suite = sweep.load_suite(path)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(suite, seeds=[0, 1])
    results = tmp_path / "runs/sweeps/toy/results.json"
    assert len(json.loads(results.read_text())) == 1
    code, said, _ = command(capsys, "sweep", path, "--seeds", "0,1", "train.checkpoint_seconds=9")
    assert code == 0 and len(asked) == 5  # one done, one interrupted, three left
    assert asked[-1] == ["method.epochs=[1, 0]", "train.seed=1", "train.checkpoint_seconds=9"]
    assert "b  seed 0" in said and "| a | 2 | 50.0 ± 0.0 |" in said and "n/a" in said
    assert results.with_suffix(".md").read_text().strip() in said
    lines = results.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("method,seed,accuracy") and lines[1].startswith("a,0,0.5")
    commits.append("d")  # results of another commit do not count, and are replaced
    sweep.sweep(suite, seeds=[0, 1], methods=["a"])
    assert len(asked) == 7 and len(json.loads(results.read_text())) == 4


def test_the_benchmark_keeps_results_and_runs_where_they_were(toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "suites").mkdir()
    toy[0].rename(tmp_path / "suites" / "toy.yaml")
    monkeypatch.setattr(accuracy, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--suite", "toy", "--seeds", "0", "--methods", "b", "train.seed=0"])
    with pytest.raises(SystemExit) as leave:
        accuracy.main()
    assert not leave.value.code
    assert "| b | 1 |" in (tmp_path / "results" / "toy.md").read_text() and "| b | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", "--seeds", "0"])
    with pytest.raises(SystemExit, match="needs --suite NAME, one of toy"):
        accuracy.main()


@pytest.mark.parametrize(
    ("suite", "says"),
    [
        ("rows: []", "suite.rows: got []; list should have at least 1 item"),
        ("rows: [{method: a}]", "suite.rows.a.config is missing"),
        ("rows: [{method: a, soup_of: [b]}]", "suite.rows.a.soup_of: there is no row b"),
        ("rows: [{method: a, config: digits_lt/lpt, soup_of: [a]}]", "suite.rows.a: a soup has no config of its own"),
        ("rows: [{method: a, config: digits_lt/lpt, arm: x}]", "suite.rows.a.arm: the suite has no `arms`"),
        ("{rows: [{method: a, config: digits_lt/lpt}], measured: twice}", "suite.measured: got 'twice'"),
        ("rows: [{method: ../a, config: digits_lt/lpt}]", "suite.rows.0.method: got '../a'"),
        ("rows: [{method: a, config: digits_lt/lpt, sets: [x]}]", "suite.rows.0.sets: there is no such setting"),
        ("rows: [{method: a, config: digits_lt/lpd}]", "suite.rows.a: config digits_lt/lpd does not exist; did you"),
        ("rows: [{method: a, config: digits_lt/lpt, set: [method.topk=x]}]", "suite.rows.a: method.topk: got 'x'"),
        ("rows: [{method: a, config: digits_lt/lpt, phase1_of: b}]", "suite.rows.a.phase1_of: there is no row b"),
        ("- 3", "toy.yaml holds list, not rows"),
        ("rows: [", "is not YAML"),
    ],
)
def test_mistakes_of_a_suite_are_told_before_anything_is_run(toy, capsys, suite, says):
    path, asked = toy
    path.write_text(suite)
    code, _, err = command(capsys, "sweep", path)
    assert code == 2 and says in err and err.count("\n") == 1 and not asked


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["phase3"], "suite phase3 does not exist; did you mean phase2?"),
        (["toy.yaml", "--seeds", "0,x"], "--seeds 0,x are no numbers separated by commas"),
        (["toy.yaml", "--methods", "c"], "suite toy has no row c; there are a, b"),
        (["toy.yaml", "--compare", "a", "c"], "suite toy has no row c"),
        (["toy.yaml", "--compare", "a", "b"], "a and b have no seed in common"),
        (["toy.yaml", "train.sed=1"], "train.sed: there is no such setting; did you mean seed?"),
    ],
)
def test_mistakes_of_the_command_are_sentences(toy, capsys, words, says):
    code, _, err = command(capsys, "sweep", *words)
    assert code == 2 and says in err and err.count("\n") == 1 and not toy[1]


def test_soups_and_arms_come_in_their_turn_and_held_out_metrics_take_the_place_of_others(tmp_path, monkeypatch):
    """As processes that are not started here: what they would be given, and what is made of what they leave."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"method": "soup", "soup_of": ["one", "arm"]},
        {"method": "one", "config": "digits_lt/lpt", "seed_plus": 3},
        {"method": "arm", "config": "digits_lt/lpt", "arm": "masked"},
    ]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"rows": rows, "arms": "a.module", "measured": "held_out"}))
    monkeypatch.setattr(sweep, "load_config", lambda config, words: None)  # there may be no train.start_seed
    monkeypatch.setattr(sweep, "config_hash", lambda config, words: "h")
    monkeypatch.setattr(sweep, "version_of_the_code", lambda: "c")
    asked = []

    def process(command, env):
        words = command[2:]
        asked.append(words)
        place = words[words.index("--json" if "--json" in words else "--out") + 1]
        report = dict.fromkeys((*COLUMNS, *sweep.FACTS_OF_A_RUN, "prompt_bytes"), 1.0) | {"versions": {}}
        report |= {"cost": dict.fromkeys(sweep.WORK, 7)}
        out = tmp_path / place
        if out.suffix:
            out.write_text(json.dumps(report))
        else:
            out.mkdir(parents=True)
            (out / "report.json").write_text(json.dumps(report))
            (out / "prompt.safetensors").write_text("p")
        (tmp_path / "runs/sweeps/s" / out.name if not out.suffix else out.parent).joinpath("history.jsonl").write_text(
            json.dumps({"val": {"accuracy": 0.1}}) + "\n" + json.dumps({"val": {"accuracy": 0.25}}) + "\n"
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", process)
    table = sweep.sweep(sweep.load_suite("s.yaml"), seeds=[4], overrides=["data.root=d", "train.compile=true"])
    one, arm, soup, evaluated = asked
    assert one[:6] == ["lpt", "train", "digits_lt/lpt", "train.seed=7", "train.start_seed=4", "data.root=d"]
    assert arm[:3] == ["a.module", "digits_lt/lpt", "train.seed=4"] and "--arm masked --out" in " ".join(arm)
    assert soup[:2] == ["lpt", "soup"] and len([word for word in soup if word.endswith("prompt.safetensors")]) == 3
    assert evaluated[3:4] == ["data.root=d"] and "train.compile=true" not in evaluated
    results = json.loads((tmp_path / "runs/sweeps/s/results.json").read_text())
    assert [(result["method"], result["seed"]) for result in results] == [("one", 4), ("arm", 4), ("soup", 4)]
    assert [result["accuracy"] for result in results] == [0.25] * 3 and results[2]["few"] is None
    assert results[2]["cost"]["steps"] == 14 and "- **soup**: soup_of ['one', 'arm']" in table


def test_rows_are_twice_in_a_suite(toy):
    toy[0].write_text(yaml.safe_dump({"rows": [{"method": "a", "config": "digits_lt/lpt"}] * 2}))
    with pytest.raises(ConfigError, match=r"suite\.rows: a stands there twice"):
        sweep.load_suite(toy[0])


def test_a_row_can_start_from_another_rows_phase_1(tmp_path):
    small = ["method.epochs=[1, 1]", "method.pool_size=5", "train.precision=fp32", "train.batch_size=32"]
    small += ["data.imbalance_factor=100"]
    config, other = "digits_lt/lpt", [*small, "method.topk=1"]
    first, second, alone = tmp_path / "first", tmp_path / "second", tmp_path / "alone"
    sweep.run(config, small, first)
    sweep.share_phase1(first, second, config, other)
    began = (second / "checkpoints" / "phase1.safetensors").stat().st_mtime_ns
    shared = sweep.run(config, other, second)
    assert (second / "checkpoints" / "phase1.safetensors").stat().st_mtime_ns == began
    with pytest.raises(LptError, match="differ in phase 1"):
        sweep.share_phase1(first, tmp_path / "third", config, [*small, "method.loss=ce"])
    with pytest.raises(LptError, match="has to be run first"):
        sweep.share_phase1(tmp_path / "absent", tmp_path / "third", config, other)
    whole = sweep.run(config, other, alone)
    assert {k: shared[k] for k in COLUMNS} == {k: whole[k] for k in COLUMNS}


def test_a_run_that_fails_ends_the_sweep_with_a_sentence(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], returncode=2)
    monkeypatch.setattr(subprocess, "run", lambda command, env: failed)
    with pytest.raises(LptError, match="fails ended with exit code 2, with the reason above"):
        sweep.run("digits_lt/lpt", [], tmp_path / "fails")


def test_a_checkout_names_a_commit_and_a_wheel_its_version(tmp_path, monkeypatch):
    import lpt

    assert sweep.version_of_the_code().removesuffix("-dirty").isalnum()
    monkeypatch.setattr(sweep, "PACKAGE", tmp_path / "lpt")
    assert sweep.version_of_the_code() == f"v{lpt.__version__}"
