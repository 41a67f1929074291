"""Codes of 1 to 8 bits in 32-bit words: how every packed operand of a kernel lies in memory. Lossless.

A code is cut into parts of 8, 4, 2 and 1 bits, the binary digits of the width from the high end, so that no
part straddles words:

    3 bits = the upper 2 | the lowest 1         6 bits = the upper 4 | the lower 2

32 neighbouring codes make one block of `bits` words, first the words of the widest part. Within a part of p
bits, code i of the block lies in word i // (32 / p) at bit p * (i % (32 / p)).

Letters: n codes along the packed axis, the last.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num, UInt8, UInt32

CODES_PER_BLOCK = 32  # codes a block


def parts(bits: int) -> tuple[int, ...]:
    """The powers of two that add up to `bits`, widest first."""
    return tuple(p for p in (8, 4, 2, 1) if bits & p)


def to_words(codes: Num[Array, "*B n"], bits: int) -> UInt32[Array, "*B w"]:
    """Codes of 1, 2, 4 or 8 bits, 32 / bits a word, the first lowest; n must fill the words.

    Whole numbers of any type, floats too.
    """
    fields = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, 32 // bits)
    return jnp.sum(fields << _shifts(bits, fields.ndim), axis=-1, dtype=jnp.uint32)


def from_words(words: UInt32[Array, "*B w"], bits: int) -> UInt32[Array, "*B n"]:
    """The codes that `to_words` was given."""
    fields = (words[..., None] >> _shifts(bits, words.ndim + 1)) & (2**bits - 1)
    return fields.reshape(*words.shape[:-1], -1)


def _shifts(bits: int, ndim: int) -> jax.Array:
    return jnp.expand_dims(jnp.arange(0, 32, bits, dtype=jnp.uint32), range(ndim - 1))


def from_blocks(words: UInt32[Array, "*B blocks bits"], size: int) -> UInt8[Array, "*B n"]:
    """The first `size` codes of blocks of `bits` words."""
    codes, at = None, 0
    for p in parts(words.shape[-1]):
        field = from_words(words[..., at : at + p], p)  # [..., blocks, 32]
        codes = field if codes is None else (codes << p) | field
        at += p
    assert codes is not None
    return codes.reshape(*words.shape[:-2], -1)[..., :size].astype(jnp.uint8)
