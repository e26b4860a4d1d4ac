"""What is learned inside a backbone: the identity at the start, everything else frozen, and a slow forward of each."""

import pytest
import torch
import torch.nn.functional as F

from lpt.model.adapters import KINDS, AdaptFormer, auto_bottleneck, with_adapter
from lpt.model.backbones import load_backbone
from tests.support.toy import prompted as with_prompts
from tests.support.toy import small_backbone


def images(n=3, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def feature(backbone, views):
    tokens = backbone.embed(views)
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, keep=backbone.reads if i == backbone.depth - 1 else None)
    return backbone.pool(tokens)


def shaken(backbone):
    """Adapters start at zero, which would hide what they do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name in backbone.learned:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_copy_starts_as_the_backbone_and_learns_only_what_it_names(kind):
    backbone = small_backbone()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    inside = with_adapter(backbone, kind)
    assert inside.learned and all(n in dict(inside.named_parameters()) for n in inside.learned)
    torch.testing.assert_close(feature(inside, images()), feature(backbone, images()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(feature(shaken(inside), images()), feature(backbone, images()), atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items()), "the original was touched"


def slow_adaptformer(adapter, tokens):
    out = torch.empty_like(tokens)
    for b in range(tokens.shape[0]):
        for n in range(tokens.shape[1]):
            x = tokens[b, n]
            normed = (x - x.mean()) / (x.var(unbiased=False) + adapter.norm.eps).sqrt() * adapter.norm.weight
            low = adapter.down.weight @ (normed + adapter.norm.bias) + adapter.down.bias
            out[b, n] = adapter.scale * (adapter.up.weight @ low.clamp(min=0) + adapter.up.bias)
    return out


@torch.no_grad()
def test_adaptformer_stands_beside_the_mlp_on_the_residual_stream():
    backbone = small_backbone()
    inside = shaken(with_adapter(backbone, "adaptformer", bottleneck=3))
    tokens = backbone.embed(images())
    for i in range(backbone.depth):
        block, mine = backbone.vit.blocks[i], inside.vit.blocks[i].mlp.adapter
        tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens))) + slow_adaptformer(mine, tokens)
    torch.testing.assert_close(feature(inside, images()), backbone.pool(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prompted", [False, True])
def test_lora_equals_its_merged_weights_also_under_prompts(prompted):
    backbone = small_backbone()
    inside, merged = shaken(with_adapter(backbone, "lora", rank=2)), small_backbone()
    for mine, theirs in zip(inside.vit.blocks, merged.vit.blocks, strict=True):
        low, high = mine.attn.qkv.lora_A["default"].weight, mine.attn.qkv.lora_B["default"].weight
        theirs.attn.qkv.weight += 2.0 * high @ low  # α / r = 2
    prompt = torch.randn(backbone.depth, 5, backbone.width) if prompted else None
    found = []
    for one in (inside, merged):
        tokens = one.embed(images())
        for i in range(one.depth):
            tokens = one.block(i, tokens, () if prompt is None else prompt[i], keep=1 if i == one.depth - 1 else None)
        found.append(one.pool(tokens))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("backbone", [small_backbone, lambda: load_backbone("nano")], ids=["timm", "nano"])
def test_lora_of_query_and_value_equals_its_merged_weights_and_leaves_keys_alone(backbone, prompted):
    inside, merged = shaken(with_adapter(backbone(), "lora_qv", rank=4)), backbone()
    width, size = merged.width, merged.preprocess.size
    for mine, theirs in zip(inside.vit.blocks, merged.vit.blocks, strict=True):
        for first, part in ((0, "q"), (2 * width, "v")):
            low, high = mine.attn.qkv.lora_A[part], mine.attn.qkv.lora_B[part]
            for i in range(width):  # row by row: (1/r) Σ_k B_ik A_k
                theirs.attn.qkv.weight[first + i] += sum(high[i, k] * low[k] for k in range(4)) / 4
    prompt = torch.randn(merged.depth, 5, width) if prompted else None
    views = torch.randn(2, 3, size, size)
    found = []
    for one in (inside, merged):
        tokens = one.embed(views)
        for i in range(one.depth):
            tokens = one.block(i, tokens, () if prompt is None else prompt[i], keep=1 if prompted else None)
        found.append(one.pool(tokens))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    untouched, normed = backbone(), torch.randn(1, 3, width)
    kept, before = (one.vit.blocks[0].attn.qkv(normed)[..., width : 2 * width] for one in (inside, untouched))
    assert torch.equal(kept, before)


def test_lora_of_query_and_value_has_as_many_parameters_as_lifts():
    inside = with_adapter(small_backbone(), "lora_qv", rank=2)
    numbers = dict(inside.named_parameters())
    assert sum(numbers[name].numel() for name in inside.learned) == inside.depth * 2 * 2 * (2 * inside.width)


@pytest.mark.parametrize(("classes", "width"), [(10, 1), (100, 4), (127, 4), (365, 8), (1000, 32), (8142, 256)])
def test_lifts_bottleneck_and_its_number_of_parameters(classes, width):
    assert auto_bottleneck(classes, 12) == width
    of_one = sum(p.numel() for p in AdaptFormer(768, width).parameters())
    published = {1: 46_104, 4: 101_436, 8: 175_212, 32: 617_868, 256: 4_749_324}
    assert 12 * of_one == published[width]


@pytest.mark.parametrize("kind", list(KINDS))
def test_beside_a_backbone_in_bf16_it_learns_in_fp32(kind):
    backbone = small_backbone().to(torch.bfloat16)
    model = with_prompts(with_adapter(backbone, kind), pool=False)
    model.only_train("head.", "backbone.")
    whole = with_prompts(with_adapter(small_backbone(), kind), pool=False)
    whole.load_learned_state(model.learned_state())
    logits = model(images()).logits
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(logits, whole(images()).logits, rtol=0.1, atol=0.1)
    F.cross_entropy(10 * logits, torch.tensor([0, 1, 2])).backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == {"head.weight"} | {f"backbone.{name}" for name in model.backbone.learned}
