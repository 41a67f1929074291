"""GGUF files: what the header says, checked before anything is made of it, and tensors as views of the file.

    uint32 magic "GGUF", uint32 version, uint64 tensors, uint64 keys
    keys      string name, uint32 type, value
    tensors   string name, uint32 dimensions, uint64 each (innermost first), uint32 type, uint64 offset
    data      from the next multiple of `general.alignment` on, each tensor at such a multiple

All little-endian; a string is a uint64 length and UTF-8, an array a type, a uint64 count and its items
(github.com/ggml-org/ggml, docs/gguf.md). The package's own reader maps what it is told to without asking, and
makes several arrays of each token: so reading is ours, and writing, types and names are the package's.
"""

import dataclasses
import os
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints_convert.gguf.blocks import TYPES, BlockType
from jaxllm.storage.metadata import excerpt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
FLOATS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
}
ALIGNMENT, LARGEST_ALIGNMENT = 32, 1 << 20  # bytes: where a file does not say, and the most that one may
DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A quantized tensor of a file: rows of blocks uint8 [*rows, bytes] and the shape of its numbers."""

    kind: BlockType
    shape: tuple[int, ...]
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class File:
    """What a file holds: keys, and tensors by name."""

    name: str
    metadata: dict[str, Any]
    tensors: dict[str, np.ndarray | Blocks]


def open_file(path: Path) -> File:
    """A GGUF file; numbers are views of the mapped file, arrays of text lists.

    Raises ValueError in one line for a file that is cut off, of another format, or wrong in any field.
    """
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    head = Header(path.name, data)
    metadata, infos = read_header(head)
    return File(path.name, metadata, _tensors(path.name, data, head.at, metadata, infos))


def read_header(head: "Header") -> tuple[dict[str, Any], list["TensorInfo"]]:
    """The keys of a file, and what it says of its tensors."""
    if (magic := bytes(head.take(4))) != MAGIC:
        raise ValueError(f"gguf.load: {head.who} must begin with {MAGIC!r}, got {magic!r}")
    version = head.number("I")
    if version not in VERSIONS:
        raise ValueError(f"gguf.load: {head.who} must be of version 2 or 3, little-endian, got {version}")
    num_tensors, num_keys = head.count(24, "tensors"), head.count(13, "keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = head.text()
        if key in metadata:
            raise ValueError(f"gguf.load: a key must stand once in {head.who}, got {excerpt(key)} twice")
        metadata[key] = head.value(key)
    return metadata, [_info(head) for _ in range(num_tensors)]


class Header:
    """Walks through a file; nothing is read that the file has not."""

    def __init__(self, who: str, data: np.ndarray):
        self.who, self.data, self.at = who, memoryview(data), 0  # type: ignore[arg-type]

    def take(self, num_bytes: int) -> memoryview:
        """The next bytes."""
        if num_bytes > len(self.data) - self.at:
            raise ValueError(
                f"gguf.load: {self.who} is cut off in its header, got {len(self.data)} bytes, "
                f"{num_bytes} wanted at {self.at}"
            )
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def number(self, kind: str):
        """The next number, of a type in the letters of `struct`."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return value

    def count(self, least: int, what: str) -> int:
        """How many things of at least so many bytes follow."""
        n = self.number("Q")
        if n * least > len(self.data) - self.at:
            raise ValueError(
                f"gguf.load: {self.who} cannot have so many {what}, got {n} in {len(self.data)} bytes"
            )
        return n

    def text(self) -> str:
        at = self.at
        value = bytes(self.take(self.count(1, "letters")))
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"gguf.load: text of {self.who} must be UTF-8, got {excerpt(value)} at {at}"
            ) from error

    def value(self, key: str):
        """A value: a number, truth, text, or an array of one of them."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(kind, key)
        kind = self.number("I")
        if kind == STRING:
            return [self.text() for _ in range(self.count(8, "items"))]
        dtype = np.dtype(f"<{self.letter(kind, key)}")
        return np.frombuffer(self.take(self.count(dtype.itemsize, "items") * dtype.itemsize), dtype)

    def scalar(self, kind: int, key: str):
        value = self.number("B" if kind == BOOL else self.letter(kind, key))
        if kind == BOOL and value > 1:
            raise ValueError(f"gguf.load: {excerpt(key)} of {self.who} must be true or false, got {value}")
        return bool(value) if kind == BOOL else value

    def letter(self, kind: int, key: str) -> str:
        if kind not in SCALARS:  # arrays of arrays among them: nothing known has any
            raise ValueError(
                f"gguf.load: {excerpt(key)} of {self.who} must be a number, text, or an array of these, "
                f"got type {kind}"
            )
        return SCALARS[kind]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # outermost first
    kind: str
    offset: int


def _info(head: Header) -> TensorInfo:
    from gguf import GGMLQuantizationType

    name, dimensions = head.text(), head.number("I")
    if not 1 <= dimensions <= DIMENSIONS:
        raise ValueError(f"gguf.load: {excerpt(name)} must have 1 to 4 dimensions, got {dimensions}")
    shape = tuple(head.number("Q") for _ in range(dimensions))[::-1]
    if not all(shape) or prod(shape) >= 1 << 60:
        raise ValueError(f"gguf.load: {excerpt(name)} must have sizes above 0 that fit, got {list(shape)}")
    kind = head.number("I")
    told = {int(one): one.name for one in GGMLQuantizationType}.get(kind, f"type {kind}")
    if told not in TYPES and told not in FLOATS:
        raise ValueError(
            f"gguf.load: {excerpt(name)} must be of {', '.join((*FLOATS, *TYPES))}, got {told}: "
            "llama-quantize --allow-requantize writes one of these"
        )
    return TensorInfo(name, shape, told, head.number("Q"))


def _tensors(
    who: str, data: np.ndarray, at: int, metadata: dict[str, Any], infos: list[TensorInfo]
) -> dict[str, np.ndarray | Blocks]:
    """The tensors, which must follow one another, as llama.cpp demands: no overlap, no hole."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(
            f"gguf.load: general.alignment must be a power of two from 8 to {LARGEST_ALIGNMENT}, "
            f"got {excerpt(alignment)}"
        )
    start = end = _padded(at, alignment)
    tensors: dict[str, np.ndarray | Blocks] = {}
    for info in infos:
        if info.name in tensors:
            raise ValueError(f"gguf.load: a tensor must stand once in {who}, got {excerpt(info.name)} twice")
        place = start + info.offset
        if place != _padded(end, alignment):
            raise ValueError(
                f"gguf.load: tensors of {who} must follow one another, got {excerpt(info.name)} at "
                f"{info.offset} and not {_padded(end, alignment) - start}"
            )
        shape, itemsize = _stored(info)
        end = place + prod(shape) * itemsize
        if end > data.size:
            raise ValueError(
                f"gguf.load: {who} must have {end} bytes or more by its header, got {data.size}: cut off"
            )
        dtype = FLOATS.get(info.kind, np.dtype(np.uint8))
        value = np.ndarray(shape, dtype, buffer=data, offset=place)
        tensors[info.name] = value if info.kind in FLOATS else Blocks(TYPES[info.kind], info.shape, value)
    if data.size > _padded(end, alignment):
        raise ValueError(f"gguf.load: {who} must end with its last tensor at {end}, got {data.size} bytes")
    return tensors


