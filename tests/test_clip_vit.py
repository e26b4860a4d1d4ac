"""The seam against open_clip itself: small models with its own code, stored as its files are."""

import copy
import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lpt import run
from lpt.config import resolve
from lpt.errors import BackboneError
from lpt.methods.supervised import build_model
from lpt.model.adapters import with_adapter
from lpt.model.backbones import clip_text, load_backbone, random_backbone
from lpt.model.backbones.clip_text import read_templates
from lpt.model.backbones.eva_vit import EvaViT
from lpt.model.heads import CosineHead
from lpt.setup import open_backbone
from tests.support.plain import plain_block
from tests.support.towers import CONFIG, TEXT, VISION, open_clip, stored
from tests.support.toy import toy_task
from tests.support.training import bind, recipe_of

CLASSES = ("class 0", "class 1", "class 2", "class 3")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(small):
    return load_backbone(f"open_clip:{small[1]}", weights=small[2])


def views(n=4, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def feature(backbone, pixels):
    tokens = backbone.embed(pixels)
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, keep=backbone.reads if i == backbone.depth - 1 else None)
    return backbone.pool(tokens)


def texts(model, classes=CLASSES, templates=("a photo of a {}",)):
    """Slowly, with open_clip's own calls: [C J]."""
    tokenizer, rows = open_clip.get_tokenizer("small"), []
    for name in classes:
        each = [model.encode_text(tokenizer([t.format(name)]))[0] for t in templates]
        rows.append(F.normalize(sum(F.normalize(one, dim=0) for one in each), dim=0))
    return torch.stack(rows)


# The image tower.


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("changes", [{}, {"ls_init_value": 0.1}, {"mlp_ratio": 2.5, "patch_dropout": 0.5}])
def test_features_are_those_of_open_clip(tmp_path, quick_gelu, changes):
    config = {**CONFIG, "vision_cfg": {**VISION, **changes}}
    model, name, path = stored(tmp_path, config, name="features", quick_gelu=quick_gelu)
    backbone = load_backbone(f"open_clip:{name}", weights=path)
    assert backbone.texts is not None and backbone.name == "open_clip:features"
    assert (backbone.depth, backbone.width, backbone.prefix, backbone.reads) == (3, 64, 1, 1)
    assert (backbone.feature_width, backbone.joint_width, backbone.dtype) == (64, 48, torch.float32)
    joint = backbone.project(feature(backbone, views()))
    torch.testing.assert_close(joint, model.encode_image(views()), rtol=1e-4, atol=1e-4)
    tower = model.visual
    before = tower.ln_post(tower.transformer(tower._embeds(views())))[:, 0]
    torch.testing.assert_close(feature(backbone, views()), before, rtol=1e-4, atol=1e-4)


def test_a_prompt_as_keys_and_values_equals_concatenated_tokens(clip):
    tokens, prompt = clip.embed(views()), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for i in range(clip.depth):
        slow = plain_block(clip, i, tokens, prompt)
        torch.testing.assert_close(clip.block(i, tokens, prompt), slow, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clip.block(i, tokens, prompt, keep=1), slow[:, :1], rtol=1e-4, atol=1e-5)
        tokens = slow


@pytest.mark.parametrize(
    ("architecture", "pool", "proj"),
    [
        ("test_vit", "token", "none"),
        ("test_vit", "token", "linear"),
        ("test_vit", "token", None),
        ("test_vit3", "map", "none"),
    ],
)
def test_a_tower_of_timm_and_the_matrix_behind_it(tmp_path, architecture, pool, proj):
    vision = {"image_size": 160, "timm_model_name": architecture, "timm_pool": pool, "timm_proj": proj}
    joint = {"linear": 48, None: 48}.get(proj, 96 if architecture == "test_vit3" else 64)
    config = {"embed_dim": joint, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}
    model, name, path = stored(tmp_path, config, name=f"timm-{pool}-{proj}")
    if proj is None:
        with pytest.raises(BackboneError, match="a matrix with a bias"):
            load_backbone(f"open_clip:{name}", weights=path)
        tensors = load_file(path)
        tensors["visual.trunk.head.bias"].zero_()
        model.visual.trunk.head.bias.zero_()
        save_file(tensors, path)
    backbone = load_backbone(f"open_clip:{name}", weights=path)
    assert (backbone.projection is None) == (proj == "none") and backbone.joint_width == joint
    assert backbone.reads == (None if pool == "map" else 1)
    assert not any(key.startswith("vit.head") for key in backbone.state_dict())
    found = backbone.project(feature(backbone, views(2, 160)))
    torch.testing.assert_close(found, model.encode_image(views(2, 160)), rtol=1e-4, atol=1e-4)
    rows = backbone.class_prototypes(CLASSES)  # the other layout of a file, with `text.` before its keys
    torch.testing.assert_close(rows, texts(model), rtol=1e-4, atol=1e-5)


