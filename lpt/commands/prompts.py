"""Commands on prompt files: inspect, edit, soup."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lpt.commands.console import print
from lpt.errors import LptError, quoted


def inspect(prompt: Annotated[Path, typer.Argument(help="a prompt file")]) -> None:
    """Show the contents of a prompt file: method, settings, backbone, classes, tensors and metrics."""
    from lpt.files import local_file
    from lpt.prompt_header import read_header

    header, tensors = read_header(prompt)
    print(f"{prompt}  format {header.format}, {local_file(prompt).stat().st_size:,} bytes")
    print(f"method    {quoted(header.method)}")
    _print_few("settings", _in_lines(f"{quoted(k, 60)}={quoted(json.dumps(v))}" for k, v in header.settings.items()))
    made_with = quoted(f"{header.backbone.name}, weights {header.backbone.fingerprint}")
    eps = f", LayerNorm ε {header.backbone.norm_eps}" if header.backbone.norm_eps else ""
    print(f"backbone  {made_with}, {header.backbone.image_size} px{eps}")
    shown = quoted(", ".join(header.classes[:6])) + (", ..." if len(header.classes) > 6 else "")
    print(f"classes   {len(header.classes)}: {shown}; {max(header.counts)} to {min(header.counts)} training images")
    facts = [quoted(header.data.get(key), 100) for key in ("name", "split_sha256")]
    print(f"data      {facts[0]}, split {facts[1]}")
    _print_few("tensor", [f"{quoted(name, 100)} {sizes}" for name, sizes in _same_in_blocks(tensors).items()])
    _print_few("measured", [f"{quoted(name, 60)} {_measured(name, value)}" for name, value in header.metrics.items()])
    print("versions  " + quoted(", ".join(f"{k} {v}" for k, v in header.versions.items())))


MOST_LINES = 12
"""Of one kind that `inspect` prints: a file may hold any number."""


def _print_few(what: str, lines: Sequence[str]) -> None:
    for line in lines[:MOST_LINES]:
        print(f"{what:8}  {line}")
    if len(lines) > MOST_LINES:
        print(f"{what:8}  ... and {len(lines) - MOST_LINES} more")


def _in_lines(words: Iterable[str], *, width: int = 100) -> list[str]:
    """`words` in lines that are not much longer than a terminal is wide, none broken."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 2 + len(word) <= width:
            lines[-1] += f"  {word}"
        else:
            lines.append(word)
    return lines


def _measured(name: str, value: float | None) -> str:
    from lpt.report.markdown import percent

    if value is not None and abs(value) > 1e6:  # no metric of ours, and hundreds of digits
        return f"{value:.3g}"
    return f"{value:.4f}" if name == "nll" and value is not None else percent(value)


def _same_in_blocks(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Shapes by name; tensors of one shape that differ in the number of their block are one line under `*`."""
    shapes: dict[tuple[str, str], int] = {}
    for name, tensor in tensors.items():
        key = re.sub(r"\.\d+\.", ".*.", name), str(list(tensor.shape))
        shapes[key] = shapes.get(key, 0) + 1
    lines: dict[str, str] = {}
    for (name, shape), number in shapes.items():
        sizes = shape if number == 1 else f"{number} of {shape}"
        lines[name] = f"{lines[name]}, {sizes}" if name in lines else sizes
    return lines


def edit(
    prompt: Annotated[Path, typer.Argument(help="a prompt file of LPT")],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE ...", help="method.query=none or early, and settings as in train: data.root=DIR"
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="output prompt file")],
) -> None:
    """Replace the query pass of an LPT prompt file, which is about 30 % of the cost of inference.

    early: group prompts are chosen by a linear map of earlier tokens; none: all images get the same ones. Both are
    computed from the training images.
    """
    from lpt.config import nested
    from lpt.files import local_file
    from lpt.serve.editing import edit_prompt

    edit_prompt(prompt, out, nested(settings), say=print)
    size = local_file(prompt).stat().st_size
    print(f"prompt file  {out}  {out.stat().st_size:,} bytes, {size:,} before; lpt evaluate measures it")


def soup(
    prompts: Annotated[
        list[Path], typer.Argument(help="prompt files with the same initialization: the same train.start_seed")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="output prompt file")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="one weight per file, in order; equal by default")
    ] = None,
) -> None:
    """Average the weights of prompt files into one prompt file (a model soup)."""
    from lpt.serve.soup import lines
    from lpt.serve.soup import soup as write_soup

    try:
        numbers = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise LptError(f"--weights {quoted(weights, 80)}: give numbers, for example 0.5,0.3,0.2") from None
    for line in lines(write_soup(prompts, out, weights=numbers)):
        print(line)
    print(f"{out}  {out.stat().st_size:,} bytes")
