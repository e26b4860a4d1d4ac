"""What `lpt inspect`, `predict` and `evaluate` say of a prompt file, in this process, and what is wrong with it."""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from benchmarks.reliability.subjects import CLASSES, backbone
from lpt import cli
from lpt.model.backbones.base import with_norm_eps
from lpt.serve import opening

MOST = 100_000
"""Letters that a command may print, and bytes that it may write."""
LONGEST = 500
"""Letters of a refusal."""
NO_NUMBER = re.compile(r"(?<![\w\"'.-])-?(nan|inf|NaN|Infinity)(?![\w\"'.-])")
"""As Python and JSON print what is no number; names are words with others around them, or in quotes."""


class Commands:
    """The three commands on files in `room`, on the tiny backbone of the subjects at any size of images."""

    def __init__(self, room: Path):
        self.room, self.out = room, room / "answers.json"
        self.picture, photos = room / "i.png", room / "photos"
        Image.new("RGB", (8, 8), (9, 99, 199)).save(self.picture)
        for part in ("train", "test"):
            for k, name in enumerate(CLASSES):
                (photos / part / name).mkdir(parents=True)
                Image.new("RGB", (9, 7), (60 * k, 9, 99)).save(photos / part / name / f"{part}.png")
        self.rest = {
            "inspect": [],
            "predict": [str(self.picture), *self._settings(), "--json", str(self.out)],
            "evaluate": ["data.name=folder", f"data.root={photos}", *self._settings(), "--json", str(self.out)],
        }
        self.bare = backbone()
        opening.load_backbone = self._backbone

    def _settings(self) -> list[str]:
        return ["backbone.name=untrained:vit_tiny_patch16_224", "train.precision=fp32", "train.device=cpu"]

    def _backbone(
        self, name: str, *, weights: Any = None, image_size: int | None = None, norm_eps: float | None = None
    ) -> Any:
        if image_size == self.bare.preprocess.size and norm_eps is None:
            return self.bare
        return with_norm_eps(backbone(image_size or 32), norm_eps)

    def answers(self, path: Path) -> Iterator[tuple[str, int, str]]:
        """(command, exit code, what is wrong with what it has said and written) of each."""
        for command, rest in self.rest.items():
            self.out.unlink(missing_ok=True)
            self.bare.preprocess = backbone_pixels(self.bare)
            code, said, complained = _called([command, str(path), *rest])
            written = self.out.read_text() if self.out.exists() else ""
            yield command, code, problem_with(code, said, complained, written)


def backbone_pixels(bare: Any) -> Any:
    """The tiny backbone's own pixels: opening a prompt file gives it those of the file."""
    size = bare.vit.patch_embed.img_size[0]
    return bare.preprocess.with_(size=size)


def _called(words: list[str]) -> tuple[int, str, str]:
    said, complained, argv = io.StringIO(), io.StringIO(), sys.argv
    code = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained), torch.no_grad():
        sys.argv = ["lpt", *words]
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            sys.argv = argv
    return code, said.getvalue(), complained.getvalue()


def problem_with(code: int, said: str, complained: str, written: str) -> str:
    """What may not be, in a few words; nothing where all is well."""
    errors = [line for line in complained.splitlines() if not line.startswith("warning: ")]
    size = len(said) + len(complained) + len(written)
    if size > MOST:
        return f"an output of {size:,} letters"
    if "Traceback (most" in complained:
        return f"a traceback: {complained[-150:]!r}"
    if not (said + complained).replace("\n", "").isprintable():
        return "an output that a terminal would obey"
    answers = said if code == 2 else f"{said}\n{complained}"  # a refusal may name what it has found
    answers = re.sub(r"(?m)^method +\S+", "", answers)  # a method may be called NaN
    if found := NO_NUMBER.search(answers):
        return f"an output with {found[0]}: {answers[max(0, found.start() - 40) :][:80]!r}"
    if code not in (0, 1, 2) or (code == 0) == bool(errors):
        return f"code {code} with {complained[-150:]!r}"
    if code == 2 and (len(errors) != 1 or len(errors[0]) > LONGEST or written):
        return f"a refusal of {len(errors)} lines, {len(complained)} letters, {len(written)} of them written"
    try:
        json.loads(written or "null", parse_constant=_no_constant)
    except ValueError as error:
        return f"written JSON that is none: {error}"
    return ""


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)
