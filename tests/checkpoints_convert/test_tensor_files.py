"""Safetensors headers that lie are refused before anything is mapped; tensors of any type are views."""

import json
import struct
from importlib.metadata import version

import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import tensor_files

GOOD = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}


def write(path, header, data=b"abcd"):
    """A file with a header that is JSON or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**changes):
    return {"a": GOOD["a"] | changes}


@pytest.mark.parametrize(
    "header",
    [
        entry(data_offsets=[-4, 0]),
        entry(data_offsets=[-(1 << 40), 4 - (1 << 40)]),
        entry(data_offsets=[4, 0]),
        entry(data_offsets=[0, 8]),
        entry(data_offsets=[0.0, 4.0]),
        entry(data_offsets=[False, 4]),
        entry(data_offsets=[0]),
        entry(shape=[2]),
        entry(shape=[-1]),
        entry(shape=[True]),
        entry(shape=[1 << 62, 1 << 62]),
        entry(shape=[1 << 63, 0], data_offsets=[0, 0]),
        entry(shape="1"),
        entry(dtype="F99"),
        entry(dtype=None),
        {"a": None},
        [],
        GOOD | {"b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},  # overlaps
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
         "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},  # a hole
        {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},  # bytes that are nobody's
        GOOD | {"__metadata__": {"x": 1}},
        b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "__metadata__": {"x": "1", "x": "2"}}',
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1, "x": 2}}',
        b'{"\xff": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
    ids=lambda header: str(header)[:60],
)  # fmt: skip
def test_a_header_that_lies_is_one_line(tmp_path, header):
    with pytest.raises(ValueError, match="^safetensors: ") as caught:
        tensor_files.open_file(write(tmp_path / "x.safetensors", header))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("size", [0, 7, 8])
def test_a_file_without_a_header_is_one_line(tmp_path, size):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match=f"x.safetensors is cut off in its header, got {size} bytes"):
        tensor_files.open_file(tmp_path / "x.safetensors")


def test_a_header_larger_than_the_package_takes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "LARGEST_HEADER", 20)
    with pytest.raises(ValueError, match="safetensors: a header has 20 bytes at most, got 6"):
        tensor_files.open_file(write(tmp_path / "x.safetensors", GOOD))


def test_tensors_of_all_types_are_views_and_those_of_less_than_a_byte_their_bytes(tmp_path):
    since_0_8 = {"C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"} if version("safetensors") < "0.8" else set()
    for kind, dtype in tensor_files.DTYPES.items():
        if kind in since_0_8:
            continue
        data = bytes(2 * dtype.itemsize)
        header = {"a": {"dtype": kind, "shape": [2, 1], "data_offsets": [0, len(data)]}}
        found = tensor_files.open_file(write(tmp_path / "x.safetensors", header, data))["a"]
        assert found.shape == (2, 1) and found.dtype == dtype and tensor_files.NAMES[found.dtype] == kind
    if since_0_8:
        return
    header = {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
    found = tensor_files.open_file(write(tmp_path / "x.safetensors", header))["a"]
    assert found.tobytes() == b"abcd" and found.dtype == tensor_files.RAW


def test_scalars_and_empty_tensors_are_written_and_read(tmp_path):
    values = {"scalar": np.array(3.0, np.float32), "empty": np.zeros((2, 0), ml_dtypes.bfloat16)}
    entries = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in values.items()]
    tensor_files.write_file(tmp_path / "x.safetensors", entries)
    found = tensor_files.open_file(tmp_path / "x.safetensors")
    assert {name: (x.shape, x.dtype, x.tobytes()) for name, x in found.items()} == {
        name: (x.shape, x.dtype, x.tobytes()) for name, x in values.items()
    }
