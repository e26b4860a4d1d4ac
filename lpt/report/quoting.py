"""Names of classes, files and runs, escaped for Markdown, HTML, a shell and a spreadsheet.

For the terminal and for errors: `printable` and `quoted` in `lpt.errors`.
"""

import html
import re
import shlex

from lpt.errors import printable

MARKDOWN = re.compile(
    r"[\\`*\[\]|~$]"  # code, emphasis, links, cells, mathematics
    r"|(?<!\w)_|_(?!\w)"  # emphasis; inside a word it is none
    r"|^[#+-]|(?<=\w)@(?=\w)|(?<=:)/(?=/)|(?<=www)\."  # headings and lists; addresses that become links by themselves
)


def for_markdown(text: object) -> str:
    """A text inside a line or a cell, that says itself and nothing else.

    >>> print(for_markdown("maple_tree"), for_markdown("a|b\\n# *c*"), for_markdown("<b>&lt;"))
    maple_tree a\\|b?# \\*c\\* &lt;b&gt;&amp;lt;
    """
    escaped = MARKDOWN.sub(lambda match: "\\" + match.group(), printable(str(text)))
    escaped = re.sub(r"&(?=#?\w+;)", "&amp;", escaped)
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


def code_block(command: str, language: str = "sh") -> list[str]:
    """Lines of a block of code that nothing in `command` ends early.

    >>> code_block("echo '```'")
    ['````sh', "echo '```'", '````']
    """
    runs = re.findall("`{3,}", command)
    fence = "`" * max([3, *(len(run) + 1 for run in runs)])
    return [fence + language, command, fence]


def for_html(text: object) -> str:
    """A text between tags, or the value of an attribute.

    >>> for_html("<b>&\\x1b")
    '&lt;b&gt;&amp;?'
    """
    return html.escape(printable(str(text)))


def shell_command(*words: str) -> str:
    """A command line on one line that a shell reads as these words, whatever they hold.

    >>> print(shell_command("lpt", "a b", "c\\nd"))
    lpt 'a b' $'c\\nd'
    """
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_c(word) for word in words)


def _ansi_c(word: str) -> str:
    """As bash and zsh write what is not printable: by its bytes."""
    parts = []
    for letter in word:
        if letter in "\\'":
            parts.append("\\" + letter)
        elif letter.isprintable():
            parts.append(letter)
        elif letter == "\n":
            parts.append("\\n")
        else:
            parts += [f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape")]
    return "$'" + "".join(parts) + "'"


def for_spreadsheet(value: str) -> str:
    """A cell of a CSV or Parquet file that no spreadsheet takes for a formula. Texts that differ stay different; bytes
    that are no UTF-8 are written as numbers.

    >>> for_spreadsheet("=1+1"), for_spreadsheet("cat"), for_spreadsheet("'cat")
    ("'=1+1", 'cat', "''cat")
    """
    value = value.encode("utf-8", "backslashreplace").decode()
    return f"'{value}" if value.lstrip().startswith(("=", "+", "-", "@", "'", "＝", "＋", "－", "＠")) else value
