"""The server: answers as the bank gives them, refusals in one sentence, files that change, limits, and its end."""

import inspect
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lpt.commands.serve import serve
from lpt.data.preprocess import MAX_PIXELS
from lpt.errors import LptError
from lpt.model.backbones import load_backbone
from lpt.serve.bank import Asked, TaskBank
from lpt.server.app import Results, Tasks, content_policy, create_app
from lpt.server.batching import Batcher
from lpt.server.bodies import asking
from lpt.server.limits import Limits, Refusal, Room
from lpt.server.running import TOKEN_VARIABLE, bound, is_loopback, token_of
from lpt.server.watching import ClosedFolder
from tests.support.command_line import lpt as command
from tests.support.serving import KINDS, in_base64, in_thread, picture, started, write_library, write_task
from tests.support.shared import ROOT
from tests.support.toy import small_backbone

HERE = "http://localhost"


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture(scope="module")
def library(tmp_path_factory, backbone):
    folder = tmp_path_factory.mktemp("library")
    write_library(folder, backbone)
    return folder


def served(folder, backbone, **settings):
    closed = ClosedFolder(folder)
    return create_app(TaskBank(backbone, closed), closed, **{"watch_seconds": 1000, **settings})


@pytest.fixture(scope="module")
def client(library, backbone):
    with TestClient(served(library, backbone), base_url=HERE) as client:
        yield client


@pytest.fixture(scope="module")
def bank(library, backbone):
    return TaskBank(backbone, library)


def files(*images):
    return [("images", (f"{k}.png", image, "image/png")) for k, image in enumerate(images)]


def form(client, images, tasks, **fields):
    return client.post("/v1/predict", files=files(*images), data={"tasks": tasks, **fields})


def same(result, answer):
    """A result is what the bank itself says."""
    assert result["status"] == 200 and result["task"] == answer.task
    assert [one["name"] for one in result["classes"]] == list(answer.classes)
    assert [one["count"] for one in result["classes"]] == list(answer.counts)
    given = torch.tensor([one["probability"] for one in result["classes"]])
    assert torch.allclose(given, torch.tensor(answer.probabilities), atol=1e-5)
    assert [one["number"] for one in result["group_prompts"]] == list(answer.group_prompts)


# Answers.


def test_an_uploaded_image_is_answered_as_by_the_bank(client, bank):
    for task in KINDS:
        response = form(client, [picture()], task, topk=3)
        assert response.status_code == 200, response.text
        (result,) = response.json()["results"]
        same(result, bank.predict(picture(), task, topk=3)[0])
        assert len(result["classes"]) == 3 and bool(result["group_prompts"]) == (task == "shoes")
    assert "computing;dur=" in response.headers["server-timing"]


def test_several_images_and_tasks_in_json(client, bank):
    images, tasks = [picture(1), picture(2, "JPEG"), picture(3)], ["birds", "shoes", "birds"]
    body = {"images": [in_base64(image) for image in images], "tasks": tasks, "topk": 4}
    body["images"][1] = "data:image/jpeg;base64," + body["images"][1]
    results = client.post("/v1/predict", json=body).json()["results"]
    for result, answer in zip(results, bank.predict(images, tasks, topk=4), strict=True):
        same(result, answer)


def test_every_task_may_be_asked_about_every_image(client, bank):
    images = [picture(1), picture(2)]
    results = form(client, images, ["lamps", "tools"], every_task="true").json()["results"]
    pairs = [(image, task) for image in images for task in ("lamps", "tools")]
    for result, (image, task) in zip(results, pairs, strict=True):
        same(result, bank.predict(image, task)[0])


def test_auto_is_the_task_that_the_image_is_routed_to(client, library, backbone, bank):
    images = [picture(seed) for seed in range(6)]
    answers = bank.predict(images, "auto")
    for result, answer in zip(form(client, images, "auto").json()["results"], answers, strict=True):
        same(result, answer)
        assert result["route"]["task"] == answer.route.task
    closed = ClosedFolder(library)
    strict = create_app(TaskBank(backbone, closed, accept=0.0), closed, watch_seconds=1000)
    with TestClient(strict, base_url=HERE) as other:
        (result,) = form(other, [picture()], "auto").json()["results"]
    assert result["status"] == 200 and result["task"] is None and result["classes"] == []
    assert result["route"]["nearest"] in KINDS and result["route"]["score"] < result["route"]["threshold"]


