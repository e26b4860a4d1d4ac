"""Metadata files and parquet: which column holds what, and rows that do not fit, in one sentence."""

import io
import json
import shutil

import numpy as np
import pytest
import torch

import lpt
from lpt.data.preprocess import Preprocess
from lpt.errors import DataError
from tests.support.pictures import picture, png


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_names_the_class_of_each_file(tmp_path, kind):
    place = tmp_path / "p"
    place.mkdir()
    rows = [(f"{i}.png", ["wren", "robin"][i % 2]) for i in range(10)]
    for i, (name, _) in enumerate(rows):
        picture(i).save(place / name)
    if kind == "csv":
        text = "file_name,species\n" + "".join(f"{name},{label}\n" for name, label in rows)
    else:
        text = "".join(json.dumps({"file_name": name, "species": label}) + "\n" for name, label in rows)
    (place / f"metadata.{kind}").write_text(text)
    task = lpt.load_task("folder", root=str(place))
    assert task.classes == ("robin", "wren") and len(task.train) + len(task.test) == 10
    labels = dict(rows)
    for name, label in zip(task.train.ids, task.train.labels.tolist(), strict=True):
        assert labels[name] == task.classes[label]


def test_absolute_names_in_metadata_are_those_of_any_working_directory(tmp_path, monkeypatch):
    place = tmp_path / "p"
    place.mkdir()
    lines = []
    for i in range(8):
        picture(i).save(place / f"{i}.png")
        lines.append(json.dumps({"file_name": str(place / f"{i}.png"), "label": "ab"[i % 2]}) + "\n")
    (place / "metadata.jsonl").write_text("".join(lines))
    whole = lpt.load_task("folder", root=str(place)).manifest()
    monkeypatch.chdir(tmp_path)
    task = lpt.load_task("folder", root="p")
    assert task.manifest() == whole and "0.png" in task.train.ids + task.test.ids and "left_out" not in task.facts


def test_parquet_with_encoded_images(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "p").mkdir()
    for role, n in (("train", 12), ("test", 4)):
        cells = []
        for i in range(n):
            buffer = io.BytesIO()
            picture(i).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        table = pa.table({"picture": image, "kind": pa.array([i % 3 for i in range(n)])})
        pq.write_table(table, tmp_path / "p" / f"{role}.parquet")
    root = str(tmp_path / "p")
    with pytest.raises(DataError, match=r"columns picture, kind: which holds the image\? Set data.image_column"):
        lpt.load_task("folder", root=root)
    with pytest.raises(DataError, match=r"image_column 'pictur' is no column .* did you mean picture"):
        lpt.load_task("folder", root=root, image_column="pictur")
    task = lpt.load_task("folder", root=root, image_column="picture", label_column="kind")
    assert task.classes == ("0", "1", "2") and task.counts.tolist() == [4, 4, 4] and len(task.test) == 4
    assert Preprocess(size=8).cut(task.test.take(torch.arange(4))).shape == (4, 3, 8, 8)


def test_metadata_that_does_not_fit_its_files(tmp_path):
    place = tmp_path / "p[1]"
    place.mkdir()
    for i in range(4):
        picture(i).save(place / f"{i}.png")

    def says(text, match):
        (place / "metadata.csv").write_text(text)
        with pytest.raises(DataError, match=match):
            lpt.load_task("folder", root=str(place))

    says("file_name,label\n0.png,a\ngone.png,b\n", "names 1 files that are not there, the first is .*gone.png")
    says(f"file_name,label\n0.png,a\n{'x' * 5000},b\n", "names 1 files that are not there")  # longer than a name can be
    says("file_name,label\n0.png,a\n0.png,a\n1.png,b\n", "lists an image twice: 0.png")
    says("file_name,label\n0.png,a\n1.png,\n", "1 rows without a label")
    says("file_name,x,y\n0.png,a,b\n", r"which holds the label\? Set data.label_column")
    says("name,label\n0.png,a\n", "it needs file_name and a class")
    says("", "cannot be read as a table .it has no rows")
    says("file_name,label\n0.png,a\n1.png\n", "row 3 has not as many cells as the first, which has 2")
    says("file_name,label,label\n0.png,a,a\n", "two columns have one name")
    says('file_name,label\n0.png,"a\n', "cannot be read as a table")
    says("file_name,label\ngo\ufeffne.png,a\n", r"the first is [^\ufeff]*go\?ne\.png")
    (place / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,a\n2.png,b\n")
    assert lpt.load_task("folder", root=str(place)).facts["left_out"] == ["3.png"]


def test_metadata_as_json_that_is_no_table(tmp_path):
    picture(0).save(tmp_path / "0.png")
    for text, match in (
        ('{"a":' * 100_000, "cannot be read as a table"),  # as deep as that crashes readers in C
        ("[1]\n", "row 1 is no object with a value for each column"),
        ('{"file_name": "0.png", "label": "a"}\n{"file_name": "0.png"}\n', "1 rows without a label"),
        ('{"file_name": "0.png", "label": ["a"]}\n', "label is to be the name of a class, and not .'a'."),
        ('{"file_name": "0\\u0000.png", "label": "a"}\n', "names 1 files that are not there"),
    ):
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(DataError, match=match):
            lpt.load_task("folder", root=str(tmp_path))


def parquet(place, name, cells, labels, kind=None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.mkdir(exist_ok=True)
    image = pa.array(cells, kind or pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "label": pa.array(labels)}), place / f"{name}.parquet")


def test_parquet_with_holes(tmp_path):
    import pyarrow as pa

    def cell(i):
        return {"bytes": png(torch.from_numpy(np.array(picture(i))).permute(2, 0, 1)), "path": None}

    good = [cell(i) for i in range(6)]
    for cells, kind in (([*good[:5], None], None), ([*good[:5], {"bytes": b"", "path": None}], None)):
        parquet(tmp_path / "p", "train", cells, [0, 1] * 3, kind)
        with pytest.raises(DataError, match="1 train rows hold no image, the first is row 5"):
            lpt.load_task("folder", root=str(tmp_path / "p"))
    parquet(tmp_path / "q", "train", list(range(6)), [0, 1] * 3, pa.int64())
    with pytest.raises(DataError, match="holds no images"):
        lpt.load_task("folder", root=str(tmp_path / "q"))
    parquet(tmp_path / "r", "train", good, [0, 1] * 3)
    before = lpt.load_task("folder", root=str(tmp_path / "r")).manifest()["sha256"]
    parquet(tmp_path / "r", "test", good[:2], [-1, -1])  # withheld labels: not a test part
    again = lpt.load_task("folder", root=str(tmp_path / "r"))
    assert again.manifest()["sha256"] == before and "split off" in again.facts["test_part"]
    shutil.rmtree(tmp_path / "r")
    parquet(tmp_path / "r", "train", good[::-1], [0, 1] * 3)  # other images, the same labels
    assert lpt.load_task("folder", root=str(tmp_path / "r")).manifest()["sha256"] != before
