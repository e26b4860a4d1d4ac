"""What can stand in for LPT's query: the ridge in closed form, the constant choice, models without a query pass."""

import pytest
import torch

import lpt
from lpt.engine import query as query_module
from lpt.engine.evaluate import PrefixCache, features, predict
from lpt.engine.query import RIDGES, fit_query_map, most_chosen, ridge
from lpt.errors import LptError, PromptFileError
from lpt.files import read_tensors
from lpt.model.backbones import timm_vit
from lpt.model.kept import Kept
from lpt.model.prompts import summarized
from lpt.prompt_file import read_prompt
from tests.support.plain import plain_feature
from tests.support.toy import images, of_mode, prompted, small_backbone, toy_images, toy_task
from tests.support.training import bind, recipe_of, train

SETTINGS = dict(
    prompt_length=2, prefix_blocks=2, pool_size=4, topk=2, epochs=(1, 1), optimizer="adamw", lr=(5e-3, 5e-3)
)
LABELS = torch.arange(4).repeat(40)


def test_the_ridge_is_the_one_of_gcv_found_slowly():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 3, 1, 1, 0.3, 0.01], dtype=torch.double)
    x = torch.randn(40, 6, generator=generator, dtype=torch.double) @ torch.diag(spread)
    y = x[:, :3] @ torch.randn(3, 2, generator=generator, dtype=torch.double)
    y = y + 2 * torch.randn(40, 2, generator=generator, dtype=torch.double)
    x, y = x - x.mean(0), y - y.mean(0)
    best = None
    for share in RIDGES:
        penalty = share * torch.linalg.eigvalsh(x.T @ x).mean() * torch.eye(6, dtype=torch.double)
        solve = torch.linalg.inv(x.T @ x + penalty) @ x.T
        hat = x @ solve + torch.ones(40, 40, dtype=torch.double) / 40  # the mean is fitted, too
        residual = (y - x @ solve @ y).square().sum()
        score = residual / (40 - hat.trace()) ** 2
        if best is None or score < best[0]:
            best = score, (solve @ y).T, share
    assert best[2] not in (RIDGES[0], RIDGES[-1])  # it is chosen, and not an end of the list
    torch.testing.assert_close(ridge(x.T @ x, x.T @ y, y.square().sum(), n=40), best[1])