def test_a_damaged_image_is_named_and_the_others_are_answered(client, bank):
    images = [picture(1), b"no image", picture(2)[:60], picture(3)]
    response = form(client, images, "lamps")
    results = response.json()["results"]
    assert response.status_code == 200 and [one["status"] for one in results] == [200, 422, 422, 200]
    assert results[1]["error"] == "image 1.png cannot be decoded (cannot identify image file)"
    same(results[3], bank.predict(images[3], "lamps")[0])
    assert form(client, [b"no image"], "auto").status_code == 422  # nothing was answered
    body = {"images": ["*", "https://example.com/a.png", "", in_base64(picture())], "tasks": "lamps"}
    errors = [one.get("error") for one in client.post("/v1/predict", json=body).json()["results"]]
    assert errors[0] == "image 1 is not in base64" and "nothing is fetched" in errors[1]
    assert errors[2:] == ["image 3 is empty", None]


def test_an_unknown_task_is_answered_with_near_names(client):
    response = form(client, [picture()], ["shoe"])
    assert response.status_code == 404
    assert response.json() == {"error": "there is no task 'shoe': did you mean shoes", "near": ["shoes"]}
    response = client.get("/v1/tasks/lamp")
    assert response.status_code == 404 and response.json()["near"] == ["lamps"]
    for path in ("../shoes", "/etc/passwd", f"{'x' * 3000}", "shoes.safetensors", "a\0b"):
        assert form(client, [picture()], [path]).status_code == 404


ONE = {"images": [in_base64(picture())], "tasks": "shoes"}


@pytest.mark.parametrize(
    ("status", "says", "sent"),
    [
        (415, "the body is text/plain: send multipart/form-data or application/json", {"content": b"x"}),
        (400, "the body is no JSON", {"content": b"{", "headers": {"content-type": "application/json"}}),
        (400, "the JSON is no object", {"json": [1]}),
        (400, "request.images is missing", {"json": {"tasks": "shoes"}}),
        (400, "request.task: there is no such setting; did you mean tasks?", {"json": {**ONE, "task": "x"}}),
        (400, "request.topk: got 0", {"json": {**ONE, "topk": 0}}),
        (400, "request.topk: got True", {"json": {**ONE, "topk": True}}),
        (400, "request.images.0: got 3", {"json": {**ONE, "images": [3]}}),
        (400, "1 images and 2 tasks", {"json": {**ONE, "tasks": ["shoes", "lamps"]}}),
        (400, "more than 420 values", {"json": {**ONE, "tasks": ["shoes"] * 1000}}),
        (400, "the body is no JSON", {"content": b"[" * 400, "headers": {"content-type": "application/json"}}),
        (413, "33 questions in one request, 32 are the most", {"json": {**ONE, "images": ["eA=="] * 33}}),
        (413, "33 questions", {"json": {**ONE, "tasks": ["shoes"] * 33, "every_task": True}}),
        (413, "more than 32 images", {"files": files(*[b"x"] * 33), "data": {"tasks": "shoes"}}),
        (400, "request.tasks is missing", {"files": files(b"x")}),
        (400, "in field 'image': send it as images", {"files": [("image", b"x")], "data": {"tasks": "shoes"}}),
        (400, "request.size: there is no such setting", {"files": files(b"x"), "data": {"tasks": "x", "size": "3"}}),
        (400, "is larger than 4096 bytes", {"files": files(b"x"), "data": {"tasks": "x" * 5000}}),
        (400, "no boundary", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}),
        (
            400,
            "breaks off before its end",
            {"content": b"--a\r\n", "headers": {"content-type": "multipart/form-data; boundary=a"}},
        ),
        (413, "the body is larger than 16,777,216 bytes", {"content": b"x" * (2**24 + 1)}),
    ],
)
def test_a_request_that_cannot_be_read_is_refused_in_one_sentence(client, status, says, sent):
    headers = {"content-type": "text/plain", **sent.pop("headers", {})} if "content" in sent else {}
    response = client.post("/v1/predict", headers=headers, **sent)
    assert (response.status_code, list(response.json())) == (status, ["error"]), response.text
    assert says in response.json()["error"] and response.json()["error"].isprintable()


def test_a_body_of_unknown_length_is_held_to_the_limit_too(client):
    response = client.post("/v1/predict", content=(b"x" * 2**20 for _ in range(17)))
    assert response.status_code == 413


