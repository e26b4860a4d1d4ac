"""Soups: averages by a slow loop, LoRA by its product, what is refused by name, and what the file says of itself."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from lpt.config import resolve
from lpt.data.image_hashes import packed
from lpt.errors import PromptFileError
from lpt.model.adapters import with_adapter
from lpt.model.heads import Calibration, LinearHead
from lpt.prompt_file import load_prompt, save_prompt
from lpt.prompt_header import read_header
from lpt.serve.soup import mean_of_rows, soup
from tests.support.command_line import lpt
from tests.support.toy import images, prompted, small_backbone, toy_task
from tests.support.training import bind, recipe_of

COUNTS = toy_task().counts


def stored(path, seed, *, kind=None, rank=2, pool=False, linear=False, size=0.1, storage="fp32", **facts):
    """A prompt file whose numbers are a common start and noise of `seed`."""
    backbone = small_backbone(depth=2)
    if kind:
        backbone = with_adapter(backbone, kind, bottleneck=3, rank=rank)
    model = prompted(backbone, num_classes=4, pool=pool)
    if linear:
        model.head = LinearHead(num_classes=4, width=backbone.feature_width)
        model.calibration = Calibration(4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.learned_state().values():
            value.add_(size * torch.randn(value.shape, generator=generator))
    facts = {"method": "fine_tune", "counts": COUNTS, "start_seed": 0, "metrics": {"few": 0.5}, **facts}
    save_prompt(path, model.only_train().eval(), storage=storage, **facts)
    return path


@pytest.mark.parametrize("what", [{"pool": True}, {"kind": "adaptformer"}, {"linear": True}, {"kind": "norm"}])
def test_numbers_are_averaged_in_the_order_of_the_files_and_rows_of_cosines_by_direction(tmp_path, what):
    paths = [stored(tmp_path / f"{i}.safetensors", i, **what) for i in range(3)]
    soup(paths, tmp_path / "soup.safetensors", weights=[3, 1, 2])
    parts, found = [load_file(path) for path in paths], load_file(tmp_path / "soup.safetensors")
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        if name == "head.weight" and "linear" not in what:
            for k in range(4):
                rows = [part[name][k].double() for part in parts]
                direction = sum(w / 6 * row / row.norm() for w, row in zip((3, 1, 2), rows, strict=True))
                length = sum(w / 6 * row.norm() for w, row in zip((3, 1, 2), rows, strict=True))
                torch.testing.assert_close(value[k].double(), length * direction / direction.norm())
        else:
            torch.testing.assert_close(value, (3 * parts[0][name] + parts[1][name] + 2 * parts[2][name]) / 6)
    load_prompt(tmp_path / "soup.safetensors", small_backbone(depth=2))


def update(path, block=0):
    """What a file's LoRA adds to a packed projection [3D D], by its definition."""
    header, tensors = read_header(path)[0], load_file(path)
    prefix, width = f"backbone.vit.blocks.{block}.attn.qkv.", 32
    if header.inside.kind == "lora":
        return 2.0 * tensors[f"{prefix}lora_B.default.weight"] @ tensors[f"{prefix}lora_A.default.weight"]
    added = torch.zeros(3 * width, width)
    for first, part in ((0, "q"), (2 * width, "v")):
        product = tensors[f"{prefix}lora_B.{part}"] @ tensors[f"{prefix}lora_A.{part}"]
        added[first : first + width] = product / header.inside.rank
    return added


@pytest.mark.parametrize("kind", ["lora", "lora_qv"])
def test_lora_is_averaged_by_its_product_also_of_other_ranks(tmp_path, kind):
    paths = [stored(tmp_path / f"{r}.safetensors", r, kind=kind, rank=r) for r in (2, 3)]
    header = soup(paths, tmp_path / "soup.safetensors", weights=[1, 3])
    expected = [0.25 * update(paths[0], b) + 0.75 * update(paths[1], b) for b in range(2)]
    for b in range(2):
        torch.testing.assert_close(update(tmp_path / "soup.safetensors", b), expected[b], rtol=1e-4, atol=1e-6)
    assert header.inside.rank == 5
    # The forward of the file is that of weights with the product in them.
    model, merged = load_prompt(tmp_path / "soup.safetensors", small_backbone(depth=2)), small_backbone(depth=2)
    with torch.no_grad():
        for block, added in zip(merged.vit.blocks, expected, strict=True):
            block.attn.qkv.weight += added
        views = images(merged)
        model.shared = None
        torch.testing.assert_close(model(views).feature, features_of(merged, views), rtol=1e-3, atol=1e-4)


def features_of(backbone, views):
    tokens = backbone.embed(views)
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens)
    return backbone.pool(tokens)


def test_a_rank_that_is_no_low_one_is_refused(tmp_path):
    paths = [stored(tmp_path / f"{i}.safetensors", i, kind="lora_qv", rank=9) for i in range(2)]
    with pytest.raises(PromptFileError, match=r"rank 18, the sum of 9, 9, and 16 is the most"):
        soup(paths, tmp_path / "soup.safetensors")
    assert not (tmp_path / "soup.safetensors").exists()


