"""`lpt fit`: what is held out, what is tried under a budget, what is chosen, and that a killed search continues
exactly.

Shapes: labels, right [H], counts [C].
"""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from lpt.config import load_config
from lpt.data import load_task
from lpt.data.folds import held_out_folds
from lpt.engine.stopping import Stopped
from lpt.errors import ConfigError, LptError
from lpt.search import bench as benches
from lpt.search import budget as budgets
from lpt.search import fitting
from lpt.search.bench import Bench, run_trial
from lpt.search.budget import Planner, SearchPlan, shorter_side
from lpt.search.candidates import Candidate, candidates, narrowed
from lpt.search.choice import Z_CHOICE, Z_SHOWN, Finalist, choose, difference, estimate, halved, image_weights, score
from lpt.search.fitting import fit, requested, searched, seconds_of
from tests.support.command_line import lpt as command
from tests.support.pictures import fill
from tests.support.toy import toy_task

NANO = ["backbone.name=nano", "train.device=cpu", "train.precision=fp32"]


# What is held out.


@pytest.mark.parametrize("counts", [(110, 71, 29, 12, 8, 5, 3, 2), (500, 100, 40), (3, 3, 3), (2, 1), (60, 0, 7)])
def test_folds_hold_out_a_fifth_at_most_and_no_image_twice(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    folds = held_out_folds(labels, len(counts), seed=0)
    assert folds.whole == tuple(k for k, n in enumerate(counts) if n < 3)
    every = torch.cat([torch.zeros(0).long(), *folds.held_out])
    assert len(every.unique()) == len(every)
    for number, held_out in enumerate(folds.held_out):
        rest = folds.rest(number, len(labels))
        assert torch.equal(torch.cat([rest, held_out]).sort().values, torch.arange(len(labels)))
        for k, n in enumerate(counts):
            given = int((labels[held_out] == k).sum())
            assert given in (0, min(20, max(1, n // 5))) and n - given >= min(n, 2)
            assert given or n < 3 or number >= 3  # a class of three is in three folds


@pytest.mark.parametrize(
    ("counts", "number"), [((3, 3, 3), 3), ((2, 1), 0), ((9, 4), 5), ((100, 25), 1), ((100, 24), 5)]
)
def test_the_fewer_images_the_tail_has_the_more_folds(counts, number):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert len(held_out_folds(labels, len(counts), seed=0).held_out) == number


def test_a_tail_with_enough_images_needs_one_fold():
    labels = torch.arange(3).repeat_interleave(40)
    assert [len(rows) for rows in held_out_folds(labels, 3, seed=0).held_out] == [24]
    assert len(held_out_folds(labels[:90], 3, seed=0).held_out) == 5  # the last class has 10, and gives 2
    one, other = (held_out_folds(labels, 3, seed=seed).held_out[0] for seed in (0, 1))
    assert not torch.equal(one, other) and torch.equal(one, held_out_folds(labels, 3, seed=0).held_out[0])


# What is chosen.


def test_weights_make_the_metrics():
    counts = torch.tensor([200, 50, 10, 4])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    right = torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 0])
    accuracy = {0: 3 / 4, 1: 1 / 2, 2: 1.0, 3: 0.0}
    expected = {
        "class_mean": sum(accuracy.values()) / 4,
        "few": (accuracy[2] + accuracy[3]) / 2,
        "accuracy": sum(accuracy[k] * n for k, n in enumerate(counts.tolist())) / 264,
    }
    for metric, value in expected.items():
        weights = image_weights(labels, counts, metric=metric, group_rule="lt20")
        assert score(right, weights).value == pytest.approx(value), metric
    none = image_weights(labels[:6], counts, metric="few", group_rule="lt20")
    assert none.sum() == 0 and math.isnan(score(right[:6], none).value)


def test_intervals_cover_as_often_as_they_say():
    """Of 1,000 draws of 300 images in classes of unequal size, as many as should hold the true difference."""
    rng = np.random.default_rng(0)
    labels = torch.tensor([k for k, n in enumerate((100, 80, 60, 30, 20, 5, 3, 2)) for _ in range(n)])
    weights = image_weights(labels, torch.ones(8), metric="class_mean", group_rule="thirds")
    skill = torch.tensor(rng.uniform(0.4, 0.9, (2, 8)))
    truth = (skill[0] - skill[1]).mean().item()
    hits = dict.fromkeys((Z_SHOWN, Z_CHOICE), 0)
    for _ in range(1000):
        one, other = (torch.tensor(rng.random(len(labels))) < skill[i][labels] for i in (0, 1))
        for z in hits:
            found = difference(one, other, weights, z=z)
            hits[z] += found.low <= truth <= found.high
    assert 0.93 <= hits[Z_SHOWN] / 1000 <= 0.99 and 0.77 <= hits[Z_CHOICE] / 1000 <= 0.9


def test_three_images_make_nobody_sure_and_thirty_do():
    one = torch.ones(3)
    assert difference(one, 0 * one, torch.full((3,), 1 / 3)).low < 0
    one = torch.ones(30)
    assert difference(one, 0 * one, torch.full((30,), 1 / 30)).low > 0.5
    assert difference(one, one, torch.full((30,), 1 / 30)).value == 0
    assert 0.8 < score(one, torch.full((30,), 1 / 30)).low < 0.95


def test_images_that_one_was_not_asked_are_left_out_of_a_difference():
    one = torch.tensor([1.0, 1.0, 0.0, math.nan, math.nan])
    other = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    weights = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3])
    assert difference(one, other, weights).value == pytest.approx(0.1 / 0.4)
    assert estimate(torch.full((2,), math.nan), torch.ones(2)).low == -math.inf


