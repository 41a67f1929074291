"""ggml's block types as tables of fields, read into our weights and written back bit for bit.

A row of a quantized tensor is cut into blocks of 32 or 256 weights, each the same number of bytes. What the
bytes mean (ggml's ggml-quants.c; the package's `gguf.quants` dequantizes the same) is a list of fields here:
float16 numbers, and codes of 1, 2, 4 or 8 bits. A field of p bits lies in runs of `run` bytes: first the
lowest p bits of each byte of a run, then the next p bits of each. Wider codes are several fields.

    Q8_0, Q5_0, Q4_0          scale * (code - middle), blocks of 32         `Affine`, symmetric
    Q4_1, Q5_1                scale * code + offset, blocks of 32           `BlockAffine`
    Q2_K, Q4_K, Q5_K          blocks of 256, scales and offsets in codes    `BlockAffine`
    Q3_K, Q6_K                blocks of 256, scales in codes, no offset     `BlockAffine`
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.quantized.words import on_host, pack
from jaxllm.ops import packing
from jaxllm.ops.packing import Packed
from jaxllm.weights.affine import Affine
from jaxllm.weights.block_affine import BlockAffine

HALF = np.dtype("<f2")


@dataclasses.dataclass(frozen=True)
class Field:
    """Bytes of a block: a float16 (bits 16), or `bits` bits from bit `low` up of each code of one kind."""

    of: str  # "scale", "offset": float16; "codes", "scale_codes", "offset_codes"
    num_bytes: int
    bits: int = 16
    low: int = 0
    run: int = 1


SCALE, OFFSET = Field("scale", 2), Field("offset", 2)
NIBBLES_32, NIBBLES_256 = Field("codes", 16, 4, 0, 16), Field("codes", 128, 4, 0, 32)
SIX_BITS = Field("six", 12)  # eight scales and eight offsets of 6 bits, interleaved (`_six_apart`)


@dataclasses.dataclass(frozen=True)
class BlockType:
    """One of ggml's types: how many weights a block has, of how many bits, and its fields in order.

    negative: the offset is subtracted in the files. signed: codes are signed bytes there.
    """

    name: str
    size: int
    bits: int
    fields: tuple[Field, ...]
    groups: int = 1  # a block
    scale_bits: int = 0
    negative: bool = False
    signed: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of a block."""
        return sum(field.num_bytes for field in self.fields)

    @property
    def has_offset(self) -> bool:
        return any(field.of in ("offset", "six") for field in self.fields)


TYPES = {
    one.name: one
    for one in (
        BlockType("Q4_0", 32, 4, (SCALE, NIBBLES_32)),
        BlockType("Q4_1", 32, 4, (SCALE, OFFSET, NIBBLES_32)),
        BlockType("Q5_0", 32, 5, (SCALE, Field("codes", 4, 1, 4), NIBBLES_32)),
        BlockType("Q5_1", 32, 5, (SCALE, OFFSET, Field("codes", 4, 1, 4), NIBBLES_32)),
        BlockType("Q8_0", 32, 8, (SCALE, Field("codes", 32, 8)), signed=("codes",)),
        BlockType(
            "Q2_K", 256, 2,
            (Field("both", 16, 4, 0, 16), Field("codes", 64, 2, 0, 32), SCALE, OFFSET),
            groups=16, scale_bits=4, negative=True,
        ),
        BlockType(
            "Q3_K", 256, 3,
            (
                Field("codes", 32, 1, 2, 32), Field("codes", 64, 2, 0, 32),
                Field("scale_codes", 8, 4, 0, 8), Field("scale_codes", 4, 2, 4, 4), SCALE,
            ),
            groups=16, scale_bits=6,
        ),
        BlockType(
            "Q4_K", 256, 4, (SCALE, OFFSET, SIX_BITS, NIBBLES_256), groups=8, scale_bits=6, negative=True
        ),
        BlockType(
            "Q5_K", 256, 5, (SCALE, OFFSET, SIX_BITS, Field("codes", 32, 1, 4, 32), NIBBLES_256),
            groups=8, scale_bits=6, negative=True,
        ),
        BlockType(
            "Q6_K", 256, 6,
            (
                Field("codes", 128, 4, 0, 64), Field("codes", 64, 2, 4, 32),
                Field("scale_codes", 16, 8), SCALE,
            ),
            groups=16, scale_bits=8, signed=("scale_codes",),
        ),
    )
}  # fmt: skip


