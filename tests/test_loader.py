"""Views made ahead: the same whoever makes them, and a sentence where a worker dies or an image is broken."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lpt.data import loader
from lpt.data.loader import Order, close_workers, made_ahead, workers_of
from lpt.data.preprocess import Preprocess
from lpt.data.samplers import InstanceBalanced
from lpt.data.task import Files
from lpt.engine.batches import Progress, Stream, drawn_ahead
from lpt.engine.evaluate import evaluate, features, predict
from lpt.errors import DataError
from lpt.files import read_tensors
from tests.support.pictures import fill
from tests.support.shared import ROOT
from tests.support.toy import prompted, small_backbone, toy_images

PREPROCESS = Preprocess(size=16, min_area=0.3)


@pytest.fixture(autouse=True)
def _no_workers_left():
    yield
    close_workers()


def photo(seed, side=(40, 52)):
    values = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize(side, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def files(n=40):
    contents = [photo(i) for i in range(n)]
    return Files(contents.__getitem__, torch.arange(n) % 4, tuple(f"p{i}.jpg" for i in range(n)), ("",) * n)


def steps(images, workers, first=0, world=1, rank=0):
    """The batches of six steps of a weak and a strong stream."""
    streams = {
        "weak": Stream(InstanceBalanced(images.labels, batch_size=12, seed=1)),
        "strong": Stream(InstanceBalanced(images.labels, batch_size=12, seed=2), strong=True),
    }
    where = [Progress("a", step, 6, 3, 0, rank, world) for step in range(first, 6)]
    with drawn_ahead(streams, where, images, PREPROCESS, number=len(where), workers=workers) as batches:
        return [{name: batch.content for name, batch in drawn.items()} for _, drawn in batches]


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_batches_are_the_same_with_any_number_of_workers_and_processes_and_after_a_kill(kind):
    images = files() if kind == "files" else toy_images(torch.arange(4).repeat(6))
    alone = steps(images, 0)
    for workers in (1, 4):
        for one, other in zip(alone, steps(images, workers), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    for one, other in zip(alone[2:], steps(images, 2, first=2), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    shares = [steps(images, workers, world=2, rank=r) for r, workers in enumerate((0, 2))]
    for one, *parts in zip(alone, *shares, strict=True):
        for name, content in one.items():
            assert torch.equal(torch.stack([part[name] for part in parts], 1).flatten(0, 1), content)


def test_evaluations_and_features_are_the_same_with_workers_and_use_them_again():
    images, model = files(70), prompted(small_backbone(), pool=True)
    one, other = (predict(model, images, batch_size=16, workers=workers) for workers in (0, 2))
    assert torch.equal(one.logits, other.logits) and torch.equal(one.ids, other.ids)
    (pool,) = loader._idle
    before = [process.pid for process in pool.processes]
    assert torch.equal(features(model, images, workers=0), features(model, images, workers=2))
    evaluate(model, images, torch.full((len(model.classes),), 9), workers=2)
    assert [process.pid for process in loader._idle[0].processes] == before and len(loader._idle) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(workers):
    images = files()
    broken = Files(
        lambda i: b"nothing" if i == 29 else images.source(i), images.labels, images.ids, images.fingerprints
    )
    with pytest.raises(DataError, match=r"image p29\.jpg cannot be decoded"):
        steps(broken, workers)
    order = Order(files=broken.take(torch.arange(27, 32)), preprocess=PREPROCESS)
    with made_ahead([("x", [order])], workers=workers) as made:
        ((item, (one,)),) = made
    assert item == "x" and list(one.errors) == [2] and "p29.jpg" in str(one.errors[2])
    assert one.views[3].float().std() > 0 and one.views[2].sum() == 0


def slowly(monkeypatch, seconds):
    cut = Preprocess.cut_one

    def slow(self, file, chance):
        if file.name == "p3.jpg":
            time.sleep(seconds)
        return cut(self, file, chance)

    monkeypatch.setattr(Preprocess, "cut_one", slow)


def test_a_worker_that_is_killed_is_a_sentence_with_its_image(monkeypatch):
    slowly(monkeypatch, 60)
    images = files()
    order = Order(files=images.take(torch.arange(8)), preprocess=PREPROCESS)

    def kill():
        while not any(place == 3 for _, _, place in loader_at()):
            time.sleep(0.02)
        os.kill(next(int(pid) for pid, _, place in loader_at() if place == 3), signal.SIGKILL)

    pools = []
    create = loader._Pool
    monkeypatch.setattr(loader, "_Pool", lambda workers: pools.append(create(workers)) or pools[-1])

    def loader_at():
        return pools[0].maker.at.tolist() if pools else []

    thread = threading.Thread(target=kill)
    thread.start()
    began = time.perf_counter()
    with (
        pytest.raises(DataError, match=r"worker .* ended by itself \(signal 9\) at image p3\.jpg: .* train\.workers"),
        made_ahead([(None, [order])] * 5, workers=2) as made,
    ):
        list(made)
    thread.join()
    assert time.perf_counter() - began < 30 and not loader._idle
    monkeypatch.undo()
    assert len(steps(images, 2)) == 6  # others are started


def test_jobs_without_views_and_a_consumer_that_leaves():
    order = Order(files=files().take(torch.arange(20)), preprocess=PREPROCESS)
    nothing = Order(preprocess=PREPROCESS)
    jobs = [(0, [nothing]), (1, [order, nothing]), (2, []), (3, [nothing, order]), (4, [])]
    for workers in (0, 2):
        with made_ahead(iter(jobs), workers=workers) as made:
            assert [(i, [len(one.views) for one in several]) for i, several in made] == [
                (0, [0]), (1, [20, 0]), (2, []), (3, [0, 20]), (4, [])
            ]  # fmt: skip
        with made_ahead(((i, [order]) for i in range(10**6)), workers=workers) as made:
            next(made)
    assert not any(thread.name == "made ahead" for thread in threading.enumerate())


def test_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(loader, "available_cores", lambda: 8)
    monkeypatch.setattr(loader.sys, "platform", "linux")
    assert workers_of(3, 1) == 3 and workers_of(0, 10**6) == 0
    assert workers_of("auto", 10**6) == 8 and workers_of("auto", 10) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers_of("auto", 10**6) == 2


def children(process):
    import psutil

    return psutil.Process(process.pid).children(recursive=True)


def test_a_run_on_files_with_workers_survives_kills_and_signals_to_all_its_processes(tmp_path):
    """In the end it has the bits of an undisturbed run without workers, and no worker outlives its run."""
    root = fill(tmp_path / "data", {"a": 24, "b": 12, "c": 6}, kind="jpg")
    common = ["data.name=folder", f"data.root={root}", "method.epochs=[15, 0]", "train.batch_size=16",
              "train.checkpoint_seconds=0", "train.precision=fp32"]  # fmt: skip
    command = [sys.executable, "-m", "lpt", "train", str(ROOT / "configs/digits_lt/lpt.yaml"), *common]
    whole, beaten = tmp_path / "whole", tmp_path / "beaten"
    subprocess.run([*command, "train.workers=0", "--out", whole], check=True, capture_output=True)
    left = []
    for how in ("kill", "interrupt"):
        resumed = [*command, "train.workers=2", "--out", beaten, "--resume"]
        process = subprocess.Popen(resumed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        before = saved(beaten)
        while process.poll() is None and saved(beaten) <= before + 1:
            time.sleep(0.02)
        workers = children(process) if process.poll() is None else []
        left += workers
        if how == "kill":
            process.send_signal(signal.SIGKILL)
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[1].decode()
        assert "worker" not in said
    end = time.perf_counter() + 30
    while any(worker.is_running() for worker in left) and time.perf_counter() < end:
        time.sleep(0.05)
    assert len(left) >= 2 and not any(worker.is_running() for worker in left)
    done = subprocess.run([*command, "train.workers=3", "--out", beaten, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(folder / "prompt.safetensors") for folder in (whole, beaten))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved(folder):
    """The step of the checkpoint in a run's folder."""
    try:
        checkpoint = read_tensors(folder / "checkpoints" / "phase1.safetensors")[0]["lpt_checkpoint"]
    except (OSError, ValueError, KeyError):
        return 0
    return json.loads(checkpoint)["step"]
