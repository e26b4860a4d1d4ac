"""Files from strangers: damaged or made to harm, each must be refused in one sentence or read, and nothing else.

Every file runs in one of two worker processes with a gigabyte to grow by, an audit hook that forbids to write outside
the worker's folder, to start a program and to open a connection, and a watchdog. A worker that dies or hangs has lost
the file that it was at; the note then names the file's kind and seed, which make it again.
"""

import ast
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.reliability import mutations
from benchmarks.reliability.row import Row

ROOT = Path(__file__).parents[2]
FULL = {"prompt": 20_400, "config": 800, "list": 800, "prototypes": 300, "checkpoint": 300, "image": 500}
FULL |= {"weights": 300, "table": 200}
QUICK = {"prompt": 330, "config": 80, "list": 80, "prototypes": 40, "checkpoint": 40, "image": 80}
QUICK |= {"weights": 30, "table": 6}
KINDS = {
    "prompt": "prompt files",
    "config": "configs",
    "list": "list, class and unlabelled files",
    "prototypes": "prototype files",
    "checkpoint": "checkpoints on --resume",
    "image": "images",
    "weights": "backbone weights",
    "table": "metadata and parquet tables",
}
GROWTH = 2**30
SECONDS, WAITS = 2.0, 10.0
"""Of processor time that a file may take, and by the clock, since two workers share the machine with others."""
HANGS = 60.0
"""Seconds without an answer after which a worker is ended."""
LONGEST = 500


def rows(quick: bool) -> list[Row]:
    found = mutated(QUICK, workers=1, first=1000) if quick else mutated(FULL, workers=2)
    return [*found, by_command_line(quick), static()]


def mutated(numbers: dict[str, int], *, workers: int, first: int = 0) -> list[Row]:
    """A row for each kind of file; seeds from `first` on, of which the lowest are the huge images."""
    jobs = [(kind, seed) for kind, n in numbers.items() for seed in range(first, first + n)]
    began, spent = time.perf_counter(), Counter[str]()
    outcomes, problems = {kind: Counter[str]() for kind in numbers}, {kind: list[str]() for kind in numbers}
    with tempfile.TemporaryDirectory() as folder:
        make_subjects(Path(folder))
        shares = [jobs[i::workers] for i in range(workers)]
        for kind, seed, seconds, outcome, problem in _answers(Path(folder), shares):
            outcomes[kind][outcome] += 1
            spent[kind] += seconds
            if problem:
                problems[kind].append(f"seed {seed}: {problem}")
    print(f"(all kinds {time.perf_counter() - began:.0f} s)", file=sys.stderr)
    return [
        Row(
            f"hostile {KINDS[kind]}",
            n,
            n - len(problems[kind]),
            len(problems[kind]),
            spent[kind],
            ", ".join(f"{count} {what}" for what, count in sorted(outcomes[kind].items()))
            + "".join(f"; {problem}" for problem in problems[kind][:20]),
        )
        for kind, n in numbers.items()
    ]


Answer = tuple[str, int, float, str, str]