def test_another_image_size_resamples_the_positions(small, clip):
    large = load_backbone(f"open_clip:{small[1]}", weights=small[2], image_size=48)
    assert large.preprocess.size == 48 and large.fingerprint == clip.fingerprint
    assert large.embed(views(2, 48)).shape == (2, 37, 64) and large.vit.pos_embed.shape == (1, 37, 64)
    assert torch.equal(large.vit.pos_embed[:, :1], clip.vit.pos_embed[:, :1])
    with pytest.raises(BackboneError, match="image_size 50 is not a multiple of the patch size 8 of open_clip:small"):
        load_backbone(f"open_clip:{small[1]}", weights=small[2], image_size=50)


def test_bfloat16_is_close_and_its_texts_are_in_fp32(small, clip):
    exact = clip.project(feature(clip, views()))
    half = load_backbone(f"open_clip:{small[1]}", weights=small[2]).to("cpu", torch.bfloat16)
    rounded = half.project(feature(half, views()))
    assert half.dtype == half.projection.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert F.cosine_similarity(rounded, exact).min() > 0.99
    assert torch.equal(half.class_prototypes(CLASSES), clip.class_prototypes(CLASSES))


def test_the_fingerprint_is_of_tower_projection_and_activation(tmp_path, small, clip):
    tensors = load_file(small[2])

    def fingerprint(changed, name="small"):
        save_file(changed, tmp_path / "w.safetensors")
        return load_backbone(f"open_clip:{name}", weights=tmp_path / "w.safetensors").fingerprint

    assert fingerprint(tensors) == clip.fingerprint
    half = {k: v.half() for k, v in tensors.items()}
    assert fingerprint(half) == fingerprint({k: v.float() for k, v in half.items()})
    assert fingerprint({**tensors, "ln_final.bias": tensors["ln_final.bias"] + 1}) == clip.fingerprint
    for key in ("visual.proj", "visual.ln_post.bias"):
        assert fingerprint({**tensors, key: tensors[key] + 1}) != clip.fingerprint
    stored(tmp_path, name="quick", quick_gelu=True)
    assert fingerprint(tensors, "quick") != clip.fingerprint


@pytest.mark.parametrize("kind", ["adaptformer", "lora", "norm", "full"])
def test_adapters_start_at_the_identity_and_copy_no_tower(clip, kind):
    clip.class_prototypes(CLASSES)
    inside = with_adapter(clip, kind)
    assert "projection" not in inside.learned and not inside.projection.requires_grad
    torch.testing.assert_close(feature(inside, views()), feature(clip, views()), rtol=1e-5, atol=1e-5)
    assert torch.equal(inside.class_prototypes(CLASSES), clip.class_prototypes(CLASSES))
    assert inside.state_dict().keys() >= {"projection"}


# Texts.


def test_texts_are_those_of_open_clip_and_need_its_tower_only_while_they_are_made(small, clip, monkeypatch):
    towers, build = [], clip_text.TextTower._tower

    def watched(texts):
        tower = build(texts)
        towers.append(weakref.ref(tower))
        return tower

    monkeypatch.setattr(clip_text.TextTower, "_tower", watched)
    torch.testing.assert_close(clip.class_prototypes(CLASSES), texts(small[0]), rtol=1e-4, atol=1e-5)
    gc.collect()
    assert len(towers) == 1 and towers[0]() is None
    assert not any("token_embedding" in key for key in clip.state_dict())
    again = copy.deepcopy(clip).class_prototypes(["Class_2", "class 0"])  # underscores are spaces, case is nothing
    torch.testing.assert_close(again, clip.class_prototypes(CLASSES)[[2, 0]])  # another batch of texts
    before = len(towers)
    both = clip.class_prototypes(["class 0", "zebra"])  # a name that is new is made alone
    torch.testing.assert_close(both, texts(small[0], ["class 0", "zebra"]), rtol=1e-4, atol=1e-5)
    assert torch.equal(both, clip.class_prototypes(["class 0", "zebra"])) and len(towers) == before + 1
    assert torch.equal(both[0], clip.class_prototypes(CLASSES)[0])


