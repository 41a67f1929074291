"""Rows of keys or values in codes of 2, 4 or 8 bits: what a cache may hold in place of plain numbers. Lossy.

As QServe (arXiv:2405.04532) and KVzip's int4 cache: each token, key head and group of numbers has a scale
and a least number, x ~ code * scale + low. A row is one run of 32-bit words, so that it is written, moved and
forgotten as a whole, whatever the cache that it lies in (a word of 16-bit scales apart would cost XLA:CPU a
conversion of the whole array at each step):

    G words     low | scale << 16, both float16, a group each
    W words     E codes, 32 / bits a word, the first lowest; the last may be filled up with zeros

    bits a number: (32 G + 32 W) / E                 4 bits, E = 64, one group: 4.5

low is rounded down and scale up, so that no number lies outside: |error| <= scale / 2, scale at least
2**-14. Numbers beyond +-32,000 are cut off. Keys are rotated first (`ops/hadamard.py`), and queries with
them, which leaves scores as they were: some channels of keys are great throughout, which 4 bits do not bear.

    rows = QuantizedRows.zeros((J, S, E), bits=4, rotated=True, dtype=k.dtype).quantize(k)
    rows.dequantize()               # [J, S, E] again, in the rotated basis: multiply rows.rotate_queries(q)

Letters: J = B K blocks of a request and key head, S cached tokens, E head size, G groups, W words of codes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxllm.ops import hadamard
from jaxllm.pytree import pytree, static
from jaxllm.weights.affine import MIN_SCALE
from pallas_kernels.decode_attention import coded
from pallas_kernels.words import to_words

ROTATION_SEED = 0  # the same for all: nothing is to be hidden
MAX_NUMBER = 32000.0  # so that a float16 holds the range of a group


@pytree
class QuantizedRows:
    """Numbers [J, S, E] in codes."""

    words: jax.Array  # uint32 [J, S, G + W]
    bits: int = static()
    group_size: int = static()  # numbers that share a scale; the last group may be shorter
    head_dim: int = static()  # E
    rotated: bool = static()
    dtype: Any = static()  # what the numbers are read as

    @classmethod
    def zeros(
        cls, shape: tuple[int, int, int], *, bits: int, group_size: int | None = None, rotated: bool, dtype
    ) -> "QuantizedRows":
        """Rows of zeros. group_size: None is the whole row."""
        J, S, E = shape
        group_size = E if group_size is None else group_size
        if bits not in (2, 4, 8) or not 1 <= group_size <= E:
            raise ValueError(
                "cache: bits must be 2, 4 or 8, group_size 1 to head_dim, "
                f"got {bits=}, {group_size=}, head_dim={E}"
            )
        width = -(-E // group_size) + -(-E * bits // 32)
        return cls(jnp.zeros((J, S, width), jnp.uint32), bits, group_size, E, rotated, jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return (*self.words.shape[:-1], self.head_dim)

    def quantize(self, x: Float[Array, "J T E"]) -> "QuantizedRows":
        """The numbers as rows like these."""
        E, qmax, groups = self.head_dim, 2**self.bits - 1, -(-self.head_dim // self.group_size)
        x = hadamard.rotate(x, ROTATION_SEED) if self.rotated else x.astype(jnp.float32)
        x = jnp.clip(x, -MAX_NUMBER, MAX_NUMBER)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, groups * self.group_size - E)), mode="edge")
        x = x.reshape(*x.shape[:2], groups, self.group_size)
        # subtle: the least of some numbers and NaN may be a number (XLA:CPU); the NaN must not be lost
        least, most = jnp.where(jnp.isnan(x).any(-1), jnp.nan, x.min(-1)), x.max(-1)
        low = (least - jnp.abs(least) * 2.0**-10).astype(jnp.float16)
        scale = (most - low.astype(jnp.float32)) * ((1 + 2.0**-10) / qmax)
        scale = jnp.maximum(scale, MIN_SCALE).astype(jnp.float16)
        start, step = (v.astype(jnp.float32)[..., None] for v in (low, scale))
        codes = jnp.clip(jnp.round((x - start) / step), 0, qmax).reshape(*x.shape[:2], -1)[..., :E]
        codes = jnp.pad(codes, ((0, 0), (0, 0), (0, -E % (32 // self.bits))))
        grid = _float16_bits(low) | _float16_bits(scale) << 16
        words = jnp.concatenate([grid, to_words(codes, self.bits)], axis=-1)
        return dataclasses.replace(self, words=words)

    def dequantize(self) -> Float[Array, "J S E"]:
        """What the rows hold, rotated if they are."""
        code = coded.Code(self.bits, self.group_size)
        return coded.dequantize(self.words, code, self.head_dim, self.dtype)

    def rotate_queries(self, q: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        """Queries in the basis of the keys."""
        return hadamard.rotate(q, ROTATION_SEED).astype(q.dtype) if self.rotated else q

    def round_trip(self, x: Float[Array, "J T E"]) -> Float[Array, "J T E"]:
        """The numbers as rows like these will give them back, in the basis in which they came."""
        y = self.quantize(x).dequantize()
        return (hadamard.unrotate(y, ROTATION_SEED) if self.rotated else y).astype(x.dtype)


def _float16_bits(x: Float[Array, "J T G"]) -> UInt32[Array, "J T G"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
