"""A table in parts: whatever ends a process, and wherever, no row is lost or doubled."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpt.errors import LptError
from lpt.serve import row_file
from lpt.serve.row_file import RowFile, partial_of

SCHEMA = pa.schema({"number": pa.int64(), "note": pa.string(), "error": pa.string()})


class Killed(BaseException):
    pass


def row(i):
    return {"number": i, **({"error": "broken"} if i % 7 == 3 else {"note": f"=note {i}\u2028"})}


def write(path, number, *, job="a", dies_after=None, resume=True, rows=()):
    """Goes on with `number` rows, or dies after some of its own; returns the file."""
    writing = RowFile(path, SCHEMA, {"job": job})
    with writing.opened(resume=resume):
        if not writing.is_whole:
            for done, i in enumerate(range(writing.rows, number)):
                if done == dies_after:
                    raise Killed
                writing.add(row(i))
                writing.keep()
            writing.finish()
    return writing


def read(path):
    if path.suffix == ".parquet":
        return [{k: v for k, v in one.items() if v is not None} for one in pq.read_table(path).to_pylist()]
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(row_file, "ROWS_A_PART", 10)
    monkeypatch.setattr(row_file, "PARTS_AT_ONCE", 3)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_there_once_and_in_order_wherever_processes_die(tmp_path, suffix, monkeypatch):
    out, draw, ends = tmp_path / f"rows{suffix}", random.Random(1), 0
    for _ in range(15):
        try:
            write(out, 123, dies_after=draw.choice([0, 1, 9, 10, 11]))
        except Killed:
            ends += 1
            assert not out.exists()
    replace = row_file.Path.replace
    with monkeypatch.context() as patched:  # all rows are there, and it dies while they are joined

        def dies(self, target):
            if target == out:
                raise Killed
            return replace(self, target)

        patched.setattr(row_file.Path, "replace", dies)
        with pytest.raises(Killed):
            write(out, 123)
    assert ends and not out.exists()
    with monkeypatch.context() as patched:  # it dies while the parts are removed
        patched.setattr(row_file.shutil, "rmtree", lambda path, **how: next(path.glob("rows-*")).unlink())
        done = write(out, 123)
    assert (done.rows, done.errors) == (123, 18) and partial_of(out).exists()
    before = out.read_bytes()
    assert write(out, 123).is_whole and not partial_of(out).exists()
    assert read(out) == [row(i) for i in range(123)] and out.read_bytes() == before
    write(tmp_path / f"at once{suffix}", 123, resume=False)
    assert read(tmp_path / f"at once{suffix}") == read(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"at once{suffix}", f"rows{suffix}"]


def test_a_file_without_rows_is_a_file(tmp_path):
    for suffix in (".parquet", ".jsonl"):
        assert read(write(tmp_path / f"none{suffix}", 0).path) == []
    assert pq.read_schema(tmp_path / "none.parquet").names == SCHEMA.names


def test_what_takes_long_is_written_in_smaller_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(row_file, "SECONDS_A_PART", -1.0)
    with pytest.raises(Killed):
        write(tmp_path / "rows.jsonl", 9, dies_after=4)
    assert len(list(partial_of(tmp_path / "rows.jsonl").glob("rows-*"))) == 4


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_what_is_there_is_neither_overwritten_nor_mixed_with_another_job(tmp_path, suffix):
    out = tmp_path / f"rows{suffix}"
    with pytest.raises(Killed):
        write(out, 50, dies_after=30)
    with pytest.raises(LptError, match="has been begun: add --resume"):
        write(out, 50, resume=False)
    with pytest.raises(LptError, match=r"begun with other settings \(job\): give those again"):
        write(out, 50, job="b")
    part = next(partial_of(out).glob("rows-000000000010*"))
    part.rename(tmp_path / "away")
    with pytest.raises(LptError, match="row 10 is missing before rows-000000000020"):
        write(out, 50)
    (tmp_path / "away").rename(part)
    write(out, 50)
    with pytest.raises(LptError, match="is there already"):
        write(out, 50, resume=False)
    if suffix == ".parquet":  # which says what it is
        with pytest.raises(LptError, match="other settings"):
            write(out, 50, job="b")
    assert len(read(out)) == 50


def test_two_processes_do_not_write_one_file(tmp_path):
    out = tmp_path / "rows.jsonl"
    with RowFile(out, SCHEMA, {}).opened(resume=False), pytest.raises(LptError, match="is in use by process"):
        write(out, 3)


def test_a_begin_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(Killed):
        write(tmp_path / "rows.parquet", 9, dies_after=5)
    assert list(tmp_path.iterdir()) == []
    for name, said in (("rows.csv", "ends in .parquet or .jsonl"), ("no.parquet", "is a folder")):
        (tmp_path / "no.parquet").mkdir(exist_ok=True)
        with pytest.raises(LptError, match=said):
            write(tmp_path / name, 3)


def test_damaged_parts_are_named(tmp_path):
    out = tmp_path / "rows.parquet"
    with pytest.raises(Killed):
        write(out, 50, dies_after=30)
    next(partial_of(out).glob("rows-000000000010*")).write_bytes(b"no parquet")
    with pytest.raises(LptError, match=r"rows-000000000010-10-2\.parquet cannot be read"):
        write(out, 50)
    (partial_of(out) / "job.json").write_text("{")
    with pytest.raises(LptError, match="no JSON"):
        write(out, 50)