def test_underscores_in_class_names_are_spaces(small, clip):
    rows = clip.class_prototypes(["grand_piano", "sea horse"])
    torch.testing.assert_close(rows, texts(small[0], ["grand piano", "sea horse"]), rtol=1e-4, atol=1e-5)


def test_templates_are_a_text_the_ensemble_or_a_file(tmp_path, small, clip, monkeypatch):
    assert read_templates("a photo of a {}") == ("a photo of a {}",) == clip.templates
    ensemble = read_templates("ensemble")
    assert len(set(ensemble)) == 80 and "a bad photo of a {}." in ensemble and all("{}" in t for t in ensemble)
    (tmp_path / "templates.txt").write_text("a sketch of {}\n\n  {} in the snow, a {} \n")
    own = read_templates(str(tmp_path / "templates.txt"))
    assert own == ("a sketch of {}", "{} in the snow, a {}")
    monkeypatch.setattr(clip_text, "TEXTS_AT_A_TIME", 3)  # a batch may end between the templates of a class
    clip.templates = own
    expected = []
    for name in CLASSES:
        expected.append(texts(small[0], [name], [t.replace("{}", name) for t in own])[0])
    torch.testing.assert_close(clip.class_prototypes(CLASSES), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a {}\na cat\n", r"'a cat' has no \{}"), (b"\n\n", "is empty"), (b"\xff", "not a text file")],
)
def test_files_of_templates_that_are_none(tmp_path, content, said):
    path = tmp_path / "templates.txt"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=said):
        read_templates(str(path))


def test_a_template_without_a_place_for_the_name_is_refused():
    with pytest.raises(BackboneError, match=r"'a photo' has no \{} for the class name and is no file"):
        read_templates("a photo")


def test_a_text_tower_that_does_not_fit_names_every_key(tmp_path, small):
    tensors = load_file(small[2])
    del tensors["ln_final.weight"]
    tensors["text_projection"] = torch.zeros(32, 47)
    tensors["another.bias"] = torch.zeros(1)
    save_file(tensors, tmp_path / "w.safetensors")
    backbone = load_backbone("open_clip:small", weights=tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"not fit the text tower of small: missing: ln_final\.weight") as error:
        backbone.class_prototypes(CLASSES)
    assert "unexpected: another.bias" in str(error.value)
    assert "text_projection (file (32, 47), model (32, 48))" in str(error.value)


