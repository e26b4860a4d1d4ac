"""What the doctor finds in a folder that was made ill on purpose."""

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import lpt
from lpt.cli import main
from lpt.data.doctor import examine
from lpt.model.backbones.labels_seen import label_sets, overlap_notes
from tests.support.command_line import lpt as command
from tests.support.pictures import fill, picture
from tests.support.toy import toy_task


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "p" / "train", {"tench": 6, "Cat of mine": 3, "owl": 1})
    fill(tmp_path / "p" / "test", {"tench": 2, "Cat of mine": 2}, seed=7)
    return tmp_path / "p"


def found(folder):
    return examine(lpt.load_task("folder", root=str(folder)))


def overlap(folder, backbone):
    return "\n".join(overlap_notes(lpt.load_task("folder", root=str(folder)).classes, backbone))


def test_a_healthy_folder_has_no_problem(folder):
    findings = found(folder)
    assert findings.problems == []
    facts = "\n".join(findings.facts)
    assert "3 classes; images: 10 training (train/), 4 test (test/)" in facts
    assert "imbalance factor 6: tench 6, Cat of mine 3, owl 1" in facts
    assert "shorter sides from 40 to 40 pixels" in facts
    notes = "\n".join(findings.notes)
    assert "1 classes have a single training image: owl" in notes and "no test image" in notes


def test_unreadable_files_are_counted_and_named(folder):
    (folder / "train/tench/1.png").write_bytes(b"no image")
    (folder / "test/tench/0.png").write_bytes((folder / "test/tench/0.png").read_bytes()[:80])
    (problem,) = found(folder).problems
    assert problem.startswith("2 files cannot be read") and "train/tench/1.png" in problem and "test/tench/0" in problem


def test_a_leak_is_found_even_when_the_file_was_encoded_anew(folder):
    Image.open(folder / "train/tench/2.png").save(folder / "test/tench/copy.bmp")
    (problem,) = found(folder).problems
    assert "1 images are in more than one part: train/tench/2.png (training) = test/tench/copy.bmp (test)" in problem


def test_a_leak_between_val_and_test_and_images_without_a_class(folder):
    fill(folder / "val", {"tench": 2}, seed=5)
    Image.open(folder / "val/tench/0.png").save(folder / "test/tench/leak.png")
    picture(99).save(folder / "test" / "stray.png")
    problems = found(folder).problems
    assert any("1 images belong to no class and are left out: test/stray.png" in p for p in problems)
    assert any("val/tench/0.png (held-out) = test/tench/leak.png (test)" in p for p in problems)


def test_one_image_under_two_classes_and_plain_copies(folder):
    image = Image.open(folder / "train/tench/2.png")
    image.save(folder / "train/owl/same.png")
    picture(55).save(folder / "train/owl/a.png")
    picture(55).save(folder / "train/owl/b.png")
    findings = found(folder)
    (problem,) = findings.problems
    assert "1 images stand under two classes" in problem and "(tench)" in problem and "(owl)" in problem
    assert any("1 images are there more than once within a part" in note for note in findings.notes)


def test_the_unlabeled_part_is_examined_too(folder):
    fill(folder / "unlabeled", {"tench": 3, "somewhere": 2}, seed=9)
    findings = found(folder)
    assert (
        findings.problems == []
        and "images: 10 training (train/), 5 unlabeled (unlabeled/), 4 test (test/)" in findings.facts[0]
    )
    Image.open(folder / "test/tench/0.png").save(folder / "unlabeled" / "leak.bmp")
    Image.open(folder / "train/owl/0.png").save(folder / "unlabeled" / "again.bmp")
    Image.open(folder / "train/owl/0.png").save(folder / "unlabeled" / "tench" / "not an owl.bmp")
    (folder / "unlabeled/somewhere/1.png").write_bytes(b"no image")
    findings = found(folder)
    unreadable, leak, two = findings.problems
    assert unreadable.startswith("1 files cannot be read: image somewhere/1.png")
    assert leak == "1 images are in more than one part: leak.bmp (unlabeled) = test/tench/0.png (test)"
    assert two == "1 images stand under two classes: train/owl/0.png (owl) = tench/not an owl.bmp (tench)"
    assert any(n.startswith("1 training images are among the unlabeled too: train/owl") for n in findings.notes)


