"""The bank of tasks as a Ray Serve application: what its replica answers, alone and in a cluster of two processors."""

import asyncio
import io
import json
import shutil
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lpt.deployment import Deployment, Replica
from lpt.errors import DataError, UnknownTask
from lpt.model.backbones import load_backbone
from lpt.model.classifier import PromptedClassifier
from lpt.model.heads import CosineHead
from lpt.prompt_file import save_prompt
from lpt.serve.bank import TaskBank


def encoded(seed):
    """A PNG of 40 x 40 random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def task_file(path, classes, seed):
    nano = load_backbone("nano")
    generator = torch.Generator().manual_seed(seed)
    head = CosineHead(num_classes=len(classes), width=nano.feature_width, scale=20, generator=generator)
    save_prompt(
        path, PromptedClassifier(nano, head, classes=classes), method="toy", counts=torch.ones(len(classes)).long()
    )


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    task_file(folder / "shoes.safetensors", ("boot", "clog", "pump"), 0)
    task_file(folder / "lamps.safetensors", ("desk", "floor"), 1)
    return folder


def test_a_replica_answers_as_the_bank_does(library):
    replica, bank = Replica(Deployment(library=library)), TaskBank(load_backbone("nano"), library)

    async def ask():
        return await asyncio.gather(*(replica.predict(encoded(i), ("shoes", "lamps")[i % 2], 2) for i in range(4)))

    for i, answer in enumerate(asyncio.run(ask())):
        (expected,) = bank.predict([encoded(i)], tasks=("shoes", "lamps")[i % 2], topk=2)
        assert answer["classes"] == expected.classes and answer["task"] == expected.task and answer["counts"] == (1, 1)
        assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)


def test_new_files_are_found_when_its_health_is_asked_for(library):
    replica = Replica(Deployment(library=library))
    task_file(library / "hats.safetensors", ("fez", "beret"), 2)
    with pytest.raises(UnknownTask, match="hats"):
        asyncio.run(replica.predict(encoded(0), "hats"))
    replica.check_health()
    assert asyncio.run(replica.predict(encoded(0), "hats"))["task"] == "hats"
    shutil.rmtree(library)  # a disk that is away: what is in memory goes on
    replica.check_health()


class Request:
    """As much of Starlette's as a replica looks at."""

    def __init__(self, body=b"", method="POST", **query):
        self.body, self.method, self.query_params = body, method, query

    async def stream(self):
        yield self.body


def test_mistakes_are_answered(library, monkeypatch):
    pytest.importorskip("starlette", reason="Starlette comes with Ray Serve: pip install lpt[ray]")
    replica = Replica(Deployment(library=library))

    def status(*words, **query):
        answer = asyncio.run(replica(Request(*words, **query)))
        return answer.status_code, answer.body.decode()

    assert status(encoded(0), task="shoes", topk="1")[0] == 200
    assert status(encoded(0), task="shoe") == (
        404,
        '{"error":"there is no task \'shoe\': did you mean shoes","near":["shoes"]}',
    )
    assert status(b"no image", task="shoes")[0] == 422 and "cannot be decoded" in status(b"no image", task="shoes")[1]
    for bad in ({"task": "shoes", "topk": "many"}, {}, {"task": "shoes", "method": "GET"}):
        assert status(encoded(0), **bad)[0] == 400
    monkeypatch.setattr("lpt.deployment.LARGEST_IMAGE", 10)
    assert status(encoded(0), task="shoes")[0] == 413
    with pytest.raises(DataError, match="topk is 0"):
        asyncio.run(replica.predict(encoded(0), "shoes", 0))
    with pytest.raises(ValidationError, match="replica"):
        Deployment(library=library, replica=2)  # type: ignore[call-arg]


def posted(task):
    """(status, the best class or tasks of like names) of an image sent to a cluster's proxy."""
    request = urllib.request.Request(f"http://127.0.0.1:8765/?task={task}&topk=1", data=encoded(0), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["classes"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["near"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, of pydantic and of sockets
def test_two_replicas_on_two_processors(library, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # nothing is written into the home folder
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "200")  # on machines that have other work, too
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install lpt[ray]")
    from ray import serve

    from lpt.deployment import build

    bank = TaskBank(load_backbone("nano"), library)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": 8765})
        handle = serve.run(build(Deployment(library=library, replicas=2, batch_size=8, device="cpu")), name="lpt")
        names = [("shoes", "lamps")[i % 2] for i in range(40)]
        asked = [handle.predict.remote(encoded(i), name, 2) for i, name in enumerate(names)]
        for i, (name, answer) in enumerate(zip(names, asked, strict=True)):
            (expected,) = bank.predict([encoded(i)], tasks=name, topk=2)
            found = answer.result(timeout_s=120)
            assert tuple(found["classes"]) == expected.classes
            assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        (best,) = bank.predict([encoded(0)], tasks="shoes", topk=1)
        assert posted("shoes") == (200, list(best.classes))
        assert posted("shoe") == (404, ["shoes"])
        task_file(library / "hats.safetensors", ("fez", "beret"), 2)
        until = time.monotonic() + 120
        while posted("hats")[0] != 200:
            assert time.monotonic() < until
            time.sleep(1)
    finally:
        serve.shutdown()
        ray.shutdown()
