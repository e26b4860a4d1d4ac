"""Commands on a folder of prompt files: list, check, add, remove, and find the task of an image."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lpt.commands.arguments import paths_and_settings
from lpt.commands.console import print, print_lines
from lpt.errors import LptError, printable, quoted

library_app = typer.Typer(no_args_is_help=True, help="Manage a folder of prompt files: list, check, add, remove.")


Library = Annotated[Path, typer.Argument(metavar="DIR", help="a folder of prompt files")]


@library_app.command("ls")
def library_ls(
    folder: Library,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the table to FILE")
    ] = None,
) -> None:
    """List the tasks: classes, training images, method, accuracy in per cent, backbone, size, time of writing (UTC)."""
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
    """Read every file and report damaged ones (exit code 1)."""
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
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="prompt files, also those in run folders")],
    name: Annotated[str | None, typer.Option(help="name of the task; default: that of its file or run")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace a task of the same name")] = False,
) -> None:
    """Copy prompt files into the folder."""
    from lpt.serve.library import add

    if name is not None and len(files) > 1:
        raise LptError(f"--name {quoted(name, 80)} is for one file, {len(files)} are given")
    for file in files:
        print(f"added {quoted(add(folder, file, name=name, replace=replace))}")


@library_app.command("rm")
def library_rm(
    folder: Library, tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="names as in `lpt library ls`")]
) -> None:
    """Delete the files of tasks."""
    from lpt.serve.library import remove

    for task in tasks:
        remove(folder, task)
        print(f"removed {quoted(task)}")


def route(
    library: Annotated[Path, typer.Argument(metavar="DIR", help="a folder of prompt files")],
    images: Annotated[
        list[Path], typer.Argument(help="image files or folders, and settings as in train: backbone.weights=FILE")
    ],
    accept: Annotated[float, typer.Option(help="share of a task's own images to accept")] = 0.95,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the results to FILE")
    ] = None,
) -> None:
    """Find the task of each image: the one with the nearest class mean of backbone features, or none.

    An image that cannot be decoded is reported, the others are routed, and the exit code is 1.
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
