"""Codes to 16-bit floats without taking them apart: what both kernels share.

A word of codes is two halves of 16 bits, and a half has the numbers 16 / bits h + i of its row, h its number
among the halves. Beside an exponent a half's bits read as a float: where digit d has its lowest bit at `at`
of a mantissa of m bits, that is the exponent of 2^(m - at),

    (half & mask) | exponent  =  2^(m - at) + d         exactly

so one instruction makes two numbers of a word, and a shift is needed only where a digit lies above the
mantissa. What is too much is known for each digit, and is taken off the sums:

    bfloat16, 2 bits    at 0, 2, 4, then (shifted by 5) 1, 3, 5, then (by 9) 3, 5
    float16, 4 bits     at 0, 4, then (by 6) 2, 6

A bfloat16 has no room for 8 bits, which are two digits of 4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.assembly import assemble


@dataclasses.dataclass(frozen=True)
class Digit:
    """Bits of a half, shifted, beside an exponent: the float offset + weight * digit, of number `field`."""

    field: int
    shift: int  # to the right
    mask: int
    exponent: int
    offset: int


def fields_of_half(bits: int) -> int:
    """Numbers of 16 bits."""
    return 16 // bits


def digits(bits: int, dtype: Any) -> tuple[Digit, ...]:
    """All digits of a half, the lowest first."""
    info = jnp.finfo(dtype)
    mantissa, width = info.nmant, min(bits, 4) if bits > info.nmant else bits
    found: list[Digit] = []
    while len(found) < 16 // width:
        first = len(found)
        count = min(mantissa // width, 16 // width - first)
        shift = 0 if first == 0 else width * (first + count) - mantissa
        for i in range(first, first + count):
            at, weight = width * i - shift, 2 ** (width * i % bits)
            offset = weight * 2 ** (mantissa - at)
            exponent = (info.maxexp - 2 + offset.bit_length()) << mantissa
            found.append(Digit(width * i // bits, shift, (2**width - 1) << at, exponent, offset))
    return tuple(found)


def offset_of_field(found: tuple[Digit, ...], field: int) -> float:
    """What the sum of a number's digits is too great by."""
    return float(sum(digit.offset for digit in found if digit.field == field))


def floats(halves: jax.Array, found: tuple[Digit, ...], dtype: Any, interpret: bool) -> list[jax.Array]:
    """The floats of each digit, from halves two at a time."""
    if interpret:
        both = [((halves >> d.shift) & d.mask) | d.exponent for d in found]
        return [lax.bitcast_convert_type(x.astype(jnp.uint16), dtype) for x in both]
    moved = {
        shift: assemble(f"shr.b32 $0, $1, {shift};", "=r,r", halves, dtype=jnp.int16, pack=2)
        if shift
        else halves
        for shift in {d.shift for d in found}
    }
    return [
        # (x & mask) | exponent
        assemble(
            f"lop3.b32 $0, $1, {d.mask * 0x10001:#x}, {d.exponent * 0x10001:#x}, 0xEA;",
            "=r,r",
            moved[d.shift],
            dtype=dtype,
            pack=2,
        )
        for d in found
    ]