@pytest.mark.parametrize("kind", [None, "adaptformer", "lora", "lora_qv"])
def test_a_soup_of_equal_files_answers_as_each_does(tmp_path, kind):
    path = stored(tmp_path / "a.safetensors", 1, kind=kind)
    same = stored(tmp_path / "b.safetensors", 1, kind=kind)
    soup([path, same], tmp_path / "soup.safetensors")
    views = images(small_backbone(depth=2))
    one, both = (load_prompt(p, small_backbone(depth=2))(views).logits for p in (path, tmp_path / "soup.safetensors"))
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-5)


def test_rows_of_another_length_count_no_more():
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    other = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    one, longer = mean_of_rows([(0.5, rows), (0.5, other)]), mean_of_rows([(0.5, rows), (0.5, 9 * other)])
    torch.testing.assert_close(F.normalize(one, dim=1), F.normalize(longer, dim=1))


def test_the_soup_says_what_it_is_made_of_and_drops_what_was_measured(tmp_path):
    facts = {"settings": {"epochs": 3, "lr": 0.1}, "data": {"name": "toy", "labeled_sha256": "x"}}
    hashes = [packed(torch.tensor(ids).numpy()) for ids in ([5, 7], [7, 9])]
    few = stored(tmp_path / "few.safetensors", 0, **facts, trained_on=hashes[0], storage="fp16")
    facts = {"settings": {"epochs": 3, "lr": 0.2}, "data": {"name": "toy", "labeled_sha256": "y"}}
    many = stored(tmp_path / "many.safetensors", 1, **facts, trained_on=hashes[1], counts=2 * COUNTS, storage="fp16")
    soup([few, many], tmp_path / "soup.safetensors", weights=[1, 3])
    header, arrays = read_header(tmp_path / "soup.safetensors")
    assert header.metrics == {} and header.settings == {"epochs": 3}
    assert header.data["name"] == "toy" and "labeled_sha256" not in header.data
    assert header.counts == (2 * COUNTS).tolist() and header.trained_on == packed(torch.tensor([5, 7, 9]).numpy())
    made = header.model_extra["soup"]["of"]
    assert [(one["file"], one["weight"]) for one in made] == [("few.safetensors", 0.25), ("many.safetensors", 0.75)]
    assert all(len(one["sha256"]) == 64 for one in made) and {str(value.dtype) for value in arrays.values()} == {
        "float16"
    }


def test_files_that_did_not_start_from_one_place_are_refused_by_name(tmp_path):
    first = stored(tmp_path / "a.safetensors", 0)
    other_start = stored(tmp_path / "b.safetensors", 0, start_seed=1)
    other_method = stored(tmp_path / "c.safetensors", 0, method="lpt")
    tuned = stored(tmp_path / "d.safetensors", 0, kind="lora")
    pooled = stored(tmp_path / "e.safetensors", 0, pool=True)
    for path, said in {
        other_start: r"seed of the start \(0 and 1\): a soup is of files from one start",
        other_method: r"differ in method \(fine_tune and lpt\)",
        tuned: r"kind of trainable parameters inside the backbone \(None and lora\)",
        pooled: "differ in topk",
    }.items():
        with pytest.raises(PromptFileError, match=said) as error:
            soup([first, path], tmp_path / "soup.safetensors")
        assert str(first) in str(error.value) and str(path) in str(error.value)


def test_mistakes_are_named(tmp_path, capsys):
    paths = [stored(tmp_path / f"{i}.safetensors", i) for i in range(2)]
    out = tmp_path / "soup.safetensors"
    for words, said in {
        (paths[0],): "a soup is made of 2 to 100 prompt files: 1 given",
        (*paths, "--weights", "1"): "--weights: 1 numbers for 2 files",
        (*paths, "--weights", "1,-1"): "--weights 1, -1: give positive numbers",
        (*paths, "--weights", "a,b"): "--weights a,b: give numbers",
    }.items():
        code, _, aside = lpt(capsys, "soup", *words, "--out", out)
        assert code == 2 and said in aside and not out.exists()
    assert "is one of the files" in lpt(capsys, "soup", *paths, "--out", paths[1])[2]
    code, told, _ = lpt(capsys, "soup", *paths, "--out", out)
    assert code == 0 and "0.500 x 0.safetensors" in told and f"{out}  {out.stat().st_size:,} bytes" in told


def test_runs_with_one_start_seed_start_alike_and_go_on_apart(tmp_path):
    task, backbone = toy_task(), small_backbone(depth=2)
    settings = {"tuning": "vpt_deep", "epochs": 1, "head_init": "random"}
    starts = [
        recipe_of("fine_tune", task, backbone, bind(task, backbone, seed=seed, start_seed=start), **settings).model
        for seed, start in ((1, 5), (2, 5), (5, None), (1, None))
    ]
    one, same, by_seed, other = ({k: v.clone() for k, v in model.learned_state().items()} for model in starts)
    assert all(torch.equal(one[k], same[k]) and torch.equal(one[k], by_seed[k]) for k in one)
    assert not torch.equal(one["shared.tokens"], other["shared.tokens"])
    raw = {"backbone": {"name": "nano"}, "data": {"name": "digits-lt"}, "method": {"name": "knn"}}
    assert resolve(raw).run_hash("s", "b") == "e0e2a0cfcd18d553"  # of the version before it
    assert resolve(raw, ["train.start_seed=0"]).run_hash("s", "b") != "e0e2a0cfcd18d553"


def test_a_run_tells_its_start(finished):
    with safe_open(finished / "prompt.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lpt"])["start_seed"] == 0
