"""A prompt file in use: metrics, predictions and pseudo-labels."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lpt.commands.arguments import OutFile, Overrides, Tta, ensemble_of, open_model, paths_and_settings
from lpt.commands.console import print, print_aside, print_lines
from lpt.errors import LptError, quoted


def evaluate(
    prompt: Annotated[Path, typer.Argument(help="a prompt file")],
    settings: Overrides = None,
    tta: Tta = "none",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the metrics there")] = None,
) -> None:
    """Metrics of a prompt file on a task (by default the one it was trained on)."""
    from lpt.config import nested
    from lpt.files import write_atomic
    from lpt.report.markdown import table
    from lpt.serve.evaluating import evaluate_prompt

    metrics = evaluate_prompt(prompt, nested(settings or []), tta=ensemble_of(tta), say=print)
    print_lines(table([(metrics["described"], metrics)]))
    if json_file:
        write_atomic(json_file, json.dumps(metrics, indent=1).encode())


def predict(
    prompt: Annotated[Path, typer.Argument(help="a prompt file")],
    images: Annotated[list[Path], typer.Argument(help="image files or folders; backbone.weights=FILE as in train")],
    topk: Annotated[int | None, typer.Option(min=1, help="classes of each image; 5 where they are printed")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the answers there")] = None,
    out: OutFile = None,
    tta: Tta = "none",
    batch_size: Annotated[int, typer.Option(min=1, help="images that go through the model together")] = 32,
    shard: Annotated[str, typer.Option(metavar="i/n", help="with --out: one of n shares of the images")] = "1/1",
    resume: Annotated[bool, typer.Option("--resume", help="go on with --out where a process has ended")] = False,
) -> None:
    """Class names and probabilities; an image that cannot be decoded is named and the others go on (exit 1).

    With --out nothing is printed or held: rows with path, class, probability, margin, task and, with --topk, lists go
    to a Parquet or JSON lines file of any length; an image that cannot be decoded is a row with its error (exit 0).
    """
    from lpt.files import write_atomic
    from lpt.serve.predicting import find_images, predict_files

    paths, settings = paths_and_settings(images)
    ensemble = ensemble_of(tta)
    if out is not None:
        if json_file:
            raise LptError("--json and --out are two ways to write answers: give --out alone for many images")
        return _predict_to_file(prompt, paths, settings, out, topk, batch_size, shard, resume, ensemble)
    if resume or shard != "1/1":
        raise LptError("--resume and --shard are for answers in a file: add --out FILE.parquet or FILE.jsonl")
    files, left_out = find_images(paths)
    model, workers = open_model(prompt, settings, at_once=min(batch_size, len(files)))
    for line in left_out:
        print(line, file=sys.stderr)
    answers: list[dict[str, Any]] = []
    told = predict_files(model, files, topk=topk or 5, batch_size=batch_size, workers=workers, tta=ensemble)
    for answer in told:
        answers.append(answer)
        if "error" in answer:
            print(f"error: {quoted(answer['error'], 4096)}", file=sys.stderr)
        else:
            pairs = zip(answer["classes"], answer["probabilities"], strict=True)
            print(f"{quoted(answer['image'], 4096)}  " + "  ".join(f"{quoted(name)} {p:.3f}" for name, p in pairs))
    if json_file:
        write_atomic(json_file, json.dumps(answers, indent=1).encode())
    if any("error" in answer for answer in answers):
        raise typer.Exit(1)


def _predict_to_file(
    prompt: Path,
    paths: Sequence[Path],
    settings: Mapping[str, Any],
    out: Path,
    topk: int | None,
    batch_size: int,
    shard: str,
    resume: bool,
    tta: Any,
) -> None:
    from lpt.prompt_file import read_prompt
    from lpt.serve.row_file import check_out
    from lpt.serve.streaming import Shard, predict_to_file

    share = Shard.parsed(shard)
    check_out(out, resume=resume)
    task = read_prompt(prompt).header.data.get("name")
    model, workers = open_model(prompt, settings, at_once=batch_size)
    with interruptible(out) as stop:
        written = predict_to_file(
            model,
            paths,
            out,
            prompt=prompt,
            task=task if isinstance(task, str) else None,
            topk=topk,
            batch_size=batch_size,
            shard=share,
            resume=resume,
            workers=workers,
            tta=tta,
            say=print_aside,
            stop=stop,
        )
    if written.rows:
        unread = f", {written.errors} of them of images that cannot be read" if written.errors else ""
        print(f"{out}  {written.rows} rows{unread}")


@contextlib.contextmanager
def interruptible(out: Path) -> Iterator[Any]:
    """What listens to Ctrl-C and SIGTERM while rows go to `out`."""
    from lpt.engine.stopping import Stop, Stopped

    stop = Stop()
    try:
        with stop.listening():
            yield stop
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command with --resume goes on with {out}", file=sys.stderr)
        raise typer.Exit(stopped.code) from None


def pseudo_label(
    prompt: Annotated[Path, typer.Argument(help="a prompt file")],
    unlabeled: Annotated[
        list[Path], typer.Argument(help="image files or folders; data.root=DIR, backbone.weights=FILE as in train")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="write labels there: FILE.parquet or FILE.jsonl")],
    precision: Annotated[float, typer.Option(help="the share of labels that is to be right")] = 0.95,
    held_out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="class folders to find thresholds on; default: of its own data")
    ] = None,
    prior: Annotated[
        str, typer.Option(help="how frequent classes are: images (estimated of them), held-out, or training")
    ] = "images",
    topk: Annotated[int, typer.Option(min=1, help="classes in the lists of each row")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="images that go through the model together")] = 32,
    shard: Annotated[str, typer.Option(metavar="i/n", help="one of n shares of the images")] = "1/1",
    resume: Annotated[bool, typer.Option("--resume", help="go on where a process has ended")] = False,
) -> None:
    """One label for each image, or `unsure`, right as often as --precision says.

    Each class has a threshold, found on held-out images of known class. FILE.json says the thresholds, and the
    precision and coverage to be expected of classes with many, some and few training images.
    """
    from lpt.serve.pseudo_labeling import Wanted, report_lines
    from lpt.serve.pseudo_labeling import pseudo_label as write_labels
    from lpt.serve.streaming import Shard

    paths, settings = paths_and_settings(unlabeled, sections=("backbone", "train", "data"))
    wanted = Wanted(precision=precision, prior=prior, held_out=held_out, topk=topk)  # type: ignore[arg-type]
    share = Shard.parsed(shard)
    with interruptible(out) as stop:
        report = write_labels(
            prompt,
            paths,
            out,
            settings,
            wanted=wanted,
            batch_size=batch_size,
            shard=share,
            resume=resume,
            say=print_aside,
            stop=stop,
        )
    for line in report_lines(report):
        print(line)