def finalist(name, hits, seconds, *, of=400, is_reference=False):
    right = torch.zeros(of)
    order = torch.randperm(of, generator=torch.Generator().manual_seed(len(name)))  # not the same images
    right[order[:hits]] = 1
    return Finalist(name, right, seconds, is_reference)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([("probe", 300, 30), ("lora", 380, 200)], "lora"),
        ([("probe", 300, 30), ("lora", 303, 200)], "probe"),
        ([("probe", 300, 30), ("mean", 303, 29)], "probe"),
        ([("probe", 300, 30), ("mean", 299, 5)], "probe"),  # cheaper, but nobody knows whether it is as good
        ([("probe", 300, 30), ("mean", 360, 29)], "mean"),
        ([("probe", 300, 30), ("vpt", 378, 190), ("lora", 380, 200)], "lora"),  # they cost about the same
        ([("probe", 300, 30), ("vpt", 378, 100), ("lora", 380, 200)], "vpt"),
        ([("probe", 300, 30), ("mean", 301, 10), ("lora", 380, 200)], "lora"),
        ([("probe", 380, 30), ("mean", 300, 10), ("lora", 300, 200)], "probe"),
    ],
)
def test_what_is_better_than_the_probe_is_taken_and_of_noise_the_cheaper(found, chosen):
    finalists = [finalist(*one, is_reference=one[0] == "probe") for one in found]
    assert choose(finalists, torch.full((400,), 1 / 400)).name == chosen
    assert choose(finalists[::-1], torch.full((400,), 1 / 400)).name == chosen


def test_halving_keeps_the_best_and_ties_keep_their_order():
    assert halved({"a": 0.2, "b": 0.5, "c": 0.5, "d": 0.4}, 2) == ["b", "c"]


# What is tried.


def test_settings_narrow_the_candidates():
    task = toy_task((30, 12, 5))
    found = candidates(task, torch.device("cpu"), width=192)

    def names(**given):
        return [one.name for one in narrowed(found, given)[0]]

    assert names() == ["class-mean", "knn", "probe", "probe-larger", "vpt", "lora", "lpt"]
    assert names(name="lpt") == ["lpt"] == names(name="lpt", epochs=[3, 1])
    assert names(epochs=3) == ["probe", "probe-larger", "vpt", "lora"]
    assert names(tuning="lora") == ["lora"] and names(prompt_length=5) == ["vpt", "lora", "lpt"]
    assert narrowed(found, {"name": "knn"})[1] == [one.label for one in found if one.name != "knn"]
    (other,) = narrowed(found, {"tuning": "bias", "epochs": 2})[0]
    assert other.settings == {"name": "fine_tune", "tuning": "bias", "epochs": 2}
    assert names(name="two_stage") == ["given"]
    with pytest.raises(ConfigError, match=r"method\.epoch: there is no such setting"):
        narrowed(found, {"epoch": 3})


