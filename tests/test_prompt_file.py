import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpt.errors import DiskError, PromptFileError
from lpt.model.adapters import with_adapter
from lpt.model.backbones import timm_vit
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import NeighbourHead
from lpt.prompt_file import beyond_fp16, load_prompt, read_prompt, save_prompt
from tests.support.toy import images, prompted, small_backbone, toy_task


@pytest.fixture
def saved(tmp_path):
    backbone = small_backbone()
    model = prompted(backbone, num_classes=4).only_train().eval()
    model.round_to(torch.float16)
    path = tmp_path / "p.safetensors"
    save_prompt(path, model, method="lpt", counts=toy_task().counts, metrics={"few": 0.5, "many": None})
    return path, model


def rewrite(path, change=None, header=None, raw=None):
    """The same file with other tensors or another header."""
    tensors = load_file(path)
    text = json.dumps(read_prompt(path).header.model_dump(mode="json") | {"format": 1} | (header or {}))
    if change:
        change(tensors)
    save_file(tensors, path, metadata={"lpt": raw or text})


def test_the_spelling_of_lpt_0_1_is_read(saved):
    """The bytes stay as they are; what a file says of its labeled images is known under the name of now."""
    path, _ = saved
    before = {"data": {"labelled_sha256": "x"}, "settings": {"then": {"name": "ulfine", "la_on": "labelled"}, "lr": 1}}
    rewrite(path, header=before)
    header = read_prompt(path).header
    assert header.data == {"labeled_sha256": "x"}
    assert header.settings == {"then": {"name": "ulfine", "la_on": "labeled"}, "lr": 1}


@pytest.mark.parametrize("pool", [False, True])
def test_a_file_reloads_to_the_same_bits(tmp_path, pool):
    backbone = small_backbone()
    model = prompted(backbone, num_classes=4, pool=pool).only_train().eval()
    model.round_to(torch.float16)
    save_prompt(tmp_path / "p.safetensors", model, method="lpt", counts=toy_task().counts)
    again = load_prompt(tmp_path / "p.safetensors", small_backbone())
    views = images(backbone)
    assert torch.equal(again(views).logits, model(views).logits)
    assert torch.equal(again.probabilities(again(views).logits), model.probabilities(model(views).logits))


@pytest.mark.parametrize("kind", ["lora", "lora_qv", "adaptformer"])
def test_what_is_learned_inside_a_backbone_reloads_to_the_same_bits(tmp_path, kind):
    backbone = with_adapter(small_backbone(), kind, bottleneck=3, rank=3)
    model = prompted(backbone, num_classes=4, pool=False).only_train().eval()
    with torch.no_grad():
        for name, value in model.learned_state().items():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    model.round_to(torch.float16)
    path = tmp_path / "p.safetensors"
    save_prompt(path, model, method="fine_tune", counts=toy_task().counts)
    again, views = load_prompt(path, small_backbone()), images(backbone)
    assert again.backbone.recipe["kind"] == kind and torch.equal(again(views).logits, model(views).logits)
    rewrite(path, header={"inside": {"kind": kind, "bottleneck": 4096, "rank": 4096}})
    with pytest.raises(PromptFileError, match=f"its {kind} is not of the size 4096 that it says"):
        load_prompt(path, small_backbone())


def test_fp32_storage_keeps_every_bit_without_rounding(tmp_path):
    backbone = small_backbone()
    model = prompted(backbone, num_classes=4).only_train().eval()
    save_prompt(tmp_path / "p.safetensors", model, method="lpt", counts=toy_task().counts, storage="fp32")
    views = images(backbone)
    assert torch.equal(load_prompt(tmp_path / "p.safetensors", backbone)(views).logits, model(views).logits)


def test_the_backbone_is_never_in_the_file(saved):
    path, model = saved
    assert set(load_file(path)) == {"shared.tokens", "pool.tokens", "pool.keys", "pool.centre", "head.weight"}
    header = read_prompt(path).header
    assert header.format == 2 and header.classes == ["0", "1", "2", "3"]
    assert header.counts == [30, 12, 5, 2] and header.backbone.fingerprint == model.backbone.fingerprint


def test_the_header_keeps_its_keys_and_their_order(saved):
    with safe_open(saved[0], framework="pt") as file:
        header = json.loads(file.metadata()["lpt"])
    assert list(header) == [
        *("format", "method", "settings", "backbone", "preprocess", "classes", "counts", "scale", "topk", "first"),
        *("inside", "fused", "space", "neighbours", "temperature", "precision", "data", "metrics", "versions"),
        "sha256",
    ]
    assert header["first"] == saved[1].pool.prefix_blocks == 2


