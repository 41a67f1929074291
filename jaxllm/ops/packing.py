"""Small whole numbers packed into 32-bit words: what every format stores its codes in. Lossless.

Any width of 1 to 8 bits takes just that many bits: 32 neighbouring codes are a block of `bits` words, where
they lie as `pallas_kernels/words.py` says.

    packed = pack(codes, 3)             # codes [..., n] -> words [..., ceil(n / 32), 3]
    unpack(packed)                      # uint8 [..., n] again

Both are compiled when called by themselves (step by step they would make some twenty small programs), and
become part of the program when traced: `inline`, here and in the formats.

Letters: n codes along the packed axis, the last.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

from jaxllm.pytree import pytree, static
from pallas_kernels.words import CODES_PER_BLOCK, from_blocks, parts, to_words


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
    return from_blocks(packed.words, packed.size)


def unpack_at(packed: Packed, index: Integer[Array, " n"]) -> UInt8[Array, "*B n"]:
    """The codes at some places of the packed axis; only their blocks are read."""
    blocks = Packed(packed.words[..., index // CODES_PER_BLOCK, None, :], packed.bits, CODES_PER_BLOCK)
    within = jnp.broadcast_to((index % CODES_PER_BLOCK)[:, None], (*blocks.shape[:-1], 1))
    return jnp.take_along_axis(unpack(blocks), within, axis=-1)[..., 0]
