"""Prompt files elsewhere: exported for programs without lpt, pushed to the Hub, pulled from it."""

from pathlib import Path
from typing import Annotated

import typer

from lpt.commands.arguments import Tta, ensemble_of
from lpt.commands.console import print
from lpt.errors import LptError, did_you_mean, quoted

BackboneSettings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="backbone.weights=FILE as in train")
]
FORMS = ("torch", "onnx", "peft")


def export(
    prompt: Annotated[Path, typer.Argument(help="a prompt file, or hf://owner/name/file")],
    to: Annotated[str, typer.Option(metavar="torch|onnx|peft", help="what the model is to be")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="NAME.pt2, NAME.onnx, or a new folder for peft")],
    settings: BackboneSettings = None,
    tta: Tta = "none",
) -> None:
    """A model that runs without lpt: backbone, prompts, head and preprocessing in one, in fp32.

    torch and onnx take uint8 images [batch 3 side side] of any batch and side, and give logits and probabilities; what
    they are is said in PATH.json. peft is a folder with LoRA and the head of a timm model.
    """
    from lpt.config import nested
    from lpt.serve.exporting import export_prompt
    from lpt.serve.opening import check_loading

    if to not in FORMS:
        raise LptError(f"--to {quoted(to, 40)}: there are {', '.join(FORMS)}{did_you_mean(to, FORMS)}")
    ensemble = ensemble_of(tta)
    loading = check_loading(nested(settings or []), sections=("backbone",))
    written = export_prompt(prompt, out, to=to, **loading, tta=ensemble)  # type: ignore[arg-type]
    if to == "peft":
        print(f"{written.model}  {written.bytes:,} bytes; README.md in it loads it on the timm model")
        return
    compared = "not compared: onnxruntime is not installed"
    if written.difference is not None:
        compared = f"logits within {written.difference:.1g} of lpt's"
    print(f"{written.model}  {written.bytes:,} bytes, {compared}; {written.facts.name} says what it is")


def push(
    prompt: Annotated[Path, typer.Argument(help="a prompt file")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="of the Hugging Face Hub; made if it is new")],
    name: Annotated[str | None, typer.Option(help="what the file is called there; default: as here")] = None,
    private: Annotated[bool, typer.Option("--private", help="a new repository is private")] = False,
    licence: Annotated[str | None, typer.Option(help="of the prompt file, as the Hub has it: apache-2.0")] = None,
) -> None:
    """Upload a prompt file to the Hugging Face Hub, with a card made of its header.

    `hf auth login` or HF_TOKEN say who you are. The file is hf://OWNER/NAME/FILE then, for every command that reads
    prompt files.
    """
    from lpt.serve.sharing import push as upload

    pushed = upload(prompt, repository, name=name, private=private, terms=licence)
    card = "with a card" if pushed.with_card else "the card there is not lpt's and stays"
    print(f"{pushed.uri}  {card}; {pushed.url}")


def pull(
    source: Annotated[str, typer.Argument(metavar="OWNER/NAME[/FILE]", help="a repository, or one file of it")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder of prompt files; made if it is new")],
    name: Annotated[str | None, typer.Option(help="what the task is called; default: as its file")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="in place of a task of that name")] = False,
) -> None:
    """Download prompt files from the Hugging Face Hub into a folder, each whole or not at all."""
    from lpt.serve.sharing import pull as download

    for task in download(source, folder, name=name, replace=replace):
        print(f"added {quoted(task)}")