def test_another_backbone_is_refused_by_name_and_fingerprint(saved):
    path, model = saved
    other = small_backbone(seed=1)
    with pytest.raises(PromptFileError) as error:
        load_prompt(path, other)
    for said in (model.backbone.name, model.backbone.fingerprint, other.name, other.fingerprint):
        assert said in str(error.value)


def test_another_image_size_is_refused(saved):
    with pytest.raises(PromptFileError, match=r"backbone\.image_size=32"):
        load_prompt(saved[0], small_backbone(size=48))


def test_truncated_empty_foreign_and_missing_files_are_refused(saved, tmp_path):
    path, _ = saved
    whole = path.read_bytes()
    for cut in (0, 4, 9, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(PromptFileError, match="damaged"):
            read_prompt(path)
    path.write_bytes(b"PK\x03\x04 a pickle in a zip" * 10)
    with pytest.raises(PromptFileError, match="damaged"):
        read_prompt(path)
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(PromptFileError, match="not a prompt file of lpt"):
        read_prompt(tmp_path / "foreign.safetensors")
    with pytest.raises(PromptFileError, match="does not exist"):
        read_prompt(tmp_path / "nowhere.safetensors")


def test_a_newer_format_is_refused(saved):
    rewrite(saved[0], header={"format": 4})
    with pytest.raises(PromptFileError, match="format 4, this lpt reads up to 3"):
        read_prompt(saved[0])


def test_fields_of_a_later_minor_version_are_kept(saved):
    rewrite(saved[0], header={"licence": "CC0"})
    assert read_prompt(saved[0]).header.model_dump()["licence"] == "CC0"


@pytest.mark.parametrize(
    ("change", "header", "says"),
    [
        (lambda t: t.pop("head.weight"), None, "head.weight is missing"),
        (lambda t: t.pop("pool.keys"), None, "a pool needs tokens, keys and centre"),
        (lambda t: t.update(extra=torch.zeros(1)), None, "unknown tensors extra"),
        (lambda t: t.update({"head.weight": t["head.weight"][:2].clone()}), None, "2 rows for 4 classes"),
        (lambda t: t["shared.tokens"].fill_(float("nan")), None, "not finite"),
        (lambda t: t.update({"pool.keys": t["pool.keys"].long()}), None, "stored as torch.int64"),
        (lambda t: t.update({"pool.keys": t["pool.keys"][0].clone()}), None, "pool.keys has shape"),
        (lambda t: t.update({"pool.keys": t["pool.keys"][:3].clone()}), None, None),
        (lambda t: t.update({"shared.tokens": t["shared.tokens"][:2].clone()}), None, None),
        (None, {"topk": 9}, "topk 9 does not fit"),
        (None, {"first": 40}, None),
        (None, {"counts": [1]}, "1 counts for 4 classes"),
        (None, {"classes": "abc"}, "damaged header: classes"),
        (None, {"scale": float("inf")}, "damaged header: it holds Infinity"),
        (None, {"scale": 1e308}, "damaged header: scale"),
        (None, {"temperature": 5e-324}, "damaged header: temperature"),
        (None, {"counts": [-1, 1, 1, 1]}, r"damaged header: counts\.0"),
        (None, {"counts": [10**18] * 4}, r"damaged header: counts\.0"),
        (None, {"metrics": {"nll": "x"}}, r"damaged header: metrics\.nll"),
        (lambda t: t["head.weight"].fill_(60_000).mul_(1000), None, "not finite"),
        (lambda t: t.update({"head.weight": torch.full((4, 32), 1e30)}), None, "numbers above 1e"),
        (lambda t: t.update({"pool.keys": t["pool.keys"][:, :9].clone()}), None, "needs a width of 32"),
        (lambda t: t.update({"a\nb" * 200: torch.zeros(1)}), None, r"unknown tensors a b.*\.\.\.$"),
        (None, {"preprocess": {"size": "huge"}}, "damaged header: preprocess.size"),
        (None, {"preprocess": {"size": 33}}, "makes no sense"),
    ],
)
def test_a_damaged_file_is_refused_before_it_is_believed(saved, change, header, says):
    path, model = saved
    rewrite(path, change, header)
    with pytest.raises(ValueError, match=says):
        load_prompt(path, model.backbone)


@pytest.mark.parametrize("raw", ["{", "[]", '{"format": "1"}', "null", '{"a": 1}', "[" * 100_000, '{"format": 0}'])
def test_a_header_that_is_no_header_is_refused(saved, raw):
    rewrite(saved[0], raw=raw)
    with pytest.raises(PromptFileError):
        read_prompt(saved[0])


def test_many_class_names_make_nothing_large(tmp_path):
    """A bank of neighbours needs no head: a million names in a header must not make one."""
    backbone, bank = small_backbone(), torch.eye(32)
    model = PromptedClassifier(
        backbone, NeighbourHead(bank=bank, counts=torch.tensor([30, 2]), k=3), classes=("a", "b")
    )
    save_prompt(tmp_path / "p.safetensors", model.eval(), method="knn", counts=torch.tensor([30, 2]))
    counts = [30, 2] + [0] * 10_000
    rewrite(tmp_path / "p.safetensors", header={"classes": [f"a{k}" for k in range(len(counts))], "counts": counts})
    assert not hasattr(load_prompt(tmp_path / "p.safetensors", backbone).head, "weight")


def test_any_flipped_bit_is_refused_or_changes_nothing(saved):
    path, _ = saved
    whole, (header, tensors) = path.read_bytes(), read_prompt(path)
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_prompt(path)
        except PromptFileError:
            continue
        assert found.tensors.keys() == tensors.keys() and found.header == header
        assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())


