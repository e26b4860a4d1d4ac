"""One forward with a shared prefix and two tails, against the published procedure in `plain.py`."""

import pytest
import torch

from lpt.errors import LptError
from lpt.model.backbones import timm_vit
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.model.prompts import DeepPrompt, PromptPool
from tests.support.plain import plain_forward
from tests.support.toy import images, prompted, small_backbone


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("vit_tiny_patch16_224", 64), ("vit_small_patch14_reg4_dinov2", 70), ("vit_base_patch16_siglip_224", 64)],
)
@pytest.mark.parametrize("pool", [False, True])
def test_the_fast_forward_equals_the_published_one(architecture, size, pool):
    backbone = timm_vit.untrained(architecture, image_size=size, depth=4)
    model = prompted(backbone, pool=pool)
    views, labels = images(backbone, 4), torch.tensor([0, 1, 2, 3])
    trained = ("pool.", "head.") if pool else ("shared.", "head.")
    grads = []
    logits = []
    for forward in (model, lambda x: plain_forward(model, x)):
        model.only_train(*trained)
        model.zero_grad(set_to_none=True)
        output = forward(views)
        loss = torch.nn.functional.cross_entropy(20 * output.logits, labels)
        if output.similarity is not None:
            loss = loss - 0.5 * output.similarity.sum(1).mean()
        loss.backward()
        logits.append(output)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    fast, slow = logits
    assert relative(fast.logits, slow.logits) <= 1e-5
    assert relative(fast.feature, slow.feature) <= 1e-5
    if pool:
        assert torch.equal(fast.ids, slow.ids)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == (3 if pool else 2)
    for name in grads[0]:
        assert relative(grads[0][name], grads[1][name]) <= 1e-5, name


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_sharing_the_prefix_is_bit_identical_to_running_it_twice():
    """LPT spec 7 (a): same inputs, same weights, nothing stochastic before the dropout."""
    backbone = small_backbone()
    model = prompted(backbone)
    views = images(backbone)
    tokens = model.prefix(views)
    again = model.prefix(views)
    assert torch.equal(model(views).logits, model.tail(tokens, query=model.query(again)).logits)


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch():
    backbone = small_backbone()
    model = prompted(backbone).only_train().eval()
    views = images(backbone, 8)
    whole = model(views)
    assert len(whole.ids.sort(dim=1).values.unique(dim=0)) > 1  # otherwise this would test nothing
    for rows in (torch.tensor([3]), torch.tensor([7, 0, 3]), torch.arange(8).flip(0)):
        part = model(views[rows])
        assert torch.equal(part.ids, whole.ids[rows])
        assert torch.allclose(part.logits, whole.logits[rows], atol=1e-6)
        assert torch.equal(part.logits.argmax(1), whole.logits[rows].argmax(1))


def test_gradients_go_where_the_paper_sends_them():
    """LPT spec 1.4: keys from the key term alone, pool prompts and head from the classification loss alone."""
    backbone = small_backbone()
    model = prompted(backbone).only_train("pool.", "head.")
    output = model(images(backbone))

    def grads(value):
        found = torch.autograd.grad(
            value, [model.pool.keys, model.pool.tokens, model.head.weight], retain_graph=True, allow_unused=True
        )
        return [g is not None and bool(g.abs().sum() > 0) for g in found]

    assert grads(output.logits.square().sum()) == [False, True, True]
    assert grads(output.similarity.sum()) == [True, False, False]
    assert model.shared.tokens.grad is None and not model.shared.tokens.requires_grad
    unchosen = sorted(set(range(5)) - set(output.ids.flatten().tolist()))
    (g,) = torch.autograd.grad(output.logits.square().sum(), [model.pool.tokens])
    assert all(g[j].abs().sum() == 0 for j in unchosen)


def test_the_constant_keys_and_values_of_a_frozen_prompt_are_never_stale():
    backbone = small_backbone()
    model = prompted(backbone, pool=False).only_train().eval()
    views = images(backbone)
    with torch.no_grad():
        before = model(views).logits
        kept = model._shared_answers._last
        model(views)
        assert model._shared_answers._last is kept  # computed once
        model.shared.tokens.add_(torch.randn_like(model.shared.tokens))
        after = model(views).logits
    fresh = prompted(backbone, pool=False).only_train().eval()
    fresh.load_learned_state(model.learned_state())
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(fresh(views).logits, after)


def test_parameter_counts_are_those_of_the_paper():
    """LPT spec 1.6, ViT-B/16: U 92,160, R 921,600, K 15,360, W 768 C."""
    backbone = timm_vit.untrained("vit_base_patch16_224", image_size=32)
    assert sum(p.numel() for p in backbone.parameters()) == 85_798_656 - (196 - 4) * 768
    for num_classes, stored in ((100, 1_105_920), (365, 1_309_440), (1000, 1_797_120), (8142, 7_282_176)):
        pool = PromptPool(size=20, topk=2, prefix_blocks=6, depth=12, length=10, width=768, key_width=768)
        model = PromptedClassifier(
            backbone,
            CosineHead(num_classes=num_classes, width=768, scale=20),
            classes=tuple(map(str, range(num_classes))),
            shared=DeepPrompt(layers=12, length=10, width=768),
            pool=pool,
        )
        assert model.trainable_parameters == stored
        model.only_train("shared.", "head.")
        assert trained(model) == 92_160 + 768 * num_classes
        model.only_train("pool.", "head.")
        assert trained(model) == 921_600 + 15_360 + 768 * num_classes


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_pool_that_leaves_no_block_is_refused():
    with pytest.raises(LptError, match="has 4 blocks, use 0 to 3"):
        prompted(small_backbone(), prefix_blocks=4)


def test_bf16_stays_close_to_fp32():
    backbone = small_backbone(width=64)
    model = prompted(backbone).only_train().eval()
    views = images(backbone)
    exact = model(views).feature
    model.backbone.to(torch.bfloat16)
    assert relative(model(views).feature, exact) < 0.05
    assert model(views).logits.dtype == torch.float32


def test_a_large_pool_is_searched_by_an_index_with_the_same_result(monkeypatch):
    from lpt.model import classifier

    backbone = small_backbone()
    model = prompted(backbone).only_train().eval()
    views = images(backbone)
    with torch.no_grad():
        in_torch = model(views)
        monkeypatch.setattr(classifier, "MIN_KEYS_FOR_INDEX", 5)
        by_index = model(views)
        assert model._index._last is not None and torch.equal(by_index.ids, in_torch.ids)
        assert torch.equal(by_index.logits, in_torch.logits)
        model.pool.keys.copy_(model.pool.keys.flip(0))  # a stale index is never used
        assert torch.equal(model(views).ids.sort(1).values, (4 - in_torch.ids).sort(1).values)
    model.only_train("pool.")
    assert model(views).similarity.requires_grad
