"""Many tasks on one backbone: their prompt files in memory within a budget, and images of any of them in one forward.

Shapes: views [B 3 S S], normalized as each task has it.
"""

import glob
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import Tensor

from lpt.data.preprocess import File, Preprocess, made_in_threads, upright_rgb
from lpt.engine.evaluate import no_answer
from lpt.errors import DataError, LptError, PromptFileError, UnknownTask, check_kind, quoted, short
from lpt.files import local_file
from lpt.memory import naming_lack_of_memory
from lpt.model import mixed
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import bare_classifier
from lpt.model.mixed import AdaptedBackbone, TaskModel
from lpt.model.task_means import TaskMeans
from lpt.prompt_file import build_model, check_identity, means_of, read_prompt
from lpt.prompt_header import Header, Inside
from lpt.serve.library import files_of, task_of
from lpt.serve.router import Route, Router
from lpt.settings import Positive, checked_arguments

Picture = Tensor | Image.Image | bytes | str | Path
"""An image: uint8 [3 h w], one of Pillow's, encoded bytes, or where it is."""
Prompts = str | Path | Iterable[str | Path] | Mapping[str, str | Path]
"""A file, one of the Hub (`hf://owner/name/file`), a folder of them, a pattern such as `prompts/*.safetensors`, several
of these, or files by task."""
AUTO = "auto"
"""In the place of a task, for the one that an image is routed to."""
MOST_AT_ONCE = 256
"""Images that `predict` holds at a time."""


class TaskAnswer(NamedTuple):
    """What a task says of an image: its most probable classes by name, the best first, their probabilities, and how
    many training images each had; which group prompts the image got, and their cosines with its query; or an error.

    `route` is there where the task was found by the image. `task` is None where no task took it.
    """

    task: str | None
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    group_prompts: tuple[int, ...] = ()
    similarity: tuple[float, ...] = ()
    route: Route | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class HeldTask:
    """A task as it was when it was asked for: whoever has this keeps that model, whatever becomes of its file."""

    name: str
    path: Path
    header: Header
    """Without the hashes of the training images."""
    preprocess: Preprocess
    model: TaskModel
    means: TaskMeans | None
    """By which images are routed to it; None for files of before."""

    def view(self, image: Picture, name: str = "image") -> Tensor:
        """The image's test view [3 S S] as this task has it; any thread may make it. Raises DataError, with its `name`,
        for one that cannot be decoded."""
        return view_of(self.preprocess, image, name)


def view_of(preprocess: Preprocess, image: Picture, name: str = "image") -> Tensor:
    """An image's test view [3 S S], normalized; any thread may make it. Raises DataError, with its `name`, for one that
    cannot be decoded."""
    if isinstance(image, Tensor):
        return preprocess.test(_checked_pixels(image, name)[None])[0]
    if isinstance(image, Image.Image):
        image = _encoded(image, name)
    return preprocess.normalized(preprocess.cut_one(File(name, image), None)[None])[0]


def view_kind(preprocess: Preprocess) -> Hashable:
    """Tasks that agree in it see an image as the same view."""
    return preprocess.test_view, preprocess.cutter


class Asked(NamedTuple):
    """A view [3 S S] that `task` is asked about."""

    task: HeldTask
    view: Tensor


Routers = tuple[tuple[Preprocess, Router], ...]
"""A router for each kind of view that tasks have: a feature is of a view."""


class Unrouted(NamedTuple):
    """An image whose task is wanted, as the view [3 S S] of each of `routers`."""

    routers: Routers
    views: tuple[Tensor, ...]


@dataclass(eq=False)
class _Entry:
    """A task in the bank; `held` is None while it is not in memory. `loading` is held by the thread that reads it."""

    name: str
    path: Path
    stamp: tuple[int, ...]
    header: Header
    means: TaskMeans | None
    held: HeldTask | None
    loading: threading.Lock = field(default_factory=threading.Lock)


