"""The semi-supervised stage and whole runs of it: streams, cached views, cost, rounds, reports, and bad input."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from lpt import run
from lpt.config import resolve
from lpt.data import load_task, loader
from lpt.data.preprocess import Preprocess
from lpt.engine.clock import Clock
from lpt.engine.history import History
from lpt.engine.session import Cost
from lpt.errors import LptError
from lpt.methods.semi_supervised import LABELED
from lpt.prompt_file import read_prompt
from lpt.serve.evaluating import evaluate_prompt
from tests.support.command_line import lpt
from tests.support.pictures import fill
from tests.support.semi import FAST, Killed, semi, semi_task
from tests.support.toy import small_backbone, toy_task


def prototyped(**changes):
    """A backbone without a projection, and random prototypes."""
    backbone = small_backbone(**changes)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(8))
    backbone.prototypes = {f"class {k}": row for k, row in enumerate(rows)}
    return backbone


# Streams.


def test_every_step_has_labeled_weak_and_strong_views_of_what_it_should(clip):
    fit = semi("ulfine", clip, keep=True, steps=5, rounds=1, ratio=2, strong_views=2, tuning="head")[1]
    task, labeled, unlabeled = semi_task(), [], []
    for was in fit.seen:
        assert was.batches.keys() == {LABELED, "weak", "strong0", "strong1"}
        one, weak = was.batches[LABELED], was.batches["weak"]
        assert len(one.views) == 4 and torch.equal(one.labels, task.train.labels[one.rows])
        views = [was.batches[name].views for name in ("weak", "strong0", "strong1")]
        assert all(torch.equal(was.batches[name].rows, weak.rows) for name in ("strong0", "strong1"))
        assert all(len(view) == 8 for view in views)
        assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
        labeled += one.rows.tolist()
        unlabeled += weak.rows.tolist()
    assert len(set(labeled)) == 20 and len(set(unlabeled[:31])) == 31  # each once before any comes again
    assert set(unlabeled) == set(range(31))


def test_unlabeled_images_may_be_files(clip, tmp_path):
    names = {f"class {k}": 4 for k in range(4)}
    fill(tmp_path / "photos", names)
    fill(tmp_path / "more", {"a": 3, "b": 4}, seed=1)
    task = load_task("folder", root=str(tmp_path / "photos"), unlabeled=str(tmp_path / "more"))
    _, fit, _ = semi("ulfine", clip, task, folder=tmp_path / "run", keep=True, steps=2, rounds=1, strong_views=2)
    weak, strong, other = (fit.seen[0].batches[name].views for name in ("weak", "strong0", "strong1"))
    assert weak.shape == strong.shape == (4, 3, 32, 32) and not torch.allclose(strong, other)
    again = semi("ulfine", clip, task, keep=True, steps=2, rounds=1, strong_views=2)[1]
    assert fit.losses == again.losses and fit.history.lines[-1]["pseudo_labels"].keys() == {
        "coverage",
        "classes_without",
    }


# Cached views.


@pytest.mark.parametrize("method", ["ulfine", "fixmatch"])
def test_on_cached_features_the_objective_is_the_same_up_to_the_views(clip, method, monkeypatch):
    monkeypatch.setattr(Preprocess, "train", lambda self, images, chance, dtype: self.test(images, dtype=dtype))
    monkeypatch.setattr(loader, "augmented", lambda images, seeds, augmenter: images // 2)
    settings = {"steps": 5, "rounds": 1, "lr": 0.1, "tau": 0.5, "tuning": "head", "strong_views": 2}
    plain, fit, _ = semi(method, clip, **settings)
    cached, again, _ = semi(method, clip, cached_views=3, **settings)
    assert again.losses == pytest.approx(fit.losses, rel=1e-4) and len(set(fit.losses)) == 5
    for name, value in plain.learned_state().items():
        torch.testing.assert_close(cached.learned_state()[name], value, rtol=1e-4, atol=1e-5)


def test_a_step_draws_one_of_the_cached_strong_views(clip):
    _, fit, _ = semi("ulfine", clip, keep=True, steps=12, rounds=1, tuning="head", cached_views=3, strong_views=2)
    weak, strong = fit.streams["weak"].features, fit.streams["strong0"].features
    assert weak.shape == (31, 64) and strong.shape == (3, 31, 64) and fit.streams[LABELED].features.shape == (26, 64)
    assert not any(torch.equal(a, b) for a, b in ((weak, strong[0]), (strong[0], strong[1]), (strong[1], strong[2])))
    chosen = set()
    for was in fit.seen:
        rows = was.batches["weak"].rows
        assert torch.equal(was.batches["weak"].views, weak[rows])
        for i, row in enumerate(rows.tolist()):
            found = [next(v for v in range(3) if torch.equal(was.batches[name].views[i], strong[v, row])) for name in
                     ("strong0", "strong1")]  # fmt: skip
            chosen.add(tuple(found))
    assert len(chosen) == 9


# Cost.


def test_the_cost_of_a_step_on_cached_features_is_its_matrix_products(clip):
    """One product of B rows of D' with C classes is 2 B C D'. Three views go forward; labeled and strong ones give the
    weight a gradient. The features cost a forward of every image."""
    fit = semi("fixmatch", clip, steps=5, rounds=1, tuning="head", cached_views=2)[1]
    assert fit.costs["semi"] == Cost(steps=5, images=5 * 3 * 4, flops=5 * 5 * 2 * 4 * 4 * 64)
    of_one = forward_by_hand(depth=3, tokens=17, width=64, patch=8, hidden=256)
    features = {name: of for name, of in fit.costs.items() if name != "semi"}
    assert {name: cost.images for name, cost in features.items()} == {
        f"{LABELED}-features": 26, "weak-features": 31, "strong-features-0": 31, "strong-features-1": 31,
    }  # fmt: skip
    for cost in features.values():
        assert cost.flops == cost.images * of_one and cost.steps == 0


def forward_by_hand(*, depth, tokens, width, patch, hidden):
    """Twice the multiply-adds of one image; in the last block only CLS asks, and continues."""
    embedding = 2 * (tokens - 1) * width * 3 * patch * patch
    total = embedding
    for i in range(depth):
        asking = 1 if i == depth - 1 else tokens
        keys_values = 2 * tokens * width * 2 * width
        queries = 2 * asking * width * width
        attention = 2 * 2 * asking * tokens * width
        out = 2 * asking * width * width
        mlp = 2 * 2 * asking * width * hidden
        total += keys_values + queries + attention + out + mlp
    return total


def test_a_step_of_full_tuning_costs_three_times_its_forward():
    """A backward is two forwards, up to the pixels' gradient, which nobody needs, and attention, which is computed
    again; weak views go forward alone. 4 patches and CLS, 16 pixels each."""
    of_one = forward_by_hand(depth=4, tokens=5, width=32, patch=16, hidden=128)
    fit = semi("fixmatch", prototyped(), steps=2, rounds=1, tuning="full", batch_size=8)[1]
    step = fit.costs["semi"].flops / 2
    assert fit.costs["semi"].images == 2 * 3 * 8
    pixels = 2 * 4 * 32 * 3 * 16 * 16
    assert step == pytest.approx(8 * of_one + 16 * (3 * of_one - pixels), rel=0.03)
    light = semi("fixmatch", prototyped(), steps=2, rounds=1, tuning="adaptformer", batch_size=8)[1]
    assert 8 * of_one * 4 < light.costs["semi"].flops / 2 < 0.9 * step  # no gradient of frozen weights


# Rounds.


def test_a_round_tells_what_it_kept_and_which_classes_it_lacks(clip, tmp_path):
    import pyarrow.parquet as pq

    _, fit, said = semi("ulfine", clip, folder=tmp_path, steps=7, rounds=3, tau=0.5, lr=0.02)
    rows = pq.read_table(tmp_path / "pseudo_labels").to_pylist()
    ids, classes = {}, [f"class {k}" for k in range(4)]
    for id_, label in zip(semi_task().unlabeled.ids, semi_task().unlabeled.labels.tolist(), strict=True):
        ids[id_] = f"class {label}"
    warnings = [line for line in said if "kept no pseudo-label" in line]
    assert [row["step"] for row in rows] == [t for t in range(7) for _ in range(4)]
    lacked = 0
    for number, line in enumerate(fit.history.lines, start=1):
        mine = [row for row in rows if row["round"] == number]
        assert {row["step"] for row in mine} == [{0, 1, 2}, {3, 4, 5}, {6}][number - 1]
        assert all(row["truth"] == ids[row["image"]] and row["kept"] == (row["confidence"] >= 0.5) for row in mine)
        kept = [row for row in mine if row["kept"]]
        told = line["pseudo_labels"]
        assert [told["coverage"], line["kept"]] == pytest.approx(2 * [len(kept) / len(mine)])
        assert told["precision"] == pytest.approx(sum(r["truth"] == r["label"] for r in kept) / len(kept))
        assert told["false_kept"] == sum(r["truth"] != r["label"] for r in kept)
        without = [name for name in classes if name not in {row["label"] for row in kept}]
        assert told["classes_without"] == without
        if without:
            lacked += 1
            start = f"warning: round {number} kept no pseudo-label of {len(without)} classes: {', '.join(without)}"
            assert start in warnings
    assert lacked == len(warnings) > 0


def test_many_silent_classes_are_cut_short(clip):
    backbone = prototyped()
    rows = torch.randn(14, 32, generator=torch.Generator().manual_seed(8))
    backbone.prototypes = {f"class {k}": row for k, row in enumerate(rows)}
    task = semi_task(unlabeled=(3,) * 14, counts=(2,) * 14)
    said = semi("fixmatch", backbone, task, steps=1, rounds=1, tau=1.0, tuning="head")[2]
    (line,) = [line for line in said if "kept no pseudo-label" in line]
    assert line.endswith("14 classes: " + ", ".join(f"class {k}" for k in range(10)) + ", ...")


# Whole runs.


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("semi")
    fill(root / "photos", {"class 0": 9, "class 1": 6, "class 2": 4, "class 3": 4})
    return fill(root / "more", {"class 0": 4, "class 1": 5, "class 2": 3, "class 3": 3}, seed=3).parent


def raw(tower, photos, method="ulfine", **settings):
    return {
        "backbone": {"name": tower[2], "weights": str(tower[3])},
        "data": {"name": "folder", "root": str(photos / "photos"), "unlabeled": str(photos / "more")},
        "method": {"name": method, "steps": 6, "rounds": 3, "lr": 0.05, "tau": 0.4, **settings},
        "train": {"batch_size": 4, "precision": "fp32"},
    }


def test_a_run_reports_heads_cost_and_pseudo_labels_and_its_prompt_file_evaluates_to_the_same(tower, photos, tmp_path):
    import pyarrow.parquet as pq

    report = run.train(resolve(raw(tower, photos), ["train.watch_test=2"]), tmp_path / "run")
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["heads"].keys() == {"linear", "similarity"} and 0 <= report["heads"]["linear"]["accuracy"] <= 1
    assert report["cost"]["steps"] == 6 and report["cost"]["images"] == 6 * 3 * 4 and report["cost"]["flops"] > 1e6
    told = report["pseudo_labels"]
    rows = [row for row in pq.read_table(tmp_path / "run" / "pseudo_labels").to_pylist() if row["round"] == 3]
    assert told["round"] == 3 and told["images"] == len(rows) == 8 and told["true"] == [4, 5, 3, 3]
    assert told["kept"] == sum(row["kept"] for row in rows)
    right = [row["similarity_label"] == row["truth"] for row in rows]
    assert told["similarity_accuracy"] == pytest.approx(sum(right) / 8)
    lines = History(tmp_path / "run" / "history.jsonl").lines
    assert ["test" in line for line in lines] == [False, True, True]
    seen = [line["test"]["class_accuracy"] for line in lines[1:]]
    assert report["watched"] == {
        "evaluations": 2, "last": seen[-1], "mean20": pytest.approx(sum(seen) / 2),
        "median20": pytest.approx(sum(seen) / 2), "best_on_test": max(seen),
    }  # fmt: skip
    assert seen[-1] == pytest.approx(report["class_accuracy"], abs=0.2)  # the last weights, before they are rounded
    places = {"backbone": {"weights": str(tower[3])}, "data": {"root": str(photos / "photos")}}
    again = evaluate_prompt(tmp_path / "run" / "prompt.safetensors", places)
    assert again["per_class"] == report["per_class"] and again["heads"] == report["heads"]


def test_what_was_not_done_is_not_reported(tower, photos, tmp_path):
    report = run.train(resolve(raw(tower, photos, "fixmatch", lambda_u=0)), tmp_path / "run")
    assert not report.keys() & {"watched", "pseudo_labels", "heads"}
    assert not (tmp_path / "run" / "pseudo_labels").exists() and report["cost"]["images"] == 24


@pytest.mark.parametrize(
    "settings", [{}, {"tuning": "head", "cached_views": 2, "weight_ema": 0.5}], ids=["adaptformer", "cached"]
)
def test_a_run_killed_within_a_round_ends_with_the_same_files(tower, photos, tmp_path, monkeypatch, settings):
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    config = resolve(raw(tower, photos, **settings), ["train.watch_test=3"])
    monkeypatch.setattr(Clock, "due", lambda self, what, seconds: True)  # a checkpoint at every step

    def kill(phase, step, steps, text):
        if (phase, step) == ("semi", 3):
            raise Killed

    whole = run.train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        run.train(config, tmp_path / "killed", show=kill)
    written = tmp_path / "killed" / "config.yaml"
    assert "la_on: labeled" in written.read_text()
    written.write_text(written.read_text().replace("la_on: labeled", "la_on: labelled"))  # as lpt 0.1 wrote it
    with pytest.warns(FutureWarning, match="la_on=labelled is spelled labeled now"):
        again = run.train(config, tmp_path / "killed", resume=True)
    assert "la_on: labeled" in written.read_text()
    assert read_prompt(tmp_path / "killed" / "prompt.safetensors").header.settings["la_on"] == "labeled"
    for report in (whole, again):
        del report["seconds"], report["peak_memory_bytes"]
    assert again == whole
    tables = [pq.read_table(tmp_path / name / "pseudo_labels") for name in ("whole", "killed")]
    assert tables[0].equals(tables[1])
    files = [load_file(tmp_path / name / "prompt.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    (tmp_path / "killed" / "report.json").unlink()
    third = run.train(config, tmp_path / "killed", resume=True)  # all phases are finished
    assert {k: v for k, v in third.items() if k in whole} == whole


@pytest.mark.parametrize("method", ["finessl", "daso", "fixmatch", "ulfine"])
def test_the_best_round_on_held_out_images_can_be_chosen(tower, photos, tmp_path, method):
    chosen = resolve(raw(tower, photos, method), ["train.select=best_val", "data.val_per_class=1"])
    report = run.train(chosen, tmp_path / "run")
    scores = [line["val"]["class_accuracy"] for line in History(tmp_path / "run" / "history.jsonl").lines]
    best = 2 * scores.index(max(scores)) + 2
    assert report["selection"] == f"best on held-out images: step {best} of semi"


@pytest.mark.parametrize("adjust", ["crt", "lws", "marc", "posthoc_la"])
def test_a_fused_head_may_be_adjusted_or_it_is_said_that_it_cannot(clip, adjust):
    first = {"name": "ulfine", "steps": 1, "rounds": 1, "tuning": "head"}
    if adjust in ("crt", "marc"):
        with pytest.raises(LptError, match=f"method.adjust={adjust} .*fused"):
            semi("decoupled", clip, adjust=adjust, first=first, epochs=1)
    else:
        model = semi("decoupled", clip, adjust=adjust, first=first, epochs=1)[0]
        assert model.calibration is not None


# Bad input.


def test_a_task_without_unlabeled_images_is_told_what_to_do(clip):
    for task in (toy_task(), replace(semi_task(), unlabeled=semi_task().unlabeled.subset([]))):
        for method in ("ulfine", "fixmatch", "finessl", "daso"):
            with pytest.raises(LptError, match=r"toy has no unlabeled images: .*data\.unlabeled"):
                semi(method, clip, task, steps=2, rounds=1)
        # What the sentence proposes does work.
        semi("fixmatch", clip, task, lambda_u=0, **{**FAST, "steps": 1})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.unlabeled=null"], "has no unlabeled images: "),
        (["method.tau=0"], "method.tau: got 0"),
        (["method.tau=1.01"], "method.tau: got 1.01"),
        (["method.name=fixmatch", "method.soft_from=0"], "method.soft_from: got 0"),
        (["method.name=finessl", "method.tau=-1"], "method.tau: got -1"),
        (["method.eta=1.1"], "method.eta: got 1.1"),
        (["method.mu=-.1"], "method.mu: got -0.1"),
        (["method.adapter_dim=0"], "method.adapter_dim"),
        (["method.orth_on=learnable_text", "method.proto_mode=recursive"], "learnable_text needs proto_mode=anchored"),
        (["method.micro_batches=3"], "train.batch_size 4 is no multiple of method.micro_batches 3"),
        (["method.rounds=7"], "method.rounds 7 are more than the 6 steps"),
        (["method.cached_views=1"], "method.cached_views needs features that stay as they are: set method.tuning=head"),
        (["method.cached_views=1", "method.tuning=vpt_deep"], "method.cached_views needs features that stay"),
        (["method.name=fixmatch", "method.cached_views=2", "method.tuning=lora"], "method.cached_views needs"),
        (["prototypes.weights=PLACE"], "the prototypes lack 2 of 4 classes: class 2, class 3"),
        (["method.name=daso", "prototypes.weights=PLACE"], "the prototypes lack 2 of 4 classes"),
    ],
)
def test_bad_input_gets_one_sentence_exit_code_2_and_nothing_half_written(tower, photos, tmp_path, capsys, words, says):
    from safetensors.torch import save_file

    place = tmp_path / "prototypes.safetensors"
    save_file({"prototypes": torch.ones(2, 48)}, place, {"classes": json.dumps(["class 0", "class 1"])})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw(tower, photos)))
    capsys.readouterr()
    overrides = [word.replace("PLACE", str(place)) for word in words]
    if overrides[0].startswith("method.name="):  # a named method forgets the settings of the other
        overrides = [overrides[0], "method.steps=6", "method.rounds=3", *overrides[1:]]
    code, _, err = lpt(capsys, "train", tmp_path / "config.yaml", *overrides, "--out", tmp_path / "out")
    assert code == 2 and says in err and "Traceback" not in err
    assert err.strip().count("\n") == 0 or "adapter_dim" in err, err
    assert not (tmp_path / "out").exists()


def test_a_backbone_without_prototypes_is_told(tmp_path):
    with pytest.raises(LptError, match=r"has no class prototypes: set prototypes\.weights"):
        semi("ulfine", small_backbone(), steps=1, rounds=1)
