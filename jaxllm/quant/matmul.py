"""The one function that multiplies by a stored weight, whatever its format, and what formats exist.

A weight is a `jax.Array` [K, N] or one of the frozen pytrees in `FORMATS`, whose logical shape is (K, N).
Adding a format is one file, one entry of `FORMATS` and one `case` below.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.quant.dense import Dense

Weight = jax.Array | Dense

# Closed on purpose: what a saved file may name. A name is looked up here and never imported.
FORMATS: tuple[type, ...] = (Dense,)


def matmul(x: Float[Array, "*B K"], w: Weight, out_dtype=None) -> Float[Array, "*B N"]:
    """`x @ w`, accumulated in float32 and returned in `out_dtype` (that of `x` if None).

    Raises TypeError for a weight of an unknown format, ValueError when the inner sizes differ.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x needs w's K as last axis, got {x.shape=}, {w.shape=}")
    match w:
        case jax.Array():  # tracers match too
            return _dot(x, w, 0, out_dtype)
        case Dense(rows):
            return _dot(x, rows, 1, out_dtype)
        case _:
            raise TypeError(f"matmul: no rule for a weight of type {type(w).__name__}")


def _dot(x, w, axis: int, out_dtype):
    """Contracts the last axis of `x` with `axis` of `w`, in `x`'s type with float32 accumulation."""
    rows = x
    # subtle: XLA:CPU has no fast path for one row of 16-bit numbers; two equal rows have one
    one = x.dtype.itemsize == 2 and x.size == x.shape[-1] and jax.default_backend() == "cpu"
    if one:
        rows = jnp.concatenate([x.reshape(1, -1)] * 2)
    y = jax.lax.dot_general(
        rows,
        w.astype(x.dtype),
        (((rows.ndim - 1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,  # float32 means float32: no TF32 on a GPU
        preferred_element_type=jnp.float32,
    )
    if one:
        y = y[:1].reshape(*x.shape[:-1], -1)
    return y.astype(out_dtype)
