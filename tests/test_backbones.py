"""The seam against timm itself and against whole blocks over concatenated prompts (`plain.py`)."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lpt.errors import BackboneError
from lpt.model.backbones import FAMILIES, load_backbone, timm_vit
from lpt.model.backbones import nano as nano_module
from lpt.model.backbones.base import KeyValue, fingerprint_of, read_prototypes
from lpt.model.backbones.timm_vit import attend
from tests.support.command_line import lpt as command
from tests.support.pictures import fill
from tests.support.plain import plain_block


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(backbone, seed=1):
    """Fresh models have zero biases, unit norms and near-zero layer scales, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(mean=float(name.endswith(("weight", "gamma"))), std=0.3, generator=generator)
    return backbone


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("vit_tiny_patch16_224", 224),  # native
        ("vit_tiny_patch16_224", 112),
        ("vit_tiny_patch16_224", 64),
        ("deit3_small_patch16_224", 112),
        ("vit_small_patch14_dinov2", 56),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("vit_base_patch16_clip_224", 64),
        ("vit_base_patch16_siglip_224", 64),  # SigLIP 2 has tags of the same architecture
        ("vit_base_patch16_radio_v3", 64),
        ("vit_base_patch14_reg1_tipsv2", 56),
    ],
)
def test_without_prompts_the_seam_is_timms_forward_bit_for_bit(architecture, size):
    changes = {"depth": 2} if "base" in architecture else {}
    backbone = lively(timm_vit.untrained(architecture, image_size=size, **changes))
    views = normal(2, 3, size, size)
    with torch.no_grad():
        tokens = backbone.embed(views)
        assert tokens.shape[2] == backbone.width and len(backbone.vit.blocks) == backbone.depth
        assert tokens.shape[1] == backbone.prefix + (size // backbone.vit.patch_embed.patch_size[0]) ** 2
        for i in range(backbone.depth):
            tokens = backbone.block(i, tokens)
        feature = backbone.pool(tokens)
        expected = backbone.vit.forward_head(backbone.vit.forward_features(views), pre_logits=True).float()
        assert feature.shape == (2, backbone.feature_width)
        assert torch.equal(feature, expected)
        if backbone.reads is not None:
            assert torch.equal(backbone.pool(tokens[:, : backbone.reads]), expected)


@pytest.mark.parametrize(
    ("architecture", "prefix", "reads"),
    [
        ("vit_tiny_patch16_224", 1, 1),
        ("vit_small_patch14_reg4_dinov2", 5, 1),
        ("vit_base_patch16_siglip_224", 0, None),
        ("vit_base_patch16_radio_v3", 8, 1),
        ("vit_base_patch14_reg1_tipsv2", 2, 1),
    ],
)
def test_the_seam_says_which_tokens_there_are_and_which_are_read(architecture, prefix, reads):
    backbone = timm_vit.untrained(architecture, image_size=56 if "patch14" in architecture else 64, depth=1)
    assert (backbone.prefix, backbone.reads, backbone.depth) == (prefix, reads, 1)


VARIANTS = {
    "vit": ("vit_tiny_patch16_224", 64, {}),
    "vit, many tokens": ("vit_tiny_patch16_224", 224, {}),
    "vit, normalised queries and keys": ("vit_tiny_patch16_224", 64, dict(qk_norm=True, scale_attn_norm=True)),
    "vit, no qkv bias": ("vit_tiny_patch16_224", 64, dict(qkv_bias=False)),
    "deit3": ("deit3_small_patch16_224", 64, {}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", 56, {}),
    "clip": ("vit_base_patch16_clip_224", 64, {}),
    "siglip": ("vit_base_patch16_siglip_224", 64, {}),
    "radio": ("vit_base_patch16_radio_v3", 64, {"embed_dim": 96, "num_heads": 3}),
    "tips": ("vit_base_patch14_reg1_tipsv2", 56, {"embed_dim": 96, "num_heads": 3}),
}
PROMPTS = {
    "one": [(4,)],
    "several": [(4,), (1,), (3,)],
    "per image": [(3, 4)],
    "shared and per image": [(10,), (3, 5)],
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("keep", [None, 1])
@pytest.mark.parametrize("prompts", list(PROMPTS))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_prompt_as_keys_and_values_equals_concatenated_tokens(variant, prompts, keep):
    architecture, size, changes = VARIANTS[variant]
    backbone = lively(timm_vit.untrained(architecture, image_size=size, depth=2, **changes))
    tokens = backbone.embed(normal(3, 3, size, size)).requires_grad_()
    given = [normal(*s, backbone.width, seed=7 + n).requires_grad_() for n, s in enumerate(PROMPTS[prompts])]
    last = backbone.depth - 1
    weight = normal(3, keep or tokens.shape[1], backbone.width, seed=99)

    def result(block):
        output = block()
        return output.detach(), torch.autograd.grad((output * weight).sum(), [tokens, *given])

    joined = torch.cat([p.expand(3, -1, -1) for p in given], dim=1)
    fast = result(lambda: backbone.block(last, tokens, given, keep=keep))
    slow = result(lambda: plain_block(backbone, last, tokens, joined)[:, :keep])
    assert fast[0].shape == weight.shape
    assert relative(fast[0], slow[0]) <= 1e-5
    for a, b in zip(fast[1], slow[1], strict=True):
        assert b.abs().sum() > 0 and relative(a, b) <= 1e-5


@pytest.mark.parametrize("variant", ["vit", "dinov2 with registers", "siglip"])
def test_constant_keys_and_values_stand_for_their_prompt(variant):
    architecture, size, changes = VARIANTS[variant]
    backbone = lively(timm_vit.untrained(architecture, image_size=size, depth=1, **changes))
    tokens = backbone.embed(normal(3, 3, size, size))
    prompt, other = normal(4, backbone.width, seed=3), normal(3, 2, backbone.width, seed=4)
    constant = backbone.keys_values(0, prompt)
    assert isinstance(constant, KeyValue)
    heads = backbone.vit.blocks[0].attn.num_heads
    assert constant.key.shape == constant.value.shape == (1, heads, 4, backbone.width // heads)
    assert backbone.keys_values(0, other).key.shape == (3, heads, 2, backbone.width // heads)
    alone = backbone.block(0, tokens, constant)
    assert torch.equal(alone, backbone.block(0, tokens, prompt))
    assert relative(alone, plain_block(backbone, 0, tokens, prompt)) <= 1e-5
    mixed = backbone.block(0, tokens, [constant, other], keep=1)
    both = torch.cat([prompt.expand(3, -1, -1), other], dim=1)
    assert relative(mixed, plain_block(backbone, 0, tokens, both)[:, :1]) <= 1e-5


def test_the_order_of_prompts_makes_no_difference():
    backbone = lively(timm_vit.untrained("vit_tiny_patch16_224", image_size=64, depth=1))
    tokens = backbone.embed(normal(2, 3, 64, 64))
    a, b = normal(3, 192, seed=1), normal(2, 192, seed=2)
    assert relative(backbone.block(0, tokens, [a, b]), backbone.block(0, tokens, [b, a])) <= 1e-6


@pytest.mark.parametrize("keep", [1, 5, 17, 40])
def test_keep_computes_the_first_tokens_of_the_whole(keep):
    backbone = lively(timm_vit.untrained("vit_tiny_patch16_224", image_size=64, depth=1))
    tokens = backbone.embed(normal(2, 3, 64, 64))
    assert relative(backbone.block(0, tokens, keep=keep), backbone.block(0, tokens)[:, :keep]) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 20, 130])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend_is_softmax_attention(dtype, tolerance, tokens):
    query, key, value = (normal(2, 3, n, 16, seed=n).to(dtype) for n in (tokens, tokens + 11, tokens + 11))
    query = 3 * query
    mixed = attend(query, key, value)
    scores = query.double() @ key.double().transpose(2, 3) / 16**0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    assert mixed.dtype == dtype and mixed.shape == query.shape
    assert relative(mixed.double(), weights @ value.double()) <= tolerance


# What the backbone contract refuses.

UNSERVED = [
    "naflexvit_base_patch16_gap",
    "vit_base_patch16_sapiens2",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_18x2_224",
]


@pytest.mark.parametrize("architecture", UNSERVED)
def test_families_without_a_seam_are_refused_by_name(architecture, tmp_path):
    with pytest.raises(BackboneError, match=rf"{architecture} .*supported: plain and rotary"):
        load_backbone(f"untrained:{architecture}")
    save_file({"x": torch.zeros(1)}, tmp_path / "any.safetensors")
    with pytest.raises(BackboneError, match=rf"{architecture} .*supported: plain and rotary"):
        load_backbone(f"timm:{architecture}", weights=tmp_path / "any.safetensors")


@pytest.mark.parametrize(
    "name", ["naflexvit_base_patch16_gap.e300_s576_in1k", "eva02_enormous_patch14_clip_224.laion2b", "resnet18.a1_in1k"]
)
def test_a_full_tag_without_a_seam_is_refused_before_any_download(name):
    with pytest.raises(BackboneError, match=rf"timm:{name} .*supported"):
        load_backbone(f"timm:{name}")


def test_a_bare_name_is_refused_and_its_tags_are_offered():
    with pytest.raises(BackboneError, match=r"bare name.*vit_base_patch16_224\.augreg2?_in21k"):
        load_backbone("timm:vit_base_patch16_224")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("timm:vit_tiny_patch16_242", "vit_tiny_patch16_224"),
        ("untrained:deit3_smal_patch16_224", "deit3_small_patch16_224"),
        ("timm:vit_tiny_patch16_224.augreg_in21kk", "vit_tiny_patch16_224.augreg_in21k"),
        ("tim:vit_tiny_patch16_224", "timm"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name, meant):
    with pytest.raises(BackboneError, match=rf"did you mean {meant}\?"):
        load_backbone(name)


def test_a_name_without_a_family_is_refused():
    with pytest.raises(BackboneError, match="a timm model would be timm:vit_tiny_patch16_224") as error:
        load_backbone("vit_tiny_patch16_224")
    assert all(family in str(error.value) for family in FAMILIES)


def test_random_weights_take_no_weights_file(tmp_path):
    with pytest.raises(BackboneError, match="use timm:test_vit"):
        load_backbone("untrained:test_vit", weights=tmp_path / "any.safetensors")


@pytest.mark.parametrize(("size", "near"), [(100, 96), (8, 16), (225, 224)])
def test_an_image_size_between_patches_is_refused(size, near):
    with pytest.raises(BackboneError, match=f"image_size {size} is not a multiple of the patch size 16 .*use {near}"):
        load_backbone("untrained:vit_tiny_patch16_224", image_size=size)


# Weights from files. `test_vit` is timm's own small ViT: 6 blocks, width 64.


def weights_of(architecture="test_vit", *, seed=0, dtype=torch.float32):
    state = timm_vit.untrained(architecture, seed=seed).vit.state_dict()
    return {name: value.half().to(dtype).contiguous() for name, value in state.items()}


def saved(tensors, path):
    save_file(tensors, path)
    return path


def test_weights_come_from_the_file(tmp_path):
    tensors = weights_of(seed=5)
    backbone = load_backbone("timm:test_vit", weights=str(saved(tensors, tmp_path / "w.safetensors")))
    assert backbone.name == "timm:test_vit" and backbone.dtype == torch.float32
    state = backbone.vit.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_the_head_of_another_label_set_is_left_out(tmp_path):
    tensors = weights_of()
    headed = {**tensors, "head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    with_head = load_backbone("timm:test_vit", weights=saved(headed, tmp_path / "h.safetensors"))
    without = load_backbone("timm:test_vit", weights=saved(tensors, tmp_path / "w.safetensors"))
    assert with_head.fingerprint == without.fingerprint


def test_weights_of_another_architecture_name_every_key_that_does_not_fit(tmp_path):
    tensors = weights_of()
    del tensors["norm.weight"], tensors["blocks.3.attn.proj.bias"]
    tensors["blocks.9.norm1.weight"] = torch.zeros(64)
    tensors["pos_embed"] = torch.zeros(1, 5, 64)
    with pytest.raises(BackboneError) as error:
        load_backbone("timm:test_vit", weights=saved(tensors, tmp_path / "w.safetensors"))
    said = str(error.value)
    assert "does not fit test_vit" in said
    assert "missing: blocks.3.attn.proj.bias, norm.weight;" in said
    assert "unexpected: blocks.9.norm1.weight;" in said
    assert "of another shape: pos_embed (file (1, 5, 64), model (1, 101, 64))" in said


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    for content in (b"", b"\x80\x02}q\x00.", b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(BackboneError, match=r"w\.safetensors is not a safetensors file"):
            load_backbone("timm:test_vit", weights=path)


def test_weights_of_another_format_are_called_by_their_name(tmp_path, capsys):
    torch.save({"a": torch.zeros(2)}, tmp_path / "new.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "vit.npz", a=np.zeros(2))
    (tmp_path / "p.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (tmp_path / "login.safetensors").write_text("<!DOCTYPE html><html>log in</html>")
    for name, said in (
        ("new.pth", "it is a PyTorch checkpoint"),
        ("old.pth", "it is a pickle, such as a PyTorch checkpoint"),
        ("vit.npz", "it is an archive of NumPy arrays"),
        ("p.h5", "it is an HDF5 file"),
        ("lfs.safetensors", "it is a Git LFS pointer and not the file itself: fetch that with git lfs pull"),
        ("login.safetensors", "it is a web page"),
    ):
        with pytest.raises(BackboneError, match=f"{said}.*convert it first, a checkpoint of PyTorch for example with"):
            load_backbone("timm:test_vit", weights=tmp_path / name)
    folder = fill(tmp_path / "photos", {"a": 3, "b": 3})
    words = ("backbone.name=timm:vit_tiny_patch16_224", f"backbone.weights={tmp_path / 'new.pth'}")
    code, _, error = command(capsys, "fit", folder, "--out", tmp_path / "run", *words, "train.device=cpu")
    assert code == 2 and "it is a PyTorch checkpoint" in error and "torch.load(FILE, weights_only=True)" in error
    assert "bytes" not in error and not (tmp_path / "run").exists()


def test_a_download_that_fails_is_told_in_our_words(monkeypatch, capsys, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    offline, unknown, missing = (
        kind.__new__(kind) for kind in (OfflineModeIsEnabled, LocalEntryNotFoundError, RepositoryNotFoundError)
    )
    unknown_offline = LocalEntryNotFoundError.__new__(LocalEntryNotFoundError)
    unknown_offline.__cause__ = offline
    for error, said in (
        (unknown_offline, r"\(HF_HUB_OFFLINE is set, and it is in no cache on this machine\)"),
        (unknown, r"\(the Hub cannot be reached, and it is in no cache on this machine\)"),
        (TimeoutError("read timed out"), r"\(the Hub cannot be reached.*\)"),
        (missing, r"\(the Hub has none of this name, or only for those who have logged in.*\)"),
        (OSError("The mirror says no. Please " + "check " * 90), r"\(The mirror says no\)"),
        (OSError(28, "No space left on device"), r"\(.*No space left on device\)"),
    ):

        def fail(*words, error=error, **settings):
            raise error

        monkeypatch.setattr("timm.create_model", fail)
        with pytest.raises(BackboneError, match=rf"could not be downloaded {said}: download it once where .*or use"):
            load_backbone("timm:vit_tiny_patch16_224.augreg_in21k")
    folder = fill(tmp_path / "photos", {"a": 3, "b": 3})
    words = ("backbone.name=timm:vit_tiny_patch16_224.augreg_in21k", "train.device=cpu")
    code, _, error = command(capsys, "fit", folder, "--out", tmp_path / "run", *words)
    assert code == 2 and "No space left on device" in error and "backbone.name=nano" in error


def test_a_missing_weights_file_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"nowhere\.safetensors does not exist"):
        load_backbone("timm:test_vit", weights=tmp_path / "nowhere.safetensors")


def test_the_fingerprint_is_of_values_not_of_files(tmp_path):
    half, full = weights_of(dtype=torch.float16), weights_of(dtype=torch.float32)
    paths = [saved(half, tmp_path / "half.safetensors"), saved(full, tmp_path / "full.safetensors")]
    fingerprints = {load_backbone("timm:test_vit", weights=path).fingerprint for path in paths}
    for size in (64, 160, 224):
        fingerprints.add(load_backbone("timm:test_vit", weights=paths[0], image_size=size).fingerprint)
    assert len(fingerprints) == 1

    changed = {name: value.clone() for name, value in full.items()}
    changed["norm.bias"][3] += 1e-3
    other = load_backbone("timm:test_vit", weights=saved(changed, tmp_path / "other.safetensors"))
    assert other.fingerprint not in fingerprints and len(other.fingerprint) == 16


def test_the_fingerprint_sees_names_and_shapes_and_ignores_order():
    a, b = torch.arange(4.0), torch.ones(2)
    base = fingerprint_of([("a", a), ("b", b)])
    assert fingerprint_of([("b", b), ("a", a)]) == base
    assert fingerprint_of([("a", b), ("b", a)]) != base
    assert fingerprint_of([("a", a.view(2, 2)), ("b", b)]) != base


def test_untrained_weights_are_a_pure_function_of_the_seed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = timm_vit.untrained("test_vit")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert timm_vit.untrained("test_vit").fingerprint == first.fingerprint
    assert timm_vit.untrained("test_vit", image_size=64).fingerprint == first.fingerprint
    assert timm_vit.untrained("test_vit", seed=1).fingerprint != first.fingerprint


def test_frozen_is_frozen():
    backbone = timm_vit.untrained("test_vit", drop_path_rate=0.5, attn_drop_rate=0.5)
    assert backbone.train() is backbone
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    views = normal(2, 3, 160, 160)
    tokens = backbone.embed(views)
    assert torch.equal(backbone.block(5, tokens), backbone.block(5, tokens))


def test_a_parent_in_train_mode_leaves_the_backbone_in_eval_mode():
    parent = torch.nn.Sequential(timm_vit.untrained("test_vit"), torch.nn.Dropout()).train()
    assert parent[1].training and not any(module.training for module in parent[0].modules())


def test_the_pixels_are_those_of_the_backbones_own_recipe():
    siglip = timm_vit.untrained("vit_base_patch16_siglip_224", depth=1).preprocess
    assert (siglip.size, siglip.mean, siglip.std) == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    clip = timm_vit.untrained("vit_base_patch16_clip_224", image_size=64, depth=1).preprocess
    assert clip.size == 64 and clip.interpolation == "bicubic"
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))  # protocols spec 8
    assert clip.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    deit = timm_vit.untrained("deit3_small_patch16_224", depth=1).preprocess
    assert deit.mean == pytest.approx((0.485, 0.456, 0.406))


def test_a_bfloat16_backbone_gives_fp32_features_close_to_fp32():
    backbone = lively(timm_vit.untrained("test_vit", image_size=64))
    views, prompt = normal(4, 3, 64, 64), normal(3, 64, seed=1)

    def feature():
        tokens = backbone.embed(views)
        for i in range(backbone.depth):
            tokens = backbone.block(i, tokens, prompt, keep=backbone.reads if i == backbone.depth - 1 else None)
        return backbone.pool(tokens)

    exact = feature()
    backbone.to(torch.bfloat16)
    rounded = feature()
    assert rounded.dtype == torch.float32 and relative(rounded, exact) < 0.05


def test_the_real_deit_weights_fit(deit_tiny_weights):
    backbone = load_backbone("timm:deit_tiny_patch16_224", weights=deit_tiny_weights, image_size=32)
    assert backbone.fingerprint == load_backbone("timm:deit_tiny_patch16_224", weights=deit_tiny_weights).fingerprint
    views = normal(2, 3, 32, 32)
    tokens = backbone.embed(views)
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens)
    assert torch.equal(backbone.pool(tokens), backbone.vit(views))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_compiled_blocks_give_the_same_numbers():
    backbone = lively(timm_vit.untrained("vit_tiny_patch16_224", image_size=64, depth=3))
    tokens, prompt = normal(2, 17, 192), normal(2, 192, seed=1).requires_grad_()

    def run():
        found = tokens
        for i in range(3):
            found = backbone.block(i, found, prompt, keep=1 if i == 2 else None)
        (gradient,) = torch.autograd.grad(found.square().sum(), [prompt])
        return found, gradient

    plain = run()
    backbone.compile_blocks()
    for mine, theirs in zip(run(), plain, strict=True):
        assert ((mine - theirs).norm() / theirs.norm()).item() <= 1e-5


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    backbone = timm_vit.untrained("vit_tiny_patch16_224", image_size=32, depth=1)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackboneError, match="needs a C\\+\\+ compiler"):
        backbone.compile_blocks()


def test_nano_comes_with_the_package_and_is_timms_own_forward():
    nano = load_backbone("nano")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = nano.embed(images)
    for i in range(nano.depth):
        tokens = nano.block(i, tokens)
    with torch.no_grad():
        assert torch.equal(nano.pool(tokens), nano.vit(images))
    assert nano_module.FILE.stat().st_size <= 4_000_000
    assert not any(p.requires_grad for p in nano.parameters()) and nano.name == "nano"
    larger = load_backbone("nano", image_size=48)
    assert larger.preprocess.size == 48 and larger.fingerprint == nano.fingerprint
    assert larger.embed(torch.zeros(1, 3, 48, 48)).shape == (1, 145, 128)


def test_nano_refuses_what_it_cannot_be_given():
    with pytest.raises(BackboneError, match="nano has its own weights"):
        load_backbone("nano", weights="x.safetensors")
    with pytest.raises(BackboneError, match="30 is not a multiple of the patch size 4"):
        load_backbone("nano", image_size=30)
    with pytest.raises(BackboneError, match="no known family"):
        load_backbone("nano:large")


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        ("[" * 100_000, torch.zeros(2, 3)),
        ("7", torch.zeros(2, 3)),
        ('["a"]', torch.zeros(2, 3)),
        ('["a", "b"]', torch.zeros(())),
        ('["a", "b"]', torch.full((2, 3), float("nan"))),
    ],
)
def test_damaged_prototypes_are_refused(tmp_path, names, rows):
    save_file({"prototypes": rows}, tmp_path / "p.safetensors", metadata={"classes": names})
    with pytest.raises(BackboneError, match=r"prototypes\.weights"):
        read_prototypes(tmp_path / "p.safetensors")
