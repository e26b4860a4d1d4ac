"""The folder that is served: looked at again and again, and never left."""

import contextlib
import logging
import os
import threading
from collections.abc import ItemsView, Iterator, Mapping
from pathlib import Path

from lpt.errors import LptError, UnknownTask, printable
from lpt.serve.bank import TaskBank
from lpt.serve.library import files_of, task_of

log = logging.getLogger("lpt.server")


class ClosedFolder(Mapping[str, Path]):
    """The prompt files of a folder by task, as they are whenever they are asked for. Links that lead out of the folder,
    and names that cannot be sent to anyone, are none of them, and in `left_out`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: dict[str, str] = {}
        """What is wrong with each such file, by its path."""

    def _files(self) -> dict[str, Path]:
        real, files, left_out = os.path.realpath(self.folder), dict[str, Path](), dict[str, str]()
        for path in files_of(self.folder):
            if printable(path.name) != path.name:
                left_out[str(path)] = f"prompt file {path} has a name that cannot be shown: rename it"
            elif path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
                left_out[str(path)] = f"prompt file {path} is a link that leads out of the folder: copy the file there"
            else:
                files[task_of(path)] = path
        self.left_out = left_out
        return files

    def items(self) -> ItemsView[str, Path]:
        return self._files().items()

    def __getitem__(self, task: str) -> Path:
        return self._files()[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files())

    def __len__(self) -> int:
        return len(self._files())

    def __str__(self) -> str:
        return str(self.folder)


class Watcher:
    """A thread that has a bank look at its folder every few seconds, and logs what has changed."""

    def __init__(self, bank: TaskBank, folder: ClosedFolder, *, seconds: float = 1.0) -> None:
        self.bank, self.folder, self.seconds = bank, folder, seconds
        self._said = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lpt folder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def refused(self) -> dict[str, str]:
        """Why each file that is not served is not, by its name; no other path is in the sentence."""
        found = {**self.folder.left_out, **self.bank.refused}
        where = f"{self.folder.folder}{os.sep}"
        return {
            printable(Path(path).name): printable(sentence.replace(where, ""))
            for path, sentence in sorted(found.items())
        }

    def look(self) -> None:
        """Once; nothing that a folder may hold ends the watching."""
        before = set(self.folder.left_out)
        try:
            lines = self.bank.sync()
            self._said = ""
        except (LptError, OSError) as error:  # the folder is gone, or nobody may read it
            lines = [] if str(error) == self._said else [f"{error}; what was served goes on"]
            self._said = str(error)
        for path, sentence in self.folder.left_out.items():
            if path not in before:
                lines.append(sentence)
            with contextlib.suppress(UnknownTask):  # it would be read again where it was dropped from memory
                self.bank.remove(task_of(Path(path)))
        for line in lines:
            log.log(logging.INFO if line.startswith("task ") else logging.WARNING, "%s", printable(line))

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self.seconds):
            try:
                self.look()
            except Exception:  # a file from anyone: its task stays as it was, and the others are looked at next time
                log.exception("the folder could not be looked at")
