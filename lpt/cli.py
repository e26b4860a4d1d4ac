"""Long-tailed prompt tuning: adapt one frozen ViT or CLIP to a long-tailed dataset, and use the file that it leaves.

A wrong setting or file is answered in one sentence, with exit code 2."""

import builtins
import contextlib
import gc
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from lpt.commands.serve import serve
from lpt.errors import ConfigError, LptError, printable, quoted, shortened

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

OutFile = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="write rows there: FILE.parquet or FILE.jsonl")
]
ConfigName = Annotated[Path, typer.Argument(help="a YAML file, or a name of `lpt list configs`: digits_lt/lpt")]
Tta = Annotated[str, typer.Option(metavar="none|five_crop", help="five_crop: means over five crops of each image")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="for example train.seed=1")]


def print(line: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Every line of every command, in place of Python's own `print`: classes and files may be called anything, and what
    they are called neither moves the cursor nor begins a line."""
    builtins.print(printable(line), file=file, flush=flush)


def print_lines(text: str) -> None:
    """A table or a config, whose line breaks are its own."""
    for line in text.split("\n"):
        print(line)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lpt import __version__

        print(f"lpt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="show the version")
    ] = False,
) -> None:
    """What can be said before any command."""


@app.command()
def train(
    config: ConfigName,
    settings: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; default runs/<data>_<method>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
) -> None:
    """Run a method and fill a folder with its prompt file, report and history."""
    from lpt.config import load_config

    resolved = load_config(config, settings or [])
    out = out or Path("runs") / re.sub(r"\W+", "_", f"{resolved.data['name']}_{resolved.method['name']}")
    _train(resolved, out, resume)


@app.command()
def plan(
    config: ConfigName,
    settings: Overrides = None,
    steps: Annotated[int, typer.Option(min=0, help="steps of each phase to time; 0 times none")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the plan there")] = None,
) -> None:
    """What `train` would do with this config, without training: phases, what trains, steps, FLOPs, memory and time.

    The backbone's weights and the class prototypes are not read: random ones of the same shapes stand in for them.
    """
    from lpt.config import load_config
    from lpt.files import write_atomic
    from lpt.plan import plan_run, table

    planned = plan_run(load_config(config, settings or []), timed_steps=steps)
    print_lines(table(planned))
    if json_file:
        write_atomic(json_file, json.dumps(planned.as_json(), indent=1).encode())


@app.command()
def fit(
    root: Annotated[str | None, typer.Argument(help="a folder of images or a Hub dataset id; none for digits")] = None,
    settings: Overrides = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="for search and training: 90s, 10m, 1.5h")] = "10m",
    metric: Annotated[str, typer.Option(help="what is chosen by: class_mean, few or accuracy")] = "class_mean",
    seed: Annotated[int | None, typer.Option(help="of folds and training; as train.seed")] = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; default runs/<folder>")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="write the chosen config there, too")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the search or run in --out")] = False,
) -> None:
    """Compare candidates on held-out training images under a budget of time, and train the best on all of them.

    From cheap to dear: class means, neighbours, a logit-adjusted linear probe, then VPT, LoRA and LPT, as far as the
    budget goes. The test set is looked at once, at the end. Settings narrow the search: method.name=lpt tries LPT
    alone, backbone.image_size=112 that size alone. docs/fitting.md says how it chooses.
    """
    from lpt.search.fitting import fit, requested

    if root is not None and re.match(r"\w+\.[\w.]+=", root):  # no folder, but a setting already
        root, settings = None, [root, *(settings or [])]
    request = requested(root, settings or [], budget=budget, metric=metric, seed=seed)
    name = Path(root).name if root else f"{request.sections['data']['name'].replace('-', '_')}_fit"
    place = out or Path("runs") / (name or "folder")
    _follow(lambda **said: fit(request, place, resume=resume, save=save, **said), place)


def _train(resolved: Any, out: Path, resume: bool) -> None:
    from lpt import run

    _follow(lambda **said: run.train(resolved, out, resume=resume, **said), out)


def _follow(work: Callable[..., dict[str, Any]], out: Path) -> None:
    """Shows what `work` says, and the results of the run that it leaves in `out`."""
    from lpt import run
    from lpt.engine.stopping import Stopped
    from lpt.report.quoting import shell_command

    try:
        with _Progress() as progress:
            report = work(say=progress.say, show=progress.show)
    except Stopped as stopped:
        if any((out / "search").glob("*.json")) and not (out / "config.yaml").exists():
            again = f"the same command with --resume --out {shell_command(str(out))} goes on with the search"
        elif any((out / "checkpoints").glob("*.safetensors")):
            again = f"the same command with --resume --out {shell_command(str(out))} goes on from what is saved"
        elif any((out / name).exists() for name in run.RUN_FILES):
            again = f"nothing is saved yet: the same command with --resume --out {shell_command(str(out))} begins again"
        else:
            again = "nothing is saved yet: the same command begins again"
        print(f"stopped by {stopped}; {again}", file=sys.stderr)
        raise typer.Exit(stopped.code) from None
    _print_results({report["described"]: report}, out)


def _print_results(rows: dict[str, dict[str, Any]], out: Path) -> None:
    """The table of `rows`, of which the last is the run in `out`, and where that run's files are."""
    from lpt.report.markdown import FIVE_CROPS, table

    report = list(rows.values())[-1]
    five = {f"{name}{FIVE_CROPS}": row["five_crops"] for name, row in rows.items() if "five_crops" in row}
    print_lines(table([*rows.items(), *five.items()]))
    sizes = ", ".join(f"{group} {number}" for group, number in report["group_sizes"].items())
    print(f"groups by training count ({report['group_rule']}): {sizes} classes; per cent on the test set")
    if "prompt_bytes" in report:
        print(f"prompt file  {out / 'prompt.safetensors'}  {report['prompt_bytes']:,} bytes")
        print(f"report       {out / 'report.html'}  {report['seconds']:.0f} s")


@app.command()
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

    metrics = evaluate_prompt(prompt, nested(settings or []), tta=_ensemble(tta), say=print)
    print_lines(table([(metrics["described"], metrics)]))
    if json_file:
        write_atomic(json_file, json.dumps(metrics, indent=1).encode())


@app.command()
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

    paths, settings = _paths_and_settings(images)
    ensemble = _ensemble(tta)
    if out is not None:
        if json_file:
            raise LptError("--json and --out are two ways to write answers: give --out alone for many images")
        return _predict_to_file(prompt, paths, settings, out, topk, batch_size, shard, resume, ensemble)
    if resume or shard != "1/1":
        raise LptError("--resume and --shard are for answers in a file: add --out FILE.parquet or FILE.jsonl")
    files, left_out = find_images(paths)
    model, workers = _open_prompt(prompt, settings, at_once=min(batch_size, len(files)))
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


def _ensemble(text: str) -> Any:
    """The views that --tta asks for. Raises LptError."""
    from typing import get_args

    from lpt.terms import Ensemble

    if text not in get_args(Ensemble):
        raise LptError(f"--tta {quoted(text, 40)}: there are {', '.join(get_args(Ensemble))}")
    return text


def _paths_and_settings(
    words: Sequence[Path], *, sections: Sequence[str] = ("backbone", "train")
) -> tuple[list[Path], dict[str, Any]]:
    """What of the `words` of a command are paths of images, and what are settings of `sections`."""
    from lpt.config import nested
    from lpt.serve.opening import check_loading
    from lpt.serve.predicting import check_there

    texts = [str(path) for path in words]
    settings = nested([t for t in texts if _is_setting(t)])
    check_loading(settings, sections=sections)
    paths = [Path(t) for t in texts if not _is_setting(t)]
    check_there(paths)
    return paths, settings


def _open_prompt(prompt: Path, settings: Mapping[str, Any], *, at_once: int) -> tuple[Any, Any]:
    """(the model of a prompt file, the processes that decode its images), as the sections `backbone` and `train` of
    `settings` have it."""
    from lpt.serve.opening import check_loading, open_prompt, workers_in

    loading = check_loading(settings, sections=("backbone", "train"))
    return open_prompt(prompt, **loading, at_once=at_once)[0], workers_in(settings)


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
    model, workers = _open_prompt(prompt, settings, at_once=batch_size)
    with _streaming(out) as stop:
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
            say=_say_aside,
            stop=stop,
        )
    if written.rows:
        unread = f", {written.errors} of them of images that cannot be read" if written.errors else ""
        print(f"{out}  {written.rows} rows{unread}")


