"""Commands on runs: train, plan, fit, sweep, and a report once more."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lpt.commands.arguments import ConfigName, Overrides, named_things
from lpt.commands.console import Progress, print, print_at_once, print_lines
from lpt.errors import LptError


def train(
    config: ConfigName,
    settings: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="output folder; default runs/<data>_<method>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume the run in --out")] = False,
) -> None:
    """Train a method; write the prompt file, the report and the training history to a folder."""
    from lpt.config import load_config

    resolved = load_config(config, settings or [])
    out = out or Path("runs") / re.sub(r"\W+", "_", f"{resolved.data['name']}_{resolved.method['name']}")
    _train(resolved, out, resume)


def plan(
    config: ConfigName,
    settings: Overrides = None,
    steps: Annotated[int, typer.Option(min=0, help="steps of each phase to time; 0: none")] = 4,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the plan to FILE")
    ] = None,
) -> None:
    """Estimate a run without training: phases, trainable parameters, steps, FLOPs, memory and time.

    The backbone's weights and the class prototypes are not read; random ones of the same shapes replace them.
    """
    from lpt.config import load_config
    from lpt.files import write_atomic
    from lpt.plan import plan_run, table

    planned = plan_run(load_config(config, settings or []), timed_steps=steps)
    print_lines(table(planned))
    if json_file:
        write_atomic(json_file, json.dumps(planned.as_json(), indent=1).encode())


def fit(
    root: Annotated[
        str | None, typer.Argument(help="a folder of images or a Hub dataset id; omit it with data.name=NAME")
    ] = None,
    settings: Overrides = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="time for search and training: 90s, 10m, 1.5h")] = "10m",
    metric: Annotated[str, typer.Option(help="selection metric: class_mean, few or accuracy")] = "class_mean",
    seed: Annotated[int | None, typer.Option(help="seed of folds and training; as train.seed")] = None,
    out: Annotated[Path | None, typer.Option(help="output folder; default runs/<folder>")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the chosen config to FILE")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume the search or run in --out")] = False,
) -> None:
    """Choose a method on held-out training images within a time budget, and train it on all training images.

    Candidates, in order of cost: class means, nearest neighbours, a logit-adjusted linear probe, VPT, LoRA and LPT, as
    far as the budget allows. The test set is evaluated once, at the end. Settings narrow the search: method.name=lpt
    tries LPT only, backbone.image_size=112 that size only. docs/fitting.md describes the choice.
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
    """Shows the progress of `work`, and the results of its run in `out`."""
    from lpt import run
    from lpt.engine.stopping import Stopped
    from lpt.report.quoting import shell_command

    try:
        with Progress() as progress:
            report = work(say=progress.say, show=progress.show)
    except Stopped as stopped:
        if any((out / "search").glob("*.json")) and not (out / "config.yaml").exists():
            again = f"the same command with --resume --out {shell_command(str(out))} continues with the search"
        elif any((out / "checkpoints").glob("*.safetensors")):
            again = f"the same command with --resume --out {shell_command(str(out))} continues from what is saved"
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


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run")],
    against: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="another run on the same classes; may be repeated")
    ] = None,
) -> None:
    """Write RUN/report.html again, with up to three other runs beside it (--against), and print the table."""
    from lpt.run import report_again

    _print_results(report_again(folder, against=against or []), folder)


def sweep(
    suite: Annotated[
        Path,
        typer.Argument(
            help="a YAML file of rows, or a name from `lpt list suites`", autocompletion=named_things("suites")
        ),
    ],
    settings: Overrides = None,
    seeds: Annotated[str, typer.Option(help="comma-separated seeds")] = "0,1,2",
    methods: Annotated[str, typer.Option(help="only these rows, comma-separated")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="parallel runs, each with its share of the cores")] = 1,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="ROW ROW", help="only compare two finished rows")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="results; default runs/sweeps/SUITE/results.json, tables beside it"),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="folder of the runs; default runs/sweeps/SUITE")
    ] = None,
) -> None:
    """Run every row of a suite over several seeds, and write one table. The same command resumes a killed sweep.

    --compare ROW ROW prints the difference in class accuracy, with a paired bootstrap over test images.
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
        loaded,
        seeds=[int(text) for text in numbers],
        methods=names,
        jobs=jobs,
        overrides=settings or [],
        say=print_at_once,
    )
    print_lines(done.rstrip("\n"))
