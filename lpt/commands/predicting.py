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
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the metrics to FILE")
    ] = None,
) -> None:
    """Compute the metrics of a prompt file on a test set (by default that of its training data)."""
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
    images: Annotated[
        list[Path], typer.Argument(help="image files or folders, and settings as in train: backbone.weights=FILE")
    ],
    topk: Annotated[int | None, typer.Option(min=1, help="number of classes per image; 5 if they are printed")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the predictions to FILE")
    ] = None,
    out: OutFile = None,
    tta: Tta = "none",
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward pass")] = 32,
    shard: Annotated[str, typer.Option(metavar="i/n", help="with --out: process share i of n of the images")] = "1/1",
    resume: Annotated[bool, typer.Option("--resume", help="resume an interrupted --out")] = False,
) -> None:
    """Predict class names and probabilities of images.

    An image that cannot be decoded is reported, the others are predicted, and the exit code is 1.

    With --out, rows (path, class, probability, margin, task; lists with --topk) are streamed to a Parquet or JSON lines
    file of any length; an image that cannot be decoded is a row with its error, and the exit code is 0.
    """
    from lpt.files import write_atomic
    from lpt.serve.predicting import find_images, predict_files

    paths, settings = paths_and_settings(images)
    ensemble = ensemble_of(tta)
    if out is not None:
        if json_file:
            raise LptError("--json and --out are two ways to write predictions: give --out alone for many images")
        return _predict_to_file(prompt, paths, settings, out, topk, batch_size, shard, resume, ensemble)
    if resume or shard != "1/1":
        raise LptError("--resume and --shard are for predictions in a file: add --out FILE.parquet or FILE.jsonl")
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
        print(f"stopped by {stopped}; the same command with --resume continues with {out}", file=sys.stderr)
        raise typer.Exit(stopped.code) from None


def pseudo_label(
    prompt: Annotated[Path, typer.Argument(help="a prompt file")],
    unlabeled: Annotated[
        list[Path],
        typer.Argument(help="image files or folders, and settings as in train: data.root=DIR, backbone.weights=FILE"),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="output file, FILE.parquet or FILE.jsonl")],
    precision: Annotated[float, typer.Option(help="target precision of the labels")] = 0.95,
    held_out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="class folders to find thresholds on; default: the held-out images of its own data"
        ),
    ] = None,
    prior: Annotated[
        str, typer.Option(help="class frequencies: images (estimated from the given images), held-out, or training")
    ] = "images",
    topk: Annotated[int, typer.Option(min=1, help="number of classes per row")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="images per forward pass")] = 32,
    shard: Annotated[str, typer.Option(metavar="i/n", help="process share i of n of the images")] = "1/1",
    resume: Annotated[bool, typer.Option("--resume", help="resume an interrupted --out")] = False,
) -> None:
    """Label unlabeled images, at a precision of --precision; an image below its threshold is `unsure`.

    Each class has a threshold on the probability, found on held-out labeled images. FILE.json has the thresholds, and
    the expected precision and coverage of many-, medium- and few-shot classes.
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