@contextlib.contextmanager
def _streaming(out: Path) -> Iterator[Any]:
    """What listens to Ctrl-C and SIGTERM while rows go to `out`."""
    from lpt.engine.stopping import Stop, Stopped

    stop = Stop()
    try:
        with stop.listening():
            yield stop
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command with --resume goes on with {out}", file=sys.stderr)
        raise typer.Exit(stopped.code) from None


def _say_aside(text: str) -> None:
    print(text, file=sys.stderr)


@app.command("pseudo-label")
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

    paths, settings = _paths_and_settings(unlabeled, sections=("backbone", "train", "data"))
    wanted = Wanted(precision=precision, prior=prior, held_out=held_out, topk=topk)  # type: ignore[arg-type]
    share = Shard.parsed(shard)
    with _streaming(out) as stop:
        report = write_labels(
            prompt,
            paths,
            out,
            settings,
            wanted=wanted,
            batch_size=batch_size,
            shard=share,
            resume=resume,
            say=_say_aside,
            stop=stop,
        )
    for line in report_lines(report):
        print(line)


@app.command()
def edit(
    prompt: Annotated[Path, typer.Argument(help="a prompt file of LPT")],
    settings: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE ...", help="method.query=none or early; data.root=DIR as in train")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="write the edited prompt file there")],
) -> None:
    """A prompt file whose images get their group prompts without a query pass, which is about 30 % of inference.

    early: by a linear map of earlier tokens; none: every image the same ones. Both are found on the training images.
    """
    from lpt.config import nested
    from lpt.serve.editing import edit_prompt

    edit_prompt(prompt, out, nested(settings), say=print)
    print(
        f"prompt file  {out}  {out.stat().st_size:,} bytes, {prompt.stat().st_size:,} before; lpt evaluate measures it"
    )


