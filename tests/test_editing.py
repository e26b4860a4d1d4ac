"""`lpt edit`: what changes in a prompt file, what does not, and what is refused."""

import json
import shutil

import pytest
import torch

from lpt.engine.query import fit_query_map, most_chosen
from lpt.errors import LptError
from lpt.files import read_tensors
from lpt.prompt_file import read_prompt
from lpt.serve.editing import edit_prompt
from lpt.serve.evaluating import load_task_of
from lpt.serve.opening import open_prompt
from tests.support.command_line import lpt


@pytest.fixture(scope="module")
def prompt(finished):
    return finished / "prompt.safetensors"


@pytest.fixture(scope="module")
def edited(prompt, tmp_path_factory):
    """(prompt file, what was said, header) by query."""
    folder, results = tmp_path_factory.mktemp("edited"), {}
    for query in ("early", "none"):
        said = []
        header = edit_prompt(prompt, folder / f"{query}.safetensors", {"method": {"query": query}}, say=said.append)
        results[query] = folder / f"{query}.safetensors", said, header
    return results


@pytest.fixture(scope="module")
def views(prompt):
    model, header = open_prompt(prompt)
    pixels = load_task_of(header, {}).test.take(torch.arange(32))
    return model, model.backbone.preprocess.test(pixels, dtype=model.backbone.dtype)


def test_everything_else_stays_to_the_bit(prompt, edited):
    before, tensors = read_tensors(prompt)
    kept = {"early": ["pool.tokens", "pool.keys", "pool.centre"], "none": ["pool.centre"]}
    for query, (path, _, header) in edited.items():
        after, now = read_tensors(path)
        for name in ("shared.tokens", "head.weight", "task.means", "task.scores", *kept[query]):
            assert torch.equal(now[name], tensors[name])
        old, new = json.loads(before["lpt"]), json.loads(after["lpt"])
        changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        assert changed == {"query", "settings", "metrics", "edited", "sha256"}
        assert new["settings"] == {**old["settings"], "query": query} and new["metrics"] == {}
        assert read_prompt(path).header.query == header.query == query


@torch.no_grad()
def test_early_holds_the_map_of_the_training_images(prompt, edited, views):
    path, said, header = edited["early"]
    model, pixels = views
    query_map = fit_query_map(model, load_task_of(header, {}).train)
    tensors = read_tensors(path)[1]
    assert "query_head.weight" not in tensors
    torch.testing.assert_close(tensors["pool.query_map"].float(), query_map, rtol=1e-3, atol=1e-3)
    early, _ = open_prompt(path)
    tokens = model.prefix(pixels)
    ids = model.match(early.pool.early_query(tokens, 1))[1]
    output = early(pixels)
    assert torch.equal(output.ids, ids)
    assert torch.equal(output.logits, model.head(model.tail_feature(tokens, ids)))
    agreed = (ids.sort(1).values == model(pixels).ids.sort(1).values).all(1).float().mean()
    share = header.edited["agreement"]
    assert abs(agreed - share) < 0.3 and share > 0.2  # of 10 sets by chance it would be a tenth
    assert f"{share:.0%} of the training images" in said[-1]


@torch.no_grad()
def test_none_holds_the_prompts_that_most_training_images_choose(prompt, edited, views):
    path, said, header = edited["none"]
    model, pixels = views
    ids, share = most_chosen(model, load_task_of(header, {}).train)
    assert header.edited["group_prompts"] == ids.tolist() and header.edited["chosen_by"] == share
    old, new = read_tensors(prompt)[1], read_tensors(path)[1]
    assert torch.equal(new["pool.tokens"], old["pool.tokens"][ids])
    assert torch.equal(new["pool.keys"], old["pool.keys"][ids])
    fixed, _ = open_prompt(path)
    constant = model.head(model.tail_feature(model.prefix(pixels), ids.expand(len(pixels), -1)))
    torch.testing.assert_close(fixed(pixels).logits, constant, rtol=1e-5, atol=1e-5)
    assert path.stat().st_size < prompt.stat().st_size and " and ".join(map(str, ids.tolist())) in said[-1]


def test_early_can_still_become_none(edited, tmp_path):
    again = edit_prompt(edited["early"][0], tmp_path / "p.safetensors", {"method": {"query": "none"}})
    assert again.query == "none"
    assert "pool.query_map" not in read_tensors(tmp_path / "p.safetensors")[1]


def test_by_command_line(prompt, tmp_path, capsys):
    words = ("edit", prompt, "method.query=none", "--out", tmp_path / "none.safetensors")
    code, said, err = lpt(capsys, *words)
    assert code == 0 and "bytes before" not in err and "none.safetensors" in said, err
    code, _, err = lpt(capsys, *words)
    assert code == 2 and "is there already: give another name" in err
    assert lpt(capsys, "evaluate", tmp_path / "none.safetensors")[0] == 0
    assert "query" in lpt(capsys, "inspect", tmp_path / "none.safetensors")[1]


def test_what_cannot_be_edited_is_named(prompt, edited, tmp_path):
    out = tmp_path / "p.safetensors"
    for source, settings, says in (
        (prompt, {"method": {"lr": 0.1}}, r"method\.lr: this cannot be edited, .* method\.query can"),
        (prompt, {"method": {"query": "late"}}, r"method\.query: got 'late'"),
        (prompt, {}, r"nothing to edit: give method\.query=none or"),
        (prompt, {"method": {"query": "none"}, "report": {"x": 1}}, "report: there is no such section"),
        (prompt, {"method": {"query": "full"}}, "has method.query=full already"),
        (edited["early"][0], {"method": {"query": "full"}}, "not what full needs any more: edit the file that it was"),
        (edited["none"][0], {"method": {"query": "early"}}, "not what early needs any more"),
    ):
        with pytest.raises(LptError, match=says):
            edit_prompt(source, out, settings)
        assert not out.exists()
    copy = tmp_path / "copy.safetensors"
    shutil.copy(prompt, copy)
    (tmp_path / "link.safetensors").symlink_to(copy)
    for same in (copy, tmp_path / "link.safetensors"):
        with pytest.raises(LptError, match="is the prompt file itself: give another name"):
            edit_prompt(copy, same, {"method": {"query": "none"}})
    assert copy.read_bytes() == prompt.read_bytes()


def test_a_file_without_group_prompts_is_refused(tmp_path):
    import lpt as package
    from tests.support.toy import prompted, small_backbone, toy_task

    path = tmp_path / "p.safetensors"
    model = prompted(small_backbone(), num_classes=4, pool=False)
    package.save_prompt(path, model, method="fine_tune", counts=toy_task().counts)
    with pytest.raises(LptError, match=r"\(fine_tune\) has no group prompts: method\.query is of LPT with a pool"):
        edit_prompt(path, tmp_path / "q.safetensors", {"method": {"query": "none"}})


def test_other_images_are_said(prompt, tmp_path):
    said, settings = [], {"method": {"query": "none"}, "data": {"seed": 5}}
    edit_prompt(prompt, tmp_path / "p.safetensors", settings, say=said.append)
    assert said[0].startswith("warning: these are not the images that")
