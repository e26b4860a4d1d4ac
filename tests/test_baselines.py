"""The linear probe: a head on features that are computed once."""

import pytest
import torch

import lpt
from lpt.engine.evaluate import features
from lpt.engine.history import History
from lpt.prompt_file import load_prompt, save_prompt
from tests.support.toy import small_backbone, toy_task
from tests.support.training import bind, train


def probed(task=None, backbone=None, folder=None, **settings):
    task, backbone, history = task or toy_task(), backbone or small_backbone(), History()
    session = bind(task, backbone, batch_size=16, history=history, feature_cache=folder)
    model = train("linear_probe", task, backbone, session, **settings)
    return model.only_train().eval(), history


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("loss", ["ce", "la"])
def test_it_learns_on_frozen_features(head, loss):
    task = toy_task((40, 20, 10, 5), test_per_class=20)
    model, history = probed(task, small_backbone(width=64), head=head, loss=loss, epochs=20, lr=1e-2)
    assert history.lines[-1]["loss"] < history.lines[0]["loss"]
    assert lpt.evaluate(model, task.test, task.counts)["accuracy"] > 0.5  # chance is 0.25


def test_the_backbone_runs_once_for_every_training_image(monkeypatch, tmp_path):
    backbone, task = small_backbone(), toy_task()
    seen = []
    embed = backbone.embed
    monkeypatch.setattr(backbone, "embed", lambda views: (seen.append(len(views)), embed(views))[1])
    first, _ = probed(task, backbone, tmp_path, epochs=5)
    assert sum(seen) == len(task.train)
    again, _ = probed(task, backbone, tmp_path, epochs=5)
    assert sum(seen) == len(task.train)  # the second run reads the file
    assert torch.equal(first.head.weight, again.head.weight)


def test_a_linear_probe_is_logistic_regression():
    """Full batches until convergence against scikit-learn's own solver, on labels that no head can separate."""
    from dataclasses import replace

    from sklearn.linear_model import LogisticRegression

    task, backbone = toy_task((60, 30, 10)), small_backbone(width=8)
    mixed = task.train.labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    task = replace(task, train=replace(task.train, labels=mixed))
    session = bind(task, backbone, batch_size=100)
    model = train("linear_probe", task, backbone, session, epochs=3000, lr=0.05, weight_decay=0.0)
    found = features(model, task.train)
    theirs = LogisticRegression(C=1e8, max_iter=20_000, tol=1e-8).fit(found.numpy(), mixed.numpy())
    best = -torch.tensor(theirs.predict_log_proba(found.numpy())).gather(1, mixed[:, None]).mean().item()
    ours = torch.nn.functional.cross_entropy(model.head(found), mixed).item()
    assert best > 0.3 and best - 1e-3 <= ours <= best + 5e-3


def test_logit_adjustment_moves_predictions_to_the_tail():
    task, backbone = toy_task((60, 4), test_per_class=30), small_backbone()
    predicted = {}
    for loss in ("ce", "la"):
        model, _ = probed(task, backbone, loss=loss, epochs=3)
        predicted[loss] = (model.head(features(model, task.test)).argmax(1) == 1).sum().item()
    assert predicted["la"] > predicted["ce"]


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_its_prompt_file_reloads_to_the_same_bits(tmp_path, head):
    task, backbone = toy_task(), small_backbone()
    model, _ = probed(task, backbone, head=head)
    save_prompt(tmp_path / "p.safetensors", model, method="linear_probe", counts=task.counts, storage="fp32")
    again = load_prompt(tmp_path / "p.safetensors", backbone)
    views = backbone.preprocess.test(task.test.pixels)
    assert type(again.head) is type(model.head)
    assert torch.equal(again(views).logits, model(views).logits)
    assert again.head.scale == model.head.scale


def test_class_means_and_neighbours_by_slow_loops():
    task, backbone = toy_task((9, 6, 4, 3)), small_backbone()
    session = bind(task, backbone, batch_size=8)
    plain = train("class_mean", task, backbone, session)
    train_features, test = features(plain, task.train), features(plain, task.test)
    unit = [row / row.norm() for row in train_features]
    means = [sum(u for u, y in zip(unit, task.train.labels, strict=True) if y == k) for k in range(4)]
    for row, logits in zip(test, plain.head(test), strict=True):
        wanted = torch.stack([row @ m / row.norm() / m.norm() for m in means])
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    near = train("knn", task, backbone, session, k=5, temperature=0.1)
    for row, logits in zip(test, near.head(test), strict=True):
        cosines = torch.stack([row @ u / row.norm() for u in unit])
        votes = torch.zeros(4)
        for i in cosines.argsort(descending=True)[:5]:
            votes[task.train.labels[i]] += (cosines[i] / 0.1).exp()
        torch.testing.assert_close(logits.exp(), (votes / votes.sum()).clamp(min=1e-6), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tuning", ["head", "vpt_shallow", "vpt_deep", "bias", "norm", "adaptformer", "lora", "full"])
def test_every_tuning_learns(tuning):
    task = toy_task((40, 20, 10, 5), test_per_class=20)
    backbone, history = small_backbone(width=64), History()
    session = bind(task, backbone, batch_size=16, history=history)
    settings = {"epochs": 8, "optimizer": "adamw", "lr": 1e-3 if tuning == "full" else 1e-2}
    model = train("fine_tune", task, backbone, session, tuning=tuning, head_init="random", **settings)
    assert history.lines[-1]["loss"] < 0.8 * history.lines[0]["loss"]
    assert lpt.evaluate(model, task.test, task.counts)["accuracy"] > 0.5  # chance is 0.25


def test_a_shallow_prompt_goes_through_all_blocks():
    backbone = small_backbone()
    session = bind(toy_task(), backbone, batch_size=8)
    model = train("fine_tune", toy_task(), backbone, session, tuning="vpt_shallow", epochs=1, prompt_length=3).eval()
    views = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = torch.cat([backbone.embed(views), model.shared.tokens.expand(2, -1, -1)], dim=1)
        for block in backbone.vit.blocks:
            tokens = block(tokens)
        wanted = model.head(backbone.pool(tokens))
        torch.testing.assert_close(model(views).logits, wanted, rtol=1e-4, atol=1e-5)