def read(kind: BlockType, data: np.ndarray, dtype) -> Affine | BlockAffine:
    """The weight of rows of blocks uint8 [N, bytes], in host memory. dtype: what it stands for."""
    N, S = data.shape[0], data.shape[1] // kind.num_bytes
    K = S * kind.size
    found = _take_apart(kind, data.reshape(N * S, kind.num_bytes))
    by_block = {name: found[name].reshape(N, S).T for name in ("scale", "offset") if name in found}
    codes = {
        name: pack(value.reshape(N, -1), bits)
        for name, bits in (
            ("codes", kind.bits),
            ("scale_codes", kind.scale_bits),
            ("offset_codes", kind.scale_bits),
        )
        if (value := found.get(name)) is not None
    }
    common = {"group_size": kind.size // kind.groups, "shape": (K, N), "dtype": np.dtype(dtype)}
    if not kind.has_offset and not kind.scale_bits:
        return on_host(Affine, codes=codes["codes"], scale=by_block["scale"], zero_point=None, **common)
    offset = by_block.get("offset")
    return on_host(
        BlockAffine,
        codes=codes["codes"],
        scale=by_block["scale"],
        scale_codes=codes.get("scale_codes"),
        offset=-offset if kind.negative and offset is not None else offset,
        offset_codes=codes.get("offset_codes"),
        groups_per_block=kind.groups,
        **common,
    )


def write(kind: BlockType, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Rows of blocks uint8 [N, bytes] of codes [N, ...] and float16 [N, S] by the names of fields."""
    N, K = parts["codes"].shape
    S = K // kind.size
    flat = {name: np.ascontiguousarray(value).reshape(N * S, -1) for name, value in parts.items()}
    return _put_together(kind, flat).reshape(N, S * kind.num_bytes)


def block_type_of(w: BlockAffine) -> BlockType | None:
    """The type that holds just such a weight; None where none does."""
    scale_bits = 0 if w.scale_codes is None else w.scale_codes.bits
    for kind in TYPES.values():
        if (
            (kind.bits, kind.groups, kind.scale_bits) == (w.codes.bits, w.groups_per_block, scale_bits)
            and kind.size == w.group_size * w.groups_per_block
            and kind.has_offset == (w.offset is not None)
        ):
            return kind
    return None


def parts_of(w: BlockAffine, kind: BlockType) -> dict[str, np.ndarray]:
    """What `write` wants of a weight that `read` made."""
    parts = {"codes": unpacked(w.codes), "scale": np.asarray(w.scale).T}
    if w.offset is not None:
        parts["offset"] = np.asarray(-w.offset if kind.negative else w.offset).T
    if w.scale_codes is not None:
        parts["scale_codes"] = unpacked(w.scale_codes)
    if w.offset_codes is not None:
        parts["offset_codes"] = unpacked(w.offset_codes)
    return parts


def unpacked(codes: Packed) -> np.ndarray:
    """Codes on the host."""
    return np.asarray(packing.unpack(jax.tree.map(jnp.asarray, codes)))


def _take_apart(kind: BlockType, blocks: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of blocks uint8 [n, bytes] by name: float16 [n], codes uint8 [n, ...]."""
    found: dict[str, Any] = {}
    at = 0
    for field in kind.fields:
        data = np.ascontiguousarray(blocks[:, at : at + field.num_bytes])
        at += field.num_bytes
        if field.of == "six":
            found["scale_codes"], found["offset_codes"] = _six_apart(data)
        elif field.bits == 16:
            found[field.of] = data.view(HALF)[:, 0]
        else:
            codes = _spread(data, field) << field.low
            found[field.of] = codes if field.of not in found else found[field.of] | codes
    if "both" in found:  # scales in the lower halves of bytes, offsets in the upper
        found["scale_codes"], found["offset_codes"] = np.split(found.pop("both"), 2, axis=1)
    for name in kind.signed:
        found[name] = found[name] ^ np.uint8(0x80)  # from -128 .. 127 to 0 .. 255
    return found


def _put_together(kind: BlockType, given: dict[str, np.ndarray]) -> np.ndarray:
    """What `_take_apart` was given."""
    given = given | {name: given[name] ^ np.uint8(0x80) for name in kind.signed}
    if any(field.of == "both" for field in kind.fields):
        given["both"] = np.concatenate([given["scale_codes"], given["offset_codes"]], axis=1)
    parts = []
    for field in kind.fields:
        if field.of == "six":
            parts.append(_six_together(given["scale_codes"], given["offset_codes"]))
        elif field.bits == 16:
            parts.append(given[field.of].astype(HALF).view(np.uint8))
        else:
            parts.append(_gathered((given[field.of] >> field.low) & (2**field.bits - 1), field))
    return np.concatenate(parts, axis=1)


def _shifts(field: Field) -> np.ndarray:
    return np.arange(0, 8, field.bits, dtype=np.uint8)[:, None]


def _spread(data: np.ndarray, field: Field) -> np.ndarray:
    """The codes [n, 8 / bits * bytes] of bytes [n, bytes]."""
    runs = data.reshape(len(data), -1, 1, field.run) >> _shifts(field)
    return (runs & np.uint8(2**field.bits - 1)).reshape(len(data), -1)


def _gathered(codes: np.ndarray, field: Field) -> np.ndarray:
    """The bytes of codes: the inverse of `_spread`."""
    runs = codes.reshape(len(codes), -1, 8 // field.bits, field.run) << _shifts(field)
    return np.bitwise_or.reduce(runs, axis=2).reshape(len(codes), -1)


def _six_apart(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets uint8 [n, 8] of 6 bits, of 12 bytes.

    Four bytes are the first scales, four the first offsets; the upper two bits of these are the upper two of
    the last scales and offsets, whose lower four are the halves of the last four bytes.
    """
    scales, offsets, lower = np.split(data, 3, axis=1)
    last_scales = (lower & 0x0F) | ((scales >> 2) & 0x30)
    last_offsets = (lower >> 4) | ((offsets >> 2) & 0x30)
    return np.hstack([scales & 0x3F, last_scales]), np.hstack([offsets & 0x3F, last_offsets])


def _six_together(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """What `_six_apart` was given."""
    upper = [half[:, :4] | ((half[:, 4:] & 0x30) << 2) for half in (scales, offsets)]
    return np.hstack([*upper, (scales[:, 4:] & 0x0F) | ((offsets[:, 4:] & 0x0F) << 4)])
