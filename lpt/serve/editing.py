"""A prompt file with another `method.query`: LPT's group prompts without the pass that chooses them.

Shapes: pool [K L n D], keys [K D'], ids [k].
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from lpt.device import versions
from lpt.engine.query import agreement, fit_query_map, most_chosen
from lpt.errors import ConfigError, PromptFileError, quoted
from lpt.files import to_bytes, write_atomic
from lpt.memory import PREDICTED_AT_ONCE
from lpt.prompt_file import stored_header
from lpt.prompt_header import Header, format_of, read_header
from lpt.serve.evaluating import load_task_of, was_trained_on
from lpt.serve.opening import check_loading, open_prompt, workers_in
from lpt.settings import validated
from lpt.terms import QueryMode

SECTIONS = ("method", "data", "backbone", "train")


class Edits(BaseModel):
    """The section `method` where a file is edited: what can be another after training."""

    model_config = ConfigDict(extra="forbid")

    query: QueryMode


def edit_prompt(
    path: str | Path,
    out: str | Path,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Header:
    """Writes the prompt file `path` with `method.query` early or none to `out`, whole or not at all, and returns its
    header.

    Both look at the test views of the training images, of the file's own task where `data` does not say another one:
    early fits the map of `lpt.engine.query.fit_query_map`, none keeps the group prompts that most images choose
    together. Neither has a query of its own left, so that a query head is left out, and the answer is that of the
    prompted pass. Everything else stays as it is, to the bit; what was measured is of the unedited file and left out.
    Raises ConfigError for what cannot be edited, PromptFileError for a file that cannot be, and what `open_prompt` and
    `load_task` raise.
    """
    path, out = Path(path), Path(out)
    query = _query_in(settings.get("method", {}))
    loading = check_loading(settings, sections=SECTIONS)
    header, arrays = read_header(path)
    _check_editable(path, header, arrays, query)
    _check_out(path, out)
    task = load_task_of(header, settings.get("data", {}))
    if not was_trained_on(task, header):
        say(f"warning: these are not the images that {path} was trained on: the edit is found on {task.name}'s")
    images, workers = task.train, workers_in(settings)
    model, _ = open_prompt(path, **loading, at_once=min(PREDICTED_AT_ONCE, len(images)))
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items() if name != "query_head.weight"}
    if query == "early":
        query_map = fit_query_map(model, images, workers=workers).to(tensors["pool.tokens"].dtype)
        share = agreement(model, query_map.float(), images, workers=workers)  # with the map as it is stored
        tensors["pool.query_map"] = query_map
        found: dict[str, Any] = {"agreement": share}
        say(f"early query: {share:.0%} of the training images get the group prompts that the full query gives them")
    else:
        ids, share = most_chosen(model, images, workers=workers)
        for name in ("pool.tokens", "pool.keys"):
            tensors[name] = tensors[name][ids].contiguous()
        tensors.pop("pool.query_map", None)
        found = {"group_prompts": ids.tolist(), "chosen_by": share}
        numbers = " and ".join(map(str, ids.tolist()))
        say(f"every image gets the group prompts {numbers}, which {share:.0%} of the training images choose, the most")
    edited = header.model_copy(
        update={
            "format": format_of(tensors),
            "query": query,
            "settings": {**header.settings, "query": query},
            "metrics": {},
            "versions": versions(),
            "edited": {"query": query, "images": task.name, **found},
        }
    )
    write_atomic(out, to_bytes(tensors, lpt=stored_header(out, edited)))
    return edited


def _query_in(method: Mapping[str, Any]) -> QueryMode:
    """What the section `method` wants. Raises ConfigError."""
    if cannot := [f"method.{key}" for key in method if key not in Edits.model_fields]:
        raise ConfigError(
            [
                f"{quoted(name)}: this cannot be edited, the prompt file is what training with it has left: "
                "method.query can"
                for name in cannot
            ]
        )
    if not method:
        raise ConfigError(["there is nothing to edit: give method.query=none or method.query=early"])
    values, mistakes = validated("method", Edits, dict(method))
    if mistakes:
        raise ConfigError(mistakes)
    return values["query"]


def _check_editable(path: Path, header: Header, arrays: Mapping[str, Any], query: QueryMode) -> None:
    """Raises PromptFileError where the query of the file cannot become `query`."""
    if "pool.tokens" not in arrays:
        raise PromptFileError(
            f"prompt file {path} ({quoted(header.method, 40)}) has no group prompts: method.query is of LPT with a pool"
        )
    if query == header.query:
        raise PromptFileError(f"prompt file {path} has method.query={query} already")
    if header.query == "none" or query == "full":
        raise PromptFileError(
            f"prompt file {path} has method.query={header.query}, and not what {query} needs any more: edit the file "
            "that it was made from, or train one"
        )


def _check_out(path: Path, out: Path) -> None:
    """Raises PromptFileError where something is there already, the unedited file before all."""
    if out.exists():
        what = "is the prompt file itself" if out.samefile(path) else "is there already"
        raise PromptFileError(f"--out {out} {what}: give another name")