def test_epochs_are_as_the_method_takes_them():
    task = toy_task((30, 12, 5))
    by_name = {one.name: one for one in candidates(task, torch.device("cpu"), width=768)}
    assert replace(by_name["lpt"], epochs=6).settings["epochs"] == [6, 0]
    (given,) = narrowed(list(by_name.values()), {"epochs": [4, 2]})[0]
    assert given.settings["epochs"] == [4, 2] and given.settings["pool_size"] == 3
    assert replace(by_name["lora"], epochs=6).settings["epochs"] == 6
    assert "epochs" not in by_name["knn"].settings
    assert by_name["vpt"].method["lr"] == pytest.approx(5e-3 / 4)  # a wider backbone, a lower rate


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("90s", 90), ("45", 45), ("1.5h", 5400), (" 2 m", 120), (".5m", 30)]
)
def test_budgets_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "-3m", "ten", "1e99h", "3 days"])
def test_what_is_no_budget_is_said(text):
    with pytest.raises(LptError, match=r"give for example 90s, 10m or 1\.5h"):
        seconds_of(text)


def clocked(monkeypatch, *, forward=0.01, step=0.1):
    """Images and steps cost as said, whatever the machine does."""
    monkeypatch.setattr(
        Planner, "forward_seconds", lambda self, size: self.forward.setdefault(size, forward * (size / 32) ** 2)
    )
    monkeypatch.setattr(
        Planner, "_steps_seconds", lambda self, one: step if not one.on_features else step / 100 * (one.epochs > 0)
    )
    monkeypatch.setattr(Planner, "left", lambda self, planned: budgets.SAFETY * self.budget - planned)


def planner(tmp_path, budget, *words, task=None):
    request = requested(None, ["data.name=digits-lt", *NANO, *words])
    bench = Bench(request.sections, task or toy_task((60, 30, 12, 5)), tmp_path, log=lambda text: None)
    found = narrowed(candidates(bench.task, bench.device, width=128), request.method)[0]
    return Planner(bench, found, budget, spent=0.0)


def test_the_budget_is_kept_and_more_of_it_buys_more(tmp_path, monkeypatch):
    clocked(monkeypatch)
    first = planner(tmp_path, 1.0)
    tried, epochs, folds = [], [], []
    for budget in (20, 60, 150, 400, 4000, 100_000):
        plan = Planner(first.bench, first.found, budget, spent=0.0).plan("")
        assert plan.seconds <= budget, (budget, plan)
        by_name = {one.name: one for one in plan.candidates}
        assert by_name["probe"].image_size == 32  # the backbone's own
        tried.append(len(by_name)), folds.append(plan.folds)
        epochs.append(by_name["lora"].epochs if "lora" in by_name else 0)
        assert {label for label, _ in plan.left_out}.isdisjoint({one.label for one in plan.candidates})
        assert len(plan.left_out) + len(plan.candidates) == 7
    assert tried == sorted(tried) and tried[0] == 3 and tried[-1] == 6  # toy images are too small for the larger probe
    bought = [epochs_of_it * number for epochs_of_it, number in zip(epochs, folds, strict=True)]
    assert (
        bought == sorted(bought)
        and epochs[-1] == max(epochs)
        and folds[1:] == sorted(folds[1:])
        and folds[1] < folds[-1] == 5
    )
    assert folds[0] == 5 and epochs[0] == 0  # features alone: folds cost next to nothing


def test_images_become_smaller_only_where_the_budget_cannot_bear_them(tmp_path, monkeypatch):
    clocked(monkeypatch, forward=0.01)
    sizes = []
    for budget in (0.2, 0.8, 20):  # 107 images take 1.07 s at 32 px, 0.6 at 24, 0.27 at 16
        plan = planner(tmp_path, budget, "method.name=class_mean").plan("")
        sizes.append(plan.candidates[0].image_size)
    assert sizes == [16, 24, 32]
    assert (
        planner(tmp_path, 0.1, "method.name=class_mean", "backbone.image_size=48").plan("").candidates[0].image_size
        == 48
    )


