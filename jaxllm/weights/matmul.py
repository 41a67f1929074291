"""The one function that multiplies by a stored weight, whatever its format, and what formats exist.

A weight is a `jax.Array` [K, N] or one of the frozen pytrees in `FORMATS`; what each has, `Weight` says.
`Experts` are several weights as one: `models/grouped.py` multiplies by them.
Adding a format is one file and one entry of `FORMATS`; one that multiplies in a way of its own gets a `case`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.ops.packing import Packed
from jaxllm.weights import (
    affine,
    codebook,
    host_residual,
    mixed_columns,
    nested_float,
    permuted,
    rotated,
    scaled,
)
from jaxllm.weights.affine import Affine
from jaxllm.weights.block_affine import BlockAffine
from jaxllm.weights.codebook import Codebook
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import Experts
from jaxllm.weights.host_residual import HostResidual
from jaxllm.weights.mixed_columns import MixedColumns
from jaxllm.weights.nested_float import NestedFloat
from jaxllm.weights.permuted import Permuted
from jaxllm.weights.planes import adaptive_planes, bit_planes, dense_widths
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes, ChosenPlanes
from jaxllm.weights.planes.bit_planes import BitPlanes
from jaxllm.weights.planes.dense_widths import BlendedWidths
from jaxllm.weights.rotated import Rotated
from jaxllm.weights.scaled import Scaled
from jaxllm.weights.sparse import DenseAndSparse
from jaxllm.weights.weight import RowWeight, Weight
from pallas_kernels.dot import depend_on, dot

AnyWeight = jax.Array | Weight
Passing = ChosenPlanes | BlendedWidths  # made on the way, never stored

# Closed on purpose: what a saved file may name. A name is looked up here and never imported.
FORMATS: tuple[type, ...] = (
    Dense, Affine, Codebook, BitPlanes, Scaled, MixedColumns, NestedFloat, HostResidual, Permuted,
    Rotated, BlockAffine, DenseAndSparse, AdaptivePlanes, Experts,
)  # fmt: skip
PARTS: tuple[type, ...] = (Packed,)  # of which formats are made


def matmul(x: Float[Array, "*B K"], w: AnyWeight | Passing, out_dtype=None) -> Float[Array, "*B N"]:
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
        case Affine():
            y = affine.matmul(x, w)
        case Codebook():
            y = codebook.matmul(x, w)
        case BitPlanes():
            y = bit_planes.matmul(x, w)
        case AdaptivePlanes() | ChosenPlanes():
            y = adaptive_planes.matmul(x, w)
        case BlendedWidths():
            y = dense_widths.blend(x, w)
        case BlockAffine() | DenseAndSparse():
            y = dot(x, depend_on(x, w).dequantize_rows(x.dtype))
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
                y = rotated.whole_product(turned, depend_on(x, w.base))
            else:  # whole codes of 8 bits are exact in any type of x
                y = matmul(turned.astype(x.dtype), w.base, jnp.float32)
            y = y if step is None else y * step
        case Permuted():
            y = matmul(permuted.gather(x, w), w.weight, jnp.float32)
        case _:
            raise TypeError(f"matmul: no rule for a weight of type {type(w).__name__}")
    return y.astype(out_dtype)


def can_gather_rows(w: AnyWeight) -> bool:
    """Whether each of the weight's rows lies by itself, so that `gather_rows` can read it."""
    return isinstance(w, RowWeight) and w.can_gather_rows


def gather_rows(w: AnyWeight, index: Int[Array, "*B"]) -> Float[Array, "*B K"]:
    """Rows of the weight [N, K], of which only what is asked for is read; in the weight's type.

    Raises TypeError for a format whose rows cannot be read alone (`can_gather_rows`).
    """
    if not isinstance(w, RowWeight) or not w.can_gather_rows:
        raise TypeError(f"gather_rows: rows of {type(w).__name__} cannot be read alone")
    return w.gather_rows(index.reshape(-1)).dequantize_rows(w.dtype).reshape(*index.shape, -1)


def dequantize(w: AnyWeight) -> Float[Array, "K N"]:
    """The weight as one array of the type it was quantized from."""
    if isinstance(w, jax.Array):
        return w
    return w.dequantize_rows(w.dtype).T


def num_bytes(w: AnyWeight) -> int:
    """Bytes of everything stored: codes, scales, tables, indices, padding."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(w))


def bits_per_weight(w: AnyWeight) -> float:
    """Stored bits over K x N."""
    return 8 * num_bytes(w) / math.prod(w.shape)
