"""Words to pairs of 16-bit floats, and the order of inputs that this takes: what the kernels share.

Codes j and j + P of a word of 2 P codes stand at one place of its halves. `(word >> shift) & mask | exponent`
puts them beside the exponent of 2**(m - at), m bits of mantissa: two numbers offset + code, exactly, offset
= 2**(m - at). Places near the top of the mantissa have small offsets; one shift serves up to three pairs.

A tensor core's operand wants the numbers 2 t, 2 t + 1 of each 8 from one lane: pair j of some words, one word
a lane, are neighbours along its sum. A word's zero point is one more pair, times the sum of its inputs in two
16-bit numbers, of which the second is what the first leaves.

Letters: M tokens, n words of a row, P pairs of a word (8 at 2 bits, 4 at 4).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a pair is found: shift to the right, less than 0 to the left; then offset + code by two masks."""

    shift: int
    mask: int
    exponent: int
    offset: int


def places(bits: int, dtype) -> tuple[Place, ...]:
    """Of each pair of a word."""
    mantissa, bias = (10, 15) if dtype == jnp.float16 else (7, 127)
    top = (mantissa - bits) // bits * bits
    together = min(3, top // bits + 1)  # that share a shift
    found = []
    for j in range(16 // bits):
        last = j + (top // bits - j) % together
        at = top - bits * (last - j)
        found.append(
            Place(
                shift=bits * last - top,
                mask=0x00010001 * ((2**bits - 1) << at),
                exponent=0x00010001 * ((bias + mantissa - at) << mantissa),
                offset=2 ** (mantissa - at),
            )
        )
    return tuple(found)


def shifted(words: jax.Array, shift: int) -> jax.Array:
    """To the right, less than 0 to the left."""
    return words >> jnp.uint32(shift) if shift > 0 else words << jnp.uint32(-shift) if shift else words


def by_word(x: Float[Array, "M W"], bits: int, multiple: int) -> Float[Array, "M n 2 P"]:
    """Inputs of the two halves of each word, with words of zeros behind them to a multiple."""
    codes = 32 // bits
    n = x.shape[1] // codes
    x = jnp.pad(x, ((0, 0), (0, codes * (-n % multiple))))
    return x.reshape(x.shape[0], -1, 2, codes // 2)


def sums_in_two(x: Float[Array, "M n 2 P"]) -> Float[Array, "M n 2"]:
    """Minus the sum of each word's inputs, and what rounding that leaves."""
    total = -x.astype(jnp.float32).sum(axis=(2, 3))
    high = total.astype(x.dtype)
    return jnp.stack([high, (total - high.astype(jnp.float32)).astype(x.dtype)], axis=-1)


def columns(
    x: Float[Array, "M n 2 P"],
) -> tuple[Int32[Array, "M n P"], Float32[Array, "M n"], Float32[Array, "M n"]]:
    """Pairs of inputs, where the sum over each word starts so that offsets cancel, and minus its inputs' sum.

    A zero point there is 2**bits + zero point.
    """
    pairs = lax.bitcast_convert_type(jnp.swapaxes(x, 2, 3), jnp.int32)
    bits = 16 // x.shape[3]
    offsets = jnp.asarray([place.offset for place in places(bits, x.dtype)], jnp.float32)
    x = x.astype(jnp.float32)
    sums = x.sum(axis=(2, 3))
    return pairs, 2.0**bits * sums - (x.sum(axis=2) * offsets[None, None]).sum(axis=2), -sums