def _answers(folder: Path, shares: list[list[tuple[str, int]]]) -> Iterator[Answer]:
    """(kind, seed, seconds, outcome, problem) of every job. A worker that died or hangs is started again behind the job
    that it was at."""
    running: dict[int, tuple[subprocess.Popen[str], list[tuple[str, int]], float]] = {}

    def start(left: list[tuple[str, int]]) -> None:
        if left:
            place = Path(tempfile.mkdtemp(dir=folder))
            (place / "jobs.json").write_text(json.dumps(left))
            command = [sys.executable, "-m", "benchmarks.reliability.hostile", str(folder), str(place)]
            quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            quiet |= {"HF_HOME": str(place / "hub"), "HF_DATASETS_CACHE": str(place / "hub"), "TMPDIR": str(place)}
            worker = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=place, env=quiet
            )
            assert worker.stdout is not None
            running[worker.stdout.fileno()] = (worker, left, time.monotonic() + 2 * HANGS)

    for share in shares:
        start(share)
    while running:
        ready, _, _ = select.select(list(running), [], [], 1.0)
        for file in ready:
            worker, left, _ = running.pop(file)
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if line.endswith("\n"):
                seconds, outcome, problem = json.loads(line)
                yield *left[0], seconds, outcome, problem
                if left[1:]:
                    running[file] = (worker, left[1:], time.monotonic() + HANGS)
                else:
                    worker.communicate()
            else:
                worker.communicate()
                yield *left[0], 0.0, "lost", f"the process ended with {worker.returncode}"
                start(left[1:])
        for file, (worker, left, until) in list(running.items()):
            if time.monotonic() > until:
                del running[file]
                worker.kill()
                worker.communicate()
                yield *left[0], HANGS, "lost", f"no answer for {HANGS:.0f} s"
                start(left[1:])


# What is damaged: real files, made here.


def backbone() -> Any:
    """A tiny ViT with a projection to a joint space, always the same."""
    import torch

    from lpt.model.backbones import timm_vit

    small = timm_vit.untrained("vit_tiny_patch16_224", image_size=32, depth=2, embed_dim=32, num_heads=2)
    small.projection = torch.randn(32, 16, generator=torch.Generator().manual_seed(5))
    return small


def models() -> dict[str, Any]:
    """A model of every sort that a prompt file can hold."""
    import torch

    from lpt.model.adapters import with_adapter
    from lpt.model.classifier import PromptedClassifier
    from lpt.model.heads import Calibration, CosineHead, FusedHead, LinearHead, NeighbourHead
    from lpt.model.prompts import DeepPrompt, PromptPool, ShallowPrompt

    bare, classes = backbone(), ("ant", "bee", "cat", "dog")
    generator = torch.Generator().manual_seed(0)

    def cosine(width: int = 32, project: Any = None) -> CosineHead:
        return CosineHead(num_classes=4, width=width, scale=20.0, generator=generator, project=project)

    def deep() -> DeepPrompt:
        return DeepPrompt(layers=2, length=3, width=32, generator=generator)

    def pool() -> PromptPool:
        return PromptPool(
            size=5, topk=2, prefix_blocks=1, depth=2, length=3, width=32, key_width=32, generator=generator
        )

    bank = torch.nn.functional.normalize(torch.randn(49, 32, generator=generator), dim=1)
    fused = {"num_classes": 4, "width": 32, "joint_width": 16, "project": bare.project}
    made = {
        "lpt": PromptedClassifier(bare, cosine(), classes=classes, shared=deep(), pool=pool(), query_head=cosine()),
        "shallow": PromptedClassifier(
            bare, cosine(), classes=classes, shared=ShallowPrompt(length=3, width=32, generator=generator)
        ),
        "adaptformer": PromptedClassifier(with_adapter(bare, "adaptformer", bottleneck=2), cosine(), classes=classes),
        "lora": PromptedClassifier(with_adapter(bare, "lora", rank=2), cosine(), classes=classes),
        "norm": PromptedClassifier(with_adapter(bare, "norm"), LinearHead(num_classes=4, width=32), classes=classes),
        "knn": PromptedClassifier(bare, NeighbourHead(bank=bank, counts=_counts(), k=5), classes=classes),
        "fused": PromptedClassifier(bare, FusedHead(**fused, fusion="daso", temperature=0.3), classes=classes),
        "zscore": PromptedClassifier(bare, FusedHead(**fused, fusion="zscore"), classes=classes, shared=deep()),
        "zero_shot": PromptedClassifier(bare, cosine(16, bare.project), classes=classes),
        "calibrated": PromptedClassifier(bare, cosine(), classes=classes, calibration=Calibration(4), shared=deep()),
    }
    with torch.no_grad():  # as if it had learned something
        for model in made.values():
            for value in model.learned_state().values():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return {name: model.only_train().eval() for name, model in made.items()}


