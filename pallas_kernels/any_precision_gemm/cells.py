"""Planes of bits made ready for the look-up, as `pallas_kernels.codebook_gemm.cells` has them. Exact.

A word of each plane holds one bit of 32 codes. Up to 4 bits, the cells of the codes at every fourth place are
made of planes that are turned until a code's three lower bits are neighbours; such cells begin at bit 0, 1, 2
or 3 of a nibble, and what makes selectors of them, a shift by 16 bits, turns them back, too.

Of more bits, merging two planes gives pairs of bits, two words of even and odd codes; merging those gives
four, and eight: two shifts and two choices a pair of words and step, whatever the number of codes in them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.codebook_gemm.cells import Cells, Instructions, Order, fourth_bits

Choose = Callable[[jax.Array, jax.Array | int, int], jax.Array]
ORDER: Order = (2, 2, 2, 4), (3, 0, 2, 1)  # of every width, so that inputs lie alike for all


def cells(planes: Sequence[jax.Array], instructions: Instructions) -> Cells:
    """The cells of words of as many planes as there are bits, the highest first; arrays of one shape."""
    choose = instructions.choose
    if len(planes) > 4:
        found: Cells = []
        low = _nibbles(planes[-4:], choose)
        for j, (upper, lower) in enumerate(zip(_nibbles(planes[:-4], choose), low, strict=True)):
            for r, word in enumerate(_merge(upper, lower, 4, choose)):
                found.append(((word,), (4 * j + r, 4 * j + 2 + r)))
        return found
    found = []
    for j, word in enumerate(_three_bits(planes[-3:], choose)):
        selectors: tuple[jax.Array, ...] = _turned(word, j), _turned(word, 16 + j)
        if len(planes) == 4:
            selectors += fourth_bits(_turned(planes[0], j - 2), instructions)
        found.append((selectors, tuple(range(4 * j, 4 * j + 4))))
    return found


def _three_bits(planes: Sequence[jax.Array], choose: Choose) -> list[jax.Array]:
    """Codes of up to three planes, word j those of inputs 4 i + j at bits 4 i + j and above, zeros beside."""
    lowest, *above = planes[::-1]
    if not above:
        return [lowest & jnp.uint32(0x11111111 << j) for j in range(4)]
    second = _turned(above[0], -1)
    # Two bits of codes of even places, and of odd ones; the third goes between them.
    even, odd = choose(lowest, second, 0x55555555), choose(second, lowest, 0x55555555)
    masks = [0x33333333, 0x66666666, 0xCCCCCCCC, 0x99999999]
    if len(above) == 1:
        return [two & jnp.uint32(mask) for two, mask in zip((even, odd, even, odd), masks, strict=True)]
    third = _turned(above[1], -2)
    thirds = third & jnp.uint32(0x55555555), third & jnp.uint32(0xAAAAAAAA)
    return [choose((even, odd)[j % 2], thirds[j % 2], mask) for j, mask in enumerate(masks)]


def _turned(word: jax.Array, by: int) -> jax.Array:
    """Rotated to the right."""
    by %= 32
    return (word >> jnp.uint32(by)) | (word << jnp.uint32(32 - by)) if by else word


def _nibbles(planes: Sequence[jax.Array], choose: Choose) -> list[jax.Array]:
    """Codes of up to four planes, word j those of inputs 4 i + j."""
    upper = _pairs(planes[:-2], choose) if len(planes) > 2 else (None, None)
    lower = _pairs(planes[-2:], choose)
    even, odd = (_merge(high, low, 2, choose) for high, low in zip(upper, lower, strict=True))
    return [even[0], odd[0], even[1], odd[1]]


def _pairs(planes: Sequence[jax.Array], choose: Choose) -> tuple[jax.Array, jax.Array]:
    """Codes of one or two planes, of even and odd inputs."""
    return _merge(planes[0] if len(planes) == 2 else None, planes[-1], 1, choose)


def _merge(high: jax.Array | None, low: jax.Array, by: int, choose: Choose) -> tuple[jax.Array, jax.Array]:
    """Fields of `by` bits to fields of twice as many: those of the even, and those of the odd."""
    mask = {1: 0x55555555, 2: 0x33333333, 4: 0x0F0F0F0F}[by]
    shift = jnp.uint32(by)
    if high is None:
        return low & jnp.uint32(mask), (low >> shift) & jnp.uint32(mask)
    return choose(low, high << shift, mask), choose(low >> shift, high, mask)
