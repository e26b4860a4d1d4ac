import pytest
import torch

from lpt.errors import LptError
from lpt.model.prompts import DeepPrompt, PromptPool


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pool(*, seed=0, **changes):
    sizes = dict(size=20, topk=2, prefix_blocks=6, depth=12, length=10, width=48, key_width=64)
    return PromptPool(**{**sizes, **changes}, generator=seeded(seed))


def test_shapes():
    assert DeepPrompt(layers=12, length=10, width=48).tokens.shape == (12, 10, 48)
    group = pool()
    assert group.tokens.shape == (20, 6, 10, 48)
    assert group.keys.shape == (20, 64)
    assert group.centre.shape == (64,) and not group.centre.any()
    assert {name for name, _ in group.named_parameters()} == {"tokens", "keys"}
    assert "centre" in group.state_dict()
    assert pool(prefix_blocks=0).tokens.shape[1] == 12 and pool(prefix_blocks=11).tokens.shape[1] == 1


def test_prompts_start_from_a_narrow_normal():
    """LPT spec 1.2 and 1.4: truncated normal, std 0.02."""
    for values in (DeepPrompt(layers=12, length=10, width=192, generator=seeded()).tokens, pool().tokens):
        assert values.std().item() == pytest.approx(0.02, rel=0.03)
        assert values.mean().abs().item() < 1e-3
    assert pool(size=200, key_width=192).keys.std().item() == pytest.approx(0.02, rel=0.03)


def test_the_start_is_a_pure_function_of_the_generator():
    torch.manual_seed(1)
    first, state = pool(), torch.get_rng_state()
    torch.manual_seed(2)
    second, other = pool(), pool(seed=1)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.keys, second.keys)
    assert not torch.equal(first.tokens, other.tokens) and not torch.equal(first.keys, other.keys)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    a, b = (DeepPrompt(layers=2, length=3, width=4, generator=seeded()).tokens for _ in range(2))
    assert torch.equal(a, b)


def slow_ensemble(group, ids):
    rows = []
    for row in ids.tolist():
        total = torch.zeros_like(group.tokens[0])
        for j in row:
            total = total + group.tokens[j]
        rows.append(total / len(row))
    return torch.stack(rows)


@pytest.mark.parametrize("topk", [1, 2, 3, 5])
def test_the_ensemble_is_the_unweighted_mean(topk):
    group = pool(size=5, topk=topk, length=3)
    ids = torch.stack([torch.randperm(5, generator=seeded(s))[:topk] for s in range(7)])
    weight = torch.randn(7, 6, 3, 48, generator=seeded(9))
    values, grads = [], []
    for ensemble in (group.ensemble, lambda i: slow_ensemble(group, i)):
        group.zero_grad()
        value = ensemble(ids)
        (value * weight).sum().backward()
        values.append(value.detach())
        grads.append(group.tokens.grad.clone())
        assert group.keys.grad is None
    assert values[0].shape == (7, 6, 3, 48)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_the_ensemble_ignores_the_order_of_its_prompts():
    group = pool()
    ids = torch.tensor([[3, 17], [0, 5]])
    assert torch.equal(group.ensemble(ids), group.ensemble(ids.flip(1)))


def test_unchosen_prompts_get_no_gradient():
    group = pool(size=6)
    group.ensemble(torch.tensor([[0, 4], [4, 2]])).square().sum().backward()
    moved = group.tokens.grad.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("prefix_blocks", [12, 13, -1])
def test_a_prefix_without_a_block_for_group_prompts_is_refused(prefix_blocks):
    with pytest.raises(LptError, match=rf"prefix_blocks {prefix_blocks} .* 12 blocks, use 0 to 11"):
        pool(prefix_blocks=prefix_blocks)


@pytest.mark.parametrize("topk", [21, 0, -1])
def test_a_topk_that_the_pool_does_not_hold_is_refused(topk):
    with pytest.raises(LptError, match=rf"topk {topk} does not fit a pool of 20 group prompts: use 1 to 20"):
        pool(topk=topk)
