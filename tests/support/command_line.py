"""The command line within this process."""

import sys

from lpt import cli


def lpt(capsys, *words) -> tuple[int, str, str]:
    """Exit code, what was printed, and what was said on the error stream."""
    old, sys.argv = sys.argv, ["lpt", *map(str, words)]
    code = 0
    try:
        cli.main()
    except SystemExit as leave:
        code = int(leave.code or 0)
    finally:
        sys.argv = old
    said = capsys.readouterr()
    return code, said.out, said.err