def test_towers_and_tokenizers_of_other_libraries(tmp_path, small, clip):
    config = {**CONFIG, "text_cfg": {**TEXT, "hf_tokenizer_name": "nobody/nothing"}}
    _, name, path = stored(tmp_path, config, name="tokens")
    with pytest.raises(BackboneError, match=r"tokenizer nobody/nothing of open_clip:tokens .*prototypes\.weights"):
        load_backbone(f"open_clip:{name}", weights=path).class_prototypes(CLASSES)
    config = {**CONFIG, "text_cfg": {"hf_model_name": "roberta-base"}}
    (tmp_path / "foreign.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "foreign.json")
    foreign = load_backbone("open_clip:foreign", weights=small[2])  # its image tower is served all the same
    torch.testing.assert_close(feature(foreign, views()), feature(clip, views()))
    with pytest.raises(BackboneError, match=r"roberta-base.*set prototypes\.weights"):
        foreign.class_prototypes(CLASSES)


# Zero-shot, and a start of the head.


def test_the_similarity_head_gives_open_clips_zero_shot_logits(small, clip):
    """Acceptance 1 of the ULFine specification."""
    head = CosineHead(num_classes=4, width=clip.joint_width, scale=100, project=clip.project)
    head.weight.data.copy_(clip.class_prototypes(CLASSES))
    image, text = F.normalize(small[0].encode_image(views(16)), dim=1), texts(small[0])
    logits, expected = 100 * head(feature(clip, views(16))), 100 * image @ text.T
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    model = recipe_of("zero_shot", toy_task(), clip).model
    assert torch.equal(100 * model(views(16)).logits, logits)


@pytest.mark.parametrize("tuning", ["head", "vpt_deep", "adaptformer"])
def test_a_head_starts_at_texts_brought_back_to_the_features(clip, tuning):
    task = toy_task()
    model = build_model(task, clip, bind(task, clip), tuning=tuning, head="cosine", scale=25, head_init="prototypes")
    expected = F.normalize(clip.class_prototypes(CLASSES) @ clip.projection.T, dim=1)
    torch.testing.assert_close(F.normalize(model.head.weight, dim=1), expected)


def test_a_run_makes_its_texts_by_template_unless_a_file_has_them(tmp_path, small):
    config = {
        "backbone": {"name": "open_clip:small", "weights": str(small[2])},
        "data": {"name": "digits-lt"},
        "method": {"name": "zero_shot"},
    }
    first = open_backbone(resolve(config, ["prototypes.template=ensemble"]))
    assert len(first.templates) == 80 and first.prototypes is None
    assert open_backbone(resolve(config)).templates == (clip_text.TEMPLATE,)
    with pytest.raises(BackboneError, match=r"'a digit' has no \{}"):
        open_backbone(resolve(config, ["prototypes.template=a digit"]))

    report = run.train(resolve(config, ["prototypes.template=the digit {}"]), tmp_path / "run")
    assert report["method"] == "zero_shot" and report["labels_seen"] == {}
    with pytest.raises(ValueError, match="other settings"):
        run.train(resolve(config, ["prototypes.template=a {}"]), tmp_path / "run", resume=True)

    save_file({"prototypes": torch.eye(10, 48)}, tmp_path / "p.safetensors", {"classes": json.dumps([*"0123456789"])})
    given = open_backbone(resolve(config, [f"prototypes.weights={tmp_path / 'p.safetensors'}"]))
    assert torch.equal(given.class_prototypes(["3", "0"]), torch.eye(10, 48)[[3, 0]])


# Names, files and pixels.


def test_a_file_that_does_not_fit_names_every_key_as_in_open_clip(tmp_path, small):
    tensors = load_file(small[2])
    del tensors["visual.proj"], tensors["visual.transformer.resblocks.1.attn.in_proj_bias"]
    tensors["visual.attn_pool.query"] = torch.zeros(3)
    tensors["visual.positional_embedding"] = torch.zeros(10, 64)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match="does not fit open_clip:small") as error:
        load_backbone("open_clip:small", weights=tmp_path / "w.safetensors")
    said = str(error.value)
    assert "missing: visual.proj, visual.transformer.resblocks.1.attn.in_proj_bias;" in said
    assert "unexpected: visual.attn_pool.query;" in said
    assert "of another shape: visual.positional_embedding (file (10, 64), model (17, 64))" in said
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(BackboneError, match="not a safetensors file"):
        load_backbone("open_clip:small", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("RN50/openai", "a ResNet"),
        ("convnext_base/laion400m_s13b_b51k", "timm's convnext"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "CoCa"),
        ("ViT-L-14-CLIPA/datacomp1b", "no_ln_pre=True, final_ln_after_pool=True, pool_type=avg"),
    ],
)
def test_towers_without_a_seam_are_refused_before_any_download(model, said):
    with pytest.raises(
        BackboneError, match=rf"open_clip:{model} \({said}\) cannot take prompts; supported: .*ViT-B-16"
    ):
        load_backbone(f"open_clip:{model}")


@pytest.mark.parametrize("odd", [{"attentional_pool": True}, {"qk_norm": True}, {"pool_type": "none"}])
def test_a_tower_with_odd_parts_is_refused(tmp_path, odd):
    (tmp_path / "odd.json").write_text(json.dumps({**CONFIG, "vision_cfg": {**VISION, **odd}}))
    open_clip.add_model_config(tmp_path / "odd.json")
    with pytest.raises(BackboneError, match=rf"open_clip:odd \({next(iter(odd))}="):
        load_backbone("open_clip:odd", weights=tmp_path / "any.safetensors")