def test_larger_images_are_tried_where_there_are_any(tmp_path, monkeypatch):
    clocked(monkeypatch, forward=1e-4, step=1e-4)
    task = toy_task((60, 30, 12, 5))
    grown = replace(task.train, pixels=task.train.pixels.repeat(1, 1, 4, 4))
    plan = planner(tmp_path, 60, task=replace(task, train=grown)).plan("")
    assert {one.name: one.image_size for one in plan.candidates}["probe-larger"] == 48
    assert dict(planner(tmp_path, 60).plan("").left_out)["linear probe, larger images"].startswith("the images are not")
    fill(tmp_path / "photos", {"cat": 3, "dog": 3})
    assert shorter_side(load_task("folder", root=str(tmp_path / "photos")).train) == 40


def test_a_plan_is_read_as_it_was_written(tmp_path, monkeypatch):
    clocked(monkeypatch)
    plan = planner(tmp_path, 4000).plan("abc")
    assert SearchPlan.from_json(json.loads(json.dumps(plan.as_json()))) == plan


def test_what_is_timed_is_about_what_it_takes(tmp_path):
    """A real clock: steps of images cost more than steps of features, and none costs nothing."""
    real = planner(tmp_path, 60)
    by_name = {one.name: replace(one, image_size=32, epochs=3 * (one.name != "knn")) for one in real.found}
    steps = {name: real._steps_seconds(by_name[name]) for name in ("knn", "probe", "vpt", "lpt")}
    assert steps["knn"] == 0 < steps["probe"] < steps["vpt"] and real.forward_seconds(32) > 0


# A whole search.

SMALL = [*NANO, "train.workers=0"]


def hurry(monkeypatch):
    """Short schedules, few folds, and costs that do not depend on the machine."""
    clocked(monkeypatch, forward=1e-3, step=1e-2)
    monkeypatch.setattr(budgets, "LEAST_STEPS", 4)
    monkeypatch.setattr(budgets, "FEWEST_STEPS", 4)
    monkeypatch.setattr(budgets, "MOST_EPOCHS", (2, 3))
    monkeypatch.setattr("lpt.search.candidates.PROBE_STEPS", 20)
    monkeypatch.setattr("lpt.search.candidates.PROBE_EPOCHS", (2, 4))

    def two_folds(labels, num_classes, *, seed):
        folds = held_out_folds(labels, num_classes, seed=seed)
        return folds._replace(held_out=folds.held_out[:2])

    monkeypatch.setattr(benches, "held_out_folds", two_folds)


@pytest.fixture
def quick(monkeypatch):
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("some") / "photos", {"cat": 14, "dog": 9, "owl": 6})


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """(the folder of a search and a run that nothing disturbed, what was said)."""
    out, said = tmp_path_factory.mktemp("whole") / "run", []
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        fit(requested(str(photos), SMALL, budget="20s", seed=3), out, save=out.parent / "saved.yaml", say=said.append)
    return out, said


def choice_of(out):
    """What a search says, but for the seconds that it took."""
    summary = json.loads((out / "search.json").read_text())
    summary.pop("planned_seconds")  # with those that loading the data took
    for one in summary["candidates"]:
        one.pop("search_seconds"), one.pop("ms", None)
    return summary


def test_a_whole_search_and_the_page_that_it_leaves(whole, photos, capsys):
    out, said = whole
    summary = json.loads((out / "search.json").read_text())
    names = [one["name"] for one in summary["candidates"]]
    assert names[:3] == ["class-mean", "knn", "probe"] and {"vpt", "lora"} < set(names)
    taken = [one for one in summary["candidates"] if one["chosen"]]
    assert [one["name"] for one in taken] == [summary["chosen"]] and summary["seed"] == 3
    assert any(one["share"] < 1 for one in summary["candidates"])  # somebody was dropped
    assert summary["why"] in said and said[0].startswith("held out: ")
    assert sum(line.startswith("| ") and line.rstrip(" |").endswith(" taken") for line in said) == 1
    saved = load_config(out.parent / "saved.yaml")
    assert saved.model_dump() == load_config(out / "config.yaml").model_dump() and saved.train.seed == 3
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "What was compared" in page and "What was compared" in text and "linear probe, logit-adjusted, 32 px" in page
    code, _, err = command(capsys, "report", out)
    assert code == 0 and "What was compared" in (out / "report.html").read_text(), err
    # The file size in the table is that of the prompt file, but for its header.
    assert 0 < (out / "prompt.safetensors").stat().st_size - taken[0]["bytes"] < 6000
    code, _, err = command(capsys, "fit", photos, "--out", out, *SMALL)
    assert code == 2 and "--resume" in err