class TaskBank:
    """Tasks by name, from prompt files for one frozen backbone. All threads may use it at once.

        bank = lpt.TaskBank(backbone, "prompts/*.safetensors")
        bank.predict(["boot.jpg", "desk.jpg"], tasks=["shoes", "lamps"])

    A task is called as its file, without the suffix. `memory` is how many bytes the tasks may take beyond the backbone:
    those that have not been asked for longest are dropped, and read again when they are. `batch_size` images go through
    the backbone together, of as many tasks as there are; tasks that agree in the sizes of their prompts share a
    forward, and of what else is learned LoRA and AdaptFormer do.

    >>> import lpt, tempfile
    >>> backbone, path = lpt.load_backbone("nano"), f"{tempfile.mkdtemp()}/digits.safetensors"
    >>> task = lpt.load_task("digits-lt")
    >>> header = lpt.save_prompt(path, lpt.model(task, backbone), method="lpt", counts=task.counts)
    >>> lpt.TaskBank(backbone, path).tasks
    ('digits',)
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Prompts = (),
        *,
        memory: Positive | None = None,
        batch_size: Positive = 64,
        accept: float = 0.95,
    ) -> None:
        """`accept` is the share of a task's own images that routing is to let pass. Files that cannot be served are in
        `refused`. Raises LptError where `prompts` names nothing."""
        check_kind("TaskBank: backbone", backbone, Backbone, "give what lpt.load_backbone returns")
        checked_arguments(TaskBank.__init__, memory=memory, batch_size=batch_size)
        self.backbone, self.memory, self.batch_size, self.accept = backbone, memory, batch_size, accept
        self.refused: dict[str, str] = {}
        """What is wrong with each file that is not served, by its path."""
        self._prompts = prompts
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._used: OrderedDict[str, int] = OrderedDict()  # bytes of tasks in memory, the one used last at the end
        # A copy is there for as long as a task that is in memory needs it.
        self._adapted: WeakValueDictionary[tuple[str, int], AdaptedBackbone] = WeakValueDictionary()
        self._routing: Routers | None = None
        self._refused_stamps: dict[Path, tuple[int, ...]] = {}
        self.sync()

    # What there is.

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(sorted(self._entries))

    @property
    def bytes(self) -> int:
        """That tasks take in memory now; copies of the backbone for adapters are `adapted_bytes`."""
        with self._lock:
            return sum(self._used.values())

    @property
    def adapted_bytes(self) -> int:
        """Of the copies of the backbone that adapters are put into: one for each kind and size of adapter in memory."""
        copies = list(self._adapted.values())
        return sum(value.nbytes for copy in copies for value in copy.backbone.state_dict().values())

    @property
    def loaded(self) -> tuple[str, ...]:
        """Tasks in memory, the one used last at the end."""
        with self._lock:
            return tuple(self._used)

    def header(self, task: str) -> Header:
        """What a task's file says, but for the hashes of its training images. Raises UnknownTask."""
        return self._entry(task).header

    def routable(self, task: str) -> bool:
        """Whether images are routed to it. Raises UnknownTask."""
        return self._entry(task).means is not None

    def __contains__(self, task: object) -> bool:
        return task in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    # Tasks come and go.

    def add(self, path: str | Path, *, name: str | None = None) -> str:
        """Adds a file, in place of the task of the same name if there is one; returns the name. Requests that have
        begun keep the model they began with. Raises PromptFileError for a file that cannot be served: the one before
        is still served."""
        path = Path(path)
        name = task_name(path) if name is None else name
        if name == AUTO:
            raise PromptFileError(f"prompt file {path}: no task can be called {AUTO}, which means any: rename it")
        stamp = _stamp(path)
        held = self._read(name, path)
        entry = _Entry(name, path, stamp, held.header, held.means, held)
        with self._lock:
            self._entries[name], self._routing = entry, None
            self._keep(entry, held)
            self.refused.pop(str(path), None)
        return name

    def remove(self, task: str) -> None:
        """Raises UnknownTask."""
        with self._lock:
            if self._entries.pop(task, None) is None:
                raise UnknownTask(task, self._entries)
            self._used.pop(task, None)
            self._routing = None

    def sync(self) -> list[str]:
        """Looks again at what `prompts` names: new files are added, changed ones replaced, and tasks whose file has
        gone are removed. A file that cannot be served is in `refused`, and its last version is served. What there is to
        say of it, a line each. Raises LptError where `prompts` names nothing."""
        said: list[str] = []
        refused: dict[str, str] = {}
        paths: dict[str, Path] = {}
        for name, path in named_files(self._prompts):
            try:
                if name in paths:
                    raise PromptFileError(
                        f"prompt file {path} has the name of {paths[name]}, which is served: give it another one"
                    )
                paths[name] = path
                self._take(name, path, said)
            except PromptFileError as error:
                refused[str(path)] = str(error)
                if self.refused.get(str(path)) != str(error):
                    said.append(f"{error}; the file of before is served" if name in self else str(error))
        for entry in list(self._entries.values()):
            if entry.name not in paths and not entry.path.exists():
                self.remove(entry.name)
                said.append(f"task {quoted(entry.name)} is removed")
        self.refused = refused
        return said

    def _take(self, name: str, path: Path, said: list[str]) -> None:
        """Adds a file that has been met, unless it is what it was. Raises PromptFileError."""
        stamp, before = _stamp(path), self._entries.get(name)
        if before is not None and (before.path, before.stamp) == (path, stamp):
            return
        if stamp == self._refused_stamps.get(path):
            raise PromptFileError(self.refused[str(path)])
        try:
            self.add(path, name=name)
            said.append(f"task {quoted(name)} is {'replaced' if before else 'added'}")
        except PromptFileError:
            self._refused_stamps[path] = stamp
            raise

    def hold(self, tasks: str | Sequence[str]) -> list[HeldTask]:
        """The tasks as they are now, read again where they had been dropped. Raises UnknownTask, and PromptFileError
        where a file cannot be read any more."""
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        entries = {name: self._entry(name) for name in names}
        held = {name: self._held(entry) for name, entry in entries.items()}
        return [held[name] for name in names]

    def _entry(self, task: str) -> _Entry:
        entry = self._entries.get(task)
        if entry is None:
            raise UnknownTask(task, self._entries)
        return entry

    def _held(self, entry: _Entry) -> HeldTask:
        with self._lock:
            if (held := entry.held) is not None:
                if entry.name in self._used:
                    self._used.move_to_end(entry.name)
                return held
        with entry.loading:  # others who want it wait for the one who reads it
            if (held := entry.held) is not None:
                return held
            entry.stamp = _stamp(entry.path)
            held = self._read(entry.name, entry.path)
            with self._lock:
                entry.header, entry.means, self._routing = held.header, held.means, None
                if self._entries.get(entry.name) is entry:
                    self._keep(entry, held)
            return held

    def _keep(self, entry: _Entry, held: HeldTask) -> None:
        """Has a task in memory, and drops those used longest ago where that is too much; under the lock."""
        entry.held = held
        self._used[entry.name] = held.model.bytes
        self._used.move_to_end(entry.name)
        total = sum(self._used.values()) if self.memory else 0
        while self.memory and total > self.memory and len(self._used) > 1:
            name, size = self._used.popitem(last=False)
            self._entries[name].held = None
            total -= size

    def _read(self, name: str, path: Path) -> HeldTask:
        """A file, through all checks. Raises PromptFileError."""
        prompt = read_prompt(path)
        header = prompt.header
        check_identity(path, header, self.backbone)
        if header.inside is None:
            model = mixed.task_model(build_model(path, prompt, self.backbone))
        else:
            adapted = self._adapted_for(header.inside)
            with adapted.lock:  # its tensors are put into the copy, and taken out again
                model = mixed.task_model(build_model(path, prompt, self.backbone, adapt=adapted.given), adapted)
        header.trained_on = None
        preprocess = Preprocess(**vars(header.preprocess))
        return HeldTask(name, path, header, preprocess, model, _in_fp16(means_of(prompt.tensors)))

    def _adapted_for(self, inside: Inside) -> AdaptedBackbone:
        key = inside.kind, {"lora": inside.rank, "adaptformer": inside.bottleneck}.get(inside.kind, 0)
        with self._lock:
            adapted = self._adapted.get(key)
            if adapted is None:
                self._adapted[key] = adapted = AdaptedBackbone(self.backbone, **inside.model_dump())
            return adapted

    # Whose image is this?

    def route(self, images: Picture | Sequence[Picture]) -> list[Route | DataError]:
        """Which of the tasks each image belongs to, by its feature under the bare backbone; or what is wrong with it.
        Raises LptError where there is no task with class means."""
        pictures, found = _pictures(images), list[Route | DataError]()
        for start in range(0, len(pictures), MOST_AT_ONCE):
            part = dict(enumerate(pictures[start : start + MOST_AT_ONCE], start))
            found += self._routes(part)
        return found

    def _routes(self, pictures: Mapping[int, Picture]) -> list[Route | DataError]:
        routers = self.routers()
        made = list(made_in_threads(_views_or_error, cycle([routers]), pictures.values(), pictures))
        found = iter(self.routed([Unrouted(routers, views) for views in made if not isinstance(views, DataError)]))
        return [views if isinstance(views, DataError) else next(found) for views in made]

    def routed(self, images: Sequence[Unrouted]) -> list[Route]:
        """As `route`, of views that somebody has made: the route of largest score by any of an image's views."""
        rows_of: dict[int, list[int]] = {}
        for row, image in enumerate(images):
            rows_of.setdefault(id(image.routers), []).append(row)
        found: dict[int, Route] = {}
        for rows in rows_of.values():
            by_view = []
            for k, (_, router) in enumerate(images[rows[0]].routers):
                views = torch.stack([images[row].views[k] for row in rows])
                by_view.append(router.routes(self._bare_features(views)))
            for row, routes in zip(rows, zip(*by_view, strict=True), strict=True):
                found[row] = max(routes, key=lambda route: route.score)
        return [found[row] for row in range(len(images))]

    def routers(self) -> Routers:
        """By which images are routed now. Raises LptError where there is no task with class means."""
        with self._lock:
            if self._routing is not None:
                return self._routing
            entries = sorted(self._entries.values(), key=lambda entry: entry.name)
            tasks: dict[Any, tuple[Preprocess, dict[str, TaskMeans]]] = {}
            for entry in entries:
                if entry.means is not None:
                    preprocess = Preprocess(**vars(entry.header.preprocess))
                    tasks.setdefault(view_kind(preprocess), (preprocess, {}))[1][entry.name] = entry.means
            if not tasks:
                Router({}, accept=self.accept)  # says why
            self._routing = tuple(
                (preprocess, Router(means, accept=self.accept)) for preprocess, means in tasks.values()
            )
            return self._routing

    @torch.no_grad()
    def _bare_features(self, views: Tensor) -> Tensor:
        device, model = next(self.backbone.parameters()).device, bare_classifier(self.backbone, ("", ""))
        parts = views.to(device, self.backbone.dtype).split(self.batch_size)
        with naming_lack_of_memory(lambda: f"in a prediction of {self.batch_size} images"):
            return torch.cat([model.feature(part) for part in parts])

    # Answers.

    def predict(
        self, images: Picture | Sequence[Picture], tasks: str | Sequence[str], *, topk: Positive = 5
    ) -> list[TaskAnswer]:
        """What `tasks[i]` says of `images[i]`; one task may be given for all images, and `auto` is the one that the
        image is routed to, if any. The answer to an image that cannot be decoded has an `error`, and the others are
        answered. Raises UnknownTask, PromptFileError and LptError."""
        (topk,) = checked_arguments(TaskBank.predict, topk=topk)
        pictures = _pictures(images)
        names = [tasks] * len(pictures) if isinstance(tasks, str) else list(tasks)
        if len(names) != len(pictures):
            raise LptError(f"{len(pictures)} images and {len(names)} tasks: give a task for each image, or one for all")
        wanted = list(dict.fromkeys(name for name in names if name != AUTO))
        held = dict(zip(wanted, self.hold(wanted), strict=True))
        answers: list[TaskAnswer] = []
        for start in range(0, len(pictures), MOST_AT_ONCE):
            rows = range(start, min(start + MOST_AT_ONCE, len(pictures)))
            answers += self._predict({i: pictures[i] for i in rows}, names, held, topk)
        return answers

    def _predict(
        self, pictures: Mapping[int, Picture], names: Sequence[str], held: Mapping[str, HeldTask], topk: int
    ) -> list[TaskAnswer]:
        """The answers to some of the pictures of a list, by their places in it."""
        to_route = {i: picture for i, picture in pictures.items() if names[i] == AUTO}
        routes = dict(zip(to_route, self._routes(to_route) if to_route else (), strict=True))
        answers: dict[int, TaskAnswer] = {}
        tasks: dict[int, HeldTask] = {}
        for i in pictures:
            route = routes.get(i)
            if isinstance(route, DataError):
                answers[i] = TaskAnswer(None, error=str(route))
            elif route is not None and route.task is None:
                answers[i] = TaskAnswer(None, route=route)
            else:
                tasks[i] = held[names[i]] if route is None else self.hold(str(route.task))[0]
        of = [task.preprocess for task in tasks.values()]
        made = made_in_threads(_view_or_error, of, [pictures[i] for i in tasks], tasks)
        views: dict[int, Tensor] = {}
        for i, view in zip(tasks, made, strict=True):
            if isinstance(view, Tensor):
                views[i] = view
            else:
                answers[i] = TaskAnswer(tasks[i].name, error=str(view))
        answered = self.answer([Asked(tasks[i], view) for i, view in views.items()], topk=topk)
        for i, answer in zip(views, answered, strict=True):
            route = routes.get(i)
            answers[i] = answer._replace(route=None if isinstance(route, DataError) else route)
        return [answers[i] for i in pictures]

    def answer(self, asked: Sequence[Asked], *, topk: int = 5) -> list[TaskAnswer]:
        """As `predict`, of views that somebody has made: what a server asks with the images of many requests."""
        if not asked:
            return []
        output = self.forward(asked)
        probabilities, classes = (value.tolist() for value in output.top(topk))
        ids, similarity = output.ids.tolist(), output.similarity.tolist()
        answers = []
        for b, (task, _) in enumerate(asked):
            number = min(topk, len(task.header.classes))
            if not torch.isfinite(output.logits[b, : len(task.header.classes)]).all():
                answers.append(TaskAnswer(task.name, error=no_answer(f"{b} of a batch")))
                continue
            best = classes[b][:number]
            given = task.model.topk
            answers.append(
                TaskAnswer(
                    task=task.name,
                    classes=tuple(short(task.header.classes[k]) for k in best),
                    probabilities=tuple(probabilities[b][:number]),
                    counts=tuple(task.header.counts[k] for k in best),
                    group_prompts=tuple(ids[b][:given]),
                    similarity=tuple(similarity[b][:given]),
                )
            )
        return answers

    def forward(self, asked: Sequence[Asked]) -> mixed.MixedOutput:
        """The logits that answers are made of."""
        with naming_lack_of_memory(lambda: f"in a prediction of {len(asked)} images"):
            device, dtype = next(self.backbone.parameters()).device, self.backbone.dtype
            views = torch.stack([view for _, view in asked]).to(device, dtype)
            return mixed.forward(self.backbone, [task.model for task, _ in asked], views, batch_size=self.batch_size)


