"""What retrieval is worth: each answer against a slow one, the intervals, and what a run says of them."""

import json

import numpy as np
import pytest
import torch

from lpt.engine import retrieval as engine
from lpt.engine.evaluate import PrefixCache, predict
from lpt.engine.retrieval import NOT_LOOKED_AT, Arms, looked_at, sampled
from lpt.metrics import paired_difference
from lpt.model.heads import Calibration, cosines
from lpt.report import retrieval as report
from lpt.report.page import html
from tests.support.plain import plain_feature
from tests.support.toy import of_mode, prompted, small_backbone, toy_images

LABELS = torch.arange(7).repeat(20)


def with_heads(mode="full"):
    """A model that knows phase 1's head, its test images, and their views."""
    model, taken = prompted(small_backbone()).only_train().eval(), toy_images(LABELS)
    generator = torch.Generator().manual_seed(5)
    query_map = 0.1 * torch.randn(32, 65, generator=generator) if mode == "early" else None
    model = of_mode(model, mode, query_map=query_map, ids=torch.tensor([1, 4])) if mode != "full" else model
    views = model.backbone.preprocess.test(taken.pixels)
    with torch.no_grad():  # rows that see what sets images apart, not what random weights make of all of them
        apart = plain_feature(model, views) - plain_feature(model, views).mean(0)
        model.head.weight.copy_(torch.randn(7, 140, generator=generator) @ apart)
        model.phase1_head = torch.randn(7, 140, generator=generator) @ apart
    model.calibration = Calibration(7)
    model.calibration.offset.data.copy_(0.001 * torch.randn(7, generator=generator))
    return model, taken, views


@pytest.mark.parametrize("mode", ["full", "early"])
@torch.no_grad()
def test_each_answer_is_the_slow_one(mode):
    model, taken, views = with_heads(mode)
    plain = predict(model, taken)
    arms = Arms.of(model, taken.labels, constant=torch.tensor([0, 3]), seed=4)
    found = predict(model, taken, beside=arms, batch_size=33)
    assert torch.equal(found.ids, plain.ids)  # the evaluation itself is what it was
    torch.testing.assert_close(found.logits, plain.logits)
    pool = model.pool

    def head(ids):
        group = torch.stack([sum(pool.tokens[j] for j in row) / 2 for row in ids.tolist()])
        return cosines(plain_feature(model, views, group), model.head.weight)

    slow = {
        "retrieved": head(plain.ids),
        "constant": head(torch.tensor([0, 3]).expand(140, -1)),
        "random": head(arms.random),
        "none": cosines(plain_feature(model, views), model.phase1_head),
    }
    slow["both"] = (slow["retrieved"] + slow["none"]) / 2
    assert found.beside.keys() == slow.keys()
    for name, logits in slow.items():
        wanted = model.calibration(logits).argmax(1)
        assert torch.equal(found.beside[name], wanted), name
        assert not any(torch.equal(wanted, model.calibration(slow[other]).argmax(1)) for other in slow if other != name)
    assert all(len(set(row)) == 2 for row in arms.random.tolist()) and len(arms.random.unique(dim=0)) == 20


def test_without_a_choice_there_are_three():
    model, taken, _ = with_heads("none")
    arms = Arms.of(model, taken.labels, constant=torch.tensor([0, 1]), seed=0)
    answers = predict(model, taken, beside=arms).beside
    assert answers.keys() == {"fixed", "none", "both"}
    assert torch.equal(answers["fixed"], predict(model, taken).logits.argmax(1))


def test_no_pool_and_no_head_of_phase_1_have_no_arms():
    assert Arms.of(prompted(small_backbone(), pool=False), LABELS, constant=torch.zeros(2), seed=0) is None
    assert Arms.of(prompted(small_backbone()), LABELS, constant=torch.zeros(2), seed=0) is None


def test_the_prefix_runs_once(monkeypatch):
    model, taken, _ = with_heads()
    ran, prefix = [], type(model).prefix
    monkeypatch.setattr(type(model), "prefix", lambda self, views: ran.append(len(views)) or prefix(self, views))
    predict(model, taken, beside=Arms.of(model, taken.labels, constant=torch.tensor([0, 1]), seed=0))
    assert sum(ran) == 140
    cache = PrefixCache()
    for _ in range(2):
        predict(model, taken, cache=cache, beside=Arms.of(model, taken.labels, constant=torch.tensor([0, 1]), seed=0))
    assert sum(ran) == 280


def test_of_many_images_some_of_each_class_are_looked_at(monkeypatch):
    labels = torch.tensor([0] * 50 + [2] * 3 + [1] * 30)
    assert sampled(labels, seed=0).tolist() == list(range(83))
    monkeypatch.setattr(engine, "MOST_IMAGES", 24)
    rows = sampled(labels, seed=0)
    assert labels[rows].bincount().tolist() == [8, 8, 3] and rows.tolist() == sorted(set(rows.tolist()))
    assert sampled(labels, seed=0).tolist() == rows.tolist() != sampled(labels, seed=1).tolist()
    monkeypatch.setattr(engine, "MOST_IMAGES", 3)
    assert labels[sampled(labels, seed=0)].bincount().tolist() == [2, 2, 2]
    model, taken, _ = with_heads()
    monkeypatch.setattr(engine, "MOST_IMAGES", 14)
    arms = Arms.of(model, taken.labels, constant=torch.tensor([0, 3]), seed=4)
    few = predict(model, taken, beside=arms, batch_size=3).beside  # some batches have none of them
    monkeypatch.undo()
    whole = predict(model, taken, beside=Arms.of(model, taken.labels, constant=torch.tensor([0, 3]), seed=4)).beside
    for name in ("retrieved", "constant", "none", "both"):
        assert torch.equal(few[name][arms.rows], whole[name][arms.rows])
        assert (few[name] == NOT_LOOKED_AT).sum() == 140 - 14
    seen, seen_labels = looked_at(few, taken.labels)
    assert torch.equal(seen_labels, LABELS[arms.rows]) and len(seen["none"]) == 14