# What there is.


def test_tasks_are_listed_and_described(client, bank):
    listed = Tasks(**client.get("/v1/tasks").json())
    assert [task.name for task in listed.tasks] == sorted(KINDS) and listed.refused == {}
    shoes = client.get("/v1/tasks/shoes").json()
    header = bank.header("shoes")
    assert [one["name"] for one in shoes["class_list"]] == list(header.classes)
    assert [one["count"] for one in shoes["class_list"]] == header.counts and shoes["images"] == sum(header.counts)


def test_health_metrics_and_paths_that_are_not_there(client):
    assert client.get("/healthz").json() == {"alive": True}
    assert client.get("/readyz").json() == {"ready": True, "tasks": 4}
    form(client, [picture(), b"x"], "lamps")
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    assert values["lpt_tasks",] == 4 and values["lpt_in_flight",] == 0 and values["lpt_task_bytes",] > 0
    assert values["lpt_requests_total", "/v1/predict", "200"] >= 1 and values["lpt_questions_total", "422"] >= 1
    for path in ("/docs", "/../../etc/passwd", "/page.html", "/v1/predict/x", "/v1/tasks/"):
        response = client.get(path)
        assert response.status_code == 404 and "no such path" in response.json()["error"]
    assert client.get("/v1/predict").status_code == 405


def test_what_openapi_says_is_what_is_sent(client):
    schema = client.get("/openapi.json").json()
    assert {"/v1/predict", "/v1/tasks", "/healthz", "/readyz", "/metrics"} <= schema["paths"].keys()
    body = schema["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/json", "multipart/form-data"}
    sent = form(client, [picture(), b"x"], "auto").json()
    assert Results(**sent).model_dump(exclude_unset=True) == sent
    assert "Results" in schema["components"]["schemas"] and "cdn" not in json.dumps(schema)


# Who may ask.


def test_with_a_token_nothing_is_said_without_it(library, backbone):
    with TestClient(served(library, backbone, token="a-long-secret", local=False), base_url="http://any") as client:
        for wrong in ({}, {"authorization": "Bearer a-long-secre"}, {"authorization": "a-long-secret"}):
            for response in (
                client.get("/v1/tasks", headers=wrong),
                client.get("/metrics", headers=wrong),
                client.get("/nothing", headers=wrong),
                client.post("/v1/predict", json=ONE, headers=wrong),
            ):
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer a-long-secret"}
        assert client.post("/v1/predict", json=ONE, headers=right).status_code == 200
        assert client.get("/").status_code == client.get("/healthz").status_code == 200


def test_web_pages_of_others_do_not_reach_a_local_server(client):
    assert client.get("/v1/tasks", headers={"host": "evil.example"}).status_code == 421
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/tasks", headers={"host": host}).status_code == 200
    response = client.post("/v1/predict", json=ONE, headers={"sec-fetch-site": "cross-site"})
    assert response.status_code == 403 and "another site" in response.json()["error"]
    assert client.post("/v1/predict", json=ONE, headers={"sec-fetch-site": "same-origin"}).status_code == 200


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert token_of(None) is None
    (tmp_path / "token").write_text("from-a-file\n")
    assert token_of(tmp_path / "token") == "from-a-file"
    monkeypatch.setenv(TOKEN_VARIABLE, "from-outside")
    assert token_of(None) == "from-outside"
    for text in ("short", "two words here", "", "ümlaut-token"):
        (tmp_path / "token").write_text(text)
        with pytest.raises(LptError, match="--token-file"):
            token_of(tmp_path / "token")
    with pytest.raises(LptError, match="cannot be read"):
        token_of(tmp_path / "absent")


# Files that come, change and go.


@pytest.fixture
def changing(tmp_path, backbone):
    """(client, watcher, folder, bank of the server)."""
    write_library(tmp_path, backbone)
    app = served(tmp_path, backbone)
    with TestClient(app, base_url=HERE) as client:
        yield client, app.state.watcher, tmp_path, app.state.service.bank


