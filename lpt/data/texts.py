"""Text files and names as people and spreadsheets write them: any common encoding, compared by what is meant."""

import codecs
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""How a file begins that says its encoding."""
INVISIBLE = "\ufeff\u200b\u2060\x00"
"""Byte-order marks and spaces of no width, which are never a part of a name at its ends."""
NO_VALUE = ("nan", "<na>")
"""How programs write a cell that is empty."""


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 or UTF-32 where it begins with their mark or has a zero in every other byte.
    Byte-order marks at the beginning of lines are left out: they are where one file was appended to another.

    Raises OSError, and ValueError for another encoding.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), None) or _unmarked(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(f"it is no {encoding.removesuffix('-sig').upper()} text: save it as UTF-8") from None
    return re.sub(r"^\ufeff+", "", text, flags=re.MULTILINE)


def _unmarked(content: bytes) -> str:
    """The encoding of a text without a mark: paths and labels are mostly ASCII, of which UTF-16 makes pairs with a
    zero."""
    start = content[:4096]
    if len(start) >= 4 and len(content) % 2 == 0:
        first, second = start[0::2].count(0), start[1::2].count(0)
        if second > 0.4 * len(start) / 2 and not first:
            return "utf-16-le"
        if first > 0.4 * len(start) / 2 and not second:
            return "utf-16-be"
    return "utf-8"


def cleaned(name: str) -> str:
    """A name without spaces and invisible letters around it.

    >>> cleaned("\\ufeff red panda ")
    'red panda'
    """
    while (shorter := name.strip().strip(INVISIBLE)) != name:
        name = shorter
    return name


def class_names_of(values: Sequence[Any]) -> list[str]:
    """The names of classes in a column of a table; an empty text where a row has none. Whole numbers are written
    without a fraction, also as texts where all are numbers or where the same number is there without one.

    Raises TypeError, with the value, for what is no name.

    >>> class_names_of([" cat", "NaN", None, 2.0, "2", "1.0"])
    ['cat', '', '', '2', '2', '1.0']
    >>> class_names_of(["1.0", "2.0", float("nan")])
    ['1', '2', '']
    """
    names = [_class_name(value) for value in values]
    texts = set(names) - {""}
    numbers = {name: without for name in texts if (without := _without_fraction(name)) != name}
    if not numbers:
        return names
    only_numbers = all(re.fullmatch(r"-?\d+", _without_fraction(name)) for name in texts)
    whole = {name: without for name, without in numbers.items() if only_numbers or without in texts}
    return [whole.get(name, name) for name in names]


def _class_name(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    if not isinstance(value, str | int):
        raise TypeError(repr(value))
    name = cleaned(str(value))
    return "" if name.casefold() in NO_VALUE else name


def _without_fraction(name: str) -> str:
    return re.sub(r"(?<=\d)\.0+$", "", name) if re.fullmatch(r"-?\d+\.0+", name) else name


def spelling(name: str) -> str:
    """What two spellings of one name have in common: case, underscores, hyphens, spaces, letters without a width,
    the Unicode form and the fraction of a whole number make no other name.

    >>> spelling("Red_Panda ") == spelling("red panda"), spelling("1.0") == spelling("1")
    (True, True)
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    seen = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf")  # zero-width ones and the like
    return _without_fraction(" ".join(re.sub(r"_|(?<=\w)-(?=\w)", " ", cleaned(seen)).split()))
