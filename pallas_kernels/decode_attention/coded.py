"""Rows of a cache in codes: a scale and a least number for each group, x ~ code * scale + low.

    G words     low | scale << 16, both float16, a group each
    W words     E codes of 2, 4 or 8 bits, 32 / bits a word, the first lowest; the last filled up with zeros

Letters: E head size, G groups, W words of codes, w = G + W.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.words import from_words


@dataclasses.dataclass(frozen=True)
class Code:
    """How rows are coded: bits of a number, and how many share a scale (the last group may be shorter)."""

    bits: int
    group_size: int


def words_of_row(code: Code | None, E: int) -> int:
    """The length of a row of E numbers as it is stored."""
    return E if code is None else -(-E // code.group_size) + -(-E * code.bits // 32)


def dequantize(rows: Shaped[Array, "*B w"], code: Code | None, E: int, dtype: Any) -> Float[Array, "*B E"]:
    """The numbers that rows hold; plain rows as they are."""
    if code is None:
        return rows
    G = -(-E // code.group_size)
    grid = rows[..., :G]
    low, scale = (
        jnp.repeat(v.astype(jnp.float32), code.group_size, axis=-1, total_repeat_length=G * code.group_size)[
            ..., :E
        ]
        for v in (_float16(grid & 0xFFFF), _float16(grid >> 16))
    )
    codes = from_words(rows[..., G:], code.bits)[..., :E].astype(jnp.float32)
    return (codes * scale + low).astype(dtype)


def _float16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)
