"""Every file below a root is in exactly one part, or named as left out: for any tree that hypothesis can think of."""

import io
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from PIL import Image

import lpt
from lpt.data.doctor import examine, load_with_mistakes
from lpt.data.task import REMARKS
from lpt.data.walk import as_text
from lpt.errors import DataError
from lpt.serve.predicting import find_images


def image_bytes(kind, shade):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3), (shade, 2 * shade % 256, 0)).save(buffer, kind)
    return buffer.getvalue()


CONTENTS = {
    "png": image_bytes("PNG", 1),
    "jpeg": image_bytes("JPEG", 2),
    "gif": image_bytes("GIF", 3),
    "heic": b"\0\0\0\x18ftypheic" + bytes(30),
    "text": b"words",
    "half": image_bytes("PNG", 4)[:40],
    "nothing": b"",
}
NAMES = st.one_of(
    st.sampled_from([
        b"1.png", b"2.JPG", b"a.jfif", b"b.jpe", b"c", b"d.heic", b"e.txt", b"f.CR2", b"Thumbs.db", b".DS_Store",
        b"._1.png", b"x.svg", b"g.tar.gz", "фото.png".encode(), b"jos\xe9.jpg", b"line\nbreak.png",
        b"\xff\xfe", b" .png", b"h.mp4",
    ]),
    st.binary(min_size=1, max_size=6).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"0")),
).filter(lambda name: name not in (b".", b".."))  # fmt: skip
FILES = st.tuples(NAMES, st.sampled_from(sorted(CONTENTS)))
FOLDERS = st.sampled_from([
    (), (), (b"nested",), (b"nested", b"deeper"), (b".hidden",), (b"__MACOSX",), (b".ipynb_checkpoints", b"x"),
    (b"\xe9t\xe9",),
])  # fmt: skip
LINKS = st.sampled_from(["..", ".", "nowhere", "/nowhere/x.png", "../..", "1.png"])
CLASSES = st.lists(
    st.sampled_from([b"cat", b"dog", "猫".encode(), b"jos\xe9", b"red owl", b"10"]), min_size=2, max_size=4, unique=True
)
FORMS = ["class folders", "parts around", "parts inside", "a table above", "tables inside"]
ROLES = st.sampled_from(
    [("train",), ("train", "test"), ("Training", "val", "Testing"), ("train_set", "dev", "heldout")]
)


@st.composite
def trees(draw):
    """(path in bytes, content or link target) of each file; the form; the folders where the classes of images are."""
    form, names = draw(st.sampled_from(FORMS)), draw(CLASSES)
    roles = [role.encode() for role in draw(ROLES)] if form != "class folders" else []
    around = [(role, name) for role in roles or [b""] for name in names]
    places = [tuple(part for part in (pair[::-1] if form == "parts inside" else pair) if part) for pair in around]
    if roles and draw(st.booleans()):
        unlabeled = (b"unlabeled",) if form != "parts inside" else (names[0], b"unlabeled")
        places.append((*unlabeled, b"x"))
    files = {(*place, b"always%d.png" % i): CONTENTS["png"] for place in places for i in range(2)}
    links = {}
    for place in places:
        for name, content in draw(st.lists(FILES, max_size=3)):
            files[(*place, *draw(FOLDERS), name)] = CONTENTS[content]
        if draw(st.integers(0, 3)) == 0:
            links[(*place, draw(st.sampled_from([b"link", b"link.png", b".link"])))] = draw(LINKS)
    for name, content in draw(st.lists(FILES, max_size=2)):
        files[(name,)] = CONTENTS[content]
    if draw(st.booleans()):  # one class folder under a second name
        links[(*places[0][:-1], b"again")] = places[0][-1]
    return form, files, links


