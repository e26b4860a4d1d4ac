"""Planted label errors and copies are found, rare classes come first, and what is written can be read elsewhere."""

import csv
import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from lpt.audit.auditing import audited
from lpt.audit.confidences import FOLDS, REPEATS, SHRINKAGE, TEMPERATURES, discriminants, folds, held_out_probabilities
from lpt.audit.copies import near_duplicates
from lpt.audit.labels import suspicions
from lpt.config import load_config
from lpt.run import train
from tests.support.command_line import lpt
from tests.support.pictures import fill


def clouds(counts, *, width=16, seed=0, spread=0.5):
    """Features [N D] around a center for each class, and their labels [N]."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centers = rng.normal(size=(len(counts), width))
    features = centers[labels] + spread * rng.normal(size=(len(labels), width))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_every_class_is_dealt_out_over_the_folds():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([25, 10, 4]))
    fold_of = folds(labels, FOLDS, seed=0)
    for k in range(3):
        sizes = torch.bincount(fold_of[labels == k], minlength=FOLDS)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(fold_of, folds(labels, FOLDS, seed=0)) and not torch.equal(fold_of, folds(labels, FOLDS, seed=1))


def test_probabilities_are_of_images_that_were_held_out():
    """The label of an image has no part in its own probabilities, unless by the folds that it is dealt into."""
    features, labels = clouds([12, 8, 4])
    probabilities = held_out_probabilities(features, labels, 3)
    assert torch.allclose(probabilities.sum(1), torch.ones(24)) and (probabilities.argmax(1) == labels).all()
    far = features.clone()
    far[0] *= -1  # one image is elsewhere: it may change what is said of others, and here its own
    assert held_out_probabilities(far, labels, 3)[0, 0] < 0.01
    single, its_labels = clouds([9, 9, 1])
    assert (held_out_probabilities(single, its_labels, 3)[-1, 2]) == 0  # nothing is known of its class without it


def test_discriminants_are_by_the_distance_to_the_means_of_the_others():
    """-(x - μ_k)ᵀ Σ⁻¹ (x - μ_k) / 2 for each image and class, in a loop, and the likeliest of all temperatures."""
    features, labels = clouds([20, 12, 6], spread=1.5)
    x, y = (features - features.mean(0)).double().numpy(), labels.numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    scores = np.zeros((REPEATS, len(y), 3))
    for repeat in range(REPEATS):
        fold_of = folds(labels, FOLDS, seed=repeat).numpy()
        for i in range(len(y)):
            rest = fold_of != fold_of[i]
            means = [unit[rest & (y == k)].mean(0) for k in range(3)]
            within = sum(np.outer(unit[j] - means[y[j]], unit[j] - means[y[j]]) for j in np.flatnonzero(rest))
            covariance = within / (rest.sum() - 3)
            covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / 16 * np.eye(16)
            away = [unit[i] - mean for mean in means]
            scores[repeat, i] = [-d @ np.linalg.inv(covariance) @ d / 2 for d in away]

    def answers(t):
        e = np.exp(t * (scores - scores.max(2, keepdims=True)))
        return e / e.sum(2, keepdims=True)

    best = max(TEMPERATURES, key=lambda t: np.log(answers(t)[0][np.arange(len(y)), y]).mean())
    assert np.abs(discriminants(features, labels, 3, seed=0).numpy() - answers(best).mean(0)).max() < 1e-4


def test_planted_label_errors_have_the_worst_quality_and_nothing_else_is_listed():
    features, labels = clouds([60, 30, 8, 6], spread=0.4)
    wrong = [3, 40, 70, 95, 101]
    planted = labels.clone()
    planted[wrong] = (labels[wrong] + 1) % 4
    found = suspicions(held_out_probabilities(features, planted, 4), planted)
    listed = np.flatnonzero(found.is_issue).tolist()
    assert len(listed) >= 4 and set(listed) <= set(wrong)
    assert found.suggested[wrong].tolist() == labels[wrong].tolist()
    assert found.quality[wrong].max() < np.delete(found.quality, wrong).min()


def test_classes_without_an_image_are_left_out():
    features, labels = clouds([30, 20, 10])
    labels = labels * 2  # 0, 2, 4 of 6
    found = suspicions(held_out_probabilities(features, labels, 6), labels)
    assert not found.is_issue.any() and set(found.suggested) <= {0, 2, 4}


def test_near_duplicates_are_pairs_far_below_the_usual_distance():
    features, _ = clouds([40, 40], spread=1.0)
    copies = features[[3, 50]] + 0.01 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    pairs, cosine = near_duplicates(torch.cat([features, copies, features[:1]]))
    assert {(pair.first, pair.second) for pair in pairs} == {(0, 82), (3, 80), (50, 81)}
    assert all(pair.cosine >= cosine for pair in pairs) and pairs[0].cosine == pytest.approx(1)
    assert near_duplicates(features[:1]) == ([], 1.0)


def test_an_audit_is_of_the_images_alone():
    features, labels = clouds([30, 12, 5])
    first, again = (audited(features, labels, 3) for _ in range(2))
    assert (first.suspicion.quality == again.suspicion.quality).all() and first.pairs == again.pairs


@pytest.fixture(scope="module")
def audited_run(tmp_path_factory):
    """A run on photos, two of which are copies under two classes."""
    place = tmp_path_factory.mktemp("audit")
    photos = fill(place / "photos", {"=owl": 24, "crane": 12, "<b>stork": 5})
    shutil.copy(photos / "=owl" / "0.png", photos / "crane" / "copy.png")
    config = place / "config.yaml"
    config.write_text(
        f"backbone: {{name: nano}}\ndata: {{name: folder, root: {photos}, test_share: 0.2}}\n"
        "method: {name: linear_probe, epochs: 2}\ntrain: {batch_size: 8, precision: fp32}\n"
    )
    train(load_config(config), place / "run")
    return place


def test_the_command_writes_lists_and_a_section_of_the_page(audited_run, capsys):
    run = audited_run / "run"
    code, said, err = lpt(capsys, "audit", run)
    assert code == 0 and "labels to look at" in said and str(run / "audit") in said, err
    rows = list(csv.DictReader((run / "audit/label_issues.csv").read_text().splitlines()))
    order = [row["group"] for row in rows]
    assert order == sorted(order, key=["few", "medium", "many"].index)
    names = {row["label"] for row in rows} | {row["suggested"] for row in rows}
    assert names <= {"'=owl", "crane", "<b>stork"}  # no spreadsheet takes one for a formula
    pairs = list(csv.DictReader((run / "audit/near_duplicates.csv").read_text().splitlines()))
    copies = {(pair["image_1"], pair["image_2"]) for pair in pairs if pair["class_1"] != pair["class_2"]}
    split = json.loads((run / "split.json").read_text())["parts"]["train"]["ids"]
    both = {"=owl/0.png", "crane/copy.png"}
    assert not both <= set(split) or both in [{a.removeprefix("'"), b.removeprefix("'")} for a, b in copies]
    tasks = json.loads((run / "audit/label_studio.json").read_text())
    assert len(tasks) == len(rows)
    for task in tasks:
        assert task["data"]["image"].startswith("/data/local-files/?d=")
        (choice,) = task["predictions"][0]["result"][0]["value"]["choices"]
        assert choice in ("=owl", "crane", "<b>stork")
    interface = ElementTree.parse(run / "audit/label_studio.xml").getroot()
    assert [one.get("value") for one in interface.iter("Choice")] == ["<b>stork", "=owl", "crane"]
    page = (run / "report.html").read_text()
    assert "Labels to look at" in page and "<b>stork" not in page
    assert lpt(capsys, "report", run)[0] == 0 and "Labels to look at" in (run / "report.html").read_text()


def test_what_cannot_be_audited_is_one_sentence(audited_run, capsys, tmp_path, monkeypatch):
    code, _, err = lpt(capsys, "audit", tmp_path)
    assert code == 2 and "holds no run" in err and err.count("\n") == 1
    others = fill(tmp_path / "others", {"=owl": 9, "crane": 9, "<b>stork": 9}, seed=7)
    code, _, err = lpt(capsys, "audit", audited_run / "run", f"data.root={others}")
    assert code == 2 and "other images" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = lpt(capsys, "audit", audited_run / "run")
    assert code == 2 and "pip install 'lpt[audit]'" in err and err.count("\n") == 1


def test_the_benchmark_plants_what_it_says_and_measures_all_groups(capsys, monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    from benchmarks.audit.__main__ import KINDS, main, planted

    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([80, 60, 5]))
    for kind, number in zip(KINDS, (8, 7), strict=True):  # 4 + 3 + 1, and 5 % of 145
        changed, wrong = planted(labels, 3, kind, 0)
        assert wrong.sum() == number and ((changed != labels).numpy() == wrong).all()
    same, _ = planted(labels, 3, KINDS[0], 0)
    assert torch.bincount(same).tolist() == [80, 60, 5]
    monkeypatch.setattr(sys, "argv", ["audit", "--quick", "--json", str(tmp_path / "a.json")])
    main()
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 4 and "| same counts | few" in capsys.readouterr().out
    best = {row["way"]: row["average_precision"] for row in rows if (row["kind"], row["group"]) == (KINDS[1], "all")}
    assert best["audit"] > 0.3
