"""Our weights as tensors of a GGUF file: which type holds each bit for bit, if any does."""

from typing import Any

import jax
import numpy as np

from checkpoints_convert.families.family import Tensor
from checkpoints_convert.gguf import blocks
from checkpoints_convert.gguf.architectures import Architecture, rows_in_order
from checkpoints_convert.gguf.blocks import TYPES
from checkpoints_convert.gguf.container import FLOATS, Entry
from jaxllm.weights.affine import Affine, scales, zero_points
from jaxllm.weights.block_affine import BlockAffine

GRIDS = ("Q4_0", "Q5_0", "Q8_0")  # scale * (code - middle) in blocks of 32, the smallest first
FITS = "Rtn(bits=4, group_size=32, symmetric=True) fits Q4_0, with bits=8 Q8_0"


def entry_of(arch: Architecture, config: Any, tensor: Tensor, weights: dict[str, Any]) -> Entry:
    """How a tensor of the file is written; several of our weights may be stacked in it."""
    parts = {name: weights[name] for name in tensor.ours}
    kinds = {_kind(name, part) for name, part in parts.items()}
    if kinds <= set(FLOATS):
        return _plain(arch, config, tensor.theirs, parts)
    if kinds <= set(GRIDS):
        kinds = {max(kinds, key=GRIDS.index)}
    if len(kinds) > 1:
        raise ValueError(
            f"gguf.save: weights that share a tensor must fit one type, got {', '.join(sorted(kinds))} "
            f"in {tensor.theirs}"
        )
    kind = TYPES[kinds.pop()]
    K, N = next(iter(parts.values())).shape[0], sum(part.shape[1] for part in parts.values())

    def read() -> np.ndarray:
        rows = []
        for name, part in parts.items():
            made = blocks.write(
                kind, blocks.parts_of(part, kind) if kind.name not in GRIDS else _grid(part, kind)
            )
            rows.append(rows_in_order(arch, config, name, made, to_file=True))
        return np.concatenate(rows)

    return Entry(tensor.theirs, kind.name, (N, K), N * K // kind.size * kind.num_bytes, read)


def _plain(arch: Architecture, config: Any, theirs: str, parts: dict[str, jax.Array | np.ndarray]) -> Entry:
    """Plain weights in their own type; what is no matrix, and positions, in float32 as llama.cpp demands."""
    first = next(iter(parts.values()))
    small = first.ndim == 1 or "positions.table" in parts
    dtype = np.dtype(np.float32) if small else np.dtype(first.dtype)
    shape = (sum(len(part) for part in parts.values()), *first.shape[1:])
    kind = next(name for name, one in FLOATS.items() if one == dtype)

    def read() -> np.ndarray:
        rows = [rows_in_order(arch, config, name, np.asarray(p), to_file=True) for name, p in parts.items()]
        value = np.concatenate(rows).astype(dtype)
        return value + np.float32(arch.norm_offset) if theirs.endswith("norm.weight") else value

    return Entry(theirs, kind, shape, int(np.prod(shape)) * dtype.itemsize, read)


def _kind(name: str, w: Any) -> str:
    """The type that holds a weight; ValueError, with what fits, where none does."""
    match w:
        case jax.Array() | np.ndarray() if np.dtype(w.dtype) in FLOATS.values():
            return next(kind for kind, dtype in FLOATS.items() if dtype == w.dtype)
        case BlockAffine() if (kind := blocks.block_type_of(w)) is not None:
            return kind.name
        case Affine():
            return _grid_type(name, w)
    raise ValueError(f"gguf.save: no block type holds {type(w).__name__} at {name} bit for bit: {FITS}")


def _grid_type(name: str, w: Affine) -> str:
    """The smallest of `GRIDS` that holds a weight."""
    K, size = w.shape[0], w.group_size
    if K % 32 or (size % 32 and size != K):
        raise ValueError(
            f"gguf.save: blocks are of 32 inputs, so group_size must be a multiple of 32 at {name}, got "
            f"group_size={size}, {K=}: {FITS}"
        )
    scale, zero_point = np.asarray(scales(w)), np.asarray(zero_points(w))
    if (scale.astype(np.float16).astype(np.float32) != scale).any():
        raise ValueError(f"gguf.save: scales must be float16 at {name}, got others: {FITS}")
    if (zero_point != np.round(zero_point)).any():
        raise ValueError(
            f"gguf.save: zero points must be whole at {name} (integer_zero_point=True or symmetric=True), "
            f"got fractions: {FITS}"
        )
    values = _values(w)
    low, high = int(values.min()), int(values.max())
    for kind in GRIDS:
        middle = 2 ** (TYPES[kind].bits - 1)
        if TYPES[kind].bits >= w.codes.bits and -middle <= low and high < middle:
            return kind
    raise ValueError(
        f"gguf.save: codes less their zero points must be -128 to 127 at {name}, got {low} to {high}: {FITS}"
    )


def _values(w: Affine) -> np.ndarray:
    """Codes less their zero points, int16 [N, K]."""
    K = w.shape[0]
    zero_point = np.repeat(np.asarray(zero_points(w)).T.astype(np.int16), w.group_size, axis=1)[:, :K]
    return blocks.unpacked(w.codes).astype(np.int16) - zero_point


def _grid(w: Affine, kind: blocks.BlockType) -> dict[str, np.ndarray]:
    """What `blocks.write` wants of a weight that `_grid_type` found to fit."""
    by_group = np.asarray(scales(w)).T.astype(np.float16)
    at = np.arange(0, w.shape[0], kind.size) // w.group_size  # the group of each block
    return {"codes": (_values(w) + 2 ** (kind.bits - 1)).astype(np.uint8), "scale": by_group[:, at]}