def test_labels_that_the_backbone_has_seen(folder):
    notes = overlap(folder, "timm:deit_tiny_patch16_224.fb_in1k")
    assert "imagenet-1k, which has 1 of these 3 classes: tench" in notes
    untagged = overlap(folder, "timm:deit_tiny_patch16_224")  # timm takes the same weights for it
    assert "imagenet-1k, which has 1 of these 3 classes: tench" in untagged
    for name in ("timm:vit_small_patch14_dinov2", "timm:vit_small_patch14_dinov2.lvd142m", "timm:no_such_model"):
        assert "overlap not checked" in overlap(folder, name)
    notes = overlap(folder, "nano")
    assert "CIFAR-100" not in notes and "not checked" not in notes  # none of these classes
    assert {"goldfish", "great white shark"} < label_sets("timm:deit_tiny_patch16_224.fb_in1k")["imagenet-1k"]
    (hundred,) = label_sets("nano").values()
    assert len(hundred) == 100 and {"apple", "aquarium fish"} < hundred


def test_a_task_in_memory_is_examined_too():
    from dataclasses import replace

    task = toy_task((20, 5, 3))
    assert examine(task).problems == []
    leaky = replace(task, test=task.train.subset(range(4)))
    assert "4 images are in more than one part" in examine(leaky).problems[0]
    labels = torch.tensor([0] * 5 + [1] * 3)
    absent = replace(task, train=replace(task.train.subset(range(8)), labels=labels))
    assert any("1 classes have no training image: class 2" in p for p in examine(absent).problems)


def test_the_command_says_it_and_exits_with_1_on_problems(folder, monkeypatch, capsys):
    def doctor(*words):
        monkeypatch.setattr(sys, "argv", ["lpt", "doctor", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    code, said = doctor(folder)
    assert code == 0 and "nothing stands in the way" in said.out and "note: " in said.out
    (folder / "train/tench/1.png").write_bytes(b"no image")
    code, said = doctor(folder, "backbone.name=timm:vit_base_patch16_224.augreg_in21k")
    assert code == 1 and "problem: 1 files cannot be read" in said.out
    code, said = doctor(folder / "absent")
    assert code == 2 and "does not exist" in said.err
    code, said = doctor(folder, "backbone.nmae=x")
    assert code == 2 and "backbone.nmae" in said.err
    code, said = doctor(folder, "train.seed=3")
    assert code == 2 and "there is no such section here" in said.err


def one_of_each_fault(root):
    fill(root / "train", {"cat": 6, "dog": 4, "eel": 1, "Red Owl": 3}), fill(root / "val", {"cat": 2, "dog": 2}, seed=3)
    (
        fill(root / "test", {"cat": 4, "dog": 2, "red owl": 2, "yak": 1}, seed=7),
        fill(root / "train", {"emu": 0, "heron": 0}),
    )
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    for path in ("train/heron/IMG_1.HEIC", "train/heron/IMG_2.HEIC", "train/dog/renamed.jpg"):
        (root / path).write_bytes(heic)
    (root / "train/dog/raw.CR2").write_bytes(b"II*\0" + bytes(99))
    (root / "train/cat/half.png").write_bytes((root / "train/cat/5.png").read_bytes()[:99])
    (root / "train/dog" / os.fsdecode(b"ni\xf1a.png")).write_bytes(b"no image")
    for path in ("train/cat/notes.txt", "train/dog/Thumbs.db", "LICENSE", "train/cat/.DS_Store", "train/dog/._1.png"):
        (root / path).write_bytes(b"words")
    picture(70).save(root / "train" / "stray.png")
    picture(71).save(root / "train/cat/twice.png"), picture(71).save(root / "train/cat/twice again.png")
    Image.open(root / "train/cat/2.png").save(root / "test/cat/leak.bmp")
    Image.open(root / "train/cat/3.png").save(root / "train/dog/a cat.png")
    (root / "train/dog/gone.png").symlink_to("nowhere.png")
    (root / "train/eel/back").symlink_to("..")
    (root / "test/dog/linked.png").symlink_to("../../val/dog/1.png")
    return root


def test_one_of_each_fault_is_named_in_one_screen_as_the_docs_show(tmp_path, monkeypatch, capsys):
    one_of_each_fault(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(capsys, "doctor", "photos")
    assert code == 1 and len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) < 400
    assert out in (Path(__file__).parents[1] / "docs" / "data.md").read_text()
