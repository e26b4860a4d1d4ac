"""One walk over folders: what is an image there, what is left out by name, links, and names that are no UTF-8."""

import io
import json
import os
import sys
import types

import pytest
import torch
from PIL import Image

import lpt
from lpt.data import preprocess
from lpt.data.doctor import examine, load_with_mistakes
from lpt.data.preprocess import Preprocess
from lpt.data.walk import as_text, walk
from lpt.errors import DataError
from lpt.serve.predicting import find_images, image_files
from tests.support.command_line import lpt as command
from tests.support.pictures import fill, picture

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
NANO = ("backbone.name=nano", "train.device=cpu")


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos", {"cat": 5, "dog": 4})


def task_of(root, **settings):
    return lpt.load_task("folder", root=str(root), **settings)


def ids(task):
    parts = (task.train, task.val, task.test, task.unlabeled)
    return sorted(name for part in parts if part for name in part.ids)


# Kind 1: files that are not images by their suffix.


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.JPG_large", "a", "a.png.part", "a.txt", "josé.é"])
def test_what_can_be_read_by_content_is_read(photos, name):
    picture(50).save(photos / "cat" / name, "JPEG")
    fill(photos, {"owl": 0})
    picture(51).save(photos / "owl" / name, "WEBP")
    picture(52).save(photos / "owl" / f"b{name}", "GIF")
    task = task_of(photos)
    assert task.classes == ("cat", "dog", "owl") and len(ids(task)) == 12 and f"cat/{name}" in ids(task)
    assert Preprocess(size=8).cut(task.train.take(torch.arange(len(task.train)))).shape == (len(task.train), 3, 8, 8)
    assert "other_files" not in task.facts and len(image_files([photos])) == 12


def ill_folder(photos):
    """Five HEIC photos in a class of their own, one renamed, raws, text files, hidden ones."""
    (photos / "heron").mkdir()
    for i in range(5):
        (photos / "heron" / f"IMG_{i}.HEIC").write_bytes(HEIC)
    (photos / "cat" / "b").write_bytes(HEIC)
    for path in ("dog/1.CR2", "dog/2.nef", "cat/logo.svg"):
        (photos / path).write_bytes(b"II*\0" + bytes(40))
    for path in ("cat/notes.txt", "cat/list.json", "dog/Thumbs.db", "README.md"):
        (photos / path).write_text("words")
    for path in ("cat/.DS_Store", "cat/._1.png", "dog/.ipynb_checkpoints/1-checkpoint.png", "__MACOSX/cat/._1.png"):
        (photos / path).parent.mkdir(parents=True, exist_ok=True)
        picture(1).save(photos / path, "PNG")
    return photos


def test_every_other_file_is_counted_and_named_by_folder(photos):
    os.mkfifo(ill_folder(photos) / "dog" / "pipe")
    task = task_of(photos)
    assert task.classes == ("cat", "dog") and len(ids(task)) == 9
    counted = {key: len(task.facts[key]) for key in ("heic", "unread_pictures", "other_files", "hidden")}
    assert counted == {"heic": 6, "unread_pictures": 3, "other_files": 5, "hidden": 4}
    said = task.summary_lines()[1:]
    for line in (
        "warning: 1 folders hold no image and are no classes, for example heron",
        "warning: 6 HEIC photos are left out: install pillow-heif to read them: cat 1 (b), heron 5 (IMG_0.HEIC, "
        "IMG_1.HEIC, ...)",
        "warning: 3 pictures of other formats are left out: save them as JPEG or PNG: cat 1 (logo.svg), dog 2 (1.CR2, "
        "2.nef)",
        "note: 5 files are no images and are left out: . 1 (README.md), cat 2 (list.json, notes.txt), dog 2 "
        "(Thumbs.db, pipe)",
        "note: 4 hidden files and folders are left out: . 1 (__MACOSX), cat 2 (.DS_Store, ._1.png), dog 1 "
        "(.ipynb_checkpoints)",
    ):
        assert line in said


def test_the_doctor_says_all_that_a_run_says(photos, capsys):
    ill_folder(photos)
    code, out, _ = command(capsys, "doctor", photos)
    assert code == 1 and "problem: 6 HEIC photos" in out and "problem: 1 folders hold no image" in out
    assert "problem: 3 pictures" in out and "note: 4 files are no images" in out and "note: 4 hidden" in out
    for line in task_of(photos).summary_lines()[1:]:
        head = line.partition(": ")[2].split(", for example")[0]
        assert head in out, line
    (photos / "emu").mkdir()
    assert "2 folders hold no image and are no classes: emu, heron" in command(capsys, "doctor", photos)[1]


