"""A small library of prompt files to be served, images to ask about, and a server in a thread or a process."""

import base64
import contextlib
import io
import os
import subprocess
import sys
import threading
import time

import torch
import uvicorn
from PIL import Image

from benchmarks.serving.libraries import model_of
from lpt.prompt_file import save_prompt
from lpt.server.running import Connection, bound
from tests.support.shared import ROOT

KINDS = {"shoes": "pool", "lamps": "deep", "birds": "lora", "tools": "head"}
"""Tasks by name, of different methods."""


def write_task(path, backbone, kind, number, *, classes=None):
    """A task of random numbers, whole or not at all."""
    classes = classes or 5 + number
    model = model_of(backbone, kind, number, classes=classes)
    temporary = path.with_name(f".{path.name}")
    save_prompt(temporary, model, method="random", counts=torch.arange(classes, 0, -1) * 7)
    temporary.rename(path)


def write_library(folder, backbone):
    for number, (name, kind) in enumerate(KINDS.items()):
        write_task(folder / f"{name}.safetensors", backbone, kind, number)


def picture(seed=0, kind="PNG", size=(40, 30)):
    """An encoded image."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, kind)
    return buffer.getvalue()


def in_base64(content):
    return base64.b64encode(content).decode()


@contextlib.contextmanager
def in_thread(app):
    """The address of a server of this process."""
    listening = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, http=Connection, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def started(folder, *words, **environment):
    """(`lpt serve` as a process of its own, its address)."""
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "lpt", "serve", str(folder), "--port", "0", *words],
        env=around,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    if " at http://" not in line:
        raise RuntimeError(f"it did not start: {line}{process.communicate()[1]}")
    return process, line.split(" at ")[1].strip().rstrip("/")