def test_unknown_names_and_tags_get_a_suggestion():
    with pytest.raises(BackboneError, match=r"ViT-B-61 is not a model of open_clip .*did you mean ViT-B-16\?"):
        load_backbone("open_clip:ViT-B-61")
    with pytest.raises(BackboneError, match=r"hf-hub:a/b is not a model of open_clip .*supported"):
        load_backbone("open_clip:hf-hub:a/b")
    with pytest.raises(BackboneError, match=r"no weights 'opneai' of ViT-B-16; did you mean openai\?"):
        load_backbone("open_clip:ViT-B-16/opneai")
    with pytest.raises(BackboneError, match=r"no weights 'zzz' of ViT-B-16; its tags are openai, laion400m_e31"):
        load_backbone("open_clip:ViT-B-16/zzz")
    with pytest.raises(BackboneError, match=r"does not say which weights: add a tag \(openai, .*backbone\.weights"):
        load_backbone("open_clip:ViT-B-16")
    with pytest.raises(BackboneError, match=r"did you mean open_clip\?"):
        load_backbone("openclip:ViT-B-16/openai")


PIXELS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "resize_mode": "squash"}


def test_a_tag_says_the_activation_the_pixels_and_the_place(monkeypatch, tmp_path, small):
    from open_clip.pretrained import _PRETRAINED

    published = {"quick": {**PIXELS, "hf_hub": "someone/small/", "quick_gelu": True}}
    monkeypatch.setitem(_PRETRAINED, "small", published)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *words: asked.append(words) or str(small[2]))
    backbone = load_backbone("open_clip:small/quick")
    assert asked == [("someone/small", "open_clip_model.safetensors")] and backbone.name == "open_clip:small/quick"
    quick, _, _ = stored(tmp_path, name="small-quick", quick_gelu=True)
    quick.load_state_dict(small[0].state_dict())
    torch.testing.assert_close(
        backbone.project(feature(backbone, views())), quick.encode_image(views()), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(backbone.class_prototypes(CLASSES), texts(quick), rtol=1e-4, atol=1e-5)
    pixels = backbone.preprocess
    assert (pixels.mean, pixels.std, pixels.size) == (PIXELS["mean"], PIXELS["std"], 32)
    assert pixels.square and pixels.interpolation == "bilinear" and pixels.crop_ratio == 1
    # A local file under the tag is the tag's; without a tag the model's config says the activation.
    assert load_backbone("open_clip:small/quick", weights=small[2]).fingerprint == backbone.fingerprint
    assert load_backbone("open_clip:small", weights=small[2]).fingerprint != backbone.fingerprint
    published["quick"]["hf_hub"] = "someone/small/own.safetensors"
    load_backbone("open_clip:small/quick")
    assert asked[-1] == ("someone/small", "own.safetensors")


def test_pixels_without_a_tag_are_clips_or_those_of_the_models_first_tag(small, clip, monkeypatch):
    from open_clip.pretrained import _PRETRAINED

    pixels = clip.preprocess
    assert pixels.mean == open_clip.OPENAI_DATASET_MEAN and pixels.std == open_clip.OPENAI_DATASET_STD
    assert not pixels.square and pixels.interpolation == "bicubic" and pixels.crop_ratio == 1
    monkeypatch.setitem(_PRETRAINED, "small", {"first": PIXELS})
    pixels = load_backbone("open_clip:small", weights=small[2]).preprocess
    assert pixels.mean == PIXELS["mean"] and pixels.square


def test_pickles_are_refused_and_a_failed_download_is_told(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from open_clip.pretrained import _PRETRAINED

    def fails_with(error):
        def download(*words):
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    fails_with(EntryNotFoundError.__new__(EntryNotFoundError))
    with pytest.raises(BackboneError, match=r"has no open_clip_model\.safetensors, and pickles are not read: convert"):
        load_backbone("open_clip:ViT-B-16/openai")
    fails_with(LocalEntryNotFoundError.__new__(LocalEntryNotFoundError))
    with pytest.raises(BackboneError, match=r"open_clip:ViT-B-16/openai could not be downloaded .*open_clip's key"):
        load_backbone("open_clip:ViT-B-16/openai")
    monkeypatch.setitem(_PRETRAINED["ViT-B-16"], "pickled", {"hf_hub": "someone/small/pytorch_model.bin"})
    with pytest.raises(BackboneError, match=r"someone/small has no weights but pytorch_model\.bin, and pickles"):
        load_backbone("open_clip:ViT-B-16/pickled")


# Towers of today: timm's rotary ones, and SigLIP 2's, with the text towers that open_clip has for them.

PE = {
    "embed_dim": 192,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 384,
        "timm_model_name": "vit_pe_core_tiny_patch16_384",
        "timm_pool": "map",
        "timm_proj": None,
    },
    "text_cfg": {**TEXT, "context_length": 32, "norm_kwargs": {"eps": 1e-5}},
}
EVA = {
    "embed_dim": 48,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_pool": "token",
        "timm_proj": None,
    },
    "text_cfg": TEXT,
}
SIGLIP2 = {
    "embed_dim": 96,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        **TEXT,
        "context_length": 64,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}


