"""The exceptions that people see, each one sentence with the thing, the value and the way out."""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence

LONGEST_WORD, LONGEST_LINE = 300, 1500
"""Letters of a word (a path for example), and of a line, that an error repeats."""


class LptError(ValueError):
    """Anything a user can put right; the command line prints it on one line and exits with code 2.

    >>> import lpt
    >>> try:
    ...     lpt.load_task("digit-lt")
    ... except lpt.LptError as error:
    ...     print(str(error)[-25:])
    ; did you mean digits-lt?
    """

    def __init__(self, message: object = ""):
        super().__init__(shortened(str(message)))


class ConfigError(LptError):
    """Every mistake of a config at once, one per line, each with its path and a suggestion."""

    def __init__(self, mistakes: Sequence[str]):
        self.mistakes = [shortened(mistake) for mistake in mistakes]
        super().__init__("\n".join(self.mistakes))


class BackboneError(LptError):
    """A backbone that cannot be served, or weights that do not fit it."""


class DataError(LptError):
    """A dataset that is missing, empty, or not what its name promises."""


class UndecodableImage(DataError):
    """An image file that is damaged, of a kind that is not read, or too large."""


class PromptFileError(LptError):
    """A prompt file that is damaged, foreign, newer than this version, or for another backbone."""


class NotInstalled(LptError):
    """A package that lpt does without until somebody asks for what it gives."""


class UnknownTask(LptError):
    """A task that a bank or a library does not have; `near` are names that are alike."""

    def __init__(self, task: object, known: Iterable[str]):
        known = list(known)
        self.task, self.near = str(task), tuple(difflib.get_close_matches(str(task)[:LONGEST_WORD], known, n=3))
        hint = f"did you mean {quoted(' or '.join(self.near))}" if self.near else f"there are {len(known)} others"
        super().__init__(f"there is no task {quoted(repr(task), 80)}: {hint}")


class TrainingError(LptError):
    """A run that went wrong by its numbers, for example a loss that is not finite."""


class DiskError(LptError):
    """A file that cannot be written: what it held before is intact."""

    def __init__(self, path: object, error: OSError):
        super().__init__(
            f"{path} cannot be written ({error.strerror or error}); what was there before is intact: put that right, "
            "and a run continues with --resume"
        )


def quoted(words: object, limit: int = 200) -> str:
    """A text from outside (a file, a library), made safe for the terminal: printable, on one line, at most `limit`
    letters.

    >>> quoted("two\\nlines\\x1b[2J", 12)
    'two lines...'
    """
    text = printable(" ".join(str(words)[: 10 * limit].split()))  # cut first: words may be megabytes
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short(name: str, limit: int = 1000) -> str:
    """A name as it is, or its beginning where it is longer than any name: of a file from anyone it may be megabytes.

    >>> short("red owl"), short("red owl", 6)
    ('red owl', 'red...')
    """
    return name if len(name) <= limit else name[: limit - 3] + "..."


def printable(text: str) -> str:
    """`text` on one line that no terminal takes for a command: a letter that is not printable, a line break too, is
    shown as a question mark, and a byte of a name that is no UTF-8 by its number.

    >>> print(printable("a  b\\n\\x1b[2J\\u202e\\udcff"))
    a  b??[2J?\\xff
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _shown(c) for c in text)


def _shown(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else "?"  # how Python keeps such a byte


def shortened(message: str) -> str:
    """`message` without anything very long that somebody has given and that would be repeated in it."""
    lines = message.split("\n")
    for i, line in enumerate(lines):
        words = [word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 3] + "..." for word in line.split(" ")]
        short = " ".join(words)
        lines[i] = short if len(short) <= LONGEST_LINE else short[: LONGEST_LINE - 3] + "..."
    return "\n".join(lines)


def check_kind(what: str, given: object, kind: type | tuple[type, ...], way_out: str) -> None:
    """Raises LptError, with the `way_out`, where `given` is nothing of that kind.

    >>> check_kind("tune: task", 3, str, "give a text")
    Traceback (most recent call last):
    lpt.errors.LptError: tune: task is 3: give a text
    """
    if not isinstance(given, kind):
        raise LptError(f"{what} is {quoted(repr(given), 80)}: {way_out}")


def require(package: str, *, extra: str | None, gives: str) -> None:
    """Raises NotInstalled where `package`, which `gives` something and which one of lpt's extras brings (None: none
    does), is absent."""
    if not importlib.util.find_spec(package):
        install = f"'lpt[{extra}]'" if extra else package
        raise NotInstalled(f"{gives} needs {package}, which is not installed: pip install {install}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, or nothing.

    >>> did_you_mean("epocs", ["epochs", "seed"])
    '; did you mean epochs?'
    >>> did_you_mean("zzz", ["epochs"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