def build(root, form, files, links):
    """Writes a tree, as far as its names do not stand in each other's way."""
    for path, content in files.items():
        whole = os.path.join(os.fsencode(root), *path)
        try:
            os.makedirs(os.path.dirname(whole), exist_ok=True)
            with open(whole, "wb") as file:
                file.write(content)
        except OSError:  # a file where a folder is wanted, or the other way round
            event("names in each other's way")
    for path, target in links.items():
        whole = os.path.join(os.fsencode(root), *path)
        if not os.path.lexists(whole) and os.path.isdir(os.path.dirname(whole)):
            os.symlink(os.fsencode(target), whole)
    if form in ("a table above", "tables inside"):
        rows = [path for path in files if path[-1].startswith(b"always") and b"unlabeled" not in path]
        by_table = {}
        for path in rows:
            depth = 0 if form == "a table above" else 1
            by_table.setdefault(path[:depth], []).append((b"/".join(path[depth:]), path[1]))
        for folder, lines in by_table.items():
            texts = [
                json.dumps({"file_name": os.fsdecode(name), "label": as_text(os.fsdecode(label))})
                for name, label in lines
            ]
            Path(os.fsdecode(os.path.join(os.fsencode(root), *folder))).joinpath("metadata.jsonl").write_text(
                "\n".join(texts)
            )


def names_on_disk(root):
    """Every file and link below `root`, none followed."""
    names = []
    for here, folders, files in os.walk(os.fsencode(root)):
        linked = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in [*files, *linked]:
            names.append(os.fsdecode(os.path.relpath(os.path.join(here, name), os.fsencode(root))))
    return names


def names_in_parts(task):
    names = []
    for role in ("train", "val", "test", "unlabeled"):
        part = getattr(task, role)
        before = ""
        if role == "unlabeled" and "CLASS" not in task.facts.get("unlabeled_part", "CLASS"):
            before = task.facts["unlabeled_part"]
        names += [before + name for name in part.ids] if part else []
    return names


def names_left_out(task):
    names = []
    for key in ("left_out", "heic", "unread_pictures", "other_files", "hidden", "back_links"):
        assert key in REMARKS
        names += task.facts.get(key, ())
    return names + [text.removeprefix("image ").split(" cannot be ")[0] for text in task.facts.get("skipped", ())]


@given(trees())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_every_file_is_in_one_part_or_named_as_left_out(tree):
    form, files, links = tree
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "p"
        root.mkdir()
        build(root, form, files, links)
        try:
            task = lpt.load_task("folder", root=str(root), on_error="skip")
        except DataError as error:
            event(f"refused: {form}")
            assert str(error).encode() and "data.root" in str(error)
            assume(False)
            raise
        event(f"read: {form}")
        used, left_out = Counter(names_in_parts(task)), Counter(names_left_out(task))
        assert max(used.values()) == 1 and not used.keys() & left_out.keys()
        tables = {
            text.strip() for key in task.facts if key.endswith("_part") for text in str(task.facts[key]).split(",")
        }
        for name in names_on_disk(root):
            shown = as_text(name)
            outer = [shown[:i] for i, letter in enumerate(shown) if letter == "/"]
            is_link_to_folder = (root / name).is_dir()
            under_link = (
                any(other.startswith(f"{shown}/") for other in [*used, *left_out]) if is_link_to_folder else False
            )
            ways = used[shown] + left_out[shown] + (shown in tables) + sum(left_out[folder] for folder in outer)
            assert ways + under_link == 1, (shown, ways, under_link, task.facts)
        json.dumps(task.manifest(), ensure_ascii=False).encode()
        "\n".join(task.summary_lines()).encode()
        seen_by_predict = {as_text(str(path.relative_to(root))) for path in find_images([root]).paths}
        assert used.keys() <= seen_by_predict


@given(trees())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_the_doctor_repeats_what_a_run_says_and_prints_no_more_than_a_screen(tree):
    form, files, links = tree
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "p"
        root.mkdir()
        build(root, form, files, links)
        try:
            task = load_with_mistakes("folder", root=str(root))
        except DataError:
            assume(False)
            raise
        findings = examine(task)
        lines = [*findings.facts, *findings.notes, *findings.problems]
        for line in task.summary_lines()[1:]:
            head = line.partition(": ")[2].split(", for example")[0]
            if "has no training image" not in head:
                assert any(said.startswith(head) for said in lines), line
        assert len(lines) < 30 and all(line.isprintable() and len(line) < 2000 for line in lines)
