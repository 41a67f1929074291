"""The one function that multiplies by a stored weight, whatever its format, and what formats exist.

A weight is a `jax.Array` [K, N] or one of the frozen pytrees in `FORMATS`. A format has `shape` (K, N) and
`dtype`, `as_rows(dtype)` (the weight [N, K] as numbers), and `specs(spec)` (where its leaves go on a mesh).
Adding a format is one file and one entry of `FORMATS`; one that multiplies in a way of its own gets a `case`.
"""

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxllm.ops.dot import after, dot
from jaxllm.ops.packing import Packed, unpack_at
from jaxllm.weights import host_residual, mixed_columns, nested_float, permuted, rotated, scaled
from jaxllm.weights.affine import Affine
from jaxllm.weights.bit_planes import BitPlanes
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.dense import Dense
from jaxllm.weights.host_residual import HostResidual
from jaxllm.weights.mixed_columns import MixedColumns
from jaxllm.weights.nested_float import NestedFloat
from jaxllm.weights.permuted import Permuted
from jaxllm.weights.rotated import Rotated
from jaxllm.weights.scaled import Scaled

Weight = (
    jax.Array
    | Dense
    | Affine
    | Codebook
    | BitPlanes
    | Scaled
    | MixedColumns
    | NestedFloat
    | HostResidual
    | Permuted
    | Rotated
)

# Closed on purpose: what a saved file may name. A name is looked up here and never imported.
FORMATS: tuple[type, ...] = (
    Dense, Affine, Codebook, BitPlanes, Scaled, MixedColumns, NestedFloat, HostResidual, Permuted,
    Rotated,
)  # fmt: skip
PARTS: tuple[type, ...] = (Packed,)  # of which formats are made


def matmul(x: Float[Array, "*B K"], w: Weight, out_dtype=None) -> Float[Array, "*B N"]:
    """`x @ w`, accumulated in float32 and returned in `out_dtype` (that of `x` if None).

    Raises TypeError for a weight of an unknown format, ValueError when the inner sizes differ.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x needs w's K as last axis, got {x.shape=}, {w.shape=}")
    match w:
        case jax.Array():  # tracers match too
            y = dot(x, w, 0)
        case Dense(rows):
            y = dot(x, rows)
        case Affine() | Codebook() | BitPlanes():
            y = dot(x, after(x, w).as_rows(x.dtype))
        case Scaled():
            y = scaled.matmul(x, w)
        case MixedColumns():
            y = mixed_columns.matmul(x, w)
        case NestedFloat():
            y = nested_float.matmul(x, w)
        case HostResidual():
            y = matmul(x, w.base, jnp.float32)
            if host_residual.selected(w.shape[0], w.k_chunk):
                y = y + host_residual.compensation(x, w)
        case Rotated():
            turned, step = rotated.activations(x, w)
            if rotated.is_whole(w):
                y = rotated.whole_product(turned, after(x, w.base))
            else:  # whole codes of 8 bits are exact in any type of x
                y = matmul(turned.astype(x.dtype), w.base, jnp.float32)
            y = y if step is None else y * step
        case Permuted():
            y = matmul(permuted.gather(x, w), w.weight, jnp.float32)
        case _:
            raise TypeError(f"matmul: no rule for a weight of type {type(w).__name__}")
    return y.astype(out_dtype)


def take(w: Weight, index: Int[Array, "*B"]) -> Float[Array, "*B K"]:
    """Rows of the weight [N, K], of which only what is asked for is read; in the weight's type.

    Raises TypeError for a format whose rows cannot be read alone (`has_rows`).
    """
    if not has_rows(w):
        raise TypeError(f"take: rows of {type(w).__name__} cannot be read alone")
    if isinstance(w, Dense):
        return _gather(w.rows, index, 0)
    some, flat = cast(Any, w), index.reshape(-1)
    zero = some.zero if isinstance(w, Affine) else None
    if isinstance(zero, Packed):  # across rows
        some = dataclasses.replace(some, zero=None)
    leaves, tree = jax.tree.flatten(some)
    places = jax.tree.leaves(some.specs(P(None, "N")), is_leaf=lambda x: isinstance(x, P))
    read = [
        _gather(x, flat, tuple(place).index("N")) if "N" in place else x
        for x, place in zip(leaves, places, strict=True)
    ]
    some = jax.tree.unflatten(tree, read)
    if any(field.name == "shape" for field in dataclasses.fields(some)):
        some = dataclasses.replace(some, shape=(w.shape[0], flat.size))
    if isinstance(zero, Packed):
        some = dataclasses.replace(some, zero=unpack_at(zero, flat).astype(jnp.float16))
    return some.as_rows(w.dtype).reshape(*index.shape, -1)


def has_rows(w: Weight) -> bool:
    """Whether each of the weight's rows lies by itself, so that `take` can read it."""
    match w:
        case Affine(scale=Affine()):  # scales are coded across rows
            return False
        case Dense() | Affine() | Codebook() | BitPlanes() | NestedFloat():
            return True
        case _:
            return False


def _gather(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    before = (slice(None),) * axis
    if x.dtype.itemsize != 2:
        return x[*before, index]
    # subtle: XLA:CPU gathers 16-bit floats by first turning all of them into float32, and would take even
    # their bits out of a decoding loop as a copy
    x, index = jax.lax.optimization_barrier((x, index))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint16)[*before, index], x.dtype)


def dequantize(w: Weight) -> Float[Array, "K N"]:
    """The weight as one array of the type it was quantized from."""
    if isinstance(w, jax.Array):
        return w
    return w.as_rows(w.dtype).T


def num_bytes(w: Weight) -> int:
    """Bytes of everything stored: codes, scales, tables, indices, padding."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(w))


def bits_per_weight(w: Weight) -> float:
    """Stored bits over K x N."""
    return 8 * num_bytes(w) / math.prod(w.shape)
