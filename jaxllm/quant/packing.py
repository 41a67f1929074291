"""Small whole numbers packed into 32-bit words: what every format stores its codes in. Lossless.

Any width of 1 to 8 bits takes just that many bits. A code is cut into parts of 8, 4, 2 and 1 bits, the binary
digits of the width from the high end, so that no part straddles words:

    3 bits = the upper 2 | the lowest 1         6 bits = the upper 4 | the lower 2

32 neighbouring codes make one block of `bits` words, first the words of the widest part. Within a part of p
bits, code i of the block lies in word i // (32 / p) at bit p * (i % (32 / p)).

    packed = pack(codes, 3)             # codes [..., n] -> words [..., ceil(n / 32), 3]
    unpack(packed)                      # uint8 [..., n] again

Letters: n codes along the packed axis, the last.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

from jaxllm.pytree import pytree, static

BLOCK = 32  # codes a block


@pytree
class Packed:
    """Codes [..., size] of `bits` bits."""

    words: jax.Array  # uint32 [..., ceil(size / 32), bits]
    bits: int = static()
    size: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return (*self.words.shape[:-2], self.size)


def parts(bits: int) -> tuple[int, ...]:
    """The powers of two that add up to `bits`, widest first."""
    return tuple(p for p in (8, 4, 2, 1) if bits & p)


def pack(codes: Integer[Array, "*B n"], bits: int) -> Packed:
    """The codes in words; a last block that is not full is filled with zeros.

    bits: 1 to 8. Codes must lie in 0 .. 2**bits - 1 (not checked here: they may be traced).
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"pack: bits must be 1 to 8, got {bits=}")
    n = codes.shape[-1]
    blocks = -(-n // BLOCK)
    wide = jnp.pad(codes.astype(jnp.uint32), [(0, 0)] * (codes.ndim - 1) + [(0, blocks * BLOCK - n)])
    words, below = [], bits
    for p in parts(bits):
        below -= p
        field = (wide >> below) & (2**p - 1)
        field = field.reshape(*codes.shape[:-1], blocks, p, BLOCK // p)
        shifts = jnp.arange(0, 32, p, dtype=jnp.uint32)
        words.append(jnp.sum(field << _last(shifts, field), axis=-1, dtype=jnp.uint32))
    return Packed(jnp.concatenate(words, axis=-1), bits, n)


def unpack(packed: Packed) -> UInt8[Array, "*B n"]:
    """The codes."""
    words, bits = packed.words, packed.bits
    codes, at = None, 0
    for p in parts(bits):
        part = words[..., at : at + p, None]
        shifts = jnp.arange(0, 32, p, dtype=jnp.uint32)
        field = (part >> _last(shifts, part)) & (2**p - 1)  # [..., blocks, p, 32 / p]
        field = field.reshape(*words.shape[:-1], BLOCK)
        codes = field if codes is None else (codes << p) | field
        at += p
    assert codes is not None
    return codes.reshape(*words.shape[:-2], -1)[..., : packed.size].astype(jnp.uint8)


def _last(shifts, like):
    return jnp.expand_dims(shifts, range(like.ndim - 1))
