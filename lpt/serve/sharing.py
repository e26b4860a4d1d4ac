"""Prompt files on the Hugging Face Hub: pushed with a card that says what they are, pulled into a library."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lpt.errors import LptError, quoted
from lpt.files import ON_THE_HUB, local_file, why_not_downloaded
from lpt.prompt_header import Header, read_header
from lpt.report.markdown import aligned_table, percent, table
from lpt.report.quoting import code_block, for_markdown, shell_command
from lpt.serve.library import SUFFIX, add

REPOSITORY = re.compile(r"(?a:[\w](?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?)")
MADE_BY = "<!-- Written by `lpt push`, which writes it anew each time; without this line it is left alone. -->"
MOST_CLASSES = 200
"""That a card names."""


class Pushed(NamedTuple):
    """Where a prompt file is now, and whether the card there is of `lpt push`."""

    uri: str
    url: str
    with_card: bool


def push(
    path: str | Path, repo: str, *, name: str | None = None, private: bool = False, terms: str | None = None
) -> Pushed:
    """Uploads a prompt file, and a card made of its header, in one commit; makes the repository where there is none.

    The file is called `name` there, by default as here; `terms` is the licence of the prompt file by the Hub's name. A
    card that somebody else has written stays. Raises PromptFileError for a file that is damaged, LptError for what the
    Hub refuses, and where it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repo)
    header, _ = read_header(path)
    local = local_file(path)
    name = local.name if name is None else name
    if not name.endswith(SUFFIX) or name.startswith(("/", ".")) or ".." in name.split("/"):
        raise LptError(f"--name {quoted(name, 80)}: a prompt file is called NAME{SUFFIX}")
    with _hub(f"{path} could not be pushed to {repo}"):
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, local)]
        with_card = _may_write_card(repo)
        if with_card:
            operations.append(CommitOperationAdd("README.md", model_card(header, repo, name, terms=terms).encode()))
        said = api.create_commit(repo, operations, commit_message=f"{name}: {quoted(header.method, 60)}, by lpt push")
    return Pushed(f"hf://{repo}/{name}", str(said.commit_url), with_card)


def pull(source: str, folder: Path, *, name: str | None = None, replace: bool = False) -> list[str]:
    """Puts the prompt files of `owner/name`, or the one of `owner/name/file`, into a library, as `lpt library add`
    does; returns their names. Raises LptError where there is none, and where the Hub cannot be reached."""
    text = source if source.startswith("hf:/") else f"hf://{source}"
    if ON_THE_HUB.fullmatch(text):
        files = [text]
    else:
        repo, _, revision = text.removeprefix("hf://").partition("@")
        check_repository(repo)
        files = [f"hf://{text.removeprefix('hf://')}/{file}" for file in prompt_files_in(repo, revision or None)]
    if name is not None and len(files) > 1:
        raise LptError(f"--name {quoted(name, 80)} is for one file, {source} has {len(files)}: name one of them")
    return [add(folder, Path(file), name=name, replace=replace) for file in files]


def prompt_files_in(repo: str, revision: str | None = None) -> list[str]:
    """The safetensors files of a repository. Raises LptError where there is none."""
    from huggingface_hub import HfApi

    with _hub(f"{repo} could not be read"):
        names = sorted(HfApi().list_repo_files(repo, revision=revision))
    if not (files := [name for name in names if name.endswith(SUFFIX)]):
        raise LptError(f"{repo} holds no prompt file: it has {quoted(', '.join(names[:5]) or 'nothing', 200)}")
    return files


def check_repository(repo: str) -> None:
    """Raises LptError for what is no name of a repository."""
    if not REPOSITORY.fullmatch(repo):
        raise LptError(f"{quoted(repo, 100)} is no repository of the Hub: write owner/name")


@contextlib.contextmanager
def _hub(what: str) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub becomes one sentence."""
    try:
        yield
    except LptError:
        raise
    except Exception as error:  # of its client, of the network: of any class
        raise LptError(f"{what}: {why_not_downloaded(error, cached=False)}") from None


def _may_write_card(repo: str) -> bool:
    """Whether the repository has no card, or one of ours."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return MADE_BY in Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8", errors="replace")
    except RemoteEntryNotFoundError:
        return True


# The card.


def model_card(header: Header, repo: str, file: str, *, terms: str | None = None) -> str:
    """README.md of a repository with this prompt file: what it is, its numbers, its terms, and how to use it."""
    from huggingface_hub import ModelCardData

    from lpt.model.backbones.published import hub_name, licence

    backbone, data = header.backbone.name, header.data.get("name")
    below = hub_name(backbone)
    facts = ModelCardData(
        base_model=below,
        base_model_relation="adapter" if below else None,
        library_name="lpt",
        license=terms,
        pipeline_tag="image-classification",
        tags=["long-tailed-recognition", "visual-prompt-tuning", "lpt"],
    )
    where = f" of {for_markdown(quoted(data, 80))}" if isinstance(data, str) else ""
    uri, weights = f"hf://{repo}/{file}", for_markdown(quoted(backbone, 100))
    known = licence(backbone)
    lines = [
        "---",
        facts.to_yaml(),
        "---",
        MADE_BY,
        "",
        f"# {for_markdown(repo.partition('/')[2])}",
        "",
        f"A prompt file of [lpt](https://pypi.org/project/lpt/): {for_markdown(quoted(header.method, 60))} for the "
        f"{len(header.classes)} classes{where}, on the frozen backbone {weights} at {header.backbone.image_size} "
        "pixels. The backbone is not in it.",
        "",
        "## Results",
        "",
        *_results(header),
        "",
        f"In per cent, on the test set. The classes have {min(header.counts):,} to {max(header.counts):,} training "
        f"images, {sum(header.counts):,} together.",
        "",
        "## Use",
        "",
        *code_block(f"pip install lpt\n{shell_command('lpt', 'predict', uri, 'photo.jpg')}"),
        "",
        *code_block(_program(header, uri), "python"),
        "",
        "## Terms",
        "",
        f"The weights of {weights} are {_terms(known)}; they are downloaded from where they are published."
        + (f" The prompt file itself: {for_markdown(terms)}." if terms else ""),
        "",
        "## Classes",
        "",
        ", ".join(for_markdown(quoted(name, 60)) for name in header.classes[:MOST_CLASSES])
        + (f", and {len(header.classes) - MOST_CLASSES} more" if len(header.classes) > MOST_CLASSES else ""),
        "",
    ]
    return "\n".join(lines)


def _results(header: Header) -> list[str]:
    metrics: dict[str, Any] = dict(header.metrics)
    if not metrics:
        return ["Nothing was measured."]
    row = quoted(header.method, 60)
    if "accuracy" in metrics:
        return table([(row, metrics)]).split("\n")
    known = {name: value for name, value in metrics.items() if value is None or abs(value) <= 1}
    return aligned_table(["", *known], [[row, *map(percent, known.values())]]).split("\n")


def _terms(known: str | None) -> str:
    return f"under the licence {for_markdown(known)}" if known else "under terms that lpt does not know"


def _program(header: Header, uri: str) -> str:
    size = f", image_size={header.backbone.image_size}"
    eps = "" if header.backbone.norm_eps is None else f", norm_eps={header.backbone.norm_eps}"
    return "\n".join(
        [
            "import lpt",
            "",
            f"backbone = lpt.load_backbone({header.backbone.name!r}{size}{eps})",
            f"bank = lpt.TaskBank(backbone, {uri!r})",
            'print(bank.predict(["photo.jpg"], tasks=bank.tasks[0]))',
        ]
    )
