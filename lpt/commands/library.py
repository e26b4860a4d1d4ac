"""A folder of prompt files: list it, check it, change it, and find the task of an image."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lpt.commands.arguments import paths_and_settings
from lpt.commands.console import print, print_lines
from lpt.errors import LptError, printable, quoted

library_app = typer.Typer(no_args_is_help=True, help="A folder of prompt files: list it, check it, add to it.")


Library = Annotated[Path, typer.Argument(metavar="DIR", help="a folder of prompt files")]


@library_app.command("ls")
def library_ls(
    folder: Library,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the table there")] = None,
) -> None:
    """The tasks: classes, training images, method, accuracy in per cent, backbone, size, when it was written (UTC)."""
    from lpt.files import write_atomic
    from lpt.serve.library import listing, table

    found = listing(folder)
    print_lines(table(found.rows))
    for problem in found.problems.values():
        print(f"warning: {quoted(problem, 1000)}", file=sys.stderr)
    if json_file:
        write_atomic(json_file, json.dumps([row._asdict() for row in found.rows], indent=1).encode())


@library_app.command("check")
def library_check(folder: Library) -> None:
    """Open and read every file whole; those that are damaged are named (exit 1)."""
    from lpt.serve.library import check

    number = bad = 0
    for _, problem in check(folder):
        number += 1
        if problem is not None:
            bad += 1
            print(f"problem: {quoted(problem, 1000)}")
    print(f"{number} files, {bad} of them bad")
    if bad:
        raise typer.Exit(1)


@library_app.command("add")
def library_add(
    folder: Library,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="prompt files; those of runs too")],
    name: Annotated[str | None, typer.Option(help="what the task is called; default: as its file, or its run")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="in place of a task of that name")] = False,
) -> None:
    """Put copies of prompt files into the folder, each whole or not at all."""
    from lpt.serve.library import add

    if name is not None and len(files) > 1:
        raise LptError(f"--name {quoted(name, 80)} is for one file, {len(files)} are given")
    for file in files:
        print(f"added {quoted(add(folder, file, name=name, replace=replace))}")


@library_app.command("rm")
def library_rm(
    folder: Library, tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="as ls calls them")]
) -> None:
    """Delete the files of tasks."""
    from lpt.serve.library import remove

    for task in tasks:
        remove(folder, task)
        print(f"removed {quoted(task)}")


def route(
    library: Annotated[Path, typer.Argument(metavar="DIR", help="a folder of prompt files")],
    images: Annotated[list[Path], typer.Argument(help="image files or folders; backbone.weights=FILE as in train")],
    accept: Annotated[float, typer.Option(help="the share of a task's own images that is to be taken")] = 0.95,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the answers there")] = None,
) -> None:
    """Whose image is this? The task with the nearest class mean on the bare backbone, or none where none is near.

    An image that cannot be decoded is named and the others go on (exit 1).
    """
    from lpt.files import write_atomic
    from lpt.serve.opening import check_loading, open_bank
    from lpt.serve.predicting import find_images

    paths, settings = paths_and_settings(images)
    files, left_out = find_images(paths)
    bank = open_bank(library, **check_loading(settings, sections=("backbone", "train")), accept=accept)
    for line in [*bank.refused.values(), *left_out]:
        print(line, file=sys.stderr)
    answers: list[dict[str, Any]] = []
    for file, found in zip(files, bank.route(files), strict=True):
        if isinstance(found, LptError):
            answers.append({"image": printable(str(file)), "error": str(found)})
            print(f"error: {quoted(found, 4096)}", file=sys.stderr)
            continue
        answers.append({"image": printable(str(file)), **found._asdict()})
        nearest = "" if found.task else f"; nearest is {quoted(found.nearest)}"
        scores = f"{found.score:.3f}, from {found.threshold:.3f} on"
        print(f"{quoted(file, 4096)}  {quoted(found.task or 'none')}  {scores}{nearest}")
    if json_file:
        write_atomic(json_file, json.dumps(answers, indent=1).encode())
    if any("error" in answer for answer in answers):
        raise typer.Exit(1)