def test_a_file_without_a_seal_is_an_older_one(saved):
    path, _ = saved
    rewrite(path, header={"scale": 3.5})
    assert read_prompt(path).header.scale == 3.5
    rewrite(path, header={"scale": 3.5, "sha256": "0" * 64})
    with pytest.raises(PromptFileError, match=r"does not hold what was written \(SHA-256\)"):
        read_prompt(path)


def test_a_file_of_today_needs_its_seal(saved):
    """A bit may flip in the very name of the seal."""
    path, _ = saved
    path.write_bytes(path.read_bytes().replace(b"sha256", b"sha257"))
    with pytest.raises(PromptFileError, match=r"does not hold what was written \(SHA-256\)"):
        read_prompt(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    model = prompted(small_backbone(), num_classes=4).only_train().eval()
    model.head.weight.data[0, 0] = 7e4
    assert beyond_fp16(model) == "head.weight"
    with pytest.raises(PromptFileError, match=r"fp16 head\.weight holds numbers that are not finite .*storage=fp32"):
        save_prompt(tmp_path / "p.safetensors", model, method="lpt", counts=toy_task().counts)
    assert not list(tmp_path.iterdir())
    save_prompt(tmp_path / "p.safetensors", model, method="lpt", counts=toy_task().counts, storage="fp32")
    assert read_prompt(tmp_path / "p.safetensors").tensors["head.weight"].max() == 7e4


def test_writing_is_all_or_nothing(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DiskError, match=r"cannot be written \(No space left on device\); what was there before"):
        save_prompt(path, model, method="lpt", counts=toy_task().counts)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_real_backbone_has_its_known_fingerprint(deit_tiny_weights):
    backbone = timm_vit.load("deit_tiny_patch16_224", weights=deit_tiny_weights, image_size=112)
    assert backbone.fingerprint == timm_vit.load("deit_tiny_patch16_224", weights=deit_tiny_weights).fingerprint
    assert (backbone.depth, backbone.width, backbone.prefix, backbone.reads) == (12, 192, 1, 1)


# Heads in the joint space.


@pytest.fixture
def fused(clip, tmp_path):
    from tests.support.semi import semi

    settings = {"steps": 2, "rounds": 1, "lr": 0.05, "adapter_dim": 3, "orth_on": "learnable_text", "eta": 0.3}
    model = semi("ulfine", clip, tau=0.4, fusion="zscore", learn_scales=True, **settings)[0].only_train().eval()
    model.round_to(torch.float16)
    save_prompt(tmp_path / "fused.safetensors", model, method="ulfine", counts=toy_task().counts)
    return tmp_path / "fused.safetensors", model


def test_a_fused_head_reloads_to_the_same_bits_with_all_its_state(fused, tower):
    from lpt.model.backbones import load_backbone

    path, model = fused
    again = load_prompt(path, load_backbone(tower[2], weights=tower[3]))
    views = images(model.backbone)
    assert torch.equal(again(views).logits, model(views).logits)
    for one, two in zip(again.head.both(again.feature(views)), model.head.both(model.feature(views)), strict=True):
        assert torch.equal(one, two)
    assert again.learned_state().keys() == model.learned_state().keys()
    assert all(torch.equal(value, again.learned_state()[name]) for name, value in model.learned_state().items())
    assert again.head.seen.any() and (again.head.fusion, again.head.eta, again.head.fuse) == ("zscore", 0.3, True)
    header = read_prompt(path).header
    assert header.space == "joint" and header.scale == 1 and header.inside.bottleneck == 3
    assert torch.equal(again.probabilities(views.new_ones(1, 4) * torch.arange(4)), torch.arange(4.0).softmax(0)[None])


@pytest.mark.parametrize("changes", [{"proto_space": "features"}, {"tuning": "vpt_deep", "prompt_length": 2}])
def test_other_fused_models_reload_too(clip, tmp_path, changes):
    from tests.support.semi import semi

    model = semi("ulfine", clip, steps=1, rounds=1, fusion="daso", fuse_inference=False, **changes)[0].eval()
    model.round_to(torch.float16)
    header = save_prompt(tmp_path / "p.safetensors", model, method="ulfine", counts=toy_task().counts)
    assert header.space == ("features" if "proto_space" in changes else "joint")
    again, views = load_prompt(tmp_path / "p.safetensors", clip), images(clip)
    with torch.no_grad():
        assert torch.equal(again(views).logits, model(views).logits) and not again.head.fuse


def test_a_zero_shot_model_in_the_joint_space_reloads_to_the_same_bits(clip, tmp_path):
    from tests.support.training import recipe_of

    model = recipe_of("zero_shot", toy_task(), clip).model.only_train().eval()
    model.round_to(torch.float16)
    header = save_prompt(tmp_path / "p.safetensors", model, method="zero_shot", counts=toy_task().counts)
    assert header.space == "joint" and load_file(tmp_path / "p.safetensors")["head.weight"].shape == (4, 48)
    again, views = load_prompt(tmp_path / "p.safetensors", clip), images(clip)
    assert torch.equal(again(views).logits, model(views).logits)
    rewrite(tmp_path / "p.safetensors", header={"space": "features"})  # 64 wide
    with pytest.raises(PromptFileError, match=r"head.weight is \[4, 48\], the backbone needs a width of 64"):
        load_prompt(tmp_path / "p.safetensors", clip)
    rewrite(tmp_path / "p.safetensors", header={"space": "elsewhere"})
    with pytest.raises(PromptFileError, match="damaged header: space"):
        load_prompt(tmp_path / "p.safetensors", clip)


def without_state(tensors):
    for name in ("scales", "prototypes", "texts", "visual", "seen", "frequency"):
        del tensors[f"head.{name}"]


@pytest.mark.parametrize(
    ("change", "header", "says"),
    [
        (without_state, None, "do not agree on whether its head is a fused one"),
        (None, {"fused": None}, "do not agree on whether its head is a fused one"),
        (lambda t: t.pop("head.visual"), None, r"the model it describes differ in head\.visual"),
        (lambda t: t.update({"head.seen": t["head.seen"][:3].clone()}), None, r"head\.seen is \[3\]"),
        (lambda t: t.update({"head.texts": t["head.texts"][0].clone()}), None, r"head\.texts has shape"),
        (lambda t: t.update({"head.prototypes": t["head.prototypes"][:, :9].clone()}), None, r"head\.prototypes is"),
        (lambda t: t["head.frequency"].fill_(float("nan")), None, "not finite"),
        (lambda t: t.update({"head.bias": torch.zeros(4)}), None, r"differ in head\.bias"),
        (lambda t: t.update({"head.weight": t["head.weight"][:, :48].clone()}), None, r"head\.weight is \[4, 48\]"),
        (None, {"fused": {"fusion": "scale", "eta": 1.5, "temperature": 1, "fuse": True}}, r"header: fused\.eta"),
        (None, {"fused": {"fusion": "scale", "eta": -0.1, "temperature": 1, "fuse": True}}, r"header: fused\.eta"),
        (None, {"fused": {"fusion": "sum", "eta": 0.5, "temperature": 1, "fuse": True}}, r"header: fused\.fusion"),
        (None, {"fused": {"fusion": "daso", "eta": 0.5, "temperature": 0, "fuse": True}}, r"header: fused\.temper"),
        (None, {"fused": {"fusion": "daso", "eta": 0.5, "temperature": 1}}, r"header: fused\.fuse"),
        (None, {"space": "features"}, r"head\.prototypes is \[4, 48\], the backbone needs \[4, 64\]"),
    ],
)
def test_a_damaged_fused_head_is_refused(fused, clip, change, header, says):
    path, _ = fused
    rewrite(path, change, header)
    with pytest.raises(PromptFileError, match=says):
        load_prompt(path, clip)