def test_the_features_of_an_image_are_computed_once(photos, tmp_path, quick, monkeypatch):
    seen = []
    real = benches.features
    monkeypatch.setattr(
        benches,
        "features",
        lambda model, images, **rest: seen.append(model.backbone.preprocess.size) or real(model, images, **rest),
    )
    request = requested(str(photos), SMALL, budget="1s")
    report = fit(request, tmp_path / "run")
    assert report["method"] in ("linear_probe", "class_mean", "knn") and len(seen) == len(set(seen))
    kept = list((tmp_path / "run/search/features").glob("*.safetensors"))
    assert len(kept) == len(seen) + 1  # the run has added those of the test images alone


def test_a_killed_search_goes_on_exactly(whole, photos, tmp_path, quick, monkeypatch):
    """Killed between two trials, then within a step of one, then in the training of the one that was chosen."""
    request, out = requested(str(photos), SMALL, budget="20s", seed=3), tmp_path / "killed"
    trials = []
    real = fitting.run_trial

    def killed(bench, candidate, fold, share, identity):
        trials.append(candidate.name)
        if candidate.name == "vpt" and "lora" not in trials[:-1] and not resumed:
            raise Stopped(15)
        if candidate.name == "lora" and resumed:

            def on_step(phase, step, steps, rates):
                if step == 1:
                    bench.stop.asked = 15

            bench.on_step = on_step
        return real(bench, candidate, fold, share, identity)

    def written():
        return {file: file.stat().st_mtime_ns for file in (out / "search/trials").glob("*.json")}

    left = [{}]
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "run_trial", killed)
        for resumed in (False, True):
            with pytest.raises(Stopped):
                fit(request, out, resume=resumed)
            left.append(written())
            assert not (out / "search.json").exists()
    assert list((out / "search/checkpoints/lora-0-0.25").glob("*.safetensors"))  # within its steps
    with monkeypatch.context() as patched:
        patched.setattr("lpt.run.follow", lambda recipe, session: session.stop(15))
        with pytest.raises(Stopped):
            fit(request, out, resume=True)
    left.append(written())
    assert len(left[0]) < len(left[1]) < len(left[2]) < len(left[3])
    assert all(after[file] == when for before, after in pairwise(left) for file, when in before.items())  # none twice
    report, undisturbed = fit(request, out, resume=True), json.loads((whole[0] / "report.json").read_text())
    assert choice_of(out) == choice_of(whole[0]) and written() == left[3]
    assert report["class_accuracy"] == undisturbed["class_accuracy"] and report["per_class"] == undisturbed["per_class"]


def test_a_search_is_repeated_by_its_plan(photos, tmp_path, quick, monkeypatch):
    request = requested(str(photos), SMALL, budget="0.4s")
    first = searched(request, tmp_path / "first")
    clocked(monkeypatch, forward=0.1, step=1.0)  # a much slower machine
    (tmp_path / "again/search").mkdir(parents=True)
    (tmp_path / "again/search/plan.json").write_bytes((tmp_path / "first/search/plan.json").read_bytes())
    again = searched(request, tmp_path / "again", resume=True)
    assert again.candidate == first.candidate and choice_of(tmp_path / "again") == choice_of(tmp_path / "first")
    with pytest.raises(LptError, match="holds a search with other settings or images"):
        searched(requested(str(photos), [*SMALL, "train.seed=1"], budget="0.4s"), tmp_path / "again", resume=True)


def test_a_trial_of_another_search_is_not_taken_over(photos, tmp_path, quick):
    request = requested(str(photos), SMALL)
    bench = Bench(request.sections, load_task(**request.sections["data"]), tmp_path, log=lambda text: None)
    one = Candidate("class-mean", "class means", {"name": "class_mean"}, 4, image_size=32)
    trial = run_trial(bench, one, 0, 1.0, "a")
    file = tmp_path / "trials/class-mean-0-1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "predicted": [7]}))
    assert run_trial(bench, one, 0, 1.0, "a").predicted == (7,)
    assert run_trial(bench, one, 0, 1.0, "b").predicted == trial.predicted
    file.write_text("{")
    assert run_trial(bench, one, 0, 1.0, "b").predicted == trial.predicted


