"""The class for Ray Data: its rows are those of `lpt predict --out`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpt.clusters import Predictor
from lpt.errors import LptError
from lpt.serve import image_files, open_prompt
from lpt.serve.streaming import predict_to_file
from tests.support.pictures import fill


@pytest.fixture
def photos(tmp_path):
    root = fill(tmp_path / "photos", {"a": 9, "b": 7}, kind="jpg")
    (root / "a" / "broken.jpg").write_bytes(b"\xff\xd8 cut")
    return root


@pytest.fixture
def expected(finished, photos, tmp_path):
    """By path, what the command writes."""
    model, _ = open_prompt(finished / "prompt.safetensors")
    out = tmp_path / "rows.parquet"
    predict_to_file(model, [photos], out, prompt=finished / "prompt.safetensors", task="digits-lt", topk=2)
    return {row["path"]: row for row in pq.read_table(out).to_pylist()}


def same(table, expected):
    rows = table.to_pylist()
    assert sorted(row["path"] for row in rows) == sorted(expected)
    for row in rows:
        for name, value in expected[row["path"]].items():
            if name == "error" and value is not None:  # Pillow says what it has opened, a path or bytes
                assert row[name].partition(" (")[0] == value.partition(" (")[0]
                continue
            assert row[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float | list) else value), name


@pytest.mark.parametrize("form", ["numpy", "pyarrow", "bytes"])
def test_a_batch_becomes_the_rows_of_the_command(finished, photos, expected, form):
    predictor = Predictor(finished / "prompt.safetensors", topk=2, batch_size=5)
    paths = [str(path) for path in image_files([photos])]
    batch = {"path": np.array(paths, dtype=object), "label": np.zeros(len(paths))}
    if form == "bytes":
        batch["bytes"] = np.array([Path(path).read_bytes() for path in paths], dtype=object)
    table = predictor(pa.table({"path": paths}) if form == "pyarrow" else batch)
    assert table.schema == pq.read_schema(next(iter(photos.parent.glob("*.parquet")))).remove_metadata()
    same(table, expected)
    assert predictor({"path": np.array(paths[:1])}).num_rows == 1
    assert predictor({"path": np.array([], dtype=object)}).schema == table.schema  # as an empty block has it


def test_mistakes_are_said(finished):
    predictor = Predictor(finished / "prompt.safetensors")
    with pytest.raises(LptError, match="has the columns image: give one that is called path"):
        predictor({"image": np.array(["a.png"])})
    (row,) = predictor({"path": np.array(["no such.png"])}).to_pylist()
    assert "no such file" in row["error"] and row["class"] is None
    with pytest.raises(LptError, match="batch_size"):
        Predictor(finished / "prompt.safetensors", batch_size=0)


@pytest.mark.slow
def test_ray_data_on_two_processors(finished, photos, expected, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install lpt[ray]")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        options = {"concurrency": 2, "batch_size": 4, "fn_constructor_kwargs": {"topk": 2, "device": "cpu"}}
        prompt = str(finished / "prompt.safetensors")
        images = ray.data.read_binary_files(str(photos), include_paths=True)
        images.map_batches(Predictor, fn_constructor_args=(prompt,), **options).write_parquet(str(tmp_path / "out"))
        same(pq.read_table(tmp_path / "out"), expected)
        paths = ray.data.from_items([{"path": str(path)} for path in image_files([photos])])
        table = pa.concat_tables(
            ray.get(paths.map_batches(Predictor, fn_constructor_args=(prompt,), **options).to_arrow_refs())
        )
        same(table, expected)
    finally:
        ray.shutdown()