@app.command()
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

    paths, settings = _paths_and_settings(images)
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


library_app = typer.Typer(no_args_is_help=True, help="A folder of prompt files: list it, check it, add to it.")
app.add_typer(library_app, name="library")
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


@app.command()
def inspect(prompt: Annotated[Path, typer.Argument(help="a prompt file")]) -> None:
    """What is in a prompt file: method, backbone, classes, sizes, numbers; at most a screenful of it."""
    from lpt.prompt_header import read_header

    header, tensors = read_header(prompt)
    print(f"{prompt}  format {header.format}, {prompt.stat().st_size:,} bytes")
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
"""Of one kind that `inspect` prints: a stranger's file has as many as it likes."""


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


@app.command()
def soup(
    prompts: Annotated[list[Path], typer.Argument(help="prompt files from one start: the same train.start_seed")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="write the soup there")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="one for each file, in their order; equal by default")
    ] = None,
) -> None:
    """Average prompt files into one, which answers at the cost of a single one: the sum of weight x file."""
    from lpt.serve.soup import lines
    from lpt.serve.soup import soup as write_soup

    try:
        numbers = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise LptError(f"--weights {quoted(weights, 80)}: give numbers, for example 0.5,0.3,0.2") from None
    for line in lines(write_soup(prompts, out, weights=numbers)):
        print(line)
    print(f"{out}  {out.stat().st_size:,} bytes")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
    against: Annotated[list[Path] | None, typer.Option(metavar="RUN", help="another run on the same classes")] = None,
) -> None:
    """Write RUN/report.html once more, other runs beside it (--against, up to three times), and print the table."""
    from lpt.run import report_again

    _print_results(report_again(folder, against=against or []), folder)


@app.command()
def doctor(
    root: Annotated[str, typer.Argument(help="a folder of images, or a Hub dataset id")],
    settings: Overrides = None,
) -> None:
    """Before training: the tail, unreadable files, what leaks from train to test; exit code 1 where there is a problem.

    backbone.name=NAME adds which of the classes that backbone has been trained to tell apart.
    """
    from lpt.config import check_data, nested
    from lpt.data.doctor import examine, load_with_mistakes
    from lpt.model.backbones.labels_seen import overlap_notes
    from lpt.serve.opening import check_loading

    given = nested(settings or [])
    loading = check_loading(given, sections=("data", "backbone"))
    task = load_with_mistakes(**check_data({"name": "folder", "root": root, **given.get("data", {})}))
    findings = examine(task)
    if loading["name"]:
        findings.notes += overlap_notes(task.classes, loading["name"])
    for line in findings.facts:
        print(line)
    for line in findings.notes:
        print(f"note: {line}")
    for line in findings.problems:
        print(f"problem: {line}")
    if findings.problems:
        print(f"{len(findings.problems)} problems")
        raise typer.Exit(1)
    print("nothing stands in the way of training")


@app.command()
def pack(
    data: Annotated[str, typer.Argument(metavar="DATA", help="a folder of images, or a config whose data is meant")],
    settings: Overrides = None,
    out: Annotated[Path, typer.Option(help="the pack's folder")] = ...,  # type: ignore[assignment]
    side: Annotated[int, typer.Option(min=16, help="pixels of an image's shorter side, at most")] = 256,
) -> None:
    """Shrink a task's images once into few large files, which decode faster: data.root=OUT then trains from them.

    After a kill the same command goes on; at the end everything is read back.
    """
    from lpt.config import check_data, load_config, nested
    from lpt.data import LOCATION_SETTINGS, load_task
    from lpt.data.packing import pack as write_pack

    if Path(data).suffix in (".yaml", ".yml") and Path(data).is_file():
        given = load_config(data, settings or []).data
    else:
        given = check_data({"name": "folder", "root": data, **nested(settings or []).get("data", {})})
    stored = {key: value for key, value in given.items() if key not in (*LOCATION_SETTINGS, "name")}
    packed = write_pack(load_task(**given), out, side=side, settings=stored, say=print)
    for role, number in packed["images"].items():
        print(f"{role:9}  {number} images")
    print(f"packed    {sum(one['bytes'] for one in packed['shards']):,} bytes; train from it with data.root={out}")


