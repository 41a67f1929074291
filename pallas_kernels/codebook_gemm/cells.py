"""Words of codes made ready for the look-up (`lookup`): 8 codes of up to 4 bits, or 4 of 5 to 8 bits. Exact.

A permutation of bytes looks up four codes that lie alike, at equal distances. The parts of a code
(`pallas_kernels.words`) lie at different distances, and a **cell** of 4 or 8 bits is where they come together
again, by shifts and masks of whole words. Of 8 cells of 4 bits `Cells` has what the instruction takes:
selectors of their lower three bits for the first four and the last four, and those of the fourth bit.

Levels come out in **pairs**, two of 16 bits a register, as tensor cores take neighbours of a sum: of 8 cells
those of cells 0 and 2, 1 and 3, 4 and 6, 5 and 7, of 4 cells those of 0 and 1, 2 and 3. A block's 32 inputs
are taken in another order than they are stored: 16 pairs, numbered as `cells` says, which `in_order` brings
inputs into.

Letters: K inputs, T tiles of W blocks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels.words import CODES_PER_BLOCK

# Two or four selectors of 8 cells, or one word of 4; and the numbers of their pairs.
Cells = list[tuple[tuple[jax.Array, ...], tuple[int, ...]]]
Order = tuple[
    tuple[int, ...], tuple[int, ...]
]  # the 32 inputs as an array of this shape, its axes in this order


class Instructions(NamedTuple):
    """What compilers do not make by themselves; each backend has its own.

    permute(a, b, selector): byte i is what nibble i of the selector names, see `lookup.byte_permute`.
    choose(a, b, mask): the bits of `a` in the mask, those of `b`, which may be a number, elsewhere.
    """

    permute: Callable[[jax.Array, jax.Array, jax.Array | int], jax.Array]
    choose: Callable[[jax.Array, jax.Array | int, int], jax.Array]


def plain_choose(a: jax.Array, b: jax.Array | int, mask: int) -> jax.Array:
    """The bits of `a` in the mask, those of `b` elsewhere."""
    return (a & jnp.uint32(mask)) | (jnp.uint32(b) & jnp.uint32(0xFFFFFFFF - mask))


def order(bits: int) -> Order:
    """How the inputs of a block are taken for codes of this width."""
    match bits:
        case 1:
            return (2, 2, 2, 4), (3, 0, 2, 1)
        case 2 | 3:
            return (2, 2, 2, 2, 2), (0, 4, 1, 3, 2)
        case 4:
            return (4, 2, 2, 2), (0, 1, 3, 2)
        case 8:
            return (32,), (0,)
        case _:
            return (4, 4, 2), (0, 2, 1)


def cells(words: Sequence[jax.Array], bits: int, instructions: Instructions) -> Cells:
    """The cells of blocks of which the words are given one by one, each an array of any shape."""
    match bits:
        case 1:
            (v,) = words
            found = [_field(v, j, 0x11111111) for j in range(4)]
        case 2:
            found = [_field(u, 2 * r, 0x33333333) for u in words for r in range(2)]
        case 3:
            *upper, v = words
            shifted, found = _down(v, 4), []
            for u, bytes_of_half in zip(upper, (0x5140, 0x7362), strict=True):
                # The lowest bits of 4 codes in each byte, in its lower half; then of 2 in each nibble.
                four = instructions.permute(v, shifted, bytes_of_half)
                two = instructions.choose(four, _up(four, 2), 0x0F0F0F0F)
                found += [
                    (_up(u, 1) & _mask(0x66666666)) | (two & _mask(0x11111111)),
                    _down((u & _mask(0xCCCCCCCC)) | (two & _mask(0x22222222)), 1),
                ]
        case 4 | 8:
            found = list(words)
        case _:
            found = _bytes(words, bits)
    if bits > 4:
        return [((word,), (2 * i, 2 * i + 1)) for i, word in enumerate(found)]
    selectors = [by_four_bits(w, instructions) if bits == 4 else (w, _down(w, 16)) for w in found]
    return [(words, tuple(range(4 * i, 4 * i + 4))) for i, words in enumerate(selectors)]


def by_four_bits(word: jax.Array, instructions: Instructions) -> tuple[jax.Array, ...]:
    """Selectors of 8 cells of four bits."""
    three = word & _mask(0x77777777)
    return three, _down(three, 16), *fourth_bits(_down(word, 1), instructions)


def fourth_bits(bits: jax.Array, instructions: Instructions) -> tuple[jax.Array, jax.Array]:
    """Selectors of byte i of the second of two words where bit 2 of nibble i is set, else of the first."""
    both = instructions.choose(bits, 0x32103210, 0x44444444)
    return both, _down(both, 16)


def in_order(x: Shaped[Array, "M K"], taken: Order, *, blocks: int) -> Shaped[Array, "M T 16 W 2"]:
    """Inputs in tiles of W = `blocks` blocks, the first pair of all blocks first, padded with zeros."""
    M, K = x.shape
    x = jnp.pad(x, ((0, 0), (0, -K % (blocks * CODES_PER_BLOCK))))
    shape, axes = taken
    x = x.reshape(-1, *shape).transpose(0, *(1 + a for a in axes))
    return x.reshape(M, -1, blocks, 16, 2).transpose(0, 1, 3, 2, 4)


def _bytes(words: Sequence[jax.Array], bits: int) -> list[jax.Array]:
    """Codes of 5, 6, 7 bits in bytes: even and odd ones of each word of upper parts."""
    found = []
    for j, upper in enumerate(words[:4]):
        even, odd = upper & _mask(0x0F0F0F0F), _field(upper, 4, 0x0F0F0F0F)
        if bits & 2:
            pairs = _field(words[4 + j // 2], 16 * (j % 2), 0xFFFF)
            pairs = _apart(pairs, 0x00FF00FF, 8, 0x0F0F0F0F, 4)
            even = _up(even, 2) | (pairs & _mask(0x03030303))
            odd = _up(odd, 2) | _field(pairs, 2, 0x03030303)
        if bits & 1:
            pairs = _apart(_field(words[-1], 8 * j, 0xFF), 0x000F000F, 12, 0x03030303, 6)
            even = _up(even, 1) | (pairs & _mask(0x01010101))
            odd = _up(odd, 1) | _field(pairs, 1, 0x01010101)
        found += [even, odd]
    return found


def _apart(x: jax.Array, *masks_and_shifts: int) -> jax.Array:
    """Moves the bits of `x` apart, step by step: those of the upper half up by the shift, to the mask."""
    for mask, shift in zip(masks_and_shifts[::2], masks_and_shifts[1::2], strict=True):
        x = (x | _up(x, shift)) & _mask(mask)
    return x


def _field(word: jax.Array, shift: int, mask: int) -> jax.Array:
    return (_down(word, shift) if shift else word) & _mask(mask)


def _up(word: jax.Array, by: int) -> jax.Array:
    return word << _mask(by)


def _down(word: jax.Array, by: int) -> jax.Array:
    return word >> _mask(by)


def _mask(number: int) -> jax.Array:
    return jnp.uint32(number)