def test_a_request_in_flight_keeps_the_model_it_began_with(changing, backbone, monkeypatch):
    client, watcher, folder, bank = changing
    before = bank.predict(picture(), "lamps")[0]
    go, asked, real = threading.Event(), threading.Event(), bank.answer
    monkeypatch.setattr(bank, "answer", lambda *a, **k: asked.set() or (go.wait(20) and real(*a, **k)))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(form, client, [picture()], "lamps")
        assert asked.wait(20)
        write_task(folder / "lamps.safetensors", backbone, "pool", 77, classes=6)
        watcher.look()
        go.set()
        same(first.result().json()["results"][0], before)
    (after,) = form(client, [picture()], "lamps").json()["results"]
    same(after, TaskBank(backbone, folder).predict(picture(), "lamps")[0])
    assert after["group_prompts"] and not before.group_prompts


def test_new_and_removed_files_are_seen(changing, backbone):
    client, watcher, folder, _ = changing
    write_task(folder / "boats.safetensors", backbone, "deep", 9)
    (folder / "birds.safetensors").unlink()
    assert form(client, [picture()], "boats").status_code == 404
    watcher.look()
    assert form(client, [picture()], "boats").status_code == 200
    assert form(client, [picture()], "birds").status_code == 404


def test_a_file_damaged_while_it_is_served_goes_on_as_it_was(changing, bank, caplog):
    client, watcher, folder, _ = changing
    (folder / "lamps.safetensors").write_bytes(b"damaged")
    with caplog.at_level(logging.INFO, "lpt.server"):
        watcher.look()
        watcher.look()
    (record,) = caplog.records  # said once
    assert record.levelname == "WARNING" and "lamps.safetensors" in record.message
    assert record.message.endswith("the file of before is served")
    same(form(client, [picture()], "lamps").json()["results"][0], bank.predict(picture(), "lamps")[0])
    refused = client.get("/v1/tasks").json()["refused"]
    assert list(refused) == ["lamps.safetensors"] and str(folder) not in refused["lamps.safetensors"]


def test_a_file_of_another_backbone_is_named_and_never_served(changing):
    client, watcher, folder, _ = changing
    write_task(folder / "other.safetensors", small_backbone(seed=1), "deep", 5)
    watcher.look()
    assert "is for backbone" in client.get("/v1/tasks").json()["refused"]["other.safetensors"]
    assert form(client, [picture()], "other").status_code == 404


def test_a_link_that_leads_out_of_the_folder_is_not_opened(changing, tmp_path_factory, backbone, caplog):
    client, watcher, folder, _ = changing
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    write_task(outside, backbone, "deep", 5)
    (folder / "secret.safetensors").symlink_to(outside)
    (folder / "again.safetensors").symlink_to("tables.safetensors")
    (folder / "lamps.safetensors").rename(folder / "tables.safetensors")
    (folder / "lamps.safetensors").symlink_to(outside)
    watcher.look()
    watcher.look()
    assert [r.message.count("leads out of the folder") for r in caplog.records if "secret" in r.message] == [1]
    listed = client.get("/v1/tasks").json()
    assert "leads out" in listed["refused"]["secret.safetensors"] and "again" in str(listed["tasks"])
    for task in ("secret", "lamps"):
        assert form(client, [picture()], task).status_code == 404


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text_are_left_out(changing):
    client, watcher, folder, _ = changing
    shutil.copy(folder / "lamps.safetensors", os.fsdecode(os.fsencode(folder) + b"/\xff.safetensors"))
    watcher.look()
    listed = client.get("/v1/tasks").json()
    assert len(listed["tasks"]) == 4 and "rename it" in listed["refused"]["\\xff.safetensors"]


def test_a_folder_that_is_gone_ends_nothing(changing, caplog):
    client, watcher, folder, _ = changing
    hidden = folder.with_name("elsewhere")
    folder.rename(hidden)
    watcher.look()
    watcher.look()
    assert [r.message.count("what was served goes on") for r in caplog.records] == [1]
    assert form(client, [picture()], "lamps").status_code == 200
    hidden.rename(folder)


# Batches and limits.


@pytest.fixture
def held_up(library, backbone, monkeypatch):
    """(client, service, an event without which nothing is answered, sizes of batches) with room for 4 questions."""
    app = served(library, backbone, limits=Limits(queue=4, seconds=3))
    service, go, sizes = app.state.service, threading.Event(), []
    real = service.bank.answer

    def answer(asked, topk):
        sizes.append(len(asked))
        assert go.wait(20)
        return real(asked, topk=topk)

    monkeypatch.setattr(service.bank, "answer", answer)
    with TestClient(app, base_url=HERE) as client:
        yield client, service, go, sizes
        go.set()


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_questions_of_all_requests_go_through_the_backbone_together(held_up, bank):
    client, service, go, sizes = held_up
    with ThreadPoolExecutor() as pool:
        first = pool.submit(form, client, [picture()], "lamps")
        until(lambda: sizes == [1])
        rest = [pool.submit(form, client, [picture(k)], task) for k, task in enumerate(("shoes", "birds", "tools"))]
        until(lambda: service.batcher.waiting == 3)
        go.set()
        for k, future in enumerate(rest):
            same(future.result().json()["results"][0], bank.predict(picture(k), ("shoes", "birds", "tools")[k])[0])
        assert first.result().status_code == 200 and sizes == [1, 3]
    assert service.room.questions == service.room.bytes == 0