def test_a_candidate_whose_numbers_leave_their_range_does_not_end_the_search(photos, tmp_path, quick):
    chosen = searched(
        requested(str(photos), [*SMALL, "method.lr=0.99", "method.optimizer=sgd"], budget="20s"), tmp_path / "run"
    )
    assert chosen.search is not None  # whatever came of it, it is said


def test_what_is_held_out_already_is_what_is_chosen_by(tmp_path, quick):
    for part, counts in (("train", {"a": 6, "b": 4}), ("val", {"a": 3, "b": 3}), ("test", {"a": 2, "b": 2})):
        fill(tmp_path / "photos" / part, counts, seed=len(part))
    said = []
    chosen = searched(requested(str(tmp_path / "photos"), SMALL, budget="1s"), tmp_path / "run", say=said.append)
    assert chosen.search and chosen.search["held_out"] == "held out: the 6 images of the val part"


def test_tiny_sets_are_searched_and_the_tiniest_are_not(tmp_path, quick):
    said = []
    tiny = fill(tmp_path / "tiny", {"a": 4, "b": 4, "c": 4})
    report = fit(requested(str(tiny), SMALL, budget="1s"), tmp_path / "run", say=said.append)
    assert report["class_accuracy"] >= 0 and any("in 2 folds" in line for line in said)
    tiniest = fill(tmp_path / "tiniest", {"a": 2, "b": 2})
    report = fit(requested(str(tiniest), SMALL), tmp_path / "other", say=said.append)
    assert report["method"] == "class_mean" and any("nothing can be held out" in line for line in said)


def test_data_without_a_folder(tmp_path, quick, capsys):
    code, said, err = command(
        capsys, "fit", "data.name=digits-lt", "method.name=class_mean", *SMALL, "--out", tmp_path / "run"
    )
    assert code == 0 and "digits-lt" in said, err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--budget", "soon"], "is no time"),
        (["--metric", "luck"], "none of class_mean, few, accuracy"),
        (["method.epoch=3"], "method.epoch: there is no such setting"),
        (["train.device=[1]"], "train.device"),
        (["method.name=lptt"], "did you mean lpt"),
        (["--seed", "-1"], "train.seed"),
    ],
)
def test_fit_tells_what_is_wrong(words, reason, tmp_path, capsys):
    fill(tmp_path / "photos", {"cat": 4, "dog": 3})
    given = words if words[0] == "train.device=[1]" else [*words, *SMALL]
    code, _, err = command(capsys, "fit", tmp_path / "photos", *given, "--out", tmp_path / "run")
    assert code == 2 and reason in err and not (tmp_path / "run").exists()


def test_what_is_no_dataset_is_said_in_a_sentence(tmp_path, capsys):
    code, _, err = command(capsys, "fit", tmp_path / "absent", *SMALL)
    assert code == 2 and "does not exist" in err
    code, _, err = command(capsys, "fit", fill(tmp_path / "one", {"cat": 5}), *SMALL)
    assert code == 2 and "class" in err and len(err.splitlines()) == 1


def test_few_needs_a_class_that_can_give_an_image(tmp_path, quick):
    photos = fill(tmp_path / "photos", {"a": 12, "b": 8, "c": 2})
    with pytest.raises(LptError, match="no few-shot class"):
        searched(requested(str(photos), SMALL, metric="few"), tmp_path / "run")


def test_one_method_with_its_epochs_is_trained_and_nothing_compared(photos, tmp_path, quick):
    chosen = searched(requested(str(photos), [*SMALL, "method.epochs=[1, 1]"]), tmp_path / "run")
    assert chosen.search is None and chosen.config.method["name"] == "lpt"
    assert chosen.config.method["epochs"] == [1, 1] and not (tmp_path / "run").exists()
    chosen = searched(requested(str(photos), [*SMALL, "method.name=two_stage"]), tmp_path / "run")
    assert chosen.config.method["name"] == "two_stage" and chosen.config.method["then"]
