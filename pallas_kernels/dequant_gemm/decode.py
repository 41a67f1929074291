"""Words to pairs of 16-bit floats, in an order that takes no shuffling: what both kernels share.

A **unit** is 8 or 16 neighbouring codes of one output, as many as fill whole words where the width allows.
`pair(fields, .., i)` gives its codes i and i + unit / 2 in the halves of one 32-bit word, beside an
exponent: two numbers offset + code in two or three instructions. A tensor core's first operand takes such
words as they come: lane t of the four that share a row has the numbers 2 t, 2 t + 1 of each 8. So lane t
takes unit t of four, pair i of four units is 8 numbers of the sum, and `in_order_of_pairs` puts activations
into that order: in each chunk of 4 units

    place 8 i + 2 t + h  has  input  unit t + i + h unit / 2        t = 0 .. 3, i < unit / 2, h = 0, 1

The offset is a power of two, so that all of offset + code is exact: sum (offset + code) x is corrected by
(offset + zero point) sum x once a group, in float32. A bfloat16 has no room for 8 bits, which are two digits
of 4.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.words import CODES_PER_BLOCK, parts

Fields = tuple[tuple[jax.Array, ...], ...]  # of each part, words as `spread` leaves them


def unit_size(bits: int) -> int:
    """Codes of a unit, best for a width."""
    return 16 if bits % 4 else 8


def in_order_of_pairs(x: Float[Array, "M K"], K: int, unit: int) -> Float[Array, "M K2"]:
    """Activations padded with zeros to K, a multiple of 4 units, in the order in which pairs come."""
    M = x.shape[0]
    x = jnp.pad(x, ((0, 0), (0, K - x.shape[1])))
    chunks = x.reshape(M, K // (4 * unit), 4, 2, unit // 2)  # [M, chunk, t, h, i]
    return chunks.transpose(0, 1, 4, 2, 3).reshape(M, K)


def word_at(p: int, t: jax.Array, unit: int) -> tuple[jax.Array, ...]:
    """Which words of a part of p bits hold unit t of its block."""
    words = unit * p // 32
    if words > 1:
        return tuple(words * t + i for i in range(words))
    return (t,) if words else (lax.div(t, 32 // (unit * p)),)


def spread(words: tuple[jax.Array, ...], p: int, t: jax.Array | None, unit: int) -> tuple[jax.Array, ...]:
    """A unit's part of p bits as fields: 16 / p pairs each, pair i at bit p (i % (16 / p)) of both halves.

    t: which unit of its block, where units are less than a word.
    """
    if len(words) > 1:  # the first half of the unit is in the first half of the words
        half = len(words) // 2
        out: list[jax.Array] = []
        for a, b in zip(words[:half], words[half:], strict=True):
            out += [(a & 0xFFFF) | (b << 16), (a >> 16) | (b & jnp.uint32(0xFFFF0000))]
        return tuple(out)
    size = unit * p  # bits
    if size == 32:
        return words
    assert t is not None
    place = (size * lax.rem(t, 32 // size)).astype(jnp.uint32)
    low = (words[0] >> place) & (2**size - 1)
    return (low | (low << (16 - size // 2)),)


@dataclasses.dataclass(frozen=True)
class Digit:
    """Bits low .. low + width - 1 of a code as the float offset + digit, in bits exponent | digit << at."""

    low: int
    width: int
    at: int
    offset: int
    exponent: int  # in both halves


def digits(bits: int, dtype) -> tuple[Digit, ...]:
    """What a code is cut into, so that each fits beside the exponent of a 16-bit float."""
    mantissa, bias = (10, 15) if dtype == jnp.float16 else (7, 127)
    out = []
    for low, width in ((4, 4), (0, 4)) if bits > mantissa else ((0, bits),):
        # as far up as it goes (the least offset) where one of the pairs need not be shifted
        p = min(parts(bits)[0], width)
        at = next((a for a in range(mantissa - width, 0, -1) if (a + width - p) % p == 0), 0)
        power = mantissa - at
        out.append(Digit(low, width, at, 2**power, ((bias + power) << mantissa) * 0x00010001))
    return tuple(out)


def plain_and_or(a: jax.Array, mask: int, b: jax.Array | int) -> jax.Array:
    """(a & mask) | b."""
    masked = a & jnp.uint32(mask)
    return masked if isinstance(b, int) and not b else masked | (jnp.uint32(b) if isinstance(b, int) else b)


def pair(
    fields: Fields,
    bits: int,
    i: int,
    digit: Digit,
    and_or: Callable[[jax.Array, int, jax.Array | int], jax.Array] = plain_and_or,
) -> jax.Array:
    """The digit of codes i (low half) and i + unit / 2 (high half) of units, beside the digit's exponent.

    and_or: computes (a & mask) | b; b may be a whole number.
    """
    below = bits
    out: jax.Array | int = digit.exponent
    for p, words in zip(parts(bits), fields, strict=True):
        below -= p
        first, last = max(below, digit.low), min(below + p, digit.low + digit.width)
        if first >= last:
            continue
        word = words[i // (16 // p)]
        target = digit.at + first - digit.low
        shift = p * (i % (16 // p)) + first - below - target  # to the right
        word = word >> shift if shift > 0 else word << -shift if shift < 0 else word
        out = and_or(word, ((2 ** (last - first) - 1) << target) * 0x00010001, out)
    assert not isinstance(out, int)
    return out


def whole_code(fields: Fields, bits: int, i: int) -> jax.Array:
    """Codes i (low half) and i + unit / 2 (high half) of units."""
    return pair(fields, bits, i, Digit(0, bits, 0, 0, 0))


def units_of_block(unit: int) -> int:
    """Units of a block of words."""
    return CODES_PER_BLOCK // unit
