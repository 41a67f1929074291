"""One change of one file of a sample: of its bytes, or of what they say."""

import io
import json
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.gguf.container import Header, read_header

TWIN = "a name that stands twice"  # stands for another key in JSON that says one twice
DEEP: Any = 0
for _ in range(400):
    DEEP = [DEEP]
HOSTILE = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**18, 10**400, 0.5, -0.0, 1e308,
    "", "x", "\n", "\ud800", "../x", "0" * 5000, "float32", "F8_E4M3", "F4", "U8", [], {}, [[]], [-1],
    [0, 1 << 62], {"type": "array"}, DEEP,
)  # fmt: skip


def mutate(rng: np.random.Generator, file: Path) -> str:
    """Changes a file; says how. The same for the same state of `rng`."""
    data = file.read_bytes()
    how = ["bytes"]
    if file.suffix == ".safetensors":
        how += ["header"] * 3
    elif file.suffix == ".json" or data[:1] in (b"{", b"["):
        how += ["json"] * 3
    elif file.suffix == ".npz":
        how += ["arrays"] * 3
    elif file.suffix == ".bin":
        how += ["words"] * 3
    elif file.suffix == ".gguf":
        how += ["fields"] * 3
    chosen = how[rng.integers(len(how))]
    changes = {"bytes": _bytes, "header": _header, "json": _json, "arrays": _arrays, "words": _words}
    changed = (changes | {"fields": _fields})[chosen](rng, data)
    if changed is None:
        file.unlink()
        return f"{file.name}: removed"
    file.write_bytes(changed)
    return f"{file.name}: {chosen}"


def _bytes(rng: np.random.Generator, data: bytes) -> bytes | None:
    """A bit turned, a part lost, doubled, zeroed or drawn; None: the file removed."""
    raw = bytearray(data)
    at = int(rng.integers(len(raw) + 1))
    end = min(len(raw), at + int(rng.integers(1, 64)))
    match int(rng.integers(8)):
        case 0 | 1 | 2 if raw:
            raw[min(at, len(raw) - 1)] ^= 1 << int(rng.integers(8))
        case 3:
            del raw[at:]
        case 4:
            del raw[at:end]
        case 5:
            raw[at:at] = raw[at:end]
        case 6:
            raw[at:end] = bytes(end - at) if rng.integers(2) else rng.bytes(end - at)
        case _:
            return None if rng.integers(4) == 0 else bytes(raw) + rng.bytes(int(rng.integers(1, 40)))
    return bytes(raw)


def _words(rng: np.random.Generator, data: bytes) -> bytes:
    """One of the first words of 32 bits is another."""
    raw = bytearray(data)
    values = (0, 1, -1, 2, 3, 7, 255, 1 << 16, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, -(1 << 31))
    word = values[rng.integers(len(values))]
    struct.pack_into("<i", raw, 4 * int(rng.integers(min(12, len(raw) // 4))), word)
    return bytes(raw)


class Recorder(Header):
    """Notes where each field of a GGUF header lies: its length, kind, number or text."""

    def __init__(self, data: bytes):
        super().__init__("sample", np.frombuffer(data, np.uint8))
        self.fields: list[tuple[int, int]] = []

    def take(self, num_bytes: int) -> memoryview:
        self.fields.append((self.at, num_bytes))
        return super().take(num_bytes)


def _fields(rng: np.random.Generator, data: bytes) -> bytes:
    """One field of a GGUF header is another, missing, or there twice."""
    head, raw = Recorder(data), bytearray(data)
    read_header(head)
    # most of the tokens' fields are alike: the others count as much as they do
    usual = [field for field in head.fields if field[1] != 8 or rng.integers(8) == 0] + head.fields[:120]
    at, size = usual[rng.integers(len(usual))]
    end = at + size
    match int(rng.integers(6)):
        case 0:
            del raw[at:end]
        case 1:
            raw[at:at] = raw[at:end]
        case 2:
            raw[at:end] = rng.bytes(size)
        case 3:
            other, width = usual[rng.integers(len(usual))]
            raw[at:end] = data[other : other + width]
        case _:
            value = (0, 1, 2, 3, 7, 9, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)[
                rng.integers(12)
            ]
            raw[at:end] = (value % (1 << 8 * size)).to_bytes(size, "little") if size in (1, 4, 8) else b""
    return bytes(raw)


def _header(rng: np.random.Generator, data: bytes) -> bytes:
    """The JSON header of a safetensors file, and mostly its length with it."""
    (length,) = struct.unpack("<Q", data[:8])
    text = _json(rng, data[8 : 8 + length])
    lengths = [len(text)] * 8 + [0, len(text) - 1, len(text) + 1, len(data), 1 << 62, (1 << 64) - 1]
    return struct.pack("<Q", lengths[rng.integers(len(lengths))]) + text + data[8 + length :]


def _json(rng: np.random.Generator, text: bytes) -> bytes:
    """One value or name in JSON is another, missing, or there twice."""
    whole = json.loads(text)
    places = list(_places(whole))
    if not places:
        return json.dumps(HOSTILE[rng.integers(len(HOSTILE))]).encode()
    parent, key = places[rng.integers(len(places))]
    value = parent[key]
    match int(rng.integers(8)):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[TWIN] = value if rng.integers(2) else HOSTILE[rng.integers(len(HOSTILE))]
            return json.dumps(whole).replace(json.dumps(TWIN), json.dumps(key)).encode()
        case 2 if isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        case 3:
            other, at = places[rng.integers(len(places))]
            parent[key] = json.loads(json.dumps(other[at]))
        case 4 | 5 if type(value) is int:
            parent[key] = value + int(rng.choice([-1, 1, 1 << 31, -(1 << 40)]))
        case _:
            parent[key] = HOSTILE[rng.integers(len(HOSTILE))]
    return json.dumps(whole).encode()


def _places(value: Any):
    """Every (object or list, key or index) in JSON."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from _places(value[key])


def _arrays(rng: np.random.Generator, data: bytes) -> bytes:
    """An .npz file written anew, one of its arrays changed, lost, there twice or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at, kind = int(rng.integers(len(members))), zipfile.ZIP_STORED
    name, content = members[at]
    match int(rng.integers(6)):
        case 0:
            del members[at]
        case 1:
            members.append((name, content))
        case 2:
            kind = zipfile.ZIP_DEFLATED
        case 3 | 4:
            sizes = (b"(1000000000000,)", b"(-1,)", b"(2, 9223372036854775807)", b"()", b"(0,)", b"('x',)")
            start = content.index(b"'shape': ") + 9
            end = content.index(b")", start) + 1
            new = sizes[rng.integers(len(sizes))]
            new = new if rng.integers(3) else content[start:end].replace(b"(", b"(1, ", 1)
            head = len(content[:10]) + struct.unpack("<H", content[8:10])[0]
            text = content[10:start] + new + content[end:head]
            members[at] = (name, content[:8] + struct.pack("<H", len(text)) + text + content[head:])
        case _:
            members[at] = (name, _bytes(rng, content) or b"")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return out.getvalue()
