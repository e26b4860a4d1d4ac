"""Prompt files on a Hub that stands on this machine: pushed by the client's own protocol, pulled, and read in place."""

import json

import pytest
import torch

from lpt.errors import PromptFileError
from lpt.files import local_file
from lpt.model.backbones import load_backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.prompt_file import save_prompt
from lpt.prompt_header import read_header
from lpt.serve.sharing import MADE_BY, model_card
from tests.support.hub import TOKEN, Commands, Hub
from tests.support.pictures import fill


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def lpt(hub, tmp_path_factory):
    commands = Commands(hub.url, str(tmp_path_factory.mktemp("home")))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    """A prompt file on nano, with numbers in its header."""
    nano, path = load_backbone("nano"), tmp_path_factory.mktemp("run") / "prompt.safetensors"
    head = CosineHead(num_classes=3, width=nano.feature_width, scale=20)
    model = PromptedClassifier(nano, head, classes=("owl", "bat", "newt"))
    metrics = {"accuracy": 0.71234, "class_accuracy": 0.6, "many": 0.9, "medium": None, "few": 0.3, "ece": 0.02}
    save_prompt(
        path, model, method="class_mean", counts=torch.tensor([100, 9, 4]), metrics=metrics, data={"name": "photos"}
    )
    return path


@pytest.fixture
def repo(hub, prompt):
    """One with this prompt file, and nothing that a test before has left."""
    name = f"me/tasks{len(hub.files)}"
    hub.files[name] = {".gitattributes": b"", "digits.safetensors": prompt.read_bytes()}
    return name


def test_push_uploads_the_file_and_a_card(hub, lpt, prompt, tmp_path):
    hub.requests.clear()
    code, said, wrong = lpt(
        "push", prompt, "me/digits", "--private", "--licence", "apache-2.0", "--name", "d.safetensors"
    )
    assert code == 0, wrong
    assert said.startswith(f"hf://me/digits/d.safetensors  with a card; {hub.url}/me/digits/commit/")
    assert hub.private["me/digits"] and hub.files["me/digits"]["d.safetensors"] == prompt.read_bytes()
    asked = [path for _, path in hub.requests]
    for part in (
        "/api/repos/create",
        "/preupload/main",
        ".git/info/lfs/objects/batch",
        "/lfs/",
        "/verify/",
        "/commit/main",
    ):
        assert any(part in path for path in asked), part
    card, header = hub.files["me/digits"]["README.md"].decode(), read_header(prompt)[0]
    assert card == model_card(header, "me/digits", "d.safetensors", terms="apache-2.0")
    # Again: the repository is there, and the card is one of ours.
    code, said, wrong = lpt("push", prompt, "me/digits")
    assert code == 0 and "with a card" in said and "prompt.safetensors" in hub.files["me/digits"], wrong
    # A card of somebody else's stays.
    hub.files["me/digits"]["README.md"] = b"# Mine"
    code, said, _ = lpt("push", prompt, "me/digits")
    assert code == 0 and "the card there is not lpt's and stays" in said
    assert hub.files["me/digits"]["README.md"] == b"# Mine"
    # From one place to the next.
    code, said, wrong = lpt("push", "hf://me/digits/d.safetensors", "me/copy")
    assert code == 0 and hub.files["me/copy"]["d.safetensors"] == prompt.read_bytes(), wrong


def test_the_card_says_what_the_header_does(prompt):
    header = read_header(prompt)[0]
    card = model_card(header, "me/digits", "d.safetensors")
    assert card.startswith("---\n") and MADE_BY in card and "license:" not in card
    assert f"| {100 * header.metrics['accuracy']:.1f} |" in card and "ECE" in card
    assert "lpt predict hf://me/digits/d.safetensors photo.jpg" in card
    assert f"{sum(header.counts):,} together" in card and ", ".join(header.classes) in card
    assert "under terms that lpt does not know" in card  # nano comes with lpt
    header.backbone.name, header.classes = "timm:vit_small_patch16_dinov3.lvd1689m", ["<b>", "a|b"] * 150
    card = model_card(header, "me/digits", "d.safetensors")
    assert "base_model: timm/vit_small_patch16_dinov3.lvd1689m" in card
    assert "under the licence dinov3" in card and "&lt;b&gt;, a\\|b" in card and "and 100 more" in card


def test_a_file_of_the_hub_is_read_wherever_a_path_is(lpt, repo, prompt, tmp_path):
    photos = fill(tmp_path / "photos", {"a": 2})
    uri, here = f"hf://{repo}/digits.safetensors", {}
    for what in (prompt, uri):
        code, said, wrong = lpt("predict", what, photos, "--json", tmp_path / "a.json")
        assert code == 0, wrong
        here[what] = json.loads((tmp_path / "a.json").read_text())
    assert here[prompt] == here[uri]
    code, said, wrong = lpt("inspect", uri)
    assert code == 0 and f"{prompt.stat().st_size:,} bytes" in said, wrong
    code, said, wrong = lpt("predict", uri, photos, "--out", tmp_path / "a.jsonl")
    assert code == 0 and "2 rows" in said, wrong
    code, said, wrong = lpt("library", "add", tmp_path / "library", uri)
    assert code == 0 and said == "added digits\n", wrong
    # Once it has been downloaded it is there without a connection.
    code, said, wrong = lpt("inspect", uri, HF_TOKEN=TOKEN)
    assert code == 0


