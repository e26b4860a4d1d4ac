"""Rotary ViTs as a backbone, against timm itself and against prompts inserted behind the prefix (`plain.py`)."""

from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from lpt.errors import BackboneError
from lpt.model.adapters import with_adapter
from lpt.model.backbones import eva_vit, load_backbone, timm_vit
from lpt.model.backbones.base import KeyValue, fingerprint_of
from lpt.model.backbones.eva_vit import EvaViT
from lpt.model.prompts import ShallowPrompt
from tests.support.plain import plain_block, plain_forward
from tests.support.toy import images, prompted


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lively(architecture, size, *, dtype=torch.float32, **changes):
    """Fresh models have zero biases, unit norms and layer scales of 1e-5, which would hide mistakes."""
    backbone = timm_vit.untrained(architecture, image_size=size, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "gamma_" in name:
                parameter.normal_(mean=0.5, std=0.1, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(mean=float(name.endswith("weight")), std=0.3, generator=generator)
            elif ".attn." in name:  # attention that is not almost even
                parameter.mul_(4)
    return backbone.to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# Of the larger ones a few blocks: (size, prefix, reads, changes).
MODELS = {
    "vit_small_patch16_dinov3": (64, 5, None, {"depth": 2}),
    "vit_base_patch16_dinov3": (64, 5, None, {"depth": 1}),
    "vit_base_patch16_dinov3_qkvb": (64, 5, None, {"depth": 1}),
    "vit_tiny_patch16_dinov3_qkvb": (112, 5, None, {"depth": 3}),
    "vit_small_plus_patch16_dinov3": (64, 5, None, {"depth": 1}),
    "eva02_tiny_patch14_224": (112, 1, None, {"depth": 3}),
    "eva02_base_patch16_clip_224": (64, 1, 1, {"depth": 1}),
    "vit_pe_core_tiny_patch16_384": (64, 1, None, {"depth": 3}),
    "vit_pe_spatial_tiny_patch16_512": (64, 1, None, {"depth": 1}),
    "vit_small_patch16_rope_224": (64, 1, 1, {"depth": 1}),
    "vit_small_patch16_rope_mixed_224": (64, 1, 1, {"depth": 3}),
    "vit_small_patch16_rope_mixed_ape_224": (64, 1, 1, {"depth": 1}),
    "vit_medium_patch16_rope_reg1_gap_256": (64, 1, None, {"depth": 1}),
    "vit_small_patch16_lingbot": (64, 5, 1, {"depth": 1}),
    "eva_giant_patch14_224": (56, 1, None, {"depth": 1, "embed_dim": 352}),
}
SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3}


@pytest.mark.parametrize("architecture", MODELS)
@torch.no_grad()
def test_without_prompts_the_seam_is_timms_forward_bit_for_bit(architecture):
    size, prefix, reads, changes = MODELS[architecture]
    backbone = lively(architecture, size, **changes)
    assert isinstance(backbone, EvaViT) and (backbone.prefix, backbone.reads) == (prefix, reads)
    for dtype in (torch.float32, torch.bfloat16) if "tiny" in architecture else (torch.float32,):
        views = normal(2, 3, size, size)
        tokens = backbone.to(dtype).embed(views)
        assert tokens.shape[1:] == (prefix + (size // backbone.vit.patch_embed.patch_size[0]) ** 2, backbone.width)
        for i in range(backbone.depth):
            tokens = backbone.block(i, tokens)
        feature, expected = backbone.pool(tokens), backbone.vit(views.to(dtype)).float()
        assert feature.shape == (2, backbone.feature_width) and torch.equal(feature, expected)
        if reads is not None:
            assert torch.equal(backbone.pool(tokens[:, :reads]), expected)


@pytest.mark.parametrize("keep", [None, 1, 7])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_prompt_as_keys_and_values_equals_one_inserted_behind_the_prefix(architecture, keep):
    """In float64, with gradients; `keep` may end before, in and behind the patches."""
    changes = {"depth": 2, "embed_dim": 176, "num_heads": 2} if "giant" in architecture else SMALL
    backbone = lively(architecture, 56 if "patch14" in architecture else 64, dtype=torch.float64, **changes)
    size = backbone.preprocess.size
    tokens = backbone.embed(normal(3, 3, size, size)).requires_grad_()
    shapes = [(10,), (3, 5), (1,)]  # for all images, for each its own, for all
    given = [
        normal(*shape, backbone.width, seed=n, dtype=torch.float64).requires_grad_() for n, shape in enumerate(shapes)
    ]
    weight = normal(3, keep or tokens.shape[1], backbone.width, seed=99, dtype=torch.float64)

    def result(output):
        return output.detach(), torch.autograd.grad((output * weight).sum(), [tokens, *given])

    joined = torch.cat([prompt.expand(3, -1, -1) for prompt in given], dim=1)
    fast = result(backbone.block(1, tokens, given, keep=keep))
    slow = result(plain_block(backbone, 1, tokens, joined)[:, :keep])
    assert relative(fast[0], slow[0]) <= 1e-12
    assert relative(slow[0], plain_block(backbone, 1, tokens)[:, :keep]) > 1e-3, "the prompt would not matter"
    for mine, theirs in zip(fast[1], slow[1], strict=True):
        assert theirs.abs().sum() > 0 and relative(mine, theirs) <= 1e-12


@pytest.mark.parametrize("part", ["norms of queries and keys", "norm of what is mixed", "gate"])
@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_dinov3_qkvb", "vit_pe_core_tiny_patch16_384"])
def test_what_an_attention_may_have_besides(architecture, part):
    changes = {"qk_norm": part[:5] == "norms", "scale_attn_inner": part[:5] == "norm "}
    backbone = lively(architecture, 64, dtype=torch.float64, **SMALL, **changes)
    block: Any = backbone.vit.blocks[1]
    if part == "gate":  # which no published model of a size for tests has
        block.attn.gate = torch.nn.Linear(96, 96).double()
    tokens, prompt = backbone.embed(normal(2, 3, 64, 64)), normal(5, 96, seed=3, dtype=torch.float64)
    for keep in (None, 1):
        slow = plain_block(backbone, 1, tokens, prompt)[:, :keep]
        assert relative(backbone.block(1, tokens, prompt, keep=keep), slow) <= 1e-12
    assert torch.equal(backbone.block(1, tokens), plain_block(backbone, 1, tokens))


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_dinov3_qkvb", "eva02_base_patch16_clip_224"])
@torch.no_grad()
def test_constant_keys_and_values_stand_for_their_prompt(architecture):
    backbone = lively(architecture, 64, **SMALL)
    tokens = backbone.embed(normal(3, 3, 64, 64))
    prompt, other = normal(4, backbone.width, seed=3), normal(3, 2, backbone.width, seed=4)
    constant, heads = backbone.keys_values(0, prompt), backbone.vit.blocks[0].attn.num_heads
    assert isinstance(constant, KeyValue)
    assert constant.key.shape == constant.value.shape == (1, heads, 4, backbone.width // heads)
    assert backbone.keys_values(0, other).key.shape == (3, heads, 2, backbone.width // heads)
    assert torch.equal(backbone.block(0, tokens, constant), backbone.block(0, tokens, prompt))
    both = torch.cat([prompt.expand(3, -1, -1), other], dim=1)
    mixed = backbone.block(0, tokens, [constant, other], keep=1)
    assert relative(mixed, plain_block(backbone, 0, tokens, both)[:, :1]) <= 1e-5


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_rope_mixed_224", "vit_pe_core_tiny_patch16_384"]
)
def test_the_fast_forward_equals_the_published_one(architecture, pool):
    backbone = lively(architecture, 64, dtype=torch.float64, **{**SMALL, "depth": 4})
    model = prompted(backbone, pool=pool).double()
    views, labels = images(backbone, 4).double(), torch.tensor([0, 1, 2, 3])
    outputs, grads = [], []
    for forward in (model, lambda x: plain_forward(model, x)):
        model.only_train(*(("pool.", "head.") if pool else ("shared.", "head.")))
        model.zero_grad(set_to_none=True)
        output = forward(views)
        loss = torch.nn.functional.cross_entropy(20 * output.logits, labels)
        (loss if output.similarity is None else loss - 0.5 * output.similarity.sum()).backward()
        outputs.append(output)
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    fast, slow = outputs
    assert relative(fast.logits, slow.logits) <= 1e-5  # features are fp32
    assert not pool or torch.equal(fast.ids, slow.ids)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == (3 if pool else 2)
    for name in grads[0]:
        assert relative(grads[0][name], grads[1][name]) <= 1e-5, name


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_rope_mixed_224"])
@torch.no_grad()
def test_a_shallow_prompt_goes_through_all_blocks_and_is_never_turned(architecture):
    backbone = lively(architecture, 64, dtype=torch.float64, **{**SMALL, "depth": 3})
    shallow = ShallowPrompt(length=4, width=backbone.width).double()
    shallow.tokens.normal_(generator=torch.Generator().manual_seed(5))
    tokens = backbone.embed(normal(2, 3, 64, 64))
    prefix, vit = backbone.prefix, backbone.vit
    fast = shallow.appended(tokens)
    slow = torch.cat([tokens[:, :prefix], shallow.tokens.expand(2, -1, -1), tokens[:, prefix:]], dim=1)
    angles = vit.rope.get_embed(shape=(4, 4)) if vit.dynamic_img_size else vit.rope.get_embed()
    for i in range(3):
        fast = backbone.block(i, fast)
        vit.blocks[i].attn.num_prefix_tokens = prefix + 4
        slow = vit.blocks[i](slow, rope=angles[i] if vit.rope_mixed else angles)
        vit.blocks[i].attn.num_prefix_tokens = prefix
    slow = torch.cat([slow[:, :prefix], slow[:, prefix + 4 :]], dim=1)
    assert relative(shallow.removed(fast), slow) <= 1e-12


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_any_image_size_has_the_angles_of_the_models_own(architecture):
    sizes = (64, 112, 256) if "patch16" in architecture else (56, 112)
    for size in sizes:
        backbone = lively(architecture, size, **SMALL)
        vit = timm.create_model(architecture, num_classes=0, **SMALL, img_size=size).eval()
        stored = backbone.vit.state_dict()
        vit.load_state_dict(stored)
        views = normal(1, 3, size, size)
        tokens = backbone.block(1, backbone.block(0, backbone.embed(views)))
        assert torch.equal(backbone.pool(tokens), vit(views))
    if vit.dynamic_img_size:  # which timm's own forward can do without being told the size
        native = timm.create_model(architecture, num_classes=0, **SMALL).eval()
        native.load_state_dict(stored)
        assert torch.equal(backbone.pool(tokens), native(views))
        with pytest.raises(AssertionError):
            backbone.embed(normal(1, 3, 64, 64))


def test_angles_are_computed_once_and_never_stale():
    backbone = lively("vit_small_patch16_rope_mixed_224", 64, **SMALL)
    tokens = backbone.embed(normal(2, 3, 64, 64))
    before = backbone.block(1, tokens, keep=3)
    kept = backbone._turns._last
    assert torch.equal(backbone.block(1, tokens, keep=3), before) and backbone._turns._last is kept
    with torch.no_grad():
        backbone.vit.rope.freqs.mul_(1.5)
    assert not torch.allclose(backbone.block(1, tokens, keep=3), before, atol=1e-3)
    assert relative(backbone.block(1, tokens, keep=3), plain_block(backbone, 1, tokens)[:, :3]) <= 1e-5
    assert backbone.to(torch.bfloat16).block(1, tokens.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [64, 112])
def test_frequencies_learn_as_in_timm(size):
    backbone = lively("vit_small_patch16_rope_mixed_224", size, **SMALL)
    inside = with_adapter(backbone, "full")
    inside.requires_grad_(True)
    assert "vit.rope.freqs" in inside.learned
    views, prompt = normal(2, 3, size, size), normal(2, 4, 96, seed=2)
    tokens = inside.embed(views)
    for i in range(2):
        tokens = inside.block(i, tokens)
    (mine,) = torch.autograd.grad(inside.pool(tokens).square().sum(), [inside.vit.rope.freqs])
    (theirs,) = torch.autograd.grad(inside.vit(views).square().sum(), [inside.vit.rope.freqs])
    assert theirs.abs().sum() > 0 and relative(mine, theirs) <= 1e-5
    tokens = inside.embed(views).detach()
    (mine,) = torch.autograd.grad(inside.block(1, tokens, prompt[0]).square().sum(), [inside.vit.rope.freqs])
    slow = plain_block(inside, 1, tokens, prompt[0])
    (theirs,) = torch.autograd.grad(slow.square().sum(), [inside.vit.rope.freqs])
    assert theirs[:, 1].abs().sum() > 0 and relative(mine, theirs) <= 1e-4


# What is learned inside.


def feature(backbone, views, prompt=None):
    tokens = backbone.embed(views)
    for i in range(backbone.depth):
        keep = backbone.reads if i == backbone.depth - 1 else None
        tokens = backbone.block(i, tokens, () if prompt is None else prompt[i], keep=keep)
    return backbone.pool(tokens)


def shaken(backbone):
    """Adapters start at zero, which would hide what they do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name in backbone.learned:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


FORMS = {  # of the projections
    "packed": ("vit_small_patch16_dinov3", 64),
    "packed, biases beside it": ("vit_tiny_patch16_dinov3_qkvb", 64),
    "separate": ("eva02_base_patch16_clip_224", 64),
    "packed with its bias": ("vit_pe_core_tiny_patch16_384", 64),
}


@pytest.mark.parametrize("kind", ["bias", "norm", "adaptformer", "lora", "lora_qv", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_a_copy_starts_as_the_backbone_and_learns_only_what_it_names(form, kind):
    architecture, size = FORMS[form]
    backbone = lively(architecture, size, **SMALL)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    inside, views = with_adapter(backbone, kind), normal(2, 3, size, size)
    names = dict(inside.named_parameters())
    assert inside.learned and inside.learned <= names.keys()
    torch.testing.assert_close(feature(inside, views), feature(backbone, views), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(feature(shaken(inside), views), feature(backbone, views), atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items()), "the original"
    beside = {f"vit.blocks.{i}.attn.{part}" for i in range(2) for part in ("q_bias", "v_bias")}
    if kind == "bias":
        assert (beside & inside.learned == beside) == ("beside" in form)
        assert all(name.endswith("bias") for name in inside.learned)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_lora_equals_its_merged_weights_also_under_prompts(form, prompts):
    """Without prompts timm's own forward would read a packed matrix that has biases beside it past the update."""
    architecture, size = FORMS[form]
    backbone, merged = (lively(architecture, size, **SMALL) for _ in range(2))
    inside = shaken(with_adapter(backbone, "lora", rank=2))
    for mine, theirs in zip(inside.vit.blocks, merged.vit.blocks, strict=True):
        for name in inside.projections:
            linear = getattr(mine.attn, name)
            update = linear.lora_B["default"].weight @ linear.lora_A["default"].weight
            getattr(theirs.attn, name).weight += 2.0 * update  # α / r = 2
    prompt = normal(2, 5, backbone.width, seed=3) if prompts else None
    views = normal(2, 3, size, size)
    found, expected = feature(inside, views, prompt), feature(merged, views, prompt)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert relative(feature(backbone, views, prompt), expected) > 1e-2


@torch.no_grad()
def test_adaptformer_stands_beside_the_mlp_and_its_layer_scale():
    backbone = lively("vit_tiny_patch16_dinov3_qkvb", 64, **SMALL)
    inside = shaken(with_adapter(backbone, "adaptformer", bottleneck=3))
    views = normal(2, 3, 64, 64)
    tokens = backbone.embed(views)
    angles = backbone.vit.rope.get_embed(shape=(4, 4))
    for block, learned in zip(backbone.vit.blocks, inside.vit.blocks, strict=True):
        tokens = tokens + block.gamma_1 * block.attn(block.norm1(tokens), rope=angles)
        tokens = tokens + block.gamma_2 * block.mlp(block.norm2(tokens)) + learned.mlp.adapter(tokens)
    torch.testing.assert_close(feature(inside, views), backbone.pool(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "kind"),
    [("separate", "lora"), ("separate", "lora_qv")]
    + [("packed, biases beside it", kind) for kind in ("bias", "norm", "adaptformer", "lora", "full")],
)
def test_beside_a_backbone_in_bf16_it_learns_in_fp32(form, kind):
    architecture, size = FORMS[form]
    backbone = lively(architecture, size, **SMALL)
    views = normal(3, 3, size, size)
    inside = with_adapter(backbone.to(torch.bfloat16), kind)
    model = prompted(inside, pool=False).only_train("head.", "backbone.")
    logits = model(views).logits
    logits.square().sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"head.weight"} | {f"backbone.{name}" for name in inside.learned}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# Weights from files, and what is refused.


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"]
)
@torch.no_grad()
def test_weights_come_from_the_file_and_nothing_else_is_lost(architecture, tmp_path):
    size = 112
    wanted = lively(architecture, None)
    fingerprint = fingerprint_of(wanted.vit.named_parameters())
    tensors = {name: value.contiguous() for name, value in wanted.vit.state_dict().items()}
    save_file({**tensors, "head.weight": torch.zeros(3, 192), "rope.bands": torch.zeros(4)}, tmp_path / "w.safetensors")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = load_backbone(f"timm:{architecture}", weights=tmp_path / "w.safetensors", image_size=size)
    assert torch.equal(torch.get_rng_state(), before), "numbers were drawn"
    assert found.fingerprint == fingerprint and found.name == f"timm:{architecture}"
    timm_vit.set_size(wanted.vit, size, architecture)
    views = normal(1, 3, size, size)
    assert torch.equal(feature(found, views), feature(wanted, views))
    tensors.pop("blocks.3.norm1.bias")
    save_file({**tensors, "blocks.99.norm1.bias": torch.zeros(4)}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"missing: blocks\.3\.norm1\.bias; unexpected: blocks\.99\.norm1\.bias"):
        load_backbone(f"timm:{architecture}", weights=tmp_path / "w.safetensors")


def test_what_was_for_masked_patches_is_left_out_as_by_timm():
    from timm.models.eva import checkpoint_filter_fn

    vit = timm.create_model("eva02_tiny_patch14_224", num_classes=0, depth=1)
    stored = dict(vit.state_dict())
    stored["norm.weight"], stored["norm.bias"] = stored.pop("fc_norm.weight"), stored.pop("fc_norm.bias")
    stored |= {"mask_token": torch.zeros(1), "lm_head.weight": torch.zeros(2, 2), "rope.freqs_cos": torch.zeros(1)}
    mine, theirs = eva_vit.of_file(stored), checkpoint_filter_fn(stored, vit)
    assert mine.keys() == theirs.keys() == vit.state_dict().keys()
    assert all(mine[name] is stored.get(name, stored.get(name.removeprefix("fc_"))) for name in mine)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_base_patch16_sapiens2.fb", "images that are not square"),
        ("eva02_enormous_patch14_clip_224.laion2b", "EvaBlockPostNorm"),
    ],
)
def test_rotary_models_of_another_kind_are_refused_before_any_download(name, part):
    with pytest.raises(BackboneError, match=rf"timm:{name} \({part}\) cannot take prompts; supported: .*dinov3"):
        load_backbone(f"timm:{name}")