def _counts() -> Any:
    import torch

    return torch.tensor([30, 12, 5, 2])


def make_subjects(folder: Path) -> None:
    """Every file that is going to be damaged, in `folder`."""
    import torch
    from safetensors.torch import save_file

    from lpt.prompt_file import save_prompt

    (folder / "prompts").mkdir()
    for name, model in models().items():
        settings = {"epochs": [1, 1], "lr": [0.02, 0.02], "inside": {"deep": [1, {"a": None}]}}
        facts = {"settings": settings, "data": {"name": "digits-lt", "settings": {"name": "digits-lt"}}}
        metrics, storage = {"few": 0.5, "many": None, "nll": 1.25}, "fp32" if name in ("lora", "shallow") else "fp16"
        path = folder / "prompts" / f"{name}.safetensors"
        save_prompt(path, model, method=name, counts=_counts(), storage=storage, metrics=metrics, **facts)
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    names = json.dumps(["ant", "bee", "cat", "dog"])
    save_file({"prototypes": rows}, folder / "prototypes.safetensors", metadata={"classes": names})
    save_file(backbone().vit.state_dict(), folder / "weights.safetensors", metadata={"about": "{}"})
    with contextlib.suppress(_Killed):
        resumed(folder, backbone(), killed_at=2)


class _Killed(Exception):
    pass


