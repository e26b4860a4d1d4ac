"""Prompt files elsewhere: exported for programs without lpt, pushed to the Hub, pulled from it."""

from pathlib import Path
from typing import Annotated

import typer

from lpt.errors import LptError, did_you_mean, printable, quoted

FORMS = ("torch", "onnx", "peft")


def export(
    prompt: Annotated[Path, typer.Argument(help="a prompt file, or hf://owner/name/file")],
    to: Annotated[str, typer.Option(metavar="torch|onnx|peft", help="what the model is to be")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="NAME.pt2, NAME.onnx, or a new folder for peft")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="backbone.weights=FILE as in train")
    ] = None,
    tta: Annotated[
        str, typer.Option(metavar="none|five_crop", help="five_crop: means over five crops of each image")
    ] = "none",
) -> None:
    """A model that runs without lpt: backbone, prompts, head and preprocessing in one, in fp32.

    torch and onnx take uint8 images [batch 3 side side] of any batch and side, and give logits and probabilities; what
    they are is said in PATH.json. peft is a folder with LoRA and the head of a timm model.
    """
    from typing import get_args

    from lpt.config import nested
    from lpt.serve.exporting import export_prompt
    from lpt.serve.opening import check_loading
    from lpt.terms import Ensemble

    if to not in FORMS:
        raise LptError(f"--to {quoted(to, 40)}: there are {', '.join(FORMS)}{did_you_mean(to, FORMS)}")
    if tta not in get_args(Ensemble):
        raise LptError(f"--tta {quoted(tta, 40)}: there are {', '.join(get_args(Ensemble))}")
    loading = check_loading(nested(settings or []), sections=("backbone",))
    written = export_prompt(prompt, out, to=to, **loading, tta=tta)  # type: ignore[arg-type]
    if to == "peft":
        print(printable(f"{written.model}  {written.bytes:,} bytes; README.md in it loads it on the timm model"))
        return
    compared = "not compared: onnxruntime is not installed"
    if written.difference is not None:
        compared = f"logits within {written.difference:.1g} of lpt's"
    print(printable(f"{written.model}  {written.bytes:,} bytes, {compared}; {written.facts.name} says what it is"))