# The intervals.


def test_the_interval_is_the_stratified_one_written_slowly():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], [40, 5, 200])
    first, second = rng.random(245) < 0.7, rng.random(245) < 0.6
    means, variances = [], []
    for c in (0, 1, 3):
        d = first[labels == c].astype(float) - second[labels == c]
        means.append(d.mean())
        variances.append(d.var(ddof=1) / len(d))
    half = 1.96 * np.sqrt(sum(variances)) / 3
    middle = np.mean(means)
    found = paired_difference(*map(torch.from_numpy, (first, second, labels)))
    assert found == pytest.approx((middle, middle - half, middle + half))


def test_the_interval_covers():
    rng, covered = np.random.default_rng(1), 0
    labels = torch.arange(10).repeat_interleave(40)
    p = rng.uniform(0.3, 0.9, 10).repeat(40)  # both are right together or one alone
    truth = 0.05
    for _ in range(300):
        u = rng.random(400)
        first, second = u < p, u < p - truth
        _, low, high = paired_difference(torch.from_numpy(first), torch.from_numpy(second), labels)
        covered += low <= truth <= high
    assert 0.90 < covered / 300 < 0.99


def test_single_images_empty_groups_and_no_difference():
    right = torch.tensor([True, True, False, True])
    assert paired_difference(right[:0], right[:0], torch.zeros(0, dtype=torch.long)) is None
    assert paired_difference(right, right, torch.tensor([0, 0, 1, 2])) == (0.0, 0.0, 0.0)
    middle, low, high = paired_difference(right, ~right, torch.tensor([0, 1, 2, 3]))  # one image a class
    assert middle == 0.5 and low < 0 < high


# What is said.


def numbers(answer, **differences):
    pairs = {name.replace("_", " - "): {"class_accuracy": d, "few": None} for name, d in differences.items()}
    return {"answer": answer, "differences": pairs}


def test_the_sentence_says_what_to_do():
    nothing, some, unclear = (0.001, -0.002, 0.004), (0.02, 0.01, 0.03), (0.003, -0.02, 0.026)
    assert report.sentence(numbers("retrieved", retrieved_constant=nothing, retrieved_none=some)) == (
        "Retrieval adds +0.1 (-0.2 to +0.4) points of class mean over the same prompts for all images: choose "
        "method.query=none (`lpt edit`), which spares the query's pass; phase 2 as a whole adds +2.0 (+1.0 "
        "to +3.0) over phase 1 alone."
    )
    kept = report.sentence(numbers("retrieved", retrieved_constant=some, retrieved_none=nothing))
    assert ": keep the query; " in kept and kept.endswith("over phase 1 alone, which is no more than noise.")
    unsure = report.sentence(numbers("retrieved", retrieved_constant=unclear, retrieved_none=unclear))
    assert "too few images to tell" in unsure and "noise" not in unsure
    both = report.sentence(numbers("both", retrieved_constant=nothing, both_constant=some, both_none=some))
    assert "with the query's own head beside it +2.0 (+1.0 to +3.0): keep the query;" in both
    assert report.sentence(numbers("fixed", fixed_none=some)).startswith("The fixed group prompts add +2.0")


def test_a_run_reports_it_everywhere(finished):
    written = json.loads((finished / "report.json").read_text())
    bought = written["retrieval"]
    assert bought["images"] == "held-out" and bought["number"] == 20 and bought["answer"] == "both"
    assert set(bought["arms"]) == {"retrieved", "constant", "random", "none", "both"} and len(bought["constant"]) == 2
    assert bought["says"] == report.sentence(bought)
    middle = bought["arms"]["both"]["class_accuracy"] - bought["arms"]["constant"]["class_accuracy"]
    assert bought["differences"]["both - constant"]["class_accuracy"][0] == pytest.approx(middle)
    text, page = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    assert "## What retrieval adds" in text and bought["says"] in text and "| mean of both heads \\* |" in text
    assert "<h2>What retrieval adds</h2>" in page and page.count("method.query=none") == text.count("method.query=none")
    assert "random ones" in page and "20 held-out images" in page


def test_a_page_of_a_run_without_a_pool_says_nothing_of_it(finished):
    written = json.loads((finished / "report.json").read_text())
    del written["retrieval"]
    classes = json.loads((finished / "split.json").read_text())["classes"]
    made = {name: torch.zeros(3, dtype=torch.long) for name in ("labels", "predicted")}
    page = html(
        written, classes=classes, predictions={**made, "confidence": torch.ones(3)}, history=[], config="", command=""
    )
    assert "What retrieval adds" not in page
