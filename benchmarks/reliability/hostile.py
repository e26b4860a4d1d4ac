"""Untrusted files: damaged or made to harm, each must be refused in one sentence or read, and nothing else.

Every file runs in one of two worker processes with a gigabyte to grow by, an audit hook that forbids to write outside
the worker's folder, to start a program and to open a connection, and a watchdog. Hypothesis draws the damage and, where
a file does what none may, looks for the simplest one that does; the note names it, and the seed that makes it again. A
worker that dies or hangs has lost the file that it was at, and another one continues with the next seed.
"""

import ast
import contextlib
import faulthandler
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from PIL import Image

from benchmarks.reliability import damage
from benchmarks.reliability.damage import Choose
from benchmarks.reliability.outputs import Commands
from benchmarks.reliability.row import Row
from benchmarks.reliability.subjects import CLASSES, backbone, make_subjects, prompt_on_nano, resumed
from lpt.config import load_config
from lpt.data import load_task
from lpt.data.lists import imagenet_lt, own_lists, read_unlabeled
from lpt.data.preprocess import File, Preprocess
from lpt.device import peak_memory, used_memory
from lpt.errors import ConfigError, LptError
from lpt.model.backbones.base import read_prototypes
from lpt.model.backbones.timm_vit import check_fit, read_weights
from lpt.prompt_file import load_prompt, read_prompt

ROOT = Path(__file__).parents[2]
FULL = {"prompt": 20_400, "config": 800, "list": 800, "prototypes": 300, "checkpoint": 300, "image": 500}
FULL |= {"served": 20_000, "weights": 300, "table": 200, "bomb": 28}  # every bomb in each of two workers
QUICK = {"prompt": 330, "config": 80, "list": 80, "prototypes": 40, "checkpoint": 40, "image": 80}
QUICK |= {"served": 60, "weights": 30, "table": 6}
KINDS = {
    "prompt": "prompt files",
    "served": "prompt files sealed anew, through inspect, predict and evaluate",
    "config": "configs",
    "list": "list, class and unlabeled files",
    "prototypes": "prototype files",
    "checkpoint": "checkpoints on --resume",
    "image": "images",
    "bomb": "huge images",
    "weights": "backbone weights",
    "table": "metadata and parquet tables",
}
CPU = torch.device("cpu")
GROWTH = 2**30
SECONDS, WAITS = 2.0, 10.0
"""Of processor time that a file may take, and by the clock, since two workers share the machine with others."""
COMMANDS = 4
"""Times as much where three commands are run on it, two of which answer images of up to 1,024 pixels."""
HANGS = 60.0
"""Seconds without an answer after which a worker ends itself."""
LONGEST = 500
SHRUNK = 3
"""So many problems of a kind are made simpler; that takes a while, so the rest are told as they are."""


def rows(quick: bool) -> list[Row]:
    damaged = mutated(QUICK, workers=1) if quick else mutated(FULL, workers=2)
    return [*damaged, by_command_line(quick), static()]


Answer = tuple[str, float, str, str]
"""Kind, seconds, outcome, problem."""


