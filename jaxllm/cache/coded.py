"""Rows of keys or values in codes of 2, 4 or 8 bits: what a cache may hold in place of plain numbers. Lossy.

As QServe (arXiv:2405.04532) and KVzip's int4 cache: each token, key head and group of numbers has a scale
and a least number, x ~ code * scale + low. A row is one run of 32-bit words, so that it is written, moved and
forgotten as a whole, whatever the cache that it lies in (a word of 16-bit scales apart would cost XLA:CPU a
conversion of the whole array at each step):

    G words     low | scale << 16, both float16, a group each
    W words     D codes, 32 / bits a word, the first lowest; the last may be filled up with zeros

    bits a number: (32 G + 32 W) / D                 4 bits, D = 64, one group: 4.5

low is rounded down and scale up, so that no number lies outside: |error| <= scale / 2, scale at least
2**-14. Numbers beyond +-32,000 are cut off. Keys are rotated first (`ops/hadamard.py`), and queries with
them, which leaves scores as they were: some channels of keys are great throughout, which 4 bits do not bear.

    rows = encode(k, zeros((B * K, R, D), bits=4, dtype=k.dtype, rotated=True))
    numbers(rows)                       # [B K, T, D] again, in the rotated basis: multiply turn(q, rows)

Letters: J = B K blocks of a request and head, R rows, T tokens, D head size, G groups, W words of codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import hadamard
from jaxllm.ops.packing import from_words, to_words
from jaxllm.pytree import pytree, static
from jaxllm.weights.affine import MIN_SCALE

SEED = 0  # of the rotation: the same for all, nothing is to be hidden
LIMIT = 32000.0  # so that a float16 holds the range of a group


@pytree
class QuantizedRows:
    """Numbers [J, R, D] in codes."""

    words: jax.Array  # uint32 [J, R, G + W]
    bits: int = static()
    group: int = static()  # numbers that share a scale; the last group may be shorter
    size: int = static()  # D
    rotated: bool = static()
    dtype: Any = static()  # what the numbers are read as

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return (*self.words.shape[:-1], self.size)


def zeros(
    shape: tuple[int, int, int], *, bits: int, group: int | None = None, rotated: bool, dtype
) -> QuantizedRows:
    """Rows of zeros. group: None is the whole row."""
    J, R, D = shape
    group = D if group is None else group
    if bits not in (2, 4, 8) or not 1 <= group <= D:
        raise ValueError(f"cache: bits must be 2, 4 or 8, group 1 to head_dim, got {bits=}, {group=}, {D=}")
    width = -(-D // group) + -(-D * bits // 32)
    return QuantizedRows(jnp.zeros((J, R, width), jnp.uint32), bits, group, D, rotated, jnp.dtype(dtype))


def encode(x: Float[Array, "J T D"], like: QuantizedRows) -> QuantizedRows:
    """The numbers as rows like those given."""
    D, top = like.size, 2**like.bits - 1
    G = -(-D // like.group)
    x = hadamard.rotate(x, SEED) if like.rotated else x.astype(jnp.float32)
    x = jnp.pad(jnp.clip(x, -LIMIT, LIMIT), ((0, 0), (0, 0), (0, G * like.group - D)), mode="edge")
    x = x.reshape(*x.shape[:2], G, like.group)
    # subtle: the least of some numbers and NaN may be a number (XLA:CPU); the NaN must not be lost
    least, most = jnp.where(jnp.isnan(x).any(-1), jnp.nan, x.min(-1)), x.max(-1)
    low = (least - jnp.abs(least) * 2.0**-10).astype(jnp.float16)
    scale = jnp.maximum((most - low.astype(jnp.float32)) * ((1 + 2.0**-10) / top), MIN_SCALE).astype(
        jnp.float16
    )
    at, step = (v.astype(jnp.float32)[..., None] for v in (low, scale))
    codes = jnp.clip(jnp.round((x - at) / step), 0, top).reshape(*x.shape[:2], -1)[..., :D]
    codes = jnp.pad(codes, ((0, 0), (0, 0), (0, -D % (32 // like.bits))))
    bit = lambda v: jax.lax.bitcast_convert_type(v, jnp.uint16).astype(jnp.uint32)  # noqa: E731
    words = jnp.concatenate([bit(low) | bit(scale) << 16, to_words(codes, like.bits)], axis=-1)
    return dataclasses.replace(like, words=words)


def numbers(rows: QuantizedRows) -> Float[Array, "J R D"]:
    """What the rows hold, rotated if they are."""
    D, G = rows.size, -(-rows.size // rows.group)
    half = lambda v: jax.lax.bitcast_convert_type(v.astype(jnp.uint16), jnp.float16)  # noqa: E731
    low, scale = (
        jnp.repeat(half(v).astype(jnp.float32), rows.group, axis=-1, total_repeat_length=G * rows.group)
        for v in (rows.words[..., :G] & 0xFFFF, rows.words[..., :G] >> 16)
    )
    codes = from_words(rows.words[..., G:], rows.bits)[..., :D].astype(jnp.float32)
    return (codes * scale[..., :D] + low[..., :D]).astype(rows.dtype)


def turn(q: Float[Array, "*B D"], rows: QuantizedRows) -> Float[Array, "*B D"]:
    """Queries in the basis of the keys."""
    return hadamard.rotate(q, SEED).astype(q.dtype) if rows.rotated else q


def kept(x: Float[Array, "J T D"], like: QuantizedRows) -> Float[Array, "J T D"]:
    """The numbers as rows like those given will give them back, in the basis in which they came."""
    held = numbers(encode(x, like))
    return hadamard.unrotate(held, SEED).astype(x.dtype) if like.rotated else held.astype(x.dtype)
