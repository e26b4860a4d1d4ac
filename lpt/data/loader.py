"""Views of image files and strong views, made ahead of the step that needs them by processes that do nothing else.

What is wanted is said whole in an `Order`, all randomness too, and the processes know of nothing else: so one set of
them serves everything that a process does, and a view is the same whoever makes it. Shapes: views [B 3 S S] uint8.
"""

import atexit
import contextlib
import math
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from lpt.data.augment import Augmenter, augmented
from lpt.data.preprocess import File, Preprocess, available_cores, decode_together, made_in_threads
from lpt.errors import DataError, quoted

Workers = Literal["auto"] | int
"""Processes that make views; 0 makes them in threads of this one."""
AHEAD = 3
"""Batches that are made before they are asked for."""
AT_A_TIME = 16
"""Images that a worker makes and hands over at a time."""
HANDED_OVER = 16 * 3 * 224**2
"""Bytes that it hands over at a time, at most, where this is more than one image."""
WAITING = 2
"""Such parts for each worker that are sent ahead."""
WORTH_WORKERS = 256
"""Images for which `auto` starts workers; fewer are made before these would be there."""
Item = TypeVar("Item")


class Order(NamedTuple):
    """Views to be made: of files, cut as `preprocess` says, or of `pixels` [B 3 h w], which stay as large as they are.
    `chance` [B 5] is of training views. `changes` are the augmentation of each view and its seed."""

    files: Sequence[File] = ()
    pixels: np.ndarray | None = None
    preprocess: Preprocess | None = None
    chance: np.ndarray | None = None
    changes: Sequence[tuple[Augmenter, int] | None] = ()
    names: Sequence[str] = ()
    """Of the images, for errors, where they are no files."""

    def __len__(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self.files) if self.pixels is None else len(self.pixels)

    def part(self, rows: slice) -> "Order":
        return Order(
            self.files[rows],
            None if self.pixels is None else self.pixels[rows],
            self.preprocess,
            None if self.chance is None else self.chance[rows],
            self.changes[rows],
            self.names[rows],
        )

    def parts(self) -> list["Order"]:
        """As workers get them."""
        image = math.prod(self.shape) if self.pixels is None else self.pixels[:1].nbytes
        rows = max(1, min(AT_A_TIME, HANDED_OVER // max(1, image)))
        return [self.part(slice(i, i + rows)) for i in range(0, len(self), rows)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a view, where it is cut here."""
        if self.preprocess is None:
            return 3, 1, 1
        return self.preprocess.test_shape if self.chance is None else (3, self.preprocess.size, self.preprocess.size)

    def name(self, i: int) -> str:
        return self.files[i].name if self.files else self.names[i] if self.names else str(i)

    def view(self, i: int) -> Tensor:
        """View [3 S S] of image i, or its five [5 3 S S]. Raises DataError, with its name, where it cannot be
        decoded."""
        change = self.changes[i] if self.changes else None
        if self.pixels is not None:
            view = torch.from_numpy(self.pixels[i])
        else:
            assert self.preprocess is not None
            chance = None if self.chance is None else torch.from_numpy(self.chance[i : i + 1])
            view = self.preprocess.cut_one(self.files[i], chance)
            change = change or cast(Any, self.files[i].change)
        return view if change is None else augmented(view[None], [change[1]], change[0])[0]


class Made(NamedTuple):
    """Views [B 3 S S] of an order, and what is wrong with the images, by their places in it, that have none."""

    views: Tensor
    errors: dict[int, DataError]

    def checked(self) -> Tensor:
        """The views. Raises DataError where one is missing."""
        for error in self.errors.values():
            raise error
        return self.views


def workers_of(wanted: Workers, images: int) -> int:
    """The number of processes: of `auto`, the cores that this machine has for each of the processes of a run on it;
    none for a few `images`, and where a process cannot be split in two."""
    if wanted != "auto":
        return wanted
    if images < WORTH_WORKERS or not sys.platform.startswith("linux"):
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(1, available_cores() // max(1, here))


@contextlib.contextmanager
def made_ahead(
    jobs: Iterable[tuple[Item, Sequence[Order]]], *, workers: int, pinned: bool = False, ahead: int = AHEAD
) -> Iterator[Iterator[tuple[Item, list[Made]]]]:
    """Each of `jobs` with what its orders have come to, in order, `ahead` of them before they are asked for; `pinned`
    views can be copied to a GPU while it works. `jobs` is iterated in another thread.

    What is raised there is raised here: DataError, with the name of an image, for a worker that has died too.
    """
    jobs = iter(jobs)
    if workers:
        made = _by_workers(jobs, workers, pinned)
    else:
        made = ((item, [_in_threads(order, pinned) for order in orders]) for item, orders in jobs)
    with contextlib.closing(cast(Any, _in_another_thread(made, ahead))) as results:
        yield results


@contextlib.contextmanager
def cut_ahead(
    batches: Iterable[Sequence[File]],
    preprocess: Preprocess,
    *,
    images: int,
    workers: Workers = "auto",
    pinned: bool = False,
) -> Iterator[Iterator[Made]]:
    """Test views of each of `batches`, of `images` files in all, a few batches ahead. A file that cannot be decoded is
    an error at its place."""
    jobs = ((None, [Order(files=files, preprocess=preprocess)]) for files in batches)
    with made_ahead(jobs, workers=workers_of(workers, images), pinned=pinned) as made:
        yield (one for _, (one,) in made)


# In this process.


def _in_another_thread(items: Iterator[Item], ahead: int) -> Iterator[Item]:
    """`items` as they come from another thread, up to `ahead` of them before they are asked for."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=max(1, ahead))
    over = threading.Event()

    def hand(kind: str, value: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put((kind, value), timeout=0.1)

    def run() -> None:
        try:
            for item in items:
                hand("item", item)
                if over.is_set():
                    break
            hand("end", None)
        except BaseException as error:
            hand("error", error)
        finally:
            close: Callable[[], None] | None = getattr(items, "close", None)
            if close:
                close()  # in the thread that it runs in

    thread = threading.Thread(target=run, name="made ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        over.set()
        thread.join()


def _in_threads(order: Order, pinned: bool) -> Made:
    """What an order comes to without workers."""
    if not len(order):
        return _together([], pinned)
    if order.pixels is not None or any(order.changes) or any(file.change for file in order.files):
        return _together([_made(order)], pinned)  # torchvision's augmentations draw from a generator of all threads
    return _together(list(made_in_threads(lambda i: _made(order.part(slice(i, i + 1))), range(len(order)))), pinned)


def _made(order: Order, at: Tensor | None = None) -> Made:
    """What an order comes to. `at` [3] holds the image that is being made, for whoever finds this process dead."""
    views: list[Tensor | None] = []
    errors: dict[int, DataError] = {}
    for i in range(len(order)):
        if at is not None:
            at[2] = i
        try:
            views.append(order.view(i))
        except DataError as error:
            errors[i] = error
            views.append(None)
    whole = next((view for view in views if view is not None), None)
    if whole is None:
        whole = torch.zeros(order.shape, dtype=torch.uint8)
    filled = [torch.zeros_like(whole) if view is None else view for view in views]
    if at is None:
        return Made(torch.stack(filled), errors)
    # Where they are handed over from, in place of a copy to there.
    shared: Any = torch.UntypedStorage._new_shared(len(filled) * whole.numel())
    stacked = torch.empty(0, dtype=torch.uint8).set_(shared).view(len(filled), *whole.shape)
    return Made(torch.stack(filled, out=stacked), errors)


def _together(parts: Sequence[Made], pinned: bool) -> Made:
    """One of several, or of none."""
    if not parts:
        return Made(torch.empty(0, 3, 1, 1, dtype=torch.uint8), {})
    if len(parts) == 1 and not pinned:
        return parts[0]
    rows = [len(part.views) for part in parts]
    views = torch.empty(sum(rows), *parts[0].views.shape[1:], dtype=torch.uint8, pin_memory=pinned)
    errors: dict[int, DataError] = {}
    first = 0
    for part, number in zip(parts, rows, strict=True):
        views[first : first + number] = part.views
        errors |= {first + i: error for i, error in part.errors.items()}
        first += number
    return Made(views, errors)


def _by_workers(
    jobs: Iterator[tuple[Item, Sequence[Order]]], workers: int, pinned: bool
) -> Iterator[tuple[Item, list[Made]]]:
    """As `made_ahead` has it, by worker processes."""
    waiting: deque[tuple[Item, list[int]]] = deque()

    def parts() -> Iterator[Order]:
        for item, orders in jobs:
            split = [order.parts() for order in orders]
            waiting.append((item, [len(one) for one in split]))
            for one in split:
                yield from one

    with _pool(workers) as pool:
        made = pool.make(parts())
        for first in made:
            item, numbers = waiting.popleft()
            while not sum(numbers):  # nothing was to be made for it
                yield item, [_together([], pinned) for _ in numbers]
                item, numbers = waiting.popleft()
            rest = iter([first, *(next(made) for _ in range(sum(numbers) - 1))])
            yield item, [_together([next(rest) for _ in range(number)], pinned) for number in numbers]
    for item, numbers in waiting:
        yield item, [_together([], pinned) for _ in numbers]


# Workers.


class _Maker:
    """What a worker is asked for orders by number, as a data set. `at` [workers 3] holds of each its process, the
    number of its order and the place of the image in it."""

    def __init__(self, workers: int, lock: Any) -> None:
        self.at = torch.full((workers, 3), -1).share_memory_()
        self.lock = lock

    def __getitem__(self, numbered: tuple[int, Order]) -> Made:
        number, order = numbered
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        at = self.at[worker.id]
        at[1], at[2] = number, 0
        made = _made(order, at)
        at[2] = len(order)
        return made

    def begin(self, worker: int) -> None:
        """The first thing that a worker does."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run that is asked to stop saves first, and needs its batches
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        decode_together(self.lock)
        self.at[worker, 0] = os.getpid()
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed: it holds files open, the lock of a run's folder for one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Parts:
    """What is to be made next, as a sampler that is set anew for each use of the workers."""

    def __init__(self) -> None:
        self.parts: Iterator[tuple[int, Order]] = iter(())

    def __iter__(self) -> Iterator[tuple[int, Order]]:
        return self.parts


class _Pool:
    """Worker processes that stay for the next who needs some."""

    def __init__(self, workers: int) -> None:
        from torch.utils.data import DataLoader

        self.workers, self.process = workers, os.getpid()
        context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else None)
        self.maker, self.parts = _Maker(workers, context.Lock()), _Parts()
        self.names: dict[int, Order] = {}
        with _unwarned():
            self.loader: Any = DataLoader(
                cast(Any, self.maker),
                batch_size=None,
                sampler=cast(Any, self.parts),
                num_workers=workers,
                collate_fn=cast(Any, _as_it_is),
                worker_init_fn=self.maker.begin,
                prefetch_factor=WAITING,
                persistent_workers=True,
                multiprocessing_context=context,
            )
        self.processes: list[Any] = []

    def make(self, parts: Iterator[Order]) -> Iterator[Made]:
        """What each of `parts` comes to, in order. Raises DataError where a worker has died."""
        self.names.clear()
        self.parts.parts = self._numbered(parts)
        try:
            with _unwarned():
                made = iter(self.loader)
            self.processes = list(made._workers)
            for number, one in enumerate(made):
                self.names.pop(number, None)
                yield one
        except (RuntimeError, OSError, EOFError) as error:
            if all(process.is_alive() for process in self.processes) and "DataLoader worker" not in str(error):
                raise
            raise DataError(self._lost(str(error))) from None

    def _numbered(self, parts: Iterator[Order]) -> Iterator[tuple[int, Order]]:
        for number, part in enumerate(parts):
            self.names[number] = part
            yield number, part

    def _lost(self, said: str) -> str:
        """What is reported about a worker that has died, with the image that it was making."""
        dead = {int(pid) for pid in re.findall(r"\d+", said)} | {p.pid for p in self.processes if not p.is_alive()}
        codes = [p.exitcode for p in self.processes if p.pid in dead and p.exitcode]
        how = f"signal {-codes[0]}" if codes and codes[0] < 0 else f"code {codes[0]}" if codes else "no word"
        for process, number, place in self.maker.at.tolist():
            if process in dead and number in self.names:
                order = self.names[number]
                image = order.name(min(place, len(order) - 1))
                where = f"at image {quoted(image)}"
                break
        else:
            first = next(iter(self.names.values()), None)
            where = "while it waited" + (f" for a batch with image {quoted(first.name(0))}" if first else "")
        return (
            f"a worker process that makes views has ended by itself ({how}) {where}: if memory is short, lower "
            "train.workers, which may be 0; a run continues with --resume"
        )

    def close(self) -> None:
        """Ends the workers."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        made, self.loader = self.loader._iterator, None
        if made is not None:
            with contextlib.suppress(Exception):
                made._shutdown_workers()


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings of more workers than cores, and of a fork beside threads, which wait meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _as_it_is(made: Made) -> Made:
    return made


_idle: list[_Pool] = []


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[_Pool]:
    """A pool that nobody else uses. One that has failed, or was left in the middle, is not used again."""
    _idle[:] = [pool for pool in _idle if pool.process == os.getpid()]  # those of a parent are not ours
    pool = next((pool for pool in _idle if pool.workers == workers), None)
    if pool:
        _idle.remove(pool)
    else:
        pool = _Pool(workers)
    try:
        yield pool
    except BaseException:
        pool.close()
        raise
    _idle.append(pool)


@atexit.register
def close_workers() -> None:
    """Ends all workers that wait for work; others are started where some are needed again."""
    for pool in _idle:
        if pool.process == os.getpid():
            pool.close()
    _idle.clear()