def mutated(numbers: dict[str, int], *, workers: int) -> list[Row]:
    """A row for each kind of file. With two workers each has half of every kind."""
    began, answers = time.perf_counter(), list[Answer]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as threads:
        make_subjects(Path(folder))
        shares = [{kind: (n + i) // workers for kind, n in numbers.items()} for i in range(workers)]
        for share in threads.map(lambda i: list(_answers(Path(folder), shares[i], 1000 * i)), range(workers)):
            answers += share
    print(f"(all kinds {time.perf_counter() - began:.0f} s)", file=sys.stderr)
    return [_row(kind, [answer for answer in answers if answer[0] == kind]) for kind in numbers]


def _row(kind: str, answers: list[Answer]) -> Row:
    outcomes = Counter(outcome for _, _, outcome, _ in answers)
    problems = [problem for *_, problem in answers if problem]
    note = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    note = "; ".join([note, *problems[:20]])
    tried, seconds = len(answers), sum(spent for _, spent, _, _ in answers)
    return Row(f"hostile {KINDS[kind]}", tried, tried - len(problems), len(problems), seconds, note)


def _answers(folder: Path, share: dict[str, int], seed: int) -> Iterator[Answer]:
    """One for every file of a share. A worker that died is started again behind the file that it was at."""
    left, idle = [kind for kind, number in share.items() for _ in range(number)], 0
    while left:
        room = Path(tempfile.mkdtemp(dir=folder))
        job = [str(folder), str(room), str(seed), json.dumps(Counter(left))]
        quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        quiet |= {"HF_HOME": str(room / "hub"), "HF_DATASETS_CACHE": str(room / "hub"), "TMPDIR": str(room)}
        command = [sys.executable, "-m", "benchmarks.reliability.hostile", *job]
        with (
            (room / "stderr").open("w") as errors,
            subprocess.Popen(command, cwd=room, env=quiet, stdout=subprocess.PIPE, stderr=errors, text=True) as worker,
        ):
            before = len(left)
            for line in filter(lambda line: line.endswith("\n"), worker.stdout or ()):  # a killed one may break off
                yield left.pop(0), *json.loads(line)
        idle = idle + 1 if len(left) == before else 0
        if left:
            last = (room / "stderr").read_text(errors="replace").strip().rpartition("\n")[2][:150]
            assert idle < 3, f"three workers in a row ended before their first answer: {last}"
            yield left.pop(0), 0.0, "lost", f"seed {seed}: the process ended with {worker.returncode} {last}".rstrip()
        seed += 10_000


# One file. A trial chooses the damage, and returns what is then to be tried: a reader, which says what it made of the
# file. A problem is an AssertionError, or an error of a wrong class.

Reading = Callable[[], str]


class Trials:
    """What a worker needs: `folder` holds the real files, `room` is where it may write."""

    def __init__(self, folder: Path, room: Path):
        self.folder, self.room, self.bare = folder, room, backbone()
        self.prompts = {path.stem: path.read_bytes() for path in sorted((folder / "prompts").iterdir())}
        self.views = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        self.expected = {name: self._answer(content) for name, content in self.prompts.items()}
        self.configs = [path.read_bytes() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
        resumed(room, self.bare)
        self.images, self.bombs = damage.image_files(), dict[str, bytes]()
        self.commands = Commands(room)
        list(self.commands.answers(min((folder / "prompts").iterdir())))  # what they import is imported now
        Preprocess(size=32).cut([File("warm", self.images["JPEG RGB"])])  # Pillow imports its formats when needed
        for name in ("a", "b", "c"):  # empty files: lists are read before images are
            (room / "root" / name).mkdir(parents=True)
            for i in range(4):
                (room / "root" / name / f"{i} of {name}.png").touch()

    def _damaged(self, name: str, choose: Choose) -> Path:
        """A safetensors file in the worker's folder, damaged."""
        path, way = self.room / name, choose.one(damage.SAFETENSORS)
        path.write_bytes(damage.SAFETENSORS[way]((self.folder / name).read_bytes(), choose))
        return path

    def prompt(self, choose: Choose) -> Reading:
        name, way = choose.one(self.prompts), choose.one(damage.PROMPTS)
        seal = choose.one(["kept", "kept", "taken off", "made anew"])
        whole = damage.unsealed(self.prompts[name]) if seal == "taken off" else self.prompts[name]
        content = damage.PROMPTS[way](whole, choose)
        content = damage.sealed_anew(content) if seal == "made anew" else content

        def read() -> str:
            try:
                answer = self._answer(content)
            except LptError as error:
                assert way != "harmless", f"a harmless change is refused: {str(error)[:150]}"
                raise
            assert bool(torch.isfinite(answer).all()), "the answer is not finite"
            if answer.shape == self.expected[name].shape and torch.equal(answer, self.expected[name]):
                return "read to the same numbers"
            assert seal != "kept" and way != "harmless", "other numbers, though it is sealed"
            return "read to other numbers, of those whose seal was taken off or made anew"

        return read

    def served(self, choose: Choose) -> Reading:
        name, way = choose.one(self.prompts), choose.one(damage.STRUCTURED)
        path = self.room / "p.safetensors"
        path.write_bytes(damage.sealed_anew(damage.STRUCTURED[way](self.prompts[name], choose)))

        def read() -> str:
            codes = []
            for command, code, problem in self.commands.answers(path):
                assert not problem, f"{command}: {problem}"
                codes.append(code)
            if codes == [2, 2, 2]:
                return "refused"
            return "read" if codes == [0, 0, 0] else f"some refused ({way})"

        return read

    def _answer(self, content: bytes) -> Any:
        path = self.room / "p.safetensors"
        path.write_bytes(content)
        read_prompt(path)
        model = load_prompt(path, self.bare)
        with torch.no_grad():
            return model.probabilities(model(self.views).logits)

    def config(self, choose: Choose) -> Reading:
        path, overrides = self.room / "c.yaml", list[str]()
        path.write_bytes(damage.damaged_yaml(choose.one(self.configs), choose))
        if choose.rarely(5):
            overrides.append(f"{choose.one(['train.seed', 'method.epochs', 'x.y'])}={choose(damage.YAML_TEXT)}")
        return lambda: load_config(path, overrides) and "read"

    def list(self, choose: Choose) -> Reading:
        root = self.room / "root"
        train = "".join(f"{name}/{i} of {name}.png {k}\n" for k, name in enumerate("abc") for i in range(3))
        test = "".join(f"{name}/3 of {name}.png {k}\n" for k, name in enumerate("abc"))
        unlabeled = test.replace(" 1", "").replace(" 2", " -1")
        texts = {"train": train, "test": test, "unlabeled": unlabeled, "classes": "ape\nbat\ncow\n"}
        wrong = choose.one(texts)
        for role, text in texts.items():
            content = damage.damaged_list(text.encode(), choose) if role == wrong else text.encode()
            (root / f"{role}.txt").write_bytes(content)
        published = wrong == "train" and choose.rarely(5)

        def read() -> str:
            if published:
                for role in ("train", "val", "test"):
                    shutil.copyfile(root / "train.txt", root / f"ImageNet_LT_{role}.txt")
                imagenet_lt(str(root))
            files = {role: str(root / f"{role}.txt") for role in texts if role != "classes" or wrong == role}
            task = own_lists(str(root), **files)
            task.manifest()
            read_unlabeled(root / "unlabeled.txt", len(task.classes))
            return "read"

        return read

    def prototypes(self, choose: Choose) -> Reading:
        path = self._damaged("prototypes.safetensors", choose)

        def read() -> str:
            self.bare.prototypes = read_prototypes(path)
            try:
                vectors = self.bare.class_prototypes(CLASSES)
            except ValueError as error:  # says nothing of the file, but what is missing or too wide
                assert "prototypes" in str(error) and len(str(error)) < LONGEST, str(error)
                return "refused"
            assert vectors.shape == (4, 16) and bool(torch.isfinite(vectors).all())
            return "read"

        return read

    def checkpoint(self, choose: Choose) -> Reading:
        self._damaged("phase1.safetensors", choose)

        def read() -> str:
            weight = resumed(self.room, self.bare)
            assert bool(weight.isfinite().all()), "the resumed run ends with numbers that are not finite"
            return "read"

        return read

    def weights(self, choose: Choose) -> Reading:
        path, wanted = self._damaged("weights.safetensors", choose), self.bare.vit.state_dict()

        def read() -> str:
            tensors = read_weights(path)
            check_fit(wanted, tensors, path, "a tiny ViT")
            if all(tensors[name].equal(value) for name, value in wanted.items()):
                return "read to the same numbers"
            return "read to other numbers: weights have no seal, but a fingerprint"

        return read

    def table(self, choose: Choose) -> Reading:
        root = self.room / "tables"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, content in damage.table_files(choose).items():
            (root / name).write_bytes(content)
        return lambda: load_task("folder", root=str(root)).manifest() and "read"

    def image(self, choose: Choose) -> Reading:
        return self._view(damage.damaged_bytes(self.images[choose.one(self.images)], choose), choose)

    def bomb(self, choose: Choose) -> Reading:
        self.bombs = self.bombs or damage.bombs()  # takes seconds, which are of no trial
        return self._view(self.bombs[choose.one(self.bombs)])

    def _view(self, content: bytes, choose: Choose | None = None) -> Reading:
        path = self.room / "image.jpg"
        path.write_bytes(content)
        as_path, training, square = (choose is not None and choose.rarely(n) for n in (2, 2, 5))

        def read() -> str:
            chance = torch.full((1, 5), 0.4) if training else None
            view = Preprocess(size=32, square=square).cut_one(File(str(path), path if as_path else content), chance)
            assert view.shape == (3, 32, 32), f"a view of shape {list(view.shape)}"
            return "read"

        return read


def judged(reading: Reading, room: Path) -> tuple[str, str]:
    """(outcome, problem): refusals are sentences that name a file of `room`, anything else is a problem."""
    try:
        return reading(), ""
    except LptError as error:
        sentences = error.mistakes if isinstance(error, ConfigError) else [str(error)]
        named = any(str(room) in one or "list" in one for one in sentences) or isinstance(error, ConfigError)
        if bad := [one for one in sentences if len(one) > LONGEST or not one.isprintable()]:
            return "refused", f"said in {len(bad[0])} letters: {bad[0][:150]!r}"
        if any(word in one for one in sentences for word in ("allocate", "MemoryError", "not enough memory")):
            return "refused", f"for want of memory: {sentences[0][:150]!r}"
        return "refused", "" if named else f"without its name: {sentences[0][:150]!r}"
    except BaseException as error:  # even a KeyboardInterrupt of a library
        return "lost", f"{type(error).__name__}: {str(error)[:150]}"


class Worker:
    """What runs in a process of its own and answers for every file, a line each."""

    def __init__(self, folder: Path, room: Path):
        faulthandler.dump_traceback_later(2 * HANGS, exit=True)
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        torch.set_num_threads(1)
        self.room, self.trials, self.breaches = room, Trials(folder, room), list[str]()
        _guard(room, self.breaches)
        self.start = used_memory(CPU)
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (space + 6 * GROWTH, resource.RLIM_INFINITY))

    def work(self, numbers: dict[str, int], seed: int) -> None:
        try:
            for kind, number in numbers.items():
                problems = 0
                while number > 0:  # a run of hypothesis ends with its first problem
                    number -= self.run(kind, number, seed, shrink=problems < SHRUNK)
                    problems, seed = problems + 1, seed + 1
        finally:
            faulthandler.cancel_dump_traceback_later()  # who continues after the last file must not be ended for it

    def run(self, kind: str, number: int, seed: int, *, shrink: bool) -> int:
        """Tries up to `number` files of a kind; returns how many it answered for."""
        tried, problem = 0, None

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=number,
            database=None,
            derandomize=True,
            deadline=None,
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @hypothesis.given(st.data())
        def behaves(data: st.DataObject) -> None:
            nonlocal tried, problem
            choose = Choose(data.draw)
            times = COMMANDS if kind == "served" else 1
            seconds, outcome, wrong = self.measured(getattr(self.trials, kind)(choose), times)
            if wrong:
                problem = (seconds, outcome, f"seed {seed}: {wrong}, by {', '.join(choose.words)}")
                raise AssertionError(wrong)
            if problem is None:  # else this is a simpler form of the problem, and no file of its own
                tried += 1
                self.tell(seconds, outcome, "")

        try:
            behaves()
        except Exception as error:
            if problem is None:  # the damage itself has gone wrong
                sys.exit(f"{type(error).__name__}: {error}")
            tried += 1
            self.tell(*problem)
        return tried

    def tell(self, seconds: float, outcome: str, problem: str) -> None:
        self.answers.write(json.dumps([seconds, outcome, problem]) + "\n")
        self.answers.flush()

    def measured(self, reading: Reading, times: int = 1) -> tuple[float, str, str]:
        """(seconds, outcome, problem), of which some are that it took too much: `times` what a file may."""
        faulthandler.dump_traceback_later(HANGS, exit=True)
        raised = sys.getrecursionlimit()  # by hypothesis, which would let a reader nest deeper, and so longer
        began, clock, before = time.process_time(), time.monotonic(), peak_memory(CPU)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            sys.setrecursionlimit(1000)
            outcome, problem = judged(reading, self.room)
            sys.setrecursionlimit(raised)
        seconds, waited = time.process_time() - began, time.monotonic() - clock
        if peak_memory(CPU) > max(before, self.start + GROWTH):
            problem = problem or f"memory grew by {(peak_memory(CPU) - self.start) / 2**20:.0f} MB"
        if seconds > times * SECONDS or waited > times * WAITS:
            problem = problem or f"{seconds:.1f} s of the processor, {waited:.1f} by the clock"
        if self.breaches:
            outcome, problem = "lost", self.breaches[-1]
            self.breaches.clear()
        return seconds, outcome, problem


CHANGING = {f"os.{call}" for call in ("remove", "rename", "mkdir", "rmdir", "link", "symlink", "chmod", "truncate")}
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork"}
FORBIDDEN |= {"subprocess.Popen", "socket.connect", "pickle.find_class"}


def _guard(room: Path, breaches: list[str]) -> None:
    """From now on `breaches` gets what a file makes this process do that no file may."""
    allowed = (os.path.realpath(room), "/dev/null")

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            breaches.append(f"{event} {str(given)[:100]}")
        if event not in CHANGING and event != "open":
            return
        if event == "open" and not (given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        names = given[:1] if event == "open" else given[:2]
        for path in [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]:
            if not os.path.realpath(path).startswith(allowed):
                breaches.append(f"{event} {path[:100]}")

    sys.addaudithook(hook)


# Through the command line, and what the package's source may not hold.


def by_command_line(quick: bool) -> Row:
    """`lpt inspect`, `predict` and `evaluate` of files that must be read, and of some that must be refused: exit code
    2 and one line. Nothing is printed that a terminal would obey."""
    began, problems, tried = time.perf_counter(), list[str](), 0
    readable = {"inspect": {"whole", "unsealed", "backbone", "giant", "data", "terminal"}}
    readable |= {"predict": {"whole", "unsealed", "data", "terminal"}, "evaluate": {"whole", "unsealed", "data"}}
    short = {("whole", "predict"), ("giant", "predict"), ("terminal", "inspect")}
    with tempfile.TemporaryDirectory() as folder:
        picture, path = Path(folder) / "i.png", Path(folder) / "file.safetensors"
        Image.new("RGB", (8, 8)).save(picture)
        commands = {"inspect": [], "predict": [str(picture)], "evaluate": ["data.name=digits-lt"]}
        for way, content in hostile_headers(prompt_on_nano(path)).items():
            path.write_bytes(content)
            for command, rest in commands.items():
                if quick and (way, command) not in short:
                    continue
                tried += 1
                line = [sys.executable, "-m", "lpt", command, str(path), *rest]
                ended = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
                output, sentences = ended.stdout + ended.stderr, ended.stderr.strip().splitlines()
                good = ended.returncode == 2 and len(sentences) == 1 and len(sentences[0]) < LONGEST
                good = ended.returncode == 0 if way in readable[command] else good
                if not good or not output.replace("\n", "").isprintable():
                    problems.append(f"{command} {way}: code {ended.returncode}, {output[-200:]!r}")
    note = "; ".join(["inspect, predict, evaluate: what is whole is read, else exit code 2 and one line", *problems])
    survived, seconds = tried - len(problems), time.perf_counter() - began
    return Row("hostile prompt files by command line", tried, survived, len(problems), seconds, note)


def hostile_headers(whole: bytes) -> dict[str, bytes]:
    """A prompt file as it is, damaged, and with headers that want something."""
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "unsealed": lambda tree: tree,
        "deep": lambda tree: "[" * 100_000,
        "format": lambda tree: tree | {"format": "1\n" * 10_000},
        "counts": lambda tree: tree | {"counts": [10**18] * 10},
        "metrics": lambda tree: tree | {"metrics": {"nll": "x", "few": {}}},
        "backbone": lambda tree: tree | {"backbone": tree["backbone"] | {"name": "hf-hub:evil/model"}},
        "giant": lambda tree: tree | {"backbone": tree["backbone"] | {"name": f"untrained:{GIANT}"}},
        "data": lambda tree: tree | {"data": {"settings": {"name": "lists", "train": "/dev/zero"}}},
        "terminal": lambda tree: tree | TERMINAL,
    }
    bare = damage.unsealed(whole)
    files = {"whole": whole, "cut": whole[:400], "sealed": whole[:-1] + bytes([whole[-1] ^ 1])}
    files["pickle"] = b"\x80\x04cos\nsystem\n(S'id'\ntR."
    return files | {way: damage.with_json(bare, change) for way, change in changes.items()}


GIANT = "vit_gigantic_patch14_clip_224"
TERMINAL = {"method": "\x1b[2J", "classes": [f"\x1b[{k}m\n" for k in range(10)], "versions": {"\x1b[2J": "\r"}}
NO_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "jsonpickle"}
NO_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "faiss.read_index", "torch.jit.load"}
NO_CALLS |= {f"yaml.{how}{what}" for how in ("", "unsafe_", "full_") for what in ("load", "load_all")}
NO_WORDS = {"allow_pickle", "trust_remote_code", "UnsafeLoader", "FullLoader", "shell"}


def static() -> Row:
    """Nothing in the package unpickles, evaluates, or trusts code that comes with data."""
    began, files = time.perf_counter(), sorted((ROOT / "lpt").rglob("*.py"))
    lines = {str(path.relative_to(ROOT)): list(unsafe(path.read_text())) for path in files}
    lost = sum(bool(bad) for bad in lines.values())
    note = (
        "no pickle, torch.load with pickles, eval, exec, unsafe YAML, faiss.read_index, trust_remote_code; torchvision "
        "unpickles CIFAR's own files for us, after it has checked their MD5"
    )
    note = "; ".join([note, *(f"{path}:{one}" for path, bad in lines.items() for one in bad)])
    name, seconds = "static: source files that run nothing from data", time.perf_counter() - began
    return Row(name, len(files), len(files) - lost, lost, seconds, note)


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
    Worker(Path(sys.argv[1]), Path(sys.argv[2])).work(json.loads(sys.argv[4]), int(sys.argv[3]))