def test_a_download_asks_timm_for_no_start_that_it_does_not_know(monkeypatch):
    """timm's `Eva` takes no `weight_init`, with which plain ViTs are spared a random start."""
    asked, create = [], timm.create_model

    def watched(name, **words):
        asked.append(words)
        return create(name.partition(".")[0], **{**words, "pretrained": False})

    monkeypatch.setattr("timm.create_model", watched)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    backbone = load_backbone("timm:vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", image_size=64)
    assert asked[-1] == {"pretrained": True, "num_classes": 0} and backbone.preprocess.size == 64
    assert torch.equal(torch.get_rng_state(), before)
    load_backbone("timm:vit_tiny_patch16_224.augreg_in21k")
    assert asked[-1]["weight_init"] == "skip"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_compiled_blocks_give_the_same_numbers():
    backbone = lively("vit_tiny_patch16_dinov3_qkvb", 64, depth=3)
    tokens, prompt = normal(2, 21, 192), normal(2, 192, seed=1).requires_grad_()

    def run():
        found = tokens
        for i in range(3):
            found = backbone.block(i, found, prompt, keep=1 if i == 2 else None)
        (gradient,) = torch.autograd.grad(found.square().sum(), [prompt])
        return found, gradient

    plain = run()
    backbone.compile_blocks()
    for mine, theirs in zip(run(), plain, strict=True):
        assert relative(mine, theirs) <= 1e-5