def named_files(prompts: Prompts) -> list[tuple[str, Path]]:
    """(name, path) of each file that `prompts` names, in order. Raises LptError for what names nothing."""
    if isinstance(prompts, Mapping):
        return [(str(name), local_file(path)) for name, path in prompts.items()]
    if not isinstance(prompts, str | Path):
        return [pair for one in prompts for pair in named_files(one)]
    path = local_file(prompts)
    if path != Path(prompts):  # called as on the Hub
        return [(task_name(Path(prompts)), path)]
    if path.is_dir():
        return [(task_of(file), file) for file in files_of(path)]  # may be empty, and filled later
    if path.exists() or not glob.has_magic(str(prompts)):
        paths = [path]
    elif not (paths := [Path(found) for found in sorted(glob.glob(str(prompts), recursive=True))]):
        raise LptError(f"prompts {quoted(str(prompts))}: no file has such a name")
    return [(task_name(path), path) for path in paths if not path.name.startswith(".")]


def task_name(path: Path) -> str:
    """What the task of a file is called: as the file, or as the run's folder where it lies in one.

    >>> task_name(Path("prompts/red shoes.safetensors")), task_name(Path("runs/lamps/prompt.safetensors"))
    ('red shoes', 'lamps')
    """
    name = task_of(path)
    return path.parent.name if name == "prompt" and path.parent.name else name


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes with the file. Raises PromptFileError where there is none."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise PromptFileError(f"prompt file {path} cannot be read: {error.strerror or error}") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _pictures(images: Any) -> list[Picture]:
    if isinstance(images, str | Path | bytes | Image.Image) or (isinstance(images, Tensor) and images.dim() == 3):
        return [images]
    check_kind("TaskBank.predict: images", images, (Sequence, Tensor), "give a list of images")
    return list(images)