def test_a_full_queue_is_429_and_a_late_answer_504(held_up):
    client, service, go, sizes = held_up
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(form, client, [picture()] * 2, "lamps") for _ in range(2)]
        until(lambda: service.room.questions == 4)
        refused = form(client, [picture()], "lamps")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "busy" in refused.json()["error"] and client.get("/readyz").status_code == 503
        late = [future.result() for future in waiting]
    assert {response.status_code for response in late} == {504} and service.room.questions == 0
    go.set()
    assert form(client, [picture()], "lamps").status_code == 200
    assert sum(sizes) <= 5  # what nobody waits for any more was not computed


def test_room_is_given_back_and_one_request_may_have_more_than_there_is():
    room = Room(Limits(queue=4, body=10, bodies=15))
    with room.place() as place:
        place.ask(9)
        with pytest.raises(Refusal) as busy, room.place():
            pass
        assert busy.value.status == 429 and room.questions == 9
    with room.place() as one, room.place() as two:
        one.hold(10)
        with pytest.raises(Refusal, match="too much") as busy:
            two.hold(6)
        assert busy.value.status == 429
        with pytest.raises(Refusal, match="larger than 10 bytes") as large:
            one.hold(1)
        assert large.value.status == 413
        with pytest.raises(Refusal, match="2 questions wait"):
            two.ask(4)
    assert (room.questions, room.bytes) == (0, 0)


def test_a_model_that_fails_is_no_matter_of_the_others(held_up, monkeypatch, caplog):
    client, service, go, _ = held_up
    go.set()
    real = service.bank.answer

    def answer(asked, topk):
        if any(task.name == "birds" for task, _ in asked):
            raise ValueError("of a model from anyone")
        return real(asked, topk=topk)

    monkeypatch.setattr(service.bank, "answer", answer)
    results = form(client, [picture()] * 3, ["lamps", "birds", "tools"]).json()["results"]
    assert [one["status"] for one in results] == [200, 500, 200]
    assert results[1]["error"] == "the model of this task fails on this image" and "ValueError" in caplog.text


def test_the_batcher_waits_for_what_is_coming_and_leaves_out_what_is_cancelled(bank):
    sizes = []
    batcher = Batcher(bank, wait=20, observe=lambda size, seconds: sizes.append(size))
    (task,) = bank.hold("lamps")

    def question():
        return batcher.submit(Asked(task, task.view(picture())))

    with batcher.coming(1):
        futures = [question() for _ in range(3)]
        assert futures[0].cancel()
        time.sleep(0.05)
        assert sizes == []
        futures.append(question())
    assert all(future.result(20) for future in futures[1:])
    batcher.close()
    assert sizes == [3] and not batcher.alive
    with pytest.raises(RuntimeError, match="stopping"):
        question()


def test_large_images_are_refused_by_their_pixels(client, monkeypatch):
    monkeypatch.setenv("LPT_MAX_PIXELS", "1000")
    (result,) = form(client, [picture()], "lamps").json()["results"]
    assert result["status"] == 422 and "40 x 30 pixels" in result["error"]


def test_names_of_files_are_quoted():
    body = b'--a\r\ncontent-disposition: form-data; name="images"; filename="a\x1b[2J.png"\r\n\r\nx\r\n'
    body += b'--a\r\ncontent-disposition: form-data; name="tasks"\r\n\r\nshoes\r\n--a--\r\n'
    found = asking("multipart/form-data; boundary=a", body, Limits())
    assert found.names == ["a?[2J.png"] and found.images == [b"x"] and found.questions == [(0, "shoes")]


def test_the_page_asks_nobody_else(client):
    response = client.get("/")
    page = response.text
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"\s//.*", "", page))
    policy = response.headers["content-security-policy"]
    assert policy == content_policy(page) and "connect-src 'self'" in policy and "unsafe" not in policy
    assert "innerHTML" not in page and "eval" not in page and len(page) < 40_000


