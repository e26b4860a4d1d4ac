"""The real data and weights beside the checkout, which tests skip without."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


def real(path: str) -> Path:
    """A file of the real data and weights, or a skip that says which one is absent."""
    file = SHARED / path
    if not file.exists():
        pytest.skip(f"{path} is not at hand")
    return file
