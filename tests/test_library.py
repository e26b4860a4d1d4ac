"""A folder of prompt files: listed by an index that is a cache, checked, and changed under readers."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lpt.errors import LptError, PromptFileError, UnknownTask
from lpt.prompt_file import load_prompt, save_prompt
from lpt.prompt_header import read_header
from lpt.serve import library
from lpt.serve.library import INDEX, add, check, listing, remove, table
from tests.support.command_line import lpt as command
from tests.support.shared import ROOT
from tests.support.toy import prompted, small_backbone, toy_task


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two prompt files of other methods, with accuracies, beside each other."""
    folder = tmp_path_factory.mktemp("made")
    for name, pool, accuracy in (("shoes", True, 0.5), ("lamps", False, None)):
        model = prompted(small_backbone(), num_classes=4, pool=pool).only_train().eval()
        method = "lpt" if pool else "fine_tune"
        save_prompt(
            folder / f"{name}.safetensors",
            model,
            method=method,
            counts=toy_task().counts,
            metrics={"accuracy": accuracy},
        )
    return folder


@pytest.fixture
def folder(made, tmp_path):
    for name in ("shoes", "lamps"):
        add(tmp_path / "library", made / f"{name}.safetensors")
    return tmp_path / "library"


def names(folder):
    return [row.task for row in listing(folder).rows]


def test_a_listing_says_what_is_in_the_files(folder, made):
    rows, problems = listing(folder)
    assert not problems and [row.task for row in rows] == ["lamps", "shoes"]
    shoes, header = rows[1], read_header(made / "shoes.safetensors")[0]
    assert (shoes.classes, shoes.images, shoes.method, shoes.accuracy) == (4, 49, "lpt", 0.5)
    assert shoes.fingerprint == header.backbone.fingerprint and shoes.image_size == 32 and not shoes.routable
    assert shoes.bytes == (made / "shoes.safetensors").stat().st_size == (folder / "shoes.safetensors").stat().st_size
    assert shoes.written.startswith("20") and rows[0].accuracy is None
    shown = table(rows).splitlines()
    assert len(shown) == 3 and "50.0" in shown[2] and "untrained:vit_tiny_patch16_224" in shown[2]


def test_the_index_is_a_cache_and_never_the_truth(folder, made, monkeypatch):
    first = listing(folder)
    read, real = [], library.read_fields
    monkeypatch.setattr(library, "read_fields", lambda path: read.append(path.name) or real(path))
    assert listing(folder) == first and read == []
    add(folder, made / "lamps.safetensors", name="shoes", replace=True)
    assert listing(folder).rows[1].method == "fine_tune" and read == ["shoes.safetensors"]
    (folder / INDEX).unlink()
    assert len(listing(folder).rows) == 2 and len(read) == 3
    remove(folder, "lamps")
    assert names(folder) == ["shoes"] and "lamps" not in (folder / INDEX).read_text()


LIES = ("words", "[]", "[" * 50_000, '{"format": 2, "files": {}}', '{"format": 1, "files": 3}')


@pytest.mark.parametrize("change", [*LIES, "stamp", "row", "kind", "name"])
def test_an_index_that_lies_is_not_believed(folder, change):
    expected = listing(folder)
    content = json.loads((folder / INDEX).read_text())
    line = content["files"]["shoes.safetensors"]
    if change == "stamp":
        line[0], line[1]["method"] = [1, 2, 3], "another"
    elif change == "row":
        line[1] = {"task": "shoes"}
    elif change == "kind":
        line[1]["classes"] = "many"
    elif change == "name":
        line[1]["task"] = "lamps"
    (folder / INDEX).write_text(change if change in LIES else json.dumps(content))
    assert listing(folder) == expected and json.loads((folder / INDEX).read_text())["format"] == 1


def test_a_folder_that_cannot_be_written_to_is_listed(folder, monkeypatch):
    (folder / INDEX).unlink(missing_ok=True)
    (folder / INDEX).mkdir()
    assert names(folder) == ["lamps", "shoes"]