def _view_or_error(preprocess: Preprocess, image: Picture, number: int) -> Tensor | DataError:
    try:
        return view_of(preprocess, image, str(image) if isinstance(image, str | Path) else f"{number} of the list")
    except DataError as error:
        return error


def _views_or_error(routers: Routers, image: Picture, number: int) -> tuple[Tensor, ...] | DataError:
    views: list[Tensor] = []
    for preprocess, _ in routers:
        view = _view_or_error(preprocess, image, number)
        if isinstance(view, DataError):
            return view
        views.append(view)
    return tuple(views)


def _in_fp16(means: TaskMeans | None) -> TaskMeans | None:
    """As they are stored: a bank keeps those of all tasks, whether they are in memory or not."""
    return None if means is None else TaskMeans(means.means.half(), means.scores)


def _checked_pixels(pixels: Tensor, name: str) -> Tensor:
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or len(pixels) != 3 or not pixels.numel():
        raise DataError(
            f"image {quoted(name)} is a tensor of shape {list(pixels.shape)} and type {pixels.dtype}: give uint8 "
            "[3, height, width]"
        )
    return pixels


def _encoded(image: Image.Image, name: str) -> bytes:
    """A file with the pixels of an opened image, upright as its EXIF data says: the limits of files are its own."""
    try:
        buffer = io.BytesIO()
        upright_rgb(image.copy()).save(buffer, "BMP")
        return buffer.getvalue()
    except Exception as error:  # a decoder's error on a damaged file can be of any class
        raise DataError(f"image {quoted(name)} cannot be decoded ({quoted(error)})") from None
