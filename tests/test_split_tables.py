"""Tables, parquet and lists as people have them: other encodings, separators and names, and a split that they say."""

import io
import json

import pytest

import lpt
from lpt.data.data_files import roles_in_words
from lpt.data.lists import read_list, read_unlabeled
from lpt.data.tables import metadata
from lpt.data.texts import class_names_of, read_text, spelling
from lpt.errors import DataError
from tests.support.command_line import lpt as command
from tests.support.pictures import fill, picture


def task_of(root, **settings):
    return lpt.load_task("folder", root=str(root), **settings)


def sizes(task):
    return [len(part) if part else 0 for part in (task.train, task.val, task.test, task.unlabeled)]


def pictures(folder, count=8):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    return folder


def parquet(path, numbers, **columns):
    """Pictures of these numbers in a parquet file, with other columns beside them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = []
    for i in numbers:
        buffer = io.BytesIO()
        picture(i).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    image = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": image} | {name: pa.array(values) for name, values in columns.items()}), path)


# Parquet: beside pictures, in odd places, and by part.


@pytest.mark.parametrize("preview", ["assets/preview.png", "logo.PNG", "docs/img/a.jpg"])
def test_parquet_beside_pictures_for_the_reader_is_the_dataset(tmp_path, preview):
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", range(12), label=[0, 1, 2] * 4)
    (tmp_path / preview).parent.mkdir(parents=True, exist_ok=True)
    picture(99).save(tmp_path / preview)
    task = task_of(tmp_path)
    assert task.classes == ("0", "1", "2") and sizes(task) == [9, 0, 3, 0]
    assert task.facts["left_out"] == [preview] and "other_files" not in task.facts


def test_pictures_in_class_folders_and_in_parquet_are_refused_and_features_are_no_dataset(tmp_path):
    fill(tmp_path, {"cat": 5, "dog": 4})
    parquet(tmp_path / "export.parquet", range(8), label=[0, 1] * 4)
    with pytest.raises(DataError, match=r"9 images in folders, such as cat/0\.png, and 8 in files such as export"):
        task_of(tmp_path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1.0, 2.0]}), tmp_path / "export.parquet")
    assert task_of(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["ro[ot]", "a*b?", "[x] {y}"])
def test_a_root_with_brackets_has_its_parquet(tmp_path, name, capsys):
    parquet(tmp_path / name / "train.parquet", range(6), label=["a", "b"] * 3)
    parquet(tmp_path / name / "test.parquet", range(6, 10), label=["a", "b"] * 2)
    assert sizes(task_of(tmp_path / name)) == [6, 0, 4, 0]
    code, out, _ = command(capsys, "doctor", tmp_path / name)
    assert code == 0 and "6 training (train.parquet), 4 test (test.parquet)" in out


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train.parquet": 6, "heldout.parquet": 4, "unlabeled.parquet": 5}, [6, 0, 4, 5]),
        ({"train-00000-of-00002.parquet": 4, "train-00001-of-00002.parquet": 2, "dev.parquet": 2}, [6, 0, 2, 0]),
        ({"default/train/0000.parquet": 6, "default/validation/0000.parquet": 2, "default/test/0.parquet": 4}, None),
        ({"data/x_train.parquet": 6, "data/x_val.parquet": 2, "data/x_eval_set.parquet": 4}, [6, 2, 4, 0]),
        ({"Training/part-0.parquet": 6, "Hold-out/part-0.parquet": 4, "unlabelled/part-0.parquet": 3}, [6, 0, 4, 3]),
        ({"part-0.parquet": 6, "part-1.parquet": 4}, [7, 0, 3, 0]),
    ],
)
def test_parquet_files_are_the_parts_that_they_are_called(tmp_path, files, expected):
    first = 0
    for name, count in files.items():
        columns = {} if "unlabel" in name else {"label": [i % 2 for i in range(count)]}
        parquet(tmp_path / name, range(first, first + count), **columns)
        first += count
    assert sizes(task_of(tmp_path)) == (expected or [6, 2, 4, 0])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["en/train.parquet", "fr/train.parquet"], r"in 2 folders, .* may be two datasets: set data\.root=.*/fr for"),
        (["cifar10/0.parquet", "mnist/0.parquet"], "may be two datasets"),
        (["en-train.parquet", "fr-train.parquet"], r"en-train\.parquet and fr-train\.parquet for one part, train"),
        (["train.parquet", "test.parquet", "heldout.parquet"], r"for one part, test: keep one"),
        (["train.parquet", "extra.parquet"], r"its train part, and extra\.parquet, which is called as none"),
        (["train_test.parquet"], "is called as two parts, train and test"),
    ],
)
def test_parquet_files_that_could_be_two_things_are_refused(tmp_path, files, said, capsys):
    for k, name in enumerate(files):
        parquet(tmp_path / name, range(4 * k, 4 * k + 4), label=[0, 1, 0, 1])
    with pytest.raises(DataError, match=said):
        task_of(tmp_path)
    code, out, error = command(capsys, "doctor", tmp_path)
    assert (code == 2 and "train-00000-of-00002.parquet" in out + error) or "for one part" in out + error


def test_parts_in_a_column_of_parquet(tmp_path):
    split = ["train"] * 5 + ["validation"] * 2 + ["test"] * 2 + ["unlabeled"] * 2
    parquet(tmp_path / "a.parquet", range(11), label=[0, 1, 0, 1, 0, 1, 0, 1, 0, None, None], split=split)
    task = task_of(tmp_path)
    assert sizes(task) == [5, 2, 2, 2] and task.unlabeled.labels.tolist() == [-1, -1]
    assert "2 test images (a.parquet, split=test)" in task.summary_lines()[0]
    parquet(tmp_path / "b" / "test.parquet", range(4), label=[0, 1, 0, 1], split=["train", "test", "test", "test"])
    with pytest.raises(DataError, match=r"rows of test\.parquet have split=train"):
        task_of(tmp_path / "b")
    parquet(tmp_path / "c" / "x.parquet", range(4), label=[0, 1, 0, 1], kind=["dev", "train", "train", "dev"])
    assert sizes(task_of(tmp_path / "c", split_column="kind")) == [2, 0, 2, 0]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([1.0, 2.0] * 4, ("1", "2")),
        (["1", "1.0", " cat", "cat\u00a0"] * 2, ("1", "cat")),
        (["01", "1.5", "NA", "None"] * 2, ("01", "1.5", "NA", "None")),
    ],
)
def test_classes_in_parquet_are_what_is_meant(tmp_path, labels, classes):
    parquet(tmp_path / "a.parquet", range(8), label=labels)
    assert task_of(tmp_path).classes == classes


@pytest.mark.parametrize("labels", [["a", "NaN"] * 4, [1.0, float("nan")] * 4, ["a", "<NA>"] * 4, ["a", " "] * 4])
def test_an_image_without_a_class_is_refused_in_a_table(tmp_path, labels):
    parquet(tmp_path / "a.parquet", range(8), label=labels)
    with pytest.raises(DataError, match="4 of the train images have no label; every image needs a class: give it one"):
        task_of(tmp_path)


# Tables of files.


def table_text(separator=",", name="file_name", label="species", folder=""):
    rows = [f"{folder}{i}.png{separator}{['café', ' robin'][i % 2]}\r\n" for i in range(8)]
    return f"{name}{separator}{label}\r\n" + "".join(rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_in_any_encoding_and_with_any_separator(tmp_path, encoding, separator):
    pictures(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(table_text(separator).encode(encoding))
    task = task_of(tmp_path)
    assert task.classes == ("café", "robin") and sizes(task) == [6, 0, 2, 0] and "left_out" not in task.facts


@pytest.mark.parametrize("name", ["filename", "File Name", "path", "image_path", "IMAGE", "img"])
def test_other_names_of_the_file_column_and_backslashes(tmp_path, name):
    pictures(tmp_path / "a b")
    (tmp_path / "metadata.csv").write_text(table_text(name=name, folder="a b\\", label="Kind"))
    task = task_of(tmp_path)
    assert sizes(task) == [6, 0, 2, 0] and {f"a b/{i}.png" for i in range(8)} == {*task.train.ids, *task.test.ids}


def test_of_two_columns_with_files_the_one_that_has_them(tmp_path):
    pictures(tmp_path)
    rows = "".join(f"{i:05d},{i}.png,{'ab'[i % 2]}\n" for i in range(8))
    (tmp_path / "metadata.csv").write_text(f"image_id,path,label\n{rows}")
    assert sizes(task_of(tmp_path)) == [6, 0, 2, 0]
    rows = "".join(f"{i}.png,./{i}.png,{'ab'[i % 2]}\n" for i in range(8))
    (tmp_path / "metadata.csv").write_text(f"image,path,label\n{rows}")
    with pytest.raises(DataError, match=r"names files in 2 columns, path, image: set data\.image_column"):
        task_of(tmp_path)
    assert sizes(task_of(tmp_path, image_column="path")) == [6, 0, 2, 0]


def test_names_without_a_suffix_and_a_heading_of_excel(tmp_path):
    pictures(tmp_path)
    rows = "".join(f"{i};{'ab'[i % 2]}\n" for i in range(8))
    (tmp_path / "metadata.csv").write_text(f"sep=;\nimage_id;dx\n{rows}")
    assert sizes(task_of(tmp_path)) == [6, 0, 2, 0]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("split", ["train", "train", "test", "val"]),
        ("Subset", ["Training", "training_set", "Testing", "validation"]),
        ("partition", ["TRAIN", "train", "holdout", "dev"]),
        ("set", ["train", "train", "eval", "valid"]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_says_the_parts(tmp_path, column, values, kind, capsys):
    pictures(tmp_path)
    rows = [{"file_name": f"{i}.png", "kind": "ab"[i % 2], column: values[i // 2]} for i in range(8)]
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
    elif kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    task = task_of(tmp_path)
    assert sizes(task) == [4, 2, 2, 0] and sorted(task.test.ids) == ["4.png", "5.png"]
    assert f"2 test images (metadata.{kind}, {column}={values[2]})" in task.summary_lines()[0]
    code, out, _ = command(capsys, "doctor", tmp_path)
    assert code == 0 and f"2 test (metadata.{kind}, {column}={values[2]})" in out


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("is_train", "11110000", [4, 0, 4, 0]),
        ("is_valid", ["False"] * 6 + ["True"] * 2, [6, 0, 2, 0]),
        ("is_test", ["no", "no", "no", "no", "yes", "yes", "yes", "yes"], [4, 0, 4, 0]),
    ],
)
def test_a_column_of_truths_says_the_parts(tmp_path, column, values, expected):
    pictures(tmp_path)
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{values[i]}\n" for i in range(8))
    (tmp_path / "metadata.csv").write_text(f"file_name,label,{column}\n{rows}")
    assert sizes(task_of(tmp_path)) == expected


@pytest.mark.parametrize("values", ["01201201", ["train", ""] * 4, ["train", "PublicTest"] * 4])
def test_a_split_column_that_cannot_be_understood_is_refused(tmp_path, values, capsys):
    pictures(tmp_path)
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{values[i]}\n" for i in range(8))
    (tmp_path / "metadata.csv").write_text(f"file_name,label,split\n{rows}")
    with pytest.raises(DataError, match="which is no part: call the parts train, val, test and unlabeled, or give"):
        task_of(tmp_path)
    code, _, error = command(capsys, "doctor", tmp_path)
    assert code == 2 and "which is no part" in error
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{i % 3}\n" for i in range(8))
    (tmp_path / "metadata.csv").write_text(f"file_name,label,fold\n{rows}")
    assert sizes(task_of(tmp_path)) == [6, 0, 2, 0]  # a fold by its number is no part


def test_unlabeled_rows_need_no_class_and_withheld_ones_are_no_test_part(tmp_path):
    pictures(tmp_path, 12)
    role = ["train"] * 6 + ["unlabeled"] * 3 + ["test"] * 3
    rows = "".join(f"{i}.png,{'ab'[i % 2] if i < 6 or i == 7 else ''},{role[i]}\n" for i in range(12))
    (tmp_path / "metadata.csv").write_text(f"file_name,label,split\n{rows}")
    task = task_of(tmp_path)
    assert sizes(task) == [4, 0, 2, 3] and task.unlabeled.labels.tolist() == [-1, 1, -1]
    assert "split off" in task.facts["test_part"] and task.facts["left_out"] == ["10.png", "11.png", "9.png"]


def test_a_split_beside_class_folders_and_one_that_disagrees(tmp_path):
    fill(tmp_path / "p", {"cat": 4, "dog": 4})
    rows = "".join(f"{c}/{i}.png,{'train' if i < 3 else 'test'}\n" for c in ("cat", "dog") for i in range(4))
    (tmp_path / "p" / "metadata.csv").write_text(f"file_name,split\n{rows}")
    task = task_of(tmp_path / "p")
    assert task.classes == ("cat", "dog") and sorted(task.test.ids) == ["cat/3.png", "dog/3.png"]
    pictures(tmp_path / "q" / "train")
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{'test' if i > 5 else 'train'}\n" for i in range(8))
    (tmp_path / "q" / "train" / "metadata.csv").write_text(f"file_name,label,split\n{rows}")
    with pytest.raises(DataError, match="is the table of the train part, and says split=test"):
        task_of(tmp_path / "q")
    rows = "".join(f"{i}.png,{'ab'[i % 2]},test,train\n" for i in range(8))
    (tmp_path / "q" / "train" / "metadata.csv").write_text(f"file_name,label,split,subset\n{rows}")
    with pytest.raises(DataError, match=r"in split and in subset, which do not agree: set data\.split_column"):
        task_of(tmp_path / "q")


@pytest.mark.parametrize("name", ["products.csv", "items.TSV", "labels.jsonl", "list.parquet"])
def test_a_table_of_another_name_is_named_and_read(tmp_path, name, capsys):
    root = pictures(tmp_path / "shop" / "images").parent
    rows = [{"path": f"images/{i}.png", "category": "ab"[i % 2], "price": str(i)} for i in range(8)]
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), root / name)
    elif name.endswith("jsonl"):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if name.endswith("TSV") else ","
        (root / name).write_text("\n".join([mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]))
    settings = f"data.table={name} data.image_column=path data.label_column=category"
    with pytest.raises(DataError, match=settings.replace(".", r"\.")):
        task_of(root)
    code, _, error = command(capsys, "doctor", root)
    assert code == 2 and settings in error
    for table in (name, str(root / name)):
        task = task_of(root, table=table, image_column="path", label_column="category")
        assert task.classes == ("a", "b") and sizes(task) == [6, 0, 2, 0]
    assert lpt.load_task("folder", table=str(root / name)).manifest() == task.manifest()
    words = ("--out", tmp_path / "run", "backbone.name=nano", "method.name=class_mean", "train.device=cpu")
    code, out, error = command(capsys, "fit", root, *words, *settings.split())
    assert code == 0 and "6 training images of 2 classes, 3 to 3 each" in out, error
    with pytest.raises(DataError, match=r"data\.table gone\.csv is no file"):
        task_of(root, table="gone.csv")


def test_a_table_of_what_folders_say_is_no_news(tmp_path):
    fill(tmp_path, {"cat": 4, "dog": 4})
    rows = [(f"{name}/{i}.png", name) for name in ("cat", "dog") for i in range(4)]
    (tmp_path / "index.csv").write_text("path,label\n" + "".join(f"{path},{name}\n" for path, name in rows))
    assert "tables_beside" not in task_of(tmp_path).facts
    (tmp_path / "index.csv").write_text(
        "path,label\n" + "".join(f"{path},{i % 2}\n" for i, (path, _) in enumerate(rows))
    )
    assert task_of(tmp_path).facts["tables_beside"] == [
        "data.table=index.csv data.image_column=path data.label_column=label"
    ]


# Lists.


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    ["a b.png 0\nc.png 1\n", "a b.png\t0\nc.png\t1\n", "a b.png,0\nc.png,1", "path, label\na b.png, 0\nc.png, 1\n",
     '"a b.png";0\r\n"c.png";1\r\n', "a b.png 0\n\ufeffc.png 1\n"],
)  # fmt: skip
def test_lists_in_any_encoding_and_with_any_separator(tmp_path, encoding, text):
    (tmp_path / "l.txt").write_bytes(text.encode(encoding))
    paths, labels = read_list(tmp_path / "l.txt")
    assert paths == ["a b.png", "c.png"] and labels.tolist() == [0, 1]


def test_unlabeled_lists_with_other_separators(tmp_path):
    for text, expected in (
        ("\ufeffa b.png\t0\nc.png\n", [0, -1]),
        ("a b.png,0\nc.png,-1\n", [0, -1]),
        ("a b.png\nc.png", [-1, -1]),
        ("a b.png; 1\nc.png; 0", [1, 0]),
    ):
        (tmp_path / "l.txt").write_text(text)
        paths, labels = read_unlabeled(tmp_path / "l.txt", 2)
        assert paths == ["a b.png", "c.png"] and labels.tolist() == expected


def test_lists_with_backslashes_and_class_names_with_a_mark(tmp_path, capsys):
    fill(tmp_path, {"cat": 3, "dog": 2})
    (tmp_path / "l.txt").write_text(
        "".join(f"{c}\\{i}.png,{k}\n" for k, c in enumerate(("cat", "dog")) for i in (0, 1))
    )
    (tmp_path / "names.txt").write_bytes("\ufeffred panda\n owl \n".encode())
    places = {"root": tmp_path, "train": tmp_path / "l.txt", "test": tmp_path / "l.txt"}
    words = [f"data.{key}={value}" for key, value in places.items()]
    task = lpt.load_task("lists", **{key: str(value) for key, value in places.items()})
    assert task.classes == ("cat", "dog") and task.train.ids[0] == "cat/0.png"
    code, out, _ = command(
        capsys, "doctor", tmp_path, "data.name=lists", *words[1:], f"data.classes={tmp_path / 'names.txt'}"
    )
    assert code == 1 and "red panda 2, owl 2" in out  # a leak: one list is both parts


def test_what_is_no_text_is_refused(tmp_path):
    for content in ("Ärger.png 0\n".encode("latin-1"), b"\x89PNG\r\n\x1a\n\xff\xfe", b"\xff\xfea"):
        (tmp_path / "l.txt").write_bytes(content)
        with pytest.raises(ValueError, match="save it as UTF-8"):
            read_text(tmp_path / "l.txt")
        with pytest.raises(DataError, match="cannot be read"):
            read_list(tmp_path / "l.txt")


def test_names_in_words():
    assert class_names_of(["Cat ", "Cat", None]) == ["Cat", "Cat", ""]
    with pytest.raises(TypeError):
        class_names_of([["a"]])
    assert spelling("ＣＡＴ_a") == spelling("cat A") != spelling("cats a")
    assert roles_in_words("car-train-of-thought-test") == ["train", "test"] and roles_in_words("latest") == []


def test_a_metadata_file_of_any_kind(tmp_path):
    for name in ("metadata.parquet", "metadata.tsv", "metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("")
        assert metadata(tmp_path) == tmp_path / name