@pytest.mark.parametrize("family", ["PE", "EVA", "SIGLIP2"])
def test_towers_of_today_and_their_texts(tmp_path, family):
    config = {"PE": PE, "EVA": EVA, "SIGLIP2": SIGLIP2}[family]
    # A name with SigLIP in it would have open_clip download that tokenizer.
    model, name, path = stored(tmp_path, config, name=f"today-{config['embed_dim']}")
    size = config["vision_cfg"]["image_size"]
    if family != "SIGLIP2":  # theirs has a bias, which is zero in what is published
        tensors = load_file(path)
        tensors["visual.trunk.head.bias"].zero_()
        model.visual.trunk.head.bias.zero_()
        save_file(tensors, path)
    backbone = load_backbone(f"open_clip:{name}", weights=path)
    assert isinstance(backbone, EvaViT) == (family != "SIGLIP2") and backbone.joint_width == config["embed_dim"]
    found, expected = backbone.project(feature(backbone, views(1, size))), model.encode_image(views(1, size))
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-4
    tokens, prompt = backbone.embed(views(1, size)), torch.randn(3, backbone.width)
    slow = plain_block(backbone, 0, tokens, prompt)
    torch.testing.assert_close(backbone.block(0, tokens, prompt), slow, rtol=1e-4, atol=1e-4)
    tokenizer = open_clip.get_tokenizer(name)
    rows = [F.normalize(model.encode_text(tokenizer([f"a photo of a {c}"]))[0], dim=0) for c in CLASSES]
    torch.testing.assert_close(backbone.class_prototypes(CLASSES), torch.stack(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", ["PE-Core-T-16-384", "ViT-B-16-SigLIP2", "EVA02-B-16"])
def test_published_text_towers_fit(model, tmp_path):
    """Of the real configs, with random weights by open_clip's own names; a tokenizer of another library is left out."""
    config = open_clip.get_model_config(model)
    text = {**config["text_cfg"], "layers": 1, "vocab_size": 64}
    built = open_clip.model.CustomTextCLIP(config["embed_dim"], {"layers": 1, "width": 64, "patch_size": 32}, text)
    tensors = {f"text.{key}": value.contiguous() for key, value in built.text.state_dict().items()}
    save_file(tensors, tmp_path / "w.safetensors")
    tower = clip_text.TextTower(
        f"open_clip:{model}", model, {**config, "text_cfg": text, "quick_gelu": False}, tmp_path / "w.safetensors"
    )._tower()
    tokens = torch.ones(2, text["context_length"], dtype=torch.long)
    torch.testing.assert_close(tower(tokens), built.eval().encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_the_perception_encoder_of_open_clip_is_rotary():
    backbone = random_backbone("open_clip:PE-Core-T-16-384/meta", image_size=64)
    assert isinstance(backbone, EvaViT) and backbone.projection is not None
    assert (backbone.projection.shape, backbone.preprocess.size, backbone.reads) == ((192, 512), 64, None)