def test_damaged_files_are_named_and_the_others_are_listed(folder):
    whole = (folder / "shoes.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-10])
    (folder / "turned.safetensors").write_bytes(
        whole[:-1] + bytes([whole[-1] ^ 1])
    )  # a bit of a tensor: only `check` sees it
    (folder / "text.safetensors").write_text("words")
    (folder / "notes.txt").write_text("no prompt file")
    (folder / ".hidden.safetensors").write_text("a half of one")
    os.mkfifo(folder / "pipe.safetensors")
    rows, problems = listing(folder)
    assert [row.task for row in rows] == ["lamps", "shoes", "turned"]
    assert set(problems) == {"cut.safetensors", "text.safetensors", "pipe.safetensors"}
    found = dict(check(folder))
    assert [name for name, problem in found.items() if problem is None] == ["lamps.safetensors", "shoes.safetensors"]
    assert "SHA-256" in found["turned.safetensors"] and len(found) == 6


def test_what_is_added_is_whole_and_named_well(folder, made, tmp_path):
    run = tmp_path / "red shoes"
    run.mkdir()
    (run / "prompt.safetensors").write_bytes((made / "shoes.safetensors").read_bytes())
    assert add(folder, run / "prompt.safetensors") == "red shoes"
    with pytest.raises(LptError, match="has a task shoes: add --replace"):
        add(folder, made / "lamps.safetensors", name="shoes")
    for name in ("../evil", "a/b", ".hidden", "", "x" * 200, "auto", "AUTO", "two\nlines", "dot.", "/tmp/x", "-x"):
        with pytest.raises(LptError, match="a task cannot be called"):
            add(folder, made / "lamps.safetensors", name=name)
    assert add(folder, made / "lamps.safetensors", name="café 2.0") == "café 2.0"
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((made / "lamps.safetensors").read_bytes()[:-4])
    for source, says in ((bad, r"bad\.safetensors is damaged"), (tmp_path / "none", "none does not exist")):
        with pytest.raises(PromptFileError, match=says):
            add(folder, source, name="lamps", replace=True)
    assert sorted(os.listdir(folder)) == [  # and nothing half-written
        "café 2.0.safetensors", "lamps.safetensors", "red shoes.safetensors", "shoes.safetensors",
    ]  # fmt: skip
    model = load_prompt(folder / "lamps.safetensors", small_backbone())
    assert model.pool is None
    with pytest.raises(UnknownTask, match="no task 'lamsp': did you mean lamps"):
        remove(folder, "lamsp")
    with pytest.raises(UnknownTask):
        remove(folder, "../made/shoes")
    with pytest.raises(LptError, match="is no folder"):
        listing(tmp_path / "absent")


def test_many_add_and_read_at_once(folder, made):
    """Four writers of tasks of their own and of a common one; readers never see a half, or lose what was there."""
    sources = [made / "shoes.safetensors", made / "lamps.safetensors"]
    end, seen = threading.Event(), []

    def read():
        while not end.is_set():
            rows, problems = listing(folder)
            seen.append(len(rows))
            assert not problems and {"lamps", "shoes"} <= {row.task for row in rows}
            assert all(problem is None for _, problem in check(folder))

    def write(number):
        for turn in range(12):
            add(folder, sources[turn % 2], name=f"{number}-{turn}")
            add(folder, sources[turn % 2], name="common", replace=True)
            if turn % 3 == 2:
                remove(folder, f"{number}-{turn}")

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        writers = [pool.submit(write, number) for number in range(4)]
        for writer in writers:
            writer.result()
        end.set()
        for reader in readers:
            reader.result()
    assert names(folder) == sorted(
        ["common", "lamps", "shoes", *(f"{n}-{t}" for n in range(4) for t in range(12) if t % 3 < 2)]
    )
    with ThreadPoolExecutor(8) as pool:  # one of them is the first, the others are told so

        def first(source):
            try:
                return add(folder, source, name="once")
            except LptError as error:
                return str(error)

        results = list(pool.map(first, sources * 4))
    assert results.count("once") == 1 and all("has a task once" in one for one in results if one != "once")
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_thousands_of_files_are_listed_in_seconds(tmp_path, made):
    content = (made / "lamps.safetensors").read_bytes()
    for number in range(2000):
        (tmp_path / f"task {number:04d}.safetensors").write_bytes(content)
    began = time.process_time()
    assert len(listing(tmp_path).rows) == 2000
    between = time.process_time()
    assert len(listing(tmp_path).rows) == 2000
    assert between - began < 8 and time.process_time() - between < 1.5


def test_the_command_lists_adds_checks_and_removes_without_torch(made, tmp_path, capsys):
    folder = tmp_path / "library"
    files = [str(made / f"{name}.safetensors") for name in ("shoes", "lamps")]
    code, out, _ = command(capsys, "library", "add", folder, *files)
    assert code == 0 and out.splitlines() == ["added shoes", "added lamps"]
    code, out, _ = command(capsys, "library", "ls", folder, "--json", tmp_path / "ls.json")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["task", "lamps", "shoes"]
    assert json.loads((tmp_path / "ls.json").read_text())[1]["accuracy"] == 0.5
    assert command(capsys, "library", "check", folder)[:2] == (0, "2 files, 0 of them bad\n")
    (folder / "bad.safetensors").write_text("words")
    code, out, _ = command(capsys, "library", "check", folder)
    assert code == 1 and "bad.safetensors is damaged" in out and out.endswith("3 files, 1 of them bad\n")
    code, out, err = command(capsys, "library", "ls", folder)
    assert code == 0 and "warning: prompt file" in err and "bad.safetensors" in err
    assert command(capsys, "library", "rm", folder, "lamps")[:2] == (0, "removed lamps\n")
    code, _, err = command(capsys, "library", "rm", folder, "lamps")
    assert code == 2 and "there is no task 'lamps'" in err
    code, _, err = command(capsys, "library", "add", folder, *files, "--name", "x")
    assert code == 2 and "--name x is for one file, 2 are given" in err
    program = (
        "import sys; sys.argv = ['lpt', 'library', sys.argv[1], sys.argv[2]]\n"
        "from lpt.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    for verb in ("ls", "check"):
        done = subprocess.run(
            [sys.executable, "-c", program, verb, str(folder)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "shoes" in done.stdout + done.stderr + "shoes" * (verb == "check"), done.stderr
