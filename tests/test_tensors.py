"""Tensor files: sealed when they are written, limited when they are opened."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from lpt import files as tensors
from lpt.files import is_intact, read_tensors, to_bytes

FOUND = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.zeros(0, 4), "d": torch.ones(2) > 0}


def test_what_is_written_is_read_and_sealed(tmp_path):
    (tmp_path / "x").write_bytes(to_bytes(FOUND, lpt={"format": 1, "é": [0.1, None]}))
    metadata, found = read_tensors(tmp_path / "x")
    header = json.loads(metadata["lpt"])
    assert found.keys() == FOUND.keys() and all(torch.equal(found[name], value) for name, value in FOUND.items())
    assert is_intact(header, found) and not is_intact({"format": 1}, found)
    assert not is_intact(header | {"format": 2}, found)
    assert not is_intact(header, found | {"a": found["a"] + 1})
    assert not is_intact(header, found | {"a": found["a"].view(3, 2)})
    assert not is_intact(header, {("e" if name == "d" else name): value for name, value in found.items()})


def test_the_same_tensors_are_the_same_bytes():
    assert to_bytes(FOUND, lpt={"a": 1}) == to_bytes(dict(reversed(FOUND.items())), lpt={"a": 1})


def test_a_header_too_long_or_of_too_many_tensors_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 99 * 2**20) + b"{" * 100)
    with pytest.raises(ValueError, match="a header of 103,809,024 bytes, 4,194,304 are the most"):
        read_tensors(path)
    monkeypatch.setattr(tensors, "MAX_TENSORS", 3)
    save_file({str(i): torch.zeros(1) for i in range(4)}, path)
    with pytest.raises(ValueError, match="4 tensors, 3 are the most"):
        read_tensors(path)
    header = json.dumps({"deep": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="deep has 70 axes, 8 are the most"):  # torch computes with 64 at most
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\0" * 20, struct.pack("<Q", 4) + b"nono", b"PK\x03\x04" * 9])
def test_what_is_no_tensor_file_has_a_short_reason(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tensors(tmp_path / "x")
    assert 0 < len(str(error.value)) < 250