def test_a_folder_of_heic_alone_says_why_there_is_no_image(tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.heic").write_bytes(HEIC)
    with pytest.raises(
        DataError, match=r"holds no image .*; 1 HEIC photos are left out: install pillow-heif .*1\.heic"
    ):
        task_of(tmp_path)
    fill(tmp_path, {"dog": 3})
    code, _, said = command(capsys, "doctor", tmp_path)
    assert code == 2 and "has 1 class" in said and "install pillow-heif" in said
    with pytest.raises(DataError, match="holds no image; 1 HEIC photos"):
        image_files([tmp_path / "cat"])


def test_a_heic_photo_that_is_called_jpg_is_named_with_the_way_out(photos, capsys):
    (photos / "cat" / "0.jpg").write_bytes(HEIC)
    (problem,) = examine(task_of(photos)).problems
    assert "1 files cannot be read: image cat/0.jpg" in problem and "it is HEIC, whatever its name: install" in problem


def test_pillow_heif_is_used_where_it_is_installed(photos, monkeypatch):
    """With a stand-in that opens our HEIC bytes as a small image."""

    def register():
        def factory(file, name):
            file.close()
            return Image.new("RGB", (9, 9), "red")

        Image.register_open("HEIF", factory, lambda prefix: prefix[8:12] == b"heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    preprocess._formats.cache_clear()
    try:
        ill_folder(photos)
        task = task_of(photos)
        assert task.classes == ("cat", "dog", "heron") and len(ids(task)) == 15 and "heic" not in task.facts
        assert Preprocess(size=8).cut(task.train.take(torch.arange(len(task.train)))).shape[0] == len(task.train)
    finally:
        monkeypatch.undo()
        preprocess._formats.cache_clear()


def test_predictions_walk_as_training_does(photos, tmp_path, capsys):
    ill_folder(photos)
    (photos / "linked").symlink_to(fill(tmp_path / "more", {"x": 2}))
    (photos / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = find_images([photos, photos / "cat" / "0.png"])
    names = [str(path.relative_to(photos)) for path in found.paths]
    trained = ids(task_of(photos, on_error="skip"))
    assert names == [*sorted([*trained, "cat/gone.png"]), "cat/0.png"] and len(trained) == 11
    assert [line.split(" are ")[0] for line in found.remarks] == [
        "warning: 6 HEIC photos",
        "warning: 3 pictures of other formats",
        "note: 4 files",
        "note: 4 hidden files and folders",
    ]


# Kind 4: links.


def test_one_real_folder_under_two_names_is_read_under_both(tmp_path, capsys):
    root = tmp_path / "p"
    fill(root / "train", {"cat": 4, "dog": 3}), fill(root / "test", {"cat": 2, "dog": 2}, seed=4)
    (root / "val").symlink_to("test")
    (root / "unlabeled").symlink_to("train")
    task = task_of(root)
    assert [len(part) for part in (task.train, task.val, task.test, task.unlabeled)] == [7, 4, 4, 7]
    assert "warning: 4 images are one file under two names, for example val/cat/0.png = test/cat/0.png" in (
        task.summary_lines()
    )
    code, out, _ = command(capsys, "doctor", root)
    assert code == 1 and "7 training (train/), 7 unlabeled (unlabeled/), 4 held-out (val/), 4 test (test/)" in out
    assert "problem: 4 images are one file under two names" in out


def test_a_linked_class_folder_and_a_linked_photo(photos):
    (photos / "tabby").symlink_to("cat")
    (photos / "dog" / "again.png").symlink_to("0.png")
    task = task_of(photos)
    assert task.classes == ("cat", "dog", "tabby") and len(ids(task)) == 15 and len(task.facts["same_file"]) == 6


def test_links_back_end(photos, tmp_path):
    (photos / "cat" / "up").symlink_to("..")
    (photos / "cat" / "self").symlink_to(".")
    (photos / "dog" / "above").symlink_to(tmp_path.parent)
    (photos / "dog" / "loop").symlink_to("loop")
    fill(tmp_path / "a", {"x": 1}), fill(tmp_path / "b", {"y": 1})
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    task = task_of(photos, on_error="skip")
    assert len(ids(task)) == 9 and task.facts["back_links"] == ["cat/self", "cat/up", "dog/above"]
    assert task.facts["skipped"] == ["image dog/loop cannot be read (a link that leads to nothing)"]
    assert walk(tmp_path / "a").images == [("b", "y", "0.png"), ("x", "0.png")]
    assert walk(tmp_path / "a").left_out == {"back_links": [("b", "a")]}
    assert len(image_files([photos])) == 10


def test_a_net_of_links_is_refused(tmp_path):
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
    for name in "abcdefgh":
        for other in set("abcdefgh") - {name}:
            (tmp_path / name / other).symlink_to(tmp_path / other)
    with pytest.raises(DataError, match=r"[a-h] is there under more than 200 names, one is"):
        walk(tmp_path)


def test_links_that_lead_nowhere_end_a_run_and_not_the_doctor(photos, capsys):
    (photos / "cat" / "gone.png").symlink_to("nowhere.png")
    (photos / "dog" / "gone").symlink_to("/nowhere/at/all")
    (photos / "owl").symlink_to("/nowhere/owl")
    (photos / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"3 links that lead to nothing, \. 1 \(owl\), cat 1 \(gone\.png\), dog 1 \(gone\)"
    ):
        task_of(photos)
    code, out, _ = command(capsys, "doctor", photos)
    assert code == 1 and "problem: a run ends here: " in out and "3 links that lead to nothing" in out
    assert "problem: 1 files cannot be read: image dog/0.png" in out
    task = task_of(photos, on_error="skip")
    assert len(ids(task)) == 8 and len(task.facts["skipped"]) == 4


def test_the_doctor_goes_on_after_what_ends_a_run(photos, monkeypatch):
    fill(photos, {"Cat": 2, "closed": 3}, seed=6)
    scan = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"closed cannot be read"):
        task_of(photos)
    problems = examine(load_with_mistakes("folder", root=str(photos))).problems
    assert len(problems) == 2 and "closed cannot be read (Permission denied)" in problems[0]
    assert "'Cat' and 'cat' are one in two spellings" in problems[1]


# Kind 6: the doctor decodes as training does.


def large_jpeg():
    buffer = io.BytesIO()
    Image.new("L", (8000, 6000), 120).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_photo_of_48_megapixels_is_readable(photos, capsys):
    (photos / "cat" / "large.jpg").write_bytes(large_jpeg())
    assert len(ids(task_of(photos, on_error="skip"))) == 10
    findings = examine(task_of(photos))
    assert findings.problems == [] and "shorter sides from 40 to " in findings.facts[-1]
    code, out, _ = command(capsys, "doctor", photos)
    assert code == 0 and "nothing stands in the way" in out


# Kind 7: names that are no UTF-8.


def named_in_bytes(root):
    """Classes and photos with names from an old archive."""
    for name, count in ((b"jos\xe9", 4), (b"th\xe9 vert", 3), ("кот".encode(), 3)):
        place = os.path.join(os.fsencode(root), name)
        os.makedirs(place)
        for i in range(count):
            picture(10 * len(name) + i).save(os.path.join(os.fsdecode(place), os.fsdecode(b"\xff\xfe%d.png" % i)))
    return root


def test_names_that_are_no_utf_8_are_read_hashed_and_shown_escaped(tmp_path):
    assert as_text(os.fsdecode(b"a\xe9\xff")) == "a\\xe9\\xff" and as_text("é\\xe9") == "é\\xe9"
    root = named_in_bytes(tmp_path / "p")
    task = task_of(root)
    assert task.classes == ("jos\\xe9", "th\\xe9 vert", "кот") and len(ids(task)) == 10
    assert "jos\\xe9/\\xff\\xfe0.png" in ids(task)
    json.dumps(task.manifest(), ensure_ascii=False).encode()
    before = task.manifest()["sha256"]
    os.rename(os.fsencode(root) + b"/jos\xe9", os.fsencode(root) + b"/jos\xe8")
    assert task_of(root).manifest()["sha256"] != before
    (root / "jos\\xe8").mkdir()
    picture(1).save(root / "jos\\xe8" / "1.png")
    with pytest.raises(DataError, match="two class folders that are shown as"):
        task_of(root)


def test_doctor_train_evaluate_and_predict_with_such_names(tmp_path, capsys):
    outer = tmp_path / os.fsdecode(b"arch\xefv")
    outer.mkdir()
    root = named_in_bytes(outer / "p")
    (root / os.fsdecode(b"jos\xe9") / os.fsdecode(b"notes\xe9.txt")).write_text("words")
    (root / os.fsdecode(b"jos\xe9") / os.fsdecode(b"broken\xe9.png")).write_text("words")
    code, out, said = command(capsys, "doctor", root)
    assert (
        code == 1 and "image jos\\xe9/broken\\xe9.png cannot be decoded" in out and "jos\\xe9 1 (notes\\xe9.txt)" in out
    )
    run = tmp_path / "run"
    words = ("--out", run, "data.on_error=skip", "train.batch_size=4", "method.name=class_mean", *NANO)
    code, out, said = command(capsys, "fit", root, *words)
    assert code == 0, said
    split = json.loads((run / "split.json").read_text())
    assert "jos\\xe9" in split["classes"] and split["other_files"] == ["jos\\xe9/notes\\xe9.txt"]
    assert json.loads((run / "report.json").read_text())["skipped_images"][0].startswith("image jos\\xe9/broken")
    assert "jos\\\\xe9" in (run / "report.md").read_text() and (run / "report.html").stat().st_size > 1000
    prompt = run / "prompt.safetensors"
    code, out, said = command(capsys, "evaluate", prompt, f"data.root={root}", *NANO)
    assert code == 0, said
    code, out, said = command(capsys, "predict", prompt, root, "--json", tmp_path / "p.json", *NANO)
    assert code == 1 and out.count("jos\\xe9/") >= 4 and "error: image" in said and "broken\\xe9.png" in said
    assert len(json.loads((tmp_path / "p.json").read_text())) == 11
