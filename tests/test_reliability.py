"""The reliability table in small: the quick form of every theme, the longer ones slow."""

import importlib
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks.reliability import hostile
from benchmarks.reliability.__main__ import THEMES, line
from benchmarks.reliability.outputs import problem_with

PYTHON = sys.executable


LONG = ("determinism", "kills", "large", "processes", "serving")
"""Themes that take a minute and more also in small. Other tests kill, resume and compare smaller runs."""


@pytest.mark.parametrize("theme", [pytest.param(t, marks=[pytest.mark.slow] * (t in LONG)) for t in THEMES])
def test_nothing_is_lost(theme):
    rows = importlib.import_module(f"benchmarks.reliability.{theme}").rows(quick=True)
    assert not [line(row) for row in rows if not row.passed]
    assert theme != "hostile" or sum(row.tried for row in rows) > 600


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from joblib import load", ["1: import joblib"]),
        ("import torch\ntorch.load(f, weights_only=False)", ["2: torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("faiss.read_index(p); yaml.load(t)", ["1: faiss.read_index", "1: yaml.load"]),
        ("from torch import load\nfrom yaml import load, safe_load", ["1: torch.load", "2: yaml.load"]),
        ("np.load(p, allow_pickle=True)", ["1: allow_pickle"]),
        ("load_dataset(x, trust_remote_code=True)", ["1: trust_remote_code"]),
        ("re.compile(p); model.eval(); eval(x)", ["1: eval"]),
    ],
)
def test_the_source_scan_finds_what_runs_data(source, found):
    assert sorted(hostile.unsafe(source)) == found


def test_a_worker_that_dies_loses_the_file_it_was_at_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile, "make_subjects", lambda folder: None)
    worker = "import json, os; print(json.dumps([0.1, 'read', ''])) if not os.path.exists('../died') else 0; "
    worker += "open('../died', 'w'); os._exit(3)"
    monkeypatch.setattr(hostile.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {PYTHON} -c "{worker}"\n')
    (tmp_path / "python").chmod(0o755)
    (row,) = hostile.mutated({"image": 3}, workers=1)
    assert (row.tried, row.survived, row.lost) == (3, 1, 2) and row.note.count("the process ended with 3") == 2


def test_a_problem_is_made_simple_and_the_files_after_it_are_tried_too(tmp_path, monkeypatch):
    def at_least(choose, limit):
        number = choose.number(0, 10**6)
        assert number < limit, "too large"
        return "read"

    worker, answers = object.__new__(hostile.Worker), []
    worker.room, worker.breaches, worker.start = tmp_path, [], hostile.used_memory(hostile.CPU)
    worker.trials = SimpleNamespace(image=lambda choose: lambda: at_least(choose, 10**5))
    worker.tell = lambda *answer: answers.append(answer)
    monkeypatch.setattr(hostile, "HANGS", 1.0)
    worker.work({"image": 20}, seed=5)
    time.sleep(1.5)  # nobody is ended for a file that was done with in time
    problems = [problem for _, _, problem in answers if problem]
    assert len(answers) == 20 and 0 < len(problems) < 20
    assert all("AssertionError: too large" in problem for problem in problems)
    assert problems[0].endswith("by 100000")  # the smallest


@pytest.mark.parametrize(
    ("code", "said", "complained", "written", "problem"),
    [
        (0, "i.png  cat 0.500  dog 0.250\n", "", '[{"a": 0.5}]', ""),
        (2, "", "error: prompt file p has a damaged header: it holds NaN, which is no number\n", "", ""),
        (1, "", "error: the model's prediction for image i.png is not finite\n", '[{"error": "x"}]', ""),
        (0, 'nano nancy "NaN" banana.nan\n', "warning: small\n", "", ""),
        (0, "i.png  cat nan  dog nan\n", "", "", "an output with nan"),
        (0, "ok\n", "", '[{"a": NaN}]', "written JSON that is none: NaN"),
        (0, "ece inf\n", "", "", "an output with inf"),
        (0, "x" * 100_001, "", "", "an output of 100,001 letters"),
        (0, "\x1b[2J", "", "", "a terminal would obey"),
        (1, "", "Traceback (most recent call last):\n  File\n", "", "a traceback"),
        (3, "", "", "", "code 3"),
        (0, "", "error: no\n", "", "code 0 with"),
        (2, "", "error: a\nerror: b\n", "", "a refusal of 2 lines"),
        (2, "", "error: " + "a" * 600, "", "a refusal of 1 lines"),
        (2, "", "error: a\n", "[]", "2 of them written"),
    ],
)
def test_what_a_command_says_of_a_strangers_file_is_judged(code, said, complained, written, problem):
    answer = problem_with(code, said, complained, written)
    assert answer.startswith(problem) or (problem and problem in answer)
    assert bool(answer) == bool(problem)
