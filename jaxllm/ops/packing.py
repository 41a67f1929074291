"""Small whole numbers packed into 32-bit words: what every format stores its codes in. Lossless.

Any width of 1 to 8 bits takes just that many bits. A code is cut into parts of 8, 4, 2 and 1 bits, the binary
digits of the width from the high end, so that no part straddles words:

    3 bits = the upper 2 | the lowest 1         6 bits = the upper 4 | the lower 2

32 neighbouring codes make one block of `bits` words, first the words of the widest part. Within a part of p
bits, code i of the block lies in word i // (32 / p) at bit p * (i % (32 / p)).

    packed = pack(codes, 3)             # codes [..., n] -> words [..., ceil(n / 32), 3]
    unpack(packed)                      # uint8 [..., n] again

Both are compiled when called by themselves (step by step they would make some twenty small programs), and
become part of the program when traced: `inline`, here and in the formats.

Letters: n codes along the packed axis, the last.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Num, UInt8, UInt32

from jaxllm.pytree import pytree, static

CODES_PER_BLOCK = 32  # codes a block


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


@functools.partial(jax.jit, static_argnames="bits", inline=True)
def pack(codes: Integer[Array, "*B n"], bits: int) -> Packed:
    """The codes in words; a last block that is not full is filled with zeros.

    bits: 1 to 8. Codes must lie in 0 .. 2**bits - 1 (not checked here: they may be traced).
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"pack: bits must be 1 to 8, got {bits=}")
    n = codes.shape[-1]
    blocks = -(-n // CODES_PER_BLOCK)
    wide = jnp.pad(
        codes.astype(jnp.uint32), [(0, 0)] * (codes.ndim - 1) + [(0, blocks * CODES_PER_BLOCK - n)]
    )
    words, below = [], bits
    for p in parts(bits):
        below -= p
        field = (wide >> below) & (2**p - 1)
        words.append(to_words(field.reshape(*codes.shape[:-1], blocks, CODES_PER_BLOCK), p))
    return Packed(jnp.concatenate(words, axis=-1), bits, n)


@functools.partial(jax.jit, inline=True)
def unpack(packed: Packed) -> UInt8[Array, "*B n"]:
    """The codes."""
    words, bits = packed.words, packed.bits
    codes, at = None, 0
    for p in parts(bits):
        field = from_words(words[..., at : at + p], p)  # [..., blocks, 32]
        codes = field if codes is None else (codes << p) | field
        at += p
    assert codes is not None
    return codes.reshape(*words.shape[:-2], -1)[..., : packed.size].astype(jnp.uint8)


def unpack_at(packed: Packed, index: Integer[Array, " n"]) -> UInt8[Array, "*B n"]:
    """The codes at some places of the packed axis; only their blocks are read."""
    blocks = Packed(packed.words[..., index // CODES_PER_BLOCK, None, :], packed.bits, CODES_PER_BLOCK)
    within = jnp.broadcast_to((index % CODES_PER_BLOCK)[:, None], (*blocks.shape[:-1], 1))
    return jnp.take_along_axis(unpack(blocks), within, axis=-1)[..., 0]