DOCS = (ROOT / "docs/serving.md").read_text()


def test_the_examples_of_the_docs_run(library, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("boot.jpg", "desk.jpg")):
        (tmp_path / name).write_bytes(picture(seed, "JPEG"))
    commands = re.findall(r"^curl .*", DOCS, re.MULTILINE)
    (program,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert len(commands) == 5
    with in_thread(served(library, backbone)) as address:
        exec(program.replace("http://localhost:8000", address), {})
        assert capsys.readouterr().out.startswith("shoes [('class ")
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        for command in commands:
            words = [*shlex.split(command.replace("localhost:8000", address)), "--fail", "--silent"]
            said = subprocess.run(words, capture_output=True, text=True)
            assert said.returncode == 0 and json.loads(said.stdout), said


def test_what_the_docs_say_of_options_is_so():
    defaults = {name.replace("_", "-"): p.default for name, p in inspect.signature(serve).parameters.items()}
    rows = dict(re.findall(r"^\| `--([\w-]+)[^`]*` \| ([^|]+?) \|", DOCS, re.MULTILINE))
    pixels = {"max-pixels": MAX_PIXELS, "task-memory": None}
    assert len(rows) == 7
    for name, said in rows.items():
        value = pixels.get(name, defaults[name])
        assert said == ("none" if value is None else f"{value:,}"), name


# A process.


@pytest.fixture(scope="module")
def nano_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    write_library(folder, load_backbone("nano"))
    return folder


def test_a_process_answers_what_has_begun_and_ends(nano_library):
    process, address = started(nano_library)
    body = json.dumps(ONE).encode()
    head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    try:
        with (
            httpx2.Client(base_url=address, timeout=60) as client,
            socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60) as connection,
        ):
            assert client.get("/readyz").json()["tasks"] == 4
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body[:50])
            until(lambda: "lpt_in_flight 1.0" in client.get("/metrics").text)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            connection.sendall(body[50:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def test_connections_that_send_nothing_or_half_a_request_are_closed(library, backbone, monkeypatch, caplog):
    monkeypatch.setattr("lpt.server.running.HEADER_SECONDS", 0.3)
    app = served(library, backbone, limits=Limits(seconds=0.5))
    with in_thread(app) as address:
        port = int(address.rpartition(":")[2])
        for sent in (b"", b"POST /v1/predict HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\n" * 3):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(sent)
                assert connection.recv(100)[:12] in (b"", b"HTTP/1.1 400")
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
            until(lambda: app.state.service.room.questions == 1)
        until(lambda: app.state.service.room.questions == 0)
        assert httpx2.get(f"{address}/healthz").status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_what_is_wrong_with_the_command_is_said_in_one_sentence(tmp_path, capsys):
    taken = bound("127.0.0.1", 0)
    taken.listen()
    port = str(taken.getsockname()[1])
    for words, says in (
        ([tmp_path / "absent"], "is no folder"),
        ([tmp_path], "it holds no prompt file"),
        ([tmp_path, "--port", port], f"--host 127.0.0.1 --port {port}: address already in use; choose another port"),
        ([tmp_path, "--host", "no.such.host.invalid"], "is no address ("),
        ([tmp_path, "--accept", "2"], "--accept 2"),
        ([tmp_path, "--token-file", tmp_path / "absent"], "--token-file"),
        ([tmp_path, "data.root=x"], "there is no such section here"),
    ):
        code, out, err = command(capsys, "serve", "--port", "0", *words)
        assert code == 2 and out == "" and says in err and err.count("\n") == 1, err
    taken.close()


def test_without_its_packages_the_extra_is_named(tmp_path, capsys, monkeypatch):
    import lpt.commands.serve as module

    def absent(package, *, extra, gives):
        raise LptError(f"{gives} needs {package}: pip install 'lpt[{extra}]'")

    monkeypatch.setattr(module, "require", absent)
    code, _, err = command(capsys, "serve", tmp_path)
    assert code == 2 and "lpt serve needs fastapi: pip install 'lpt[serve]'" in err


def test_loopback_is_known_by_the_address():
    for host, local in (("127.0.0.1", True), ("0.0.0.0", False)):
        with bound(host, 0) as listening:
            assert is_loopback(listening) == local
