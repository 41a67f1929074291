"""Tensors of torch's pickled files (`pytorch_model.bin`), without torch and without running what they name.

    tensors = open_directory(path)    # only where a user asks: `load(..., unsafe_format="pickle")`

A pickle is a program. What `torch.save` writes (since 1.6) is a zip archive: `*/data.pkl` builds a dictionary
of tensors, `*/data/KEY` are the bytes of each storage, not compressed (torch/serialization.py and _utils.py).
Here the program is first read opcode by opcode and may have only those that build such a dictionary; then it
is run by an unpickler to which every name but the rebuilders of tensors, the types of storages and an
OrderedDict is an error. These names stand for functions of this file: nothing is imported. A tensor is a view
of the mapped file.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from checkpoints_convert.json_fields import COUNT, list_of
from checkpoints_convert.tensor_files import open_indexed
from jaxllm.storage.metadata import excerpt, one_line

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BINPERSID", "BUILD"),
}


# What the program handles: tuples, of which it can change nothing (BUILD would call `__setstate__`).


class Storage(NamedTuple):
    """The numbers of one or more tensors, in one row."""

    values: np.ndarray


class Tensor(NamedTuple):
    """A view of a storage."""

    view: np.ndarray


class Numbers(NamedTuple):
    """What a storage holds."""

    dtype: np.dtype


class Rebuilder(NamedTuple):
    """What the program may call."""

    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class Names(dict):
    """Stands for OrderedDict; what else torch hangs on it (`_metadata`) is dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


def open_directory(path: Path) -> dict[str, np.ndarray]:
    """Each tensor of a directory's `pytorch_model.bin`, else of the files that its index names."""
    if (path / SINGLE).is_file():
        return open_file(path / SINGLE)
    if (path / INDEX).is_file():
        return open_indexed(path, INDEX, open_file)
    raise FileNotFoundError(f"huggingface.load: no {SINGLE} or {INDEX} in {str(path)!r}")


def open_file(path: Path) -> dict[str, np.ndarray]:
    """Each tensor of a file as a view of the mapped file.

    Raises ValueError, in one line, for another format, a name that is no tensor's, or sizes out of bounds.
    """
    try:
        program, storages = _entries(path)
        tensors = _Unpickler(program, storages).load()
    except (Refused, OSError):
        raise
    except Exception as error:  # whatever a broken archive or a broken program makes zipfile and pickle raise
        raise Refused(f"pickle: {path.name} must be what torch.save writes, got {one_line(error)}") from error
    if not isinstance(tensors, dict):
        raise Refused(f"pickle: {path.name} must hold a dictionary of tensors, got {type(tensors).__name__}")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise Refused(f"pickle: {path.name} must hold tensors by name, got {kind} at {excerpt(name)}")
    return {name: value.view for name, value in tensors.items()}


class Refused(ValueError):
    """A file that is not read, with the line that says why."""


def _entries(path: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """The program of an archive, and the bytes of each storage by its key."""
    if not zipfile.is_zipfile(path):
        raise Refused(f"pickle: {path.name} must be a zip archive, as torch writes since version 1.6")
    mapped = np.memmap(path, np.uint8, "r")
    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            at = entry.header_offset
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise Refused(f"pickle: entries of {path.name} must be plain bytes, got {entry.filename}")
            names, extra = struct.unpack("<HH", mapped[at + 26 : at + 30].tobytes())
            start = at + 30 + names + extra
            if start + entry.file_size > mapped.size or entry.filename in found:
                raise Refused(
                    f"pickle: {path.name} must have each entry once and whole, got {entry.filename}"
                )
            found[entry.filename] = mapped[start : start + entry.file_size]
    programs = [name for name in found if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise Refused(f"pickle: {path.name} must have one data.pkl, got {len(programs)}")
    folder = programs[0].removesuffix("data.pkl")
    order = found.get(folder + "byteorder")
    if order is not None and order.tobytes() != b"little":
        raise Refused(f"pickle: numbers of {path.name} must be little-endian, got {excerpt(order.tobytes())}")
    program = found[programs[0]].tobytes()
    _check_program(program)
    data = folder + "data/"
    return program, {name.removeprefix(data): x for name, x in found.items() if name.startswith(data)}


def _check_program(program: bytes) -> None:
    """Raises Refused for an opcode that no dictionary of tensors needs, or a memo larger than the program."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in OPCODES:
            raise Refused(f"pickle: a dictionary of tensors has no opcode {opcode.name}")
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(program):
            raise Refused(f"pickle: places of the memo must be fewer than bytes, got {argument}")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage, once it is known to lie in it."""
    sizes = list_of(COUNT).holds([offset, *shape, *strides])
    if not isinstance(storage, Storage) or not sizes or len(shape) != len(strides):
        raise Refused(
            f"pickle: a tensor must be a storage, an offset, a shape, strides, got {excerpt(shape)}"
        )
    values, elements = storage.values, math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if elements else 0
    if last >= values.size and elements or elements > values.size:
        raise Refused(
            f"pickle: a tensor must lie in its storage of {values.size} numbers, "
            f"got {offset=}, shape={excerpt(shape)}, strides={excerpt(strides)}"
        )
    if not elements:
        return Tensor(np.empty(shape, values.dtype))
    steps = [step * values.itemsize for step in strides]
    return Tensor(np.ndarray(shape, values.dtype, values, offset * values.itemsize, steps))


def _parameter(tensor: Any, *_: Any) -> Any:
    """`torch._utils._rebuild_parameter`: what it wraps."""
    return tensor


KINDS = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
GLOBALS: dict[str, Rebuilder | Numbers] = {
    "collections.OrderedDict": Rebuilder(Names),
    "torch._utils._rebuild_tensor_v2": Rebuilder(_tensor),
    "torch._utils._rebuild_parameter": Rebuilder(_parameter),
    **{f"torch.{name}": Numbers(dtype) for name, dtype in KINDS.items()},
}


class _Unpickler(pickle.Unpickler):
    """Runs a program that was checked; it can reach `GLOBALS` and the storages of its archive."""

    def __init__(self, program: bytes, storages: dict[str, np.ndarray]):
        super().__init__(io.BytesIO(program))
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in GLOBALS:
            raise Refused(f"pickle: a file may name tensors and nothing else, got {excerpt(full)}")
        return GLOBALS[full]

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise Refused(f"pickle: what lies outside must be a storage, got {excerpt(pid)}")
        _, kind, key, _, count = pid
        if not isinstance(kind, Numbers) or not isinstance(key, str) or key not in self.storages:
            raise Refused(f"pickle: a storage must be of a type and in the archive, got {excerpt(pid)}")
        stored, dtype = self.storages[key], kind.dtype
        if type(count) is not int or count < 0 or count * dtype.itemsize > stored.size:
            raise Refused(
                f"pickle: storage {excerpt(key)} must have {excerpt(count)} numbers, got {stored.size} bytes"
            )
        return Storage(stored[: count * dtype.itemsize].view(dtype))
