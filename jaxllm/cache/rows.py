"""Rows of keys or values, plain or in codes: the one place that knows of both kinds.

A cache holds rows as an array [J, S, E] or as `QuantizedRows` of that shape. All else stores, reads and
multiplies them by these functions and never asks which they are; of an array they add nothing to a program.

Letters: J = B K blocks of a request and key head, S cached tokens, T tokens of a chunk, E head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.cache.coded import QuantizedRows
from jaxllm.ops.attention import heads_first

Rows = jax.Array | QuantizedRows  # [J, S, E]


def zeros(
    shape: tuple[int, int, int], dtype, *, bits: int | None, group_size: int | None, rotated: bool
) -> Rows:
    """Rows of zeros. bits: of the codes, None for an array; group_size and rotated: of codes only."""
    if bits is None:
        return jnp.zeros(shape, dtype)
    return QuantizedRows.zeros(shape, bits=bits, group_size=group_size, rotated=rotated, dtype=dtype)


def quantize(x: Float[Array, "J T E"], like: Rows) -> Rows:
    """Numbers as rows like those given."""
    return like.quantize(x) if isinstance(like, QuantizedRows) else x.astype(like.dtype)


def dequantize(rows: Rows) -> Float[Array, "J S E"]:
    """The numbers that rows hold, in the basis in which they are stored."""
    return rows.dequantize() if isinstance(rows, QuantizedRows) else rows


def stored(rows: Rows) -> jax.Array:
    """The array that rows are held in: numbers, or words of codes."""
    return rows.words if isinstance(rows, QuantizedRows) else rows


def code_of(rows: Rows) -> dict[str, Any]:
    """`bits` and `group_size` of rows in codes, nothing for plain ones: as attention over them is told."""
    return {"bits": rows.bits, "group_size": rows.group_size} if isinstance(rows, QuantizedRows) else {}


def rotate_queries(q: Float[Array, "*B E"], keys: Rows) -> Float[Array, "*B E"]:
    """Queries in the basis in which keys are stored."""
    return keys.rotate_queries(q) if isinstance(keys, QuantizedRows) else q


def round_trip(x: Float[Array, "B T K E"], like: Rows) -> Float[Array, "B T K E"]:
    """A chunk's numbers as rows like those given will give them back, in the basis in which they came.

    subtle: in the order in which `append` quantizes them, so that a program does it once.
    """
    if not isinstance(like, QuantizedRows):
        return x
    B, T, K, E = x.shape
    return like.round_trip(heads_first(x)).reshape(B, K, T, E).swapaxes(1, 2)


def type_name(rows: Rows) -> str:
    """What a number is held in: "4 bits" or "bfloat16"."""
    return f"{rows.bits} bits" if isinstance(rows, QuantizedRows) else jnp.dtype(rows.dtype).name