def _stored(info: TensorInfo) -> tuple[tuple[int, ...], int]:
    """The shape of what a file holds of a tensor, and the bytes of an item."""
    if info.kind in FLOATS:
        return info.shape, FLOATS[info.kind].itemsize
    kind, K = TYPES[info.kind], info.shape[-1]
    if K % kind.size:
        raise ValueError(
            f"gguf.load: rows of {info.kind} must be multiples of {kind.size}, "
            f"got {excerpt(info.name)} of {K}"
        )
    return (*info.shape[:-1], K // kind.size * kind.num_bytes), 1


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written: numbers, or rows of blocks uint8, made when it is its turn."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the numbers
    num_bytes: int
    read: Callable[[], np.ndarray]


def write_file(path: Path, metadata: dict[str, Any], entries: list[Entry]) -> None:
    """Writes keys and tensors: whole numbers as uint32, fractions as float32, lists by their items."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    architecture = metadata["general.architecture"]
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue  # the writer's first key
        if isinstance(value, list):
            kind = GGUFValueType.INT32 if type(value[0]) is int else kinds[type(value[0])]
            writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    for one in entries:
        kind = GGMLQuantizationType[one.kind]
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:  # not by the writer, whose `tofile` does not say that a disk is full
        for one in entries:
            value = np.asarray(one.read(), order="C")
            assert value.nbytes == one.num_bytes, one.name
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.write(value.reshape(-1).view(np.uint8).data)
        file.write(bytes(-file.tell() % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