def test_a_query_that_is_linear_in_the_summaries_is_found_exactly():
    x = torch.randn(200, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x, weight = x - x.mean(0), torch.arange(10.0, dtype=torch.double).view(2, 5)
    y = x @ weight.T
    torch.testing.assert_close(ridge(x.T @ x, x.T @ y, y.square().sum(), n=200), weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_the_map_is_least_squares_on_the_training_images_whatever_the_batches(architecture, monkeypatch):
    """Against one matrix of all images, and its mean is the queries' mean: keys are compared around the same center."""
    backbone = timm_vit.untrained(architecture, image_size=32, depth=3, embed_dim=48, num_heads=2)
    model, taken = prompted(backbone, prefix_blocks=1).only_train().eval(), toy_images(LABELS)
    monkeypatch.setattr(query_module, "RIDGES", (1e-3,))
    fitted = fit_query_map(model, taken)
    monkeypatch.setattr(query_module, "BATCH", 37)
    torch.testing.assert_close(fit_query_map(model, taken), fitted, rtol=1e-3, atol=1e-4)
    views = backbone.preprocess.test(taken.pixels)
    with torch.no_grad():
        tokens = model.prefix(views)
        x, y = summarized(tokens, backbone.prefix).double(), plain_feature(model, views).double()
    width = backbone.width * (2 if backbone.prefix else 1)
    assert x.shape[1] == width == fitted.shape[1] - 1
    patches = tokens[:, backbone.prefix :]
    torch.testing.assert_close(x[:, -backbone.width :].float(), sum(patches.unbind(1)) / patches.shape[1])
    centered = x - x.mean(0)
    scatter = centered.T @ centered
    penalty = 1e-3 * scatter.trace() / width * torch.eye(width, dtype=torch.double)
    slow = torch.linalg.solve(scatter + penalty, centered.T @ (y - y.mean(0))).T
    torch.testing.assert_close(fitted[:, :-1].double(), slow, rtol=1e-3, atol=1e-4)
    early = of_mode(model, "early", query_map=fitted).query(tokens)
    torch.testing.assert_close(early.mean(0).double(), y.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(early.double(), x @ slow.T + (y.mean(0) - slow @ x.mean(0)), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_early_chooses_by_the_map_and_runs_no_query_tail(monkeypatch):
    model, views = prompted(small_backbone()).only_train().eval(), images(small_backbone(), 8)
    query_map = torch.randn(32, 65, generator=torch.Generator().manual_seed(1))
    tokens = model.prefix(views)
    wanted = (summarized(tokens, 1) @ query_map[:, :-1].T + query_map[:, -1] - model.pool.centre).double()
    keys = model.pool.keys.double()
    cosine = torch.stack([torch.stack([q @ k / q.norm() / k.norm() for k in keys]) for q in wanted])
    ids = cosine.argsort(dim=1, descending=True)[:, :2]
    feature = plain_feature(model, views, torch.stack([model.pool.tokens[row].mean(0) for row in ids]))
    early = of_mode(model, "early", query_map=query_map)
    blocks = counted_blocks(monkeypatch, early.backbone)
    output = early(views)
    assert blocks == [0, 1, 2, 3]
    assert torch.equal(output.ids, ids) and len(ids.unique(dim=0)) > 1
    torch.testing.assert_close(output.feature, feature, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_none_is_the_constant_pair_and_runs_no_query_tail(monkeypatch):
    model, views = prompted(small_backbone()).only_train().eval(), images(small_backbone(), 8)
    ids = torch.tensor([1, 3])
    group = model.pool.tokens[ids].mean(0).expand(8, -1, -1, -1)
    feature, constant = plain_feature(model, views, group), model.tail_feature(model.prefix(views), ids.expand(8, -1))
    fixed = of_mode(model, "none", ids=ids)
    blocks = counted_blocks(monkeypatch, fixed.backbone)
    output = fixed(views)
    assert blocks == [0, 1, 2, 3] and output.ids is None and output.similarity is None
    torch.testing.assert_close(output.feature, feature, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.feature, constant, rtol=1e-5, atol=1e-6)
    kept = fixed._fixed_answers._last
    fixed(views)
    assert fixed._fixed_answers._last is kept  # computed once, and never stale
    fixed.pool.tokens.add_(torch.randn_like(fixed.pool.tokens))
    assert not torch.allclose(fixed(views).feature, output.feature, atol=1e-3)


def counted_blocks(monkeypatch, backbone):
    """The blocks that are run from now on, in a list that grows."""
    ran, block = [], type(backbone).block
    monkeypatch.setattr(
        type(backbone), "block", lambda self, i, *args, **kwargs: ran.append(i) or block(self, i, *args, **kwargs)
    )
    return ran


def test_the_most_chosen_prompts_are_counted_as_sets():
    model, taken = prompted(small_backbone()).only_train().eval(), toy_images(LABELS)
    ids, share = most_chosen(model, taken)
    chosen = [tuple(sorted(row)) for row in predict(model, taken).ids.tolist()]
    times = {pair: chosen.count(pair) for pair in set(chosen)}
    assert len(times) > 1 and times[tuple(ids.tolist())] == max(times.values())
    assert share == pytest.approx(max(times.values()) / len(chosen))
    fixed = of_mode(model, "none", ids=ids)
    assert most_chosen(fixed, taken)[0].tolist() == [0, 1]  # of its own prompts


def test_of_many_images_some_are_looked_at(monkeypatch):
    model, taken = prompted(small_backbone()).only_train().eval(), toy_images(LABELS)
    monkeypatch.setattr(query_module, "MOST_COUNTED", 30)
    monkeypatch.setattr(query_module, "MOST_FITTED", 30)
    rows = torch.randperm(160, generator=torch.Generator().manual_seed(0))[:30].sort().values
    ids, share = most_chosen(model, taken)
    assert (ids.tolist(), share) == (most_chosen(model, taken.subset(rows.tolist()))[0].tolist(), share)
    torch.testing.assert_close(fit_query_map(model, taken), fit_query_map(model, taken.subset(rows.tolist())))


@pytest.mark.parametrize("mode", ["early", "none"])
def test_prefixes_are_cached_in_every_mode(mode):
    model, taken = prompted(small_backbone()).only_train().eval(), toy_images(LABELS)
    query_map = 0.1 * torch.randn(32, 65, generator=torch.Generator().manual_seed(1))
    model = of_mode(model, mode, query_map=query_map if mode == "early" else None, ids=torch.tensor([0, 2]))
    cache, plain = PrefixCache(), predict(model, taken)
    for _ in range(2):
        again = predict(model, taken, cache=cache)
        assert torch.equal(again.logits, plain.logits)
    assert len(cache._cached) == 2 and cache.bytes > 0
    if mode == "early":  # another map is another query
        with torch.no_grad():
            model.pool.query_map.neg_()
        assert torch.equal(predict(model, taken, cache=cache).ids, predict(model, taken).ids)


def test_cached_features_know_which_query_they_are(tmp_path):
    model, taken = prompted(small_backbone()).only_train().eval(), toy_images(LABELS)
    full = features(model, taken, folder=tmp_path)
    query_map = 0.1 * torch.randn(32, 65, generator=torch.Generator().manual_seed(1))
    early = of_mode(model, "early", query_map=query_map)
    assert not torch.equal(features(early, taken, folder=tmp_path), full)
    assert torch.equal(features(early, taken, folder=tmp_path), features(early, taken))
    assert len(list(tmp_path.iterdir())) == 2


# As settings of the method.


def tuned(**changes):
    task, backbone = toy_task(), small_backbone()
    return train("lpt", task, backbone, bind(task, backbone), **(SETTINGS | changes)).only_train().eval(), task


def test_full_is_what_it_was_and_the_default():
    (plain, _), (full, _) = tuned(), tuned(query="full", tuning="vpt_deep")
    for name, value in plain.learned_state().items():
        assert torch.equal(value, full.learned_state()[name])


@pytest.mark.parametrize("centering", ["off", "mean"])
def test_early_trains_keys_on_early_queries(centering):
    model, task = tuned(query="early", query_head=True, query_centering=centering, key_init="kmeans")
    assert model.query_head is None and model.phase1_head.shape == (4, 32)
    wanted = fit_query_map(model, task.train)  # after training: what it depends on was frozen
    torch.testing.assert_close(model.pool.query_map, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        queries = model.query(model.prefix(model.backbone.preprocess.test(task.train.pixels)))
    if centering == "mean":
        torch.testing.assert_close(model.pool.centre, queries.mean(0), rtol=1e-4, atol=1e-5)
    else:
        assert not model.pool.centre.any()


def test_none_trains_topk_prompts_and_no_keys():
    task, backbone = toy_task(), small_backbone()
    session = bind(task, backbone)
    recipe = recipe_of("lpt", task, backbone, session, **(SETTINGS | dict(query="none", weight_decay=0.0)))
    phases = list(recipe.phases)
    before = recipe.model.pool.keys.detach().clone()
    assert phases[1].on_epoch is None
    model = train("lpt", task, backbone, session, **(SETTINGS | dict(query="none", weight_decay=0.0)))
    assert len(model.pool.tokens) == len(model.pool.keys) == 2 and torch.equal(model.pool.keys, before)
    assert not torch.equal(model.pool.tokens, recipe.model.pool.tokens)
    assert lpt.evaluate(model, task).get("key_usage") is None


@pytest.mark.parametrize("mode", ["early", "none"])
def test_a_file_reloads_to_the_same_bits(tmp_path, mode):
    model, task = tuned(query=mode)
    model.round_to(torch.float16)
    header = lpt.save_prompt(tmp_path / "p.safetensors", model, method="lpt", counts=task.counts)
    assert header.query == mode and header.format == (3 if mode == "early" else 2)
    again = lpt.load_prompt(tmp_path / "p.safetensors", small_backbone())
    views = images(small_backbone())
    assert torch.equal(again(views).logits, model(views).logits)
    assert ("pool.query_map" in read_tensors(tmp_path / "p.safetensors")[1]) == (mode == "early")


@pytest.mark.parametrize(
    ("mode", "changes", "says"),
    [
        ("early", {"query": "full"}, "a query map belongs to query early, its query is full"),
        ("none", {"query": "early"}, "a query map belongs to query early"),
        ("full", {"query": "none"}, "4 group prompts for every image, topk is 2"),
        ("full", {"query": "late"}, "query"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, mode, changes, says):
    from lpt.files import to_bytes

    model, task = tuned(query=mode)
    path = tmp_path / "p.safetensors"
    lpt.save_prompt(path, model, method="lpt", counts=task.counts)
    header, tensors = read_prompt(path)
    path.write_bytes(to_bytes({k: v.half() for k, v in tensors.items()}, lpt=header.model_dump(mode="json") | changes))
    with pytest.raises(PromptFileError, match=says):
        read_prompt(path)


# Phase 1 tunes more than a prompt.


@pytest.mark.parametrize("tuning", ["lora", "vpt_deep+adaptformer"])
def test_phase_1_tunes_inside_the_backbone_and_phase_2_leaves_it_alone(tmp_path, tuning):
    (one, _), (both, task) = tuned(tuning=tuning, epochs=(2, 0)), tuned(tuning=tuning, epochs=(2, 2), query_head=True)
    kind = tuning.rpartition("+")[2]
    assert (both.shared is None) == (tuning == kind) and both.backbone.recipe["kind"] == kind
    inside = {name for name in one.learned_state() if name.startswith(("backbone.", "shared."))}
    assert any("lora_B" in name or "adapter.up" in name for name in inside)
    for name in inside:
        assert torch.equal(one.learned_state()[name], both.learned_state()[name]), name
    fresh, _ = tuned(tuning=tuning, epochs=(1, 0), lr=(1e-9, 1e-9))
    moved = [n for n in inside if not torch.allclose(fresh.learned_state()[n], one.learned_state()[n], atol=1e-5)]
    assert len(moved) > len(inside) / 2
    views = images(small_backbone())
    with torch.no_grad():  # the fast forward is still the published one over the tuned backbone's own blocks
        query = plain_feature(both, views)
        output = both(views)
        ids = both.match(query)[1]
        prompted_feature = plain_feature(both, views, both.pool.ensemble(ids))
    assert torch.equal(output.ids, ids)
    torch.testing.assert_close(output.feature, prompted_feature, rtol=1e-4, atol=1e-5)
    both.round_to(torch.float16)
    lpt.save_prompt(tmp_path / "p.safetensors", both, method="lpt", counts=task.counts)
    again = lpt.load_prompt(tmp_path / "p.safetensors", small_backbone())
    assert torch.equal(again(views).logits, both(views).logits)


def test_constants_of_a_prompt_follow_what_is_learned_inside():
    model, _ = tuned(tuning="vpt_deep+lora")
    views = images(small_backbone())
    with torch.no_grad():
        before, state = model(views).logits, model.prefix_state
        for parameter in model._learned:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        assert model.prefix_state != state
        after = model(views).logits
        model._shared_answers = Kept()
        assert torch.equal(model(views).logits, after) and not torch.allclose(before, after, atol=1e-3)
    model.only_train("backbone.")
    assert model.prefix_state is None


def test_what_cannot_start_is_refused():
    with pytest.raises(LptError, match=r"pool_init=shared needs a shared prompt, method\.tuning=lora has none: use tn"):
        tuned(tuning="lora", pool_init="shared")