@app.command()
def sweep(
    suite: Annotated[Path, typer.Argument(help="a YAML file of rows, or a name of `lpt list suites`")],
    settings: Overrides = None,
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "0,1,2",
    methods: Annotated[str, typer.Option(help="only these rows, separated by commas")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time, each with its share of the cores")] = 1,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="ROW ROW", help="only compare two rows that have been run")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="default runs/sweeps/SUITE/results.json; tables beside it")
    ] = None,
    runs: Annotated[Path | None, typer.Option(metavar="DIR", help="of the runs; default runs/sweeps/SUITE")] = None,
) -> None:
    """Run every row of a suite over seeds, and write one table; a killed sweep goes on with the same command.

    --compare ROW ROW: the difference in class accuracy, by a paired bootstrap over test images.
    """
    from lpt import sweep as sweeping

    numbers = [text.strip() for text in seeds.split(",")]
    if not all(text.isdecimal() for text in numbers):
        raise LptError(f"--seeds {seeds} are no numbers separated by commas, for example 0,1,2")
    loaded = sweeping.load_suite(suite, results=results, runs=runs)
    if compare:
        return print_lines(sweeping.compare(loaded, *compare))
    names = [name for name in methods.split(",") if name]
    done = sweeping.sweep(
        loaded, seeds=[int(text) for text in numbers], methods=names, jobs=jobs, overrides=settings or [], say=_say_now
    )
    print_lines(done.rstrip("\n"))


def _say_now(text: str) -> None:
    print(text, flush=True)


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="methods, backbones, data, losses, presets, configs or suites")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="of backbones: all published weights by family, with size and licence")
    ] = False,
) -> None:
    """What there is."""
    from lpt.errors import did_you_mean
    from lpt.listing import tables

    lists = tables()
    if what is not None and what not in lists:
        raise LptError(f"there is no list of {what!r}: {', '.join(lists)}{did_you_mean(what, lists)}")
    if everything:
        if what != "backbones":
            raise LptError(f"--all is for backbones, not for {what or 'all lists'}: lpt list backbones --all")
        from lpt.model.backbones.catalogue import lines

        for line in lines():
            print(line)
        return
    for kind in [what] if what else lists:
        if what is None:
            print(f"{kind}:")
        for name, text in lists[kind].items():
            print(f"  {name}  {text}")


@app.command("config")
def config_(config: ConfigName) -> None:
    """The text of a config, to start one's own from: lpt config NAME > my.yaml."""
    from lpt.shipped import file_of

    print_lines(file_of("config", config).read_text(encoding="utf-8").rstrip("\n"))


app.command()(serve)


def _is_setting(text: str) -> bool:
    return text.partition(".")[0] in ("backbone", "train", "data") and "=" in text and not os.path.exists(text)


class _Progress:
    """A bar with rates and time left on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None
        self.phase = ""

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self.bar = Progress(*columns, TextColumn("{task.fields[rates]}"), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(printable(text), markup=False, highlight=False)
        else:
            print(text, flush=True)

    def show(self, phase: str, step: int, steps: int, rates: str) -> None:
        if not self.bar:
            return
        if phase != self.phase:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task, self.phase = self.bar.add_task(phase, total=steps, rates=""), phase
        self.bar.update(self.task, completed=step, rates=rates)


def main() -> None:
    """Entry point. People's mistakes end with code 2 and no traceback."""
    warnings.showwarning = _show_warning
    # While modules are imported little is garbage, and looking for it takes a fifth of the time.
    gc.set_threshold(50_000)
    try:
        app()
    except ConfigError as error:
        _fail(*error.mistakes)
    except LptError as error:
        _fail(str(error))
    except OSError as error:
        name = quoted(error.filename or "a file")
        _fail(f"{name}: {error.strerror or quoted(error)}; nothing more was written")


def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """On one line, without the place in our code that people can do nothing about."""
    print(f"warning: {quoted(message, 1000)}", file=sys.stderr)


def _fail(*mistakes: str) -> NoReturn:
    lines = [shortened(" ".join(mistake.split("\n"))) for mistake in mistakes]
    if len(lines) == 1:
        print(f"error: {lines[0]}", file=sys.stderr)
    else:
        print(f"error: {len(lines)} mistakes:", file=sys.stderr)
        for line in lines:
            print(f"  {line}", file=sys.stderr)
    sys.exit(2)
