"""A folder of prompt files over HTTP, with a page to try it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lpt.errors import LptError, printable, quoted, require


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder of prompt files")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="backbone.weights=FILE, train.device=cpu")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="the backbone; default: what most of the files are for")] = None,
    host: Annotated[str, typer.Option(help="the address to listen at; by default only this machine can reach it")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="what clients must bring; or the variable LPT_SERVE_TOKEN")
    ] = None,
    task_memory: Annotated[
        int | None, typer.Option(min=1, metavar="MB", help="of tasks in memory; others are read again when asked for")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images that go through the backbone together")] = 64,
    accept: Annotated[float, typer.Option(help="task=auto: the share of a task's own images that is taken")] = 0.95,
    max_body: Annotated[int, typer.Option(min=1, metavar="MB", help="of one request")] = 16,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="of an image; default 33554432")] = None,
    max_images: Annotated[int, typer.Option(min=1, max=1000, help="asked about in one request")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="images that may wait; then requests get 429")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for a request; then it gets 504")] = 30,
) -> None:
    """Answer images over HTTP, of many tasks in one batch; / is a page to try it.

    New, changed and removed files are seen within a second. SIGTERM and Ctrl-C end it once what has begun is answered.
    """
    require("fastapi", extra="serve", gives="lpt serve")
    from lpt.config import nested
    from lpt.data.preprocess import PIXELS_VARIABLE
    from lpt.serve.opening import check_loading, open_bank
    from lpt.server.app import create_app
    from lpt.server.limits import MIB, Limits
    from lpt.server.running import bound, is_loopback, run, token_of
    from lpt.server.watching import ClosedFolder

    loading = check_loading(nested(settings or []), sections=("backbone", "train"))
    if backbone is not None:
        loading["name"] = backbone
    if not 0 <= accept <= 1:
        raise LptError(f"--accept {accept}: give a share from 0 to 1")
    if max_pixels is not None:
        os.environ[PIXELS_VARIABLE] = str(max_pixels)
    token = token_of(token_file)
    closed = ClosedFolder(folder)
    limits = Limits(body=max_body * MIB, bodies=8 * max_body * MIB, questions=max_images, queue=queue, seconds=timeout)
    memory = None if task_memory is None else task_memory * MIB
    with bound(host, port) as listening:  # before the backbone is loaded, which takes longer
        local = is_loopback(listening)
        bank = open_bank(closed, **loading, memory=memory, batch_size=batch_size, accept=accept)
        app = create_app(bank, closed, limits=limits, token=token, local=local)
        for sentence in [*closed.left_out.values(), *bank.refused.values()]:
            print(printable(f"warning: {quoted(sentence, 1000)}"), file=sys.stderr)
        if not local and token is None:
            print(f"warning: whoever can reach {quoted(host, 80)} is answered: set LPT_SERVE_TOKEN", file=sys.stderr)
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{listening.getsockname()[1]}/"
        print(printable(f"{len(bank)} tasks on {quoted(bank.backbone.name)} at {address}"), flush=True)
        run(app, listening)
