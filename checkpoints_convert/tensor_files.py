"""Safetensors files without a framework: views of the mapped file, and a writer.

A file is eight bytes (little-endian length of the header), a JSON header {name: {dtype, shape,
data_offsets}}, and the numbers, row by row (github.com/huggingface/safetensors). The package's own parser
checks a header before anything is mapped: offsets and lengths, holes and overlaps, types. Views and writer
are ours because the package's numpy side has no bfloat16 in every version, and to write without holding all
tensors at once.
"""

import json
import os
import struct
import warnings
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints_convert.json_fields import OBJECT, TEXT, check_fields, read_object
from jaxllm.storage.metadata import excerpt, is_file_name, one_line, parse_json

FLOATS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# I32 and I64 are read in quantized weights; the others only lie in files, beside what is read.
DTYPES = FLOATS | {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype(bool),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
RAW = np.dtype("V1")  # the bytes of numbers that numpy has no type for: less than a byte each
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {RAW: "a type of other sizes than bytes"}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes, as the package has it

OpenFile = Callable[[Path], dict[str, np.ndarray]]


def open_file(path: Path) -> dict[str, np.ndarray]:
    """Each tensor of a safetensors file as a view of the mapped file; nothing is read yet.

    A type that numpy does not know comes as its bytes [n], of type `RAW`: whether a tensor is of use is
    for the caller to say. Raises ValueError in one line for a file that is cut off or no safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        (length,) = struct.unpack("<Q", head) if len(head) == 8 else (size,)
        if 8 + length > size:
            raise ValueError(f"safetensors: {path.name} is cut off in its header, got {size} bytes")
        if length > LARGEST_HEADER:
            raise ValueError(f"safetensors: a header has {LARGEST_HEADER} bytes at most, got {length}")
        # The package takes the last of two metadata entries of one name, we neither.
        header = parse_json(f"safetensors: the header of {path.name}", file.read(length))
    if (end := 8 + length + _last_end(header)) > size:
        raise ValueError(f"safetensors: {path.name} must have {end} bytes, got {size}: cut off")
    try:
        with safe_open(path, "numpy"):  # maps the file and checks its header; reads no numbers
            pass
    except SafetensorError as error:
        why = one_line(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"safetensors: {path.name} must be whole and valid, got {why[:200]}") from error
    header.pop("__metadata__", None)
    if not header:
        return {}
    data = np.memmap(path, np.uint8, "r")
    tensors: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"], RAW)
        shape = (stop - start,) if dtype is RAW else tuple(entry["shape"])
        if num_bytes(tuple(n or 1 for n in shape), dtype) >= 1 << 63:  # numpy has none, not even with a zero
            raise ValueError(f"safetensors: dimensions must fit 63 bits, got {name!r} of {list(shape)}")
        tensors[name] = np.ndarray(shape, dtype, buffer=data, offset=8 + length + start)
    return tensors


def _last_end(header: Any) -> int:
    """Where the last tensor ends, as far as a header that nothing has checked yet says so."""
    entries = header.values() if isinstance(header, dict) else []
    offsets = [entry.get("data_offsets") for entry in entries if isinstance(entry, dict)]
    ends = [pair[1] for pair in offsets if isinstance(pair, list) and len(pair) == 2]
    return max((end for end in ends if type(end) is int and end < 1 << 63), default=0)


def open_directory(path: Path) -> dict[str, np.ndarray]:
    """Each tensor of a directory's `model.safetensors`, else of the files that its index names.

    The single file comes first, as in transformers: a sharded save leaves its index behind when a smaller one
    follows. Where the files of such an index are there too and hold other numbers, a warning says so.
    """
    if (path / SINGLE).is_file():
        tensors = open_file(path / SINGLE)
        if (path / INDEX).is_file():
            _warn_of_other_weights(path, tensors)
        return tensors
    if (path / INDEX).is_file():
        return open_indexed(path, INDEX, open_file)
    pickled = sorted(file.name for end in ("bin", "pt", "pth") for file in path.glob(f"*.{end}"))
    if pickled:
        raise ValueError(
            "huggingface.load: weights must be in safetensors files; a pickle can run code when opened: "
            "give unsafe_format='pickle' (jaxllm convert --unsafe-format pickle) to read tensors and nothing "
            f"else of it, got {pickled[0]}"
        )
    raise FileNotFoundError(
        f"huggingface.load: no {SINGLE} or {INDEX} in {str(path)!r}; pickled weights are not used"
    )


def open_indexed(path: Path, index: str, open_file: OpenFile) -> dict[str, np.ndarray]:
    """Each tensor of the files that an index names, all of them in its directory."""
    where = read_object(path / index)
    check_fields(index, where, {"weight_map": OBJECT})
    check_fields(f"weight_map of {index}", where["weight_map"], dict.fromkeys(where["weight_map"], TEXT))
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(where["weight_map"].values())):
        file = path / name
        if not is_file_name(name) or not file.is_file() or not _lies_in(path, file):
            raise FileNotFoundError(
                f"huggingface.load: the index names a file that is not there, got {excerpt(name)}"
            )
        tensors |= open_file(file)
    lost = sorted(set(where["weight_map"]) - set(tensors))
    if lost:
        raise ValueError(f"huggingface.load: the index names tensors that no file has, got {listed(lost)}")
    return tensors


def _lies_in(path: Path, file: Path) -> bool:
    """Whether a file is no link out of its directory, but for those into the hub's cache."""
    real = file.resolve()
    store = real.parent.parent.name if real.parent.name == "blobs" else ""
    return real.is_relative_to(path.resolve()) or store.startswith("models--")


def _warn_of_other_weights(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        others = open_indexed(path, INDEX, open_file)
    except (ValueError, FileNotFoundError):
        return  # no other weights, only an index that was left behind
    if others.keys() != tensors.keys() or not all(same(tensors[name], others[name]) for name in tensors):
        warnings.warn(
            f"huggingface.load: {SINGLE} is read, as transformers does; the files of {INDEX} beside it are "
            f"other weights, got both in {str(path)!r}",
            stacklevel=2,
        )


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors have the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.ndim < 2:
        return a.tobytes() == b.tobytes()
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))  # row by row


Tensor = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


def write_file(path: Path, tensors: list[Tensor]) -> None:
    """Writes (name, shape, dtype, read) as one safetensors file, each read when it is its turn."""
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype, _ in tensors:
        end = at + num_bytes(shape, dtype)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, dtype, read in tensors:
            value = np.asarray(read(), order="C")
            assert value.shape == shape and value.dtype == dtype, name
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_directory(path: Path, tensors: Iterable[Tensor], max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or several files of at most that size and their index."""
    files: list[list[Tensor]] = [[]]
    size = total = 0
    for tensor in tensors:
        count = num_bytes(tensor[1], tensor[2])
        if files[-1] and size + count > max_shard_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size, total = size + count, total + count
    if len(files) == 1:
        write_file(path / SINGLE, files[0])
        return
    places: dict[str, str] = {}
    for i, file in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_file(path / name, file)
        places |= {tensor[0]: name for tensor in file}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of a tensor in a file."""
    return prod(shape) * dtype.itemsize


def listed(names: list[str], most: int = 8) -> str:
    """Names on one line, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
