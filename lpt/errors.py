"""The exceptions that people see, each one sentence with the thing, the value and the way out."""

import difflib
from collections.abc import Iterable, Sequence


class LptError(ValueError):
    """Anything a user can put right; the command line prints it on one line and exits with code 2."""


class ConfigError(LptError):
    """Every mistake of a config at once, one per line, each with its path and a suggestion."""

    def __init__(self, mistakes: Sequence[str]):
        self.mistakes = list(mistakes)
        super().__init__("\n".join(self.mistakes))


class BackboneError(LptError):
    """A backbone that cannot be served, or weights that do not fit it."""


class DataError(LptError):
    """A dataset that is missing, empty, or not what its name promises."""


class PromptFileError(LptError):
    """A prompt file that is damaged, foreign, newer than this version, or for another backbone."""


class TrainingError(LptError):
    """A run that went wrong by its numbers, for example a loss that is not finite."""


class DiskError(LptError):
    """A file that cannot be written: what it held before is intact."""

    def __init__(self, path: object, error: OSError):
        super().__init__(
            f"{path} cannot be written ({error.strerror or error}); what was there before is intact: put that right, "
            "and a run goes on with --resume"
        )


def quoted(words: object, limit: int = 200) -> str:
    """What a file or a library says, made fit for an error message: printable, on one line, at most `limit` letters.

    >>> quoted("two\\nlines\\x1b[2J", 12)
    'two lines...'
    """
    one_line = " ".join(str(words)[: 10 * limit].split())  # cut first: words may be megabytes
    text = "".join(letter if letter.isprintable() else "?" for letter in one_line)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short(name: str, limit: int = 1000) -> str:
    """A name as it is, or its beginning where it is longer than any name: of a file from anyone it may be megabytes.

    >>> short("red owl"), short("red owl", 6)
    ('red owl', 'red...')
    """
    return name if len(name) <= limit else name[: limit - 3] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, or nothing.

    >>> did_you_mean("epocs", ["epochs", "seed"])
    '; did you mean epochs?'
    >>> did_you_mean("zzz", ["epochs"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