def test_pull_adds_to_a_folder(hub, lpt, repo, prompt, tmp_path):
    hub.files[repo] |= {"more/lamps.safetensors": prompt.read_bytes(), "README.md": b"#"}
    code, said, wrong = lpt("pull", repo, tmp_path / "prompts")
    assert code == 0 and said == "added digits\nadded lamps\n", wrong
    assert (tmp_path / "prompts" / "lamps.safetensors").read_bytes() == prompt.read_bytes()
    code, said, wrong = lpt("pull", f"{repo}/digits.safetensors", tmp_path / "prompts")
    assert code == 2 and "has a task digits: add --replace" in wrong
    code, said, _ = lpt(
        "pull", f"hf://{repo}@main/digits.safetensors", tmp_path / "prompts", "--name", "ten", "--replace"
    )
    assert code == 0 and said == "added ten\n"
    hub.files[repo] = {"prompt.safetensors": prompt.read_bytes()}
    code, said, _ = lpt("pull", f"{repo}/prompt.safetensors", tmp_path / "prompts")
    assert code == 0 and said == f"added {repo.partition('/')[2]}\n"


WRONG = {
    "missing file": ("inspect", "hf://{repo}/lamps.safetensors", "the repository is there, without such a file"),
    "missing revision": ("inspect", "hf://{repo}@v9/digits.safetensors", "is there, without such a revision"),
    "missing repository": (
        "inspect",
        "hf://me/nothing/a.safetensors",
        "the Hub has none of this name, or only for those",
    ),
    "no file": ("inspect", "hf://me/nothing", "names no file of the Hub: write hf://owner/name/file.safetensors"),
    "no repository": ("push", "{prompt}", "digits", "digits is no repository of the Hub: write owner/name"),
    "foreign": ("push", "{prompt}", "other/{name}", "the token that was given has no right to do this"),
    "no prompt file": ("push", "{wrong}", "{repo}", "is damaged or no safetensors file"),
    "bad name": (
        "push",
        "{prompt}",
        "{repo}",
        "--name",
        "../a.safetensors",
        "a prompt file is called NAME.safetensors",
    ),
    "pull nothing": ("pull", "me/nothing", "{folder}", "me/nothing could not be read: the Hub has none of this name"),
    "pull a name for two": ("pull", "{repo}", "{folder}", "--name", "a", "--name a is for one file"),
    "pull empty": ("pull", "me/empty", "{folder}", "me/empty holds no prompt file: it has README.md"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_had_is_one_sentence(what, hub, lpt, repo, prompt, tmp_path):
    hub.files["me/empty"] = {"README.md": b"#"}
    hub.files[repo]["more.safetensors"] = prompt.read_bytes()
    hub.files[f"other/{repo.partition('/')[2]}"] = {}
    (tmp_path / "wrong.safetensors").write_bytes(b"nothing")
    names = {"repo": repo, "name": repo.partition("/")[2], "prompt": prompt, "folder": tmp_path / "prompts"}
    *words, sentence = (word.format(**names, wrong=tmp_path / "wrong.safetensors") for word in WRONG[what])
    code, said, wrong = lpt(*words)
    assert code == 2 and not said and sentence in wrong and len(wrong.splitlines()) == 1, (said, wrong)
    assert not (tmp_path / "prompts").exists()


def test_a_wrong_token(lpt, prompt, repo):
    for words in (("push", prompt, "me/new"), ("inspect", f"hf://{repo}/digits.safetensors")):
        code, _, wrong = lpt(*words, HF_TOKEN="hf_wrong")
        assert code == 2 and "the Hub does not know the token that it was given" in wrong, wrong
    code, _, wrong = lpt("push", prompt, "me/new", HF_TOKEN="")
    assert code == 2 and "the Hub wants to know who asks: hf auth login, or HF_TOKEN" in wrong
    lpt("--version", HF_TOKEN=TOKEN)


def test_a_download_that_ends_early_leaves_nothing(hub, lpt, repo, tmp_path):
    uri = f"hf://{repo}/digits.safetensors"
    hub.cut_short.add("digits.safetensors")
    code, said, wrong = lpt("pull", uri, tmp_path / "prompts")
    assert code == 2 and "could not be downloaded (Consistency check failed" in wrong and len(wrong.splitlines()) == 1
    assert not any((tmp_path / "prompts").glob("*")) if (tmp_path / "prompts").exists() else True
    hub.cut_short.clear()
    code, said, wrong = lpt("pull", uri, tmp_path / "prompts")
    assert code == 0 and said == "added digits\n", wrong


def test_a_damaged_file_of_the_hub_is_not_taken(hub, lpt, repo, prompt, tmp_path):
    content = bytearray(prompt.read_bytes())
    content[-1] ^= 1
    hub.files[repo]["digits.safetensors"] = bytes(content)
    code, _, wrong = lpt("pull", f"{repo}/digits.safetensors", tmp_path / "prompts")
    assert code == 2 and "is damaged" in wrong
    assert not any((tmp_path / "prompts").glob("*.safetensors"))


def test_without_a_connection(tmp_path, prompt):
    """What is asked for within this process, whose client is offline."""
    with pytest.raises(PromptFileError, match=r"prompt file hf://me/lamps/a.safetensors could not be downloaded"):
        read_header("hf://me/lamps/a.safetensors")
    assert local_file(prompt) == prompt
    nobody = Commands("http://127.0.0.1:9", str(tmp_path))
    try:
        code, _, wrong = nobody("push", prompt, "me/digits")
        assert code == 2 and wrong.endswith("could not be pushed to me/digits: the Hub cannot be reached\n")
    finally:
        nobody.close()
