"""Two processes are one: the same losses for the same global batch, one writer, and a run that changes their number.

Batches of 200 make every epoch one step, so that the history holds the loss of each, and 599 test images do not divide
by two. As a program of its own this is one of the processes, which tells of itself in OUT-RANK.json:

    torchrun --nproc_per_node 2 -m benchmarks.reliability.processes CONFIG OUT STOP_AT
    accelerate launch --num_processes 2 --cpu -m benchmarks.reliability.processes CONFIG OUT STOP_AT
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.reliability.row import Row
from lpt.data import DATA, Task
from lpt.data.digits import digits_lt
from lpt.data.task import Images

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu")
RELATIVE = 1e-5
"""Of the loss, between one process and two, in fp32."""
METHODS = ("lpt", "two_stage", "ulfine")
TESTED, COUNTED = 599, ("steps", "images")


def settings_of(method: str, steps: int) -> dict[str, Any]:
    """Settings with which `method` takes `steps` steps in all."""
    half, common = steps // 2, {"optimizer": "adamw", "prompt_length": 4}
    pool = {"pool_size": 5, "query_centering": "mean", "key_init": "kmeans"}
    return {
        "lpt": {"epochs": [half, steps - half], "lr": [5e-3, 2e-3], **pool, **common},
        "two_stage": {
            "epochs_stage1": half,
            "then": {"name": "fine_tune", "tuning": "vpt_deep", "epochs": steps - half, **common},
        },
        "ulfine": {"steps": steps, "rounds": steps, "tuning": "vpt_deep", "lr": 5e-3, "tau": 0.5, **common},
    }[method]


def rows(quick: bool) -> list[Row]:
    steps = 20 if quick else 50
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for method in ("lpt",) if quick else METHODS:
            place = Path(folder) / method
            config = _config(place, method, steps)
            one, alone = _run(config, place / "one", 1)
            two, together = _run(config, place / "two", 2)
            found += [_same(method, place, one, two), _speed(method, place, steps, alone, together)]
            if not quick:  # three more starts of two processes
                found.append(_changed(method, config, place / "changed", one))
    return found


def _same(method: str, place: Path, one: list[float], two: list[float]) -> Row:
    apart = [abs(a - b) / abs(a) for a, b in zip(one, two, strict=True)]
    reports = [json.loads((place / name / "report.json").read_text()) for name in ("one", "two")]
    prompts = [load_file(place / name / "prompt.safetensors") for name in ("one", "two")]
    found = [load_file(place / name / "predictions.safetensors") for name in ("one", "two")]
    far = max((a.float() - prompts[1][k].float()).abs().max().item() for k, a in prompts[0].items())
    (alone,), both = ([_told(place / name, rank) for rank in range(n)] for name, n in (("one", 1), ("two", 2)))
    other = int((found[0]["predicted"] != found[1]["predicted"]).sum())
    confidence = (found[0]["confidence"] - found[1]["confidence"]).abs().max().item()
    amiss = {
        "the images of some steps are others": alone["rows"] != _merged([told["rows"] for told in both]),
        f"the second process has written {both[1]['wrote'][:3]}": bool(both[1]["wrote"]),
        # FLOPs are a little more: what depends on prompts alone is computed by each process.
        "the numbers of steps or images differ": any(reports[0]["cost"][k] != reports[1]["cost"][k] for k in COUNTED),
        f"{other} predictions differ": other > 0,
        f"a confidence differs by {confidence:.1e}": confidence > 1e-3,
        f"a stored number differs by {far:.1e}": far > 1e-3,
    }
    wrong = [text for text, is_so in amiss.items() if is_so]
    note = (
        f"largest relative difference of a loss {max(apart):.1e}, of a stored number {far:.1e}, of a confidence "
        f"{confidence:.1e}; the same images in each of {len(alone['rows'])} steps, the same class of {TESTED} test "
        "images, one writer"
    )
    good, seconds = sum(x <= RELATIVE for x in apart), reports[1]["seconds"]
    return Row(f"{method}: two take the steps of one", len(one), good, len(wrong), seconds, "; ".join([note, *wrong]))


def _told(out: Path, rank: int) -> dict[str, Any]:
    return json.loads(out.with_name(f"{out.name}-{rank}.json").read_text())


def _merged(parts: list[dict[str, dict[str, list[int]]]]) -> dict[str, dict[str, list[int]]]:
    """By step and stream the rows of the global batch, of which process r has every w-th from the r-th on."""
    return {
        step: {
            name: [row for pair in zip(*(of[step][name] for of in parts), strict=True) for row in pair] for name in of
        }
        for step, of in parts[0].items()
    }


def _speed(method: str, place: Path, steps: int, alone: float, together: float) -> Row:
    """What two processes on the same two cores can show is that they are not much slower, not that they scale."""
    report, told = json.loads((place / "two" / "report.json").read_text()), _told(place / "two", 0)
    rate = [report["cost"]["images"] / seconds for seconds in (alone, together)]
    sent, most = told["bytes"] / steps, 4 * report["trainable_parameters"] + 2**16
    note = (
        f"{rate[0]:.0f} images/s in one process of two threads, {rate[1]:.0f} in two of one thread each, on the same "
        f"two cores; {told['calls'] / steps:.1f} collectives a step with {sent:,.0f} bytes of each process, with the "
        f"evaluation at the end and an epoch's end after each step; what trains has "
        f"{4 * report['trainable_parameters']:,}"
    )
    return Row(f"{method}: throughput and traffic", 1, int(sent <= most), 0, alone + together, note)


def _changed(method: str, config: Path, out: Path, one: list[float]) -> Row:
    """SIGTERM reaches one process while a step ends; all end after the next."""
    began, steps, wrong, changed = time.perf_counter(), len(one), [], list[float]()
    for processes, stop_at in ((2, steps // 3), (1, 2 * steps // 3), (2, 0)):
        changed, _ = _run(config, out, processes, launcher=ACCELERATE, stop_at=stop_at)
        if stop_at and len(changed) != stop_at + 1:
            wrong.append(f"asked to stop in step {stop_at + 1}, {processes} ended after {len(changed)}")
    apart = [abs(a - b) / abs(a) for a, b in zip(one, changed, strict=True)]
    note = (
        "SIGTERM to one process after a third and two thirds, two started by accelerate launch --cpu; largest relative "
        f"difference of a loss {max(apart):.1e}"
    )
    good, seconds = sum(x <= RELATIVE for x in apart), time.perf_counter() - began
    check = f"{method}: from two processes to one and back"
    return Row(check, steps, good, len(wrong), seconds, "; ".join([note, *wrong]))


def _config(place: Path, method: str, steps: int) -> Path:
    place.mkdir(parents=True)
    rows = torch.randn(10, 128, generator=torch.Generator().manual_seed(0))
    classes = digits_lt().classes
    prototypes = place / "prototypes.safetensors"
    save_file({"prototypes": rows}, prototypes, metadata={"classes": json.dumps(classes)})
    config = {
        "backbone": {"name": "nano", "flip": False},
        "data": {"name": "digits-semi" if method == "ulfine" else "digits-odd"},
        "method": {"name": method, **settings_of(method, steps)},
        "prototypes": {"weights": str(prototypes)},
        "train": {"batch_size": 200, "precision": "fp32", "device": "cpu", "storage": "fp32"},
    }
    path = place / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def _run(
    config: Path, out: Path, processes: int, *, launcher: Sequence[str] = TORCHRUN, stop_at: int = 0
) -> tuple[list[float], float]:
    """Losses of all steps so far, and the seconds that steps took in all."""
    module = ["-m", "benchmarks.reliability.processes", str(config), str(out), str(stop_at)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *(launcher if processes > 1 else []), *module]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode and not stop_at:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = [json.loads(text) for text in (out / "history.jsonl").read_text().splitlines()]
    phases = {line["phase"]: line["seconds"] for line in lines}  # a phase's last line has its whole time
    return [line["loss"] for line in lines], sum(phases.values())


def digits_odd(*, seed: int = 0) -> Task:
    """The long-tailed digits with a number of test images that two processes cannot share evenly."""
    task = digits_lt(seed=seed)
    return replace(task, name="digits-odd", test=task.test.subset(list(range(TESTED))))


def digits_semi(*, seed: int = 0) -> Task:
    """The same, and 600 others as if nobody had labeled them."""
    more = digits_lt(seed=seed, val_per_class=60).val
    assert isinstance(more, Images)
    return replace(digits_odd(seed=seed), name="digits-semi", unlabeled=more)


def work(config: str, out: str, stop_at: int) -> None:
    """One of the processes; the first one gets SIGTERM at step `stop_at` of all phases, and all end after that step."""
    from lpt import run
    from lpt.config import load_config
    from lpt.engine.stopping import Stopped

    DATA.update({"digits-semi": digits_semi, "digits-odd": digits_odd})
    started = sum(1 for _ in (Path(out) / "history.jsonl").open()) if (Path(out) / "history.jsonl").exists() else 0
    left = stop_at - started

    def show(phase: str, step: int, steps: int, text: str) -> None:
        nonlocal left
        left -= phase in ("phase1", "phase2", "reweighted", "tune", "semi")
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with _telling(Path(out)):
            run.train(load_config(config), out, resume=True, show=show)
    except Stopped as stopped:
        sys.exit(stopped.code)


@contextlib.contextmanager
def _telling(out: Path) -> Iterator[None]:
    """Writes OUT-RANK.json at the end: the rows that were drawn, by step, the files of OUT that were opened to be
    written, and calls and bytes of what went to the other processes."""
    from lpt.engine import loop

    rows: dict[str, dict[str, list[int]]] = {}
    wrote: list[str] = []
    sent = {"calls": 0, "bytes": 0}
    whole = str(out.resolve())

    @contextlib.contextmanager
    def drawn(*given: Any, **settings: Any) -> Iterator[Any]:
        with ahead(*given, **settings) as batches:
            yield (noted(*one) for one in batches)

    def noted(progress: Any, found: Any) -> Any:
        rows[f"{progress.phase}/{progress.step}"] = {name: of.rows.tolist() for name, of in found.items()}
        return progress, found

    def counted(real: Any, which: int) -> Any:
        def call(*given: Any, **rest: Any) -> Any:
            sent["calls"] += 1
            sent["bytes"] += given[which].nbytes
            return real(*given, **rest)

        return call

    def opened(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], str | Path) and (given[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            wrote.extend([str(given[0])] if str(Path(given[0]).absolute()).startswith(whole + os.sep) else [])

    ahead, loop.drawn_ahead = loop.drawn_ahead, drawn
    torch.distributed.all_reduce = counted(torch.distributed.all_reduce, 0)
    torch.distributed.all_gather = counted(torch.distributed.all_gather, 1)
    sys.addaudithook(opened)
    yield
    told = {"rows": rows, "wrote": wrote, **sent}
    out.with_name(f"{out.name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