def resumed(folder: Path, bare: Any, *, killed_at: int | None = None) -> Any:
    """A run of three steps from the checkpoint in `folder`, if there is one; the weights that it ends with."""
    import torch
    import torch.nn.functional as F

    from lpt.data.samplers import InstanceBalanced
    from lpt.data.task import Images
    from lpt.engine.batches import Stream
    from lpt.engine.loop import Fit
    from lpt.model.classifier import PromptedClassifier
    from lpt.model.heads import CosineHead

    pixels = torch.randint(0, 255, (12, 3, 16, 16), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    images = Images(pixels, torch.arange(4).repeat(3), tuple(str(i) for i in range(12)))
    head = CosineHead(num_classes=4, width=32, scale=20.0, generator=torch.Generator().manual_seed(0))
    model = PromptedClassifier(bare, head, classes=("ant", "bee", "cat", "dog")).only_train("head.")
    fit = Fit(images, bare.preprocess, 4, checkpoints=folder, checkpoint_seconds=0.0, run_hash="a", count_flops=False)

    def step(model: Any, batches: Any, progress: Any) -> dict[str, Any]:
        if progress.step == killed_at:
            raise _Killed
        fit.memory.note(rows=batches["all"].rows)
        fit.memory.state["queue"] = torch.ones(3)
        return {"loss": F.cross_entropy(20 * model(batches["all"].views).logits, batches["all"].labels)}

    stream = {"all": Stream(InstanceBalanced(images.labels, batch_size=4, seed=0))}
    fit("phase1", model, step, stream, steps=3, steps_per_epoch=3, optimizer="adamw", lr=1e-3, weight_decay=0.0)
    return head.weight.detach()


# One file. A trial returns what a reader made of it; a problem is an AssertionError, or an error of a wrong class.

Trial = Callable[[random.Random], str]


@dataclass
class Trials:
    """What a worker needs: `folder` holds the real files, `place` is where it may write, `seed` is the trial's."""

    folder: Path
    place: Path
    seed: int = 0

    def __post_init__(self) -> None:
        import torch

        from lpt.data.preprocess import File, Preprocess

        self.bare = backbone()
        self.prompts = {path.stem: path.read_bytes() for path in sorted((self.folder / "prompts").iterdir())}
        self.views = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        self.expected = {name: self._logits(content) for name, content in self.prompts.items()}
        resumed(self.place, self.bare)
        self.images = mutations.image_files()
        _bombs()  # they take seconds to make, which are not of any trial
        Preprocess(size=32).cut([File("warm", self.images[0][1])])  # nor is the import of Pillow's formats
        self._small_folder()

    def prompt(self, rng: random.Random) -> str:
        import torch

        from lpt.errors import LptError

        name, way = rng.choice(list(self.prompts)), rng.choice(list(mutations.PROMPTS))
        sealed = rng.random() < 0.5 or way == "harmless"
        real = self.prompts[name] if sealed else mutations.unsealed(self.prompts[name])
        try:
            logits = self._logits(mutations.PROMPTS[way](real, rng))
        except LptError as error:
            assert way != "harmless", f"{name}: a harmless change is refused: {str(error)[:150]}"
            raise
        assert bool(torch.isfinite(logits).all()), f"{name}, {way}: the answer is not finite"
        if logits.shape == self.expected[name].shape and torch.equal(logits, self.expected[name]):
            return "read to the same numbers"
        assert not sealed, f"{name}, {way}: other numbers, though it is sealed"
        return "read to other numbers, of those whose seal was taken off"

    def _logits(self, content: bytes) -> Any:
        import torch

        from lpt.prompt_file import load_prompt, read_prompt

        path = self.place / "p.safetensors"
        path.write_bytes(content)
        read_prompt(path)
        model = load_prompt(path, self.bare)
        with torch.no_grad():
            return model.probabilities(model(self.views).logits)

    def config(self, rng: random.Random) -> str:
        from lpt.config import load_config

        real = rng.choice(sorted((ROOT / "configs").rglob("*.yaml")))
        path = self.place / "c.yaml"
        path.write_bytes(mutations.yaml_text(real.read_bytes(), rng))
        override = [f"{rng.choice(('train.seed', 'method.epochs', 'x.y'))}={rng.choice(mutations.YAML)}"]
        load_config(path, override if rng.random() < 0.2 else ())
        return "read"

    def _small_folder(self) -> None:
        """Three classes of empty files: lists are read before images are."""
        for name in ("a", "b", "c"):
            (self.place / "root" / name).mkdir(parents=True)
            for i in range(4):
                (self.place / "root" / name / f"{i} of {name}.png").touch()

    def list(self, rng: random.Random) -> str:
        from lpt.data.lists import imagenet_lt, own_lists, read_unlabeled

        root = self.place / "root"
        train = "".join(f"{name}/{i} of {name}.png {k}\n" for k, name in enumerate("abc") for i in range(3))
        test = "".join(f"{name}/3 of {name}.png {k}\n" for k, name in enumerate("abc"))
        texts = {"train": train, "test": test, "unlabeled": test.replace(" 1", "").replace(" 2", " -1")}
        texts["classes"] = "ape\nbat\ncow\n"
        wrong = rng.choice(list(texts))
        for role, text in texts.items():
            damaged = mutations.list_text(text.encode(), rng) if role == wrong else text.encode()
            (root / f"{role}.txt").write_bytes(damaged)
        if wrong == "train" and rng.random() < 0.2:
            for role in ("train", "val", "test"):
                (root / f"ImageNet_LT_{role}.txt").write_bytes((root / "train.txt").read_bytes())
            imagenet_lt(str(root))
        files = {role: str(root / f"{role}.txt") for role in texts if role != "classes" or wrong == role}
        task = own_lists(str(root), **files)
        task.manifest()
        read_unlabeled(root / "unlabeled.txt", len(task.classes))
        return "read"

    def prototypes(self, rng: random.Random) -> str:
        import torch

        from lpt.model.backbones.base import read_prototypes

        path = self.place / "prototypes.safetensors"
        path.write_bytes(mutations.safetensors((self.folder / "prototypes.safetensors").read_bytes(), rng))
        self.bare.prototypes = read_prototypes(path)
        try:
            found = self.bare.class_prototypes(["ant", "bee", "cat", "dog"])
        except ValueError as error:  # says nothing of the file, but what is missing or too wide
            assert "prototypes" in str(error) and len(str(error)) < LONGEST, str(error)
            return "refused"
        assert found.shape == (4, 16) and bool(torch.isfinite(found).all())
        return "read"

    def checkpoint(self, rng: random.Random) -> str:
        import torch

        path = self.place / "phase1.safetensors"
        path.write_bytes(mutations.safetensors((self.folder / "phase1.safetensors").read_bytes(), rng))
        weight = resumed(self.place, self.bare)
        assert bool(torch.isfinite(weight).all()), "the resumed run ends with numbers that are not finite"
        return "read"

    def weights(self, rng: random.Random) -> str:
        import torch

        from lpt.model.backbones.timm_vit import check_fit, read_weights

        path, wanted = self.place / "weights.safetensors", self.bare.vit.state_dict()
        path.write_bytes(mutations.safetensors((self.folder / "weights.safetensors").read_bytes(), rng))
        found = read_weights(path)
        check_fit(wanted, found, path, "a tiny ViT")
        same = all(torch.equal(found[name], value) for name, value in wanted.items())
        return "read to the same numbers" if same else "read to other numbers: weights have no seal, but a fingerprint"

    def table(self, rng: random.Random) -> str:
        from lpt.data import load_task

        root = self.place / "tables"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, content in mutations.table_files(rng).items():
            (root / name).write_bytes(content)
        load_task("folder", root=str(root)).manifest()
        return "read"

    def image(self, rng: random.Random) -> str:
        from lpt.data.preprocess import File, Preprocess

        if self.seed < len(_bombs()):
            name, content = _bombs()[self.seed]
        else:
            name, content = rng.choice(self.images)
            content = mutations.image(content, rng)
        path = self.place / "image.jpg"
        path.write_bytes(content)
        file = File(str(path), rng.choice((path, content)))
        chance = rng.choice((None, self._chance))
        view = Preprocess(size=32, square=rng.random() < 0.2)._cut(file, chance)
        assert view.shape == (3, 32, 32), f"{name}: a view of shape {list(view.shape)}"
        return "read"

    @property
    def _chance(self) -> Any:
        import torch

        return torch.full((1, 5), 0.4)


_bombs = cache(mutations.bombs)


def judged(trial: Callable[[], str], place: Path) -> tuple[str, str]:
    """(outcome, problem): refusals are sentences that name a file of `place`, anything else is a problem."""
    from lpt.errors import ConfigError, LptError

    try:
        return trial(), ""
    except LptError as error:
        said = error.mistakes if isinstance(error, ConfigError) else [str(error)]
        named = any(str(place) in one or "list" in one for one in said) or isinstance(error, ConfigError)
        if bad := [one for one in said if len(one) > LONGEST or not one.isprintable()]:
            return "refused", f"said in {len(bad[0])} letters: {bad[0][:150]!r}"
        if any(word in one for one in said for word in ("allocate", "MemoryError", "not enough memory")):
            return "refused", f"for want of memory: {said[0][:150]!r}"
        return "refused", "" if named else f"without its name: {said[0][:150]!r}"
    except BaseException as error:  # even a KeyboardInterrupt of a library
        return "lost", f"{type(error).__name__}: {str(error)[:150]}"


def worker(folder: Path, place: Path) -> None:
    """Answers for every job, a line each."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    trials = Trials(folder, place)
    breaches: list[str] = []
    _guard(place, breaches)
    start = _resident()
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + 3 * GROWTH, resource.RLIM_INFINITY))
    for kind, seed in json.loads((place / "jobs.json").read_text()):
        began, clock, before = time.process_time(), time.monotonic(), _peak()
        trials.seed = seed
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome, problem = judged(lambda k=kind, s=seed: getattr(trials, k)(random.Random(f"{k} {s}")), place)
        seconds, waited = time.process_time() - began, time.monotonic() - clock
        if _peak() > max(before, start + GROWTH):
            problem = problem or f"memory grew by {(_peak() - start) / 2**20:.0f} MB"
        if seconds > SECONDS or waited > WAITS:
            problem = problem or f"{seconds:.1f} s of the processor, {waited:.1f} by the clock"
        if breaches:
            problem, outcome = breaches.pop(), "lost"
            breaches.clear()
        answers.write(json.dumps([seconds, outcome, problem]) + "\n")
        answers.flush()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CHANGING = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
}


def _guard(place: Path, breaches: list[str]) -> None:
    """From now on `breaches` gets what a file makes this process do that no file may."""
    allowed = (os.path.realpath(place), "/dev/null")

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            breaches.append(f"{event} {str(given)[:100]}")
        elif event == "open" and isinstance(given[0], str | bytes | os.PathLike):
            writes = (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.realpath(os.fsdecode(given[0])).startswith(allowed):
                breaches.append(f"writes {os.fsdecode(given[0])[:100]}")
        elif event in CHANGING:
            paths = [os.fsdecode(path) for path in given[:2] if isinstance(path, str | bytes | os.PathLike)]
            if outside := [path for path in paths if not os.path.realpath(path).startswith(allowed)]:
                breaches.append(f"{event} {outside[0][:100]}")

    sys.addaudithook(hook)


# Through the command line, and what the package's source may not hold.


def by_command_line(quick: bool) -> Row:
    """`lpt inspect`, `predict` and `evaluate` of files that must be read, and of some that must be refused: exit code
    2 and one line. Nothing is printed that a terminal would obey."""
    import numpy as np
    from PIL import Image

    began, problems, tried = time.perf_counter(), list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        whole = on_nano(place / "whole.safetensors").read_bytes()
        picture = place / "i.png"
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
        ways: dict[str, Callable[[dict[str, Any]], Any]] = {
            "unsealed": lambda tree: tree,
            "deep": lambda tree: "[" * 100_000,
            "format": lambda tree: tree | {"format": "1\n" * 10_000},
            "counts": lambda tree: tree | {"counts": [10**18] * 10},
            "metrics": lambda tree: tree | {"metrics": {"nll": "x", "few": {}}},
            "backbone": lambda tree: tree | {"backbone": {**tree["backbone"], "name": "hf-hub:evil/model"}},
            "giant": lambda tree: (
                tree | {"backbone": {**tree["backbone"], "name": "untrained:vit_gigantic_patch14_clip_224"}}
            ),
            "data": lambda tree: tree | {"data": {"settings": {"name": "lists", "train": "/dev/zero"}}},
            "terminal": lambda tree: (
                tree
                | {"method": "\x1b[2J", "classes": [f"\x1b[{k}m\n" for k in range(10)], "versions": {"\x1b[2J": "\r"}}
            ),
        }
        bare = mutations.unsealed(whole)
        files = {"whole": whole, "cut": whole[:400], "sealed": whole[:-1] + bytes([whole[-1] ^ 1])}
        files |= {"pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR."}
        files |= {way: mutations.with_lpt(bare, change) for way, change in ways.items()}
        commands = {"inspect": [], "predict": [str(picture)], "evaluate": ["data.name=digits-lt"]}
        read = {"inspect": {"whole", "unsealed", "backbone", "giant", "data", "terminal"}}
        read |= {"predict": {"whole", "unsealed", "data", "terminal"}, "evaluate": {"whole", "unsealed", "data"}}
        for way, content in files.items():
            path = place / f"{way}.safetensors"
            path.write_bytes(content)
            for command, rest in commands.items():
                if quick and (way, command) not in {
                    ("whole", "predict"),
                    ("giant", "predict"),
                    ("terminal", "inspect"),
                }:
                    continue
                tried += 1
                line = [sys.executable, "-m", "lpt", command, str(path), *rest]
                ended = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
                said = ended.stderr.strip().splitlines()
                fine = ended.returncode == 2 and len(said) == 1 and len(said[0]) < LONGEST
                fine = ended.returncode == 0 if way in read[command] else fine
                if not fine or not (ended.stdout + ended.stderr).replace("\n", "").isprintable():
                    problems.append(
                        f"{command} {way}: code {ended.returncode}, {(ended.stdout + ended.stderr)[-200:]!r}"
                    )
    note = "inspect, predict, evaluate: what is whole is read, else exit code 2 and one line"
    note += "".join(f"; {problem}" for problem in problems)
    seconds = time.perf_counter() - began
    return Row("hostile prompt files by command line", tried, tried - len(problems), len(problems), seconds, note)


def on_nano(path: Path) -> Path:
    """A prompt file for the backbone that comes with the package, and for digits."""
    from lpt.data import load_task
    from lpt.model.backbones import load_backbone
    from lpt.model.classifier import PromptedClassifier
    from lpt.model.heads import CosineHead
    from lpt.model.prompts import DeepPrompt
    from lpt.prompt_file import save_prompt

    bare, task = load_backbone("nano"), load_task("digits-lt")
    head = CosineHead(num_classes=10, width=bare.feature_width, scale=20.0)
    shared = DeepPrompt(layers=bare.depth, length=3, width=bare.width)
    model = PromptedClassifier(bare, head, classes=task.classes, shared=shared).only_train().eval()
    data = {"name": task.name, "settings": {"name": "digits-lt"}}
    save_prompt(path, model, method="lpt", counts=task.counts, data=data, metrics={"few": 0.5})
    return path


NO_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "jsonpickle"}
NO_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "faiss.read_index",
    "yaml.load",
    "yaml.load_all",
}
NO_CALLS |= {"yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "torch.jit.load"}
NO_WORDS = {"allow_pickle", "trust_remote_code", "UnsafeLoader", "FullLoader", "shell"}


def static() -> Row:
    """Nothing in the package unpickles, evaluates, or trusts code that comes with data."""
    began, found = time.perf_counter(), list[str]()
    files = sorted((ROOT / "lpt").rglob("*.py"))
    bad = {path: list(unsafe(path.read_text())) for path in files}
    found = [f"{path.relative_to(ROOT)}:{what}" for path, some in bad.items() for what in some]
    lost = sum(bool(some) for some in bad.values())
    note = (
        "no pickle, torch.load with pickles, eval, exec, unsafe YAML, faiss.read_index, trust_remote_code; torchvision "
        "unpickles CIFAR's own files for us, after it has checked their MD5"
    )
    note += "".join(f"; {one}" for one in found)
    return Row(
        "static: source files that run nothing from data",
        len(files),
        len(files) - lost,
        lost,
        time.perf_counter() - began,
        note,
    )


def unsafe(source: str) -> Iterator[str]:
    """`line: what` of everything in a module that could run what a file says.

    >>> list(unsafe("import pickle; torch.load(f); torch.load(f, weights_only=True); re.compile(p)"))
    ['1: import pickle', '1: torch.load']
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"{node.lineno}: import {name}" for name in names if name.partition(".")[0] in NO_IMPORTS)
            if isinstance(node, ast.ImportFrom):  # calls are known by their module's name
                inside = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (f"{node.lineno}: {name}" for name in inside if name in NO_CALLS | {"torch.load"})
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            pickled = name == "torch.load" and given.get("weights_only") != "True"
            if pickled or name in NO_CALLS:
                yield f"{node.lineno}: {name}"
            yield from (f"{node.lineno}: {word}" for word in NO_WORDS & given.keys() if given[word] != "False")
        elif isinstance(node, ast.Attribute) and node.attr in NO_WORDS:
            yield f"{node.lineno}: {node.attr}"


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
