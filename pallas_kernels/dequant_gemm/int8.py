"""Activations as whole numbers of 8 bits, and codes as bytes, for tensor cores that multiply and add exactly.

Words are taken as bytes, a byte as it is: with parts of p bits it holds F = 8 / p codes, and

    T_f = byte & (255 << p f) = sum over g >= f of 2**(p g) code_g                       f = 0 .. F - 1
    sum over f of T_f y_f = sum over g of code_g x_g          where y_0 + .. + y_g = 2**(-p g) x_g

so that nothing is shifted: one instruction masks the bytes of a word (and makes them signed, T - 128). Each
part of a code is a product of its own, with x in its order and times its place, so that nothing is joined.

x is a whole number times a unit, a power of two, for each row and step of k inputs: 20 to 24 bits below the
power of two above the greatest (`precision`). Then y are whole numbers of 32 bits, each 4 digits to the base
of 256, -128 to 127. The digits of a row are columns of the product, which cost nothing where a tile of
8 columns is filled with zeros otherwise. So are the groups of a step: the columns of one have zeros for x of
others, so that one product may go over several groups.

Letters: M rows of x, K inputs, k inputs of a step, C columns of the product.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels.compat import output
from pallas_kernels.words import parts

DIGITS = 4
COLUMNS = 8  # what tensor cores multiply at once
LEAST_BYTES = 16  # of a row's part in a step: half of what tensor cores add up at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The p bits of a code that have `below` others beneath, in words of a block from `word` on."""

    p: int
    word: int
    below: int


def parts_of(bits: int) -> tuple[Part, ...]:
    """The parts of codes."""
    out, word = [], 0
    for p in parts(bits):
        word += p
        out.append(Part(p=p, word=word - p, below=bits - word))
    return tuple(out)


def least_step(bits: int) -> int:
    """Inputs of the shortest step."""
    return max(32, 8 * LEAST_BYTES // parts(bits)[-1])


def groups_of_step(k: int, group_size: int, K: int) -> int:
    """The most groups that a step has inputs of."""
    if group_size >= K or group_size % k == 0:
        return 1
    return k // group_size if k % group_size == 0 else pl.cdiv(k - 1, group_size) + 1


def tiles_of(m: int, k: int, group_size: int, K: int) -> int:
    """Tiles of 8 columns of the product that m rows of x take."""
    return pl.cdiv(m * DIGITS * groups_of_step(k, group_size, K), COLUMNS)


def precision(bits: int) -> tuple[int, int]:
    """Bits of an activation below the greatest, and how many more are kept for what y divides x by."""
    more = max(8 - part.p - part.below for part in parts_of(bits))
    return min(24, 30 - more - parts_of(bits)[0].below), more  # y is up to 1.5 * 2**30


def in_digits(
    x: Float[Array, "M K"], *, bits: int, k: int, group_size: int, m: int, interpret: bool
) -> tuple[Int8[Array, "parts C K2"], Float32[Array, "steps 4 C"]]:
    """Digits in the order of each part, and of each step and column start, total, unit, and nothing.

    start: what is added to the sum of a column, as bytes are less 128. total: of x, negative, what the zero
      point is multiplied by. unit: of the sum, no number where a row of x is not finite; the others are whole
      multiples of it below 2**24.

    Columns: of each m rows of x, group by digit by row, zeros up to a multiple of 8. A kernel, as XLA would
    take nine for it.
    """
    M, K = x.shape
    steps, tiles, orders = pl.cdiv(K, k), pl.cdiv(M, m), len(parts_of(bits))
    C = tiles * COLUMNS * tiles_of(m, k, group_size, K)
    return pl.pallas_call(
        functools.partial(_kernel, bits=bits, k=k, group_size=group_size, m=m),
        out_shape=(output((orders, C, steps * k), jnp.int8, x), output((steps, 4, C), jnp.float32, x)),
        grid=(steps, tiles * m, C // (tiles * m * DIGITS)),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="dequant_gemm_digits",
    )(x)


def _kernel(x_ref, digits_ref, factors_ref, *, bits: int, k: int, group_size: int, m: int):
    """Program (step, row, group); rows behind M are zeros, and so are groups that a step does not have."""
    (M, K), C = x_ref.shape, factors_ref.shape[2]
    i, row, h = (pl.program_id(axis) for axis in range(3))
    of_tile = C // pl.cdiv(M, m)
    column = lax.div(row, m) * of_tile + h * (DIGITS * m) + lax.rem(row, m)

    def inputs(at):
        real = (at < K) & (row < M)
        return plt.load(x_ref.at[row, at], mask=real, other=jnp.zeros((), x_ref.dtype)).astype(jnp.float32)

    below, more = precision(bits)
    up, unit = _units(jnp.max(jnp.abs(inputs(i * k + jnp.arange(k, dtype=jnp.int32)))), below)
    starts: list[Any] = [0] * DIGITS
    totals: list[Any] = [0] * DIGITS
    for order, part in enumerate(parts_of(bits)):
        F = 8 // part.p
        before: Any = 0
        for f in range(F):
            byte = jnp.arange(k // F, dtype=jnp.int32)
            at = i * k + byte * F + f
            own = lax.div(at, group_size) - lax.div(i * k, group_size) == h
            u = jnp.floor(jnp.where(own & ~jnp.isnan(unit), inputs(at) * up, 0.0) + 0.5).astype(jnp.int32)
            y = u << (more + part.below - part.p * f)
            for d, digit in enumerate(_digits(y - before)):
                place = i * k + f * (k // F) + byte
                plt.store(digits_ref.at[order, column + d * m, place], digit.astype(jnp.int8))
                starts[d] += digit.sum()
            before = y
            if order == 0:
                totals = [t + digit.sum() for t, digit in zip(totals, _digits(u << more), strict=True)]
    for d in range(DIGITS):
        start, total = ((a[d] * of).astype(jnp.float32) for a, of in ((starts, 128), (totals, -1)))
        unit_of_d = unit * float(2.0 ** (8 * d - more))
        for which, factor in enumerate((start * unit_of_d, total * unit_of_d, unit_of_d, jnp.float32(0))):
            plt.store(factors_ref.at[i, jnp.int32(which), column + d * m], factor)


def _units(most: jax.Array, below: int) -> tuple[jax.Array, jax.Array]:
    """2**below over the power of two above a number; one over that, NaN where it is not finite."""
    exponent = lax.bitcast_convert_type(most, jnp.int32) >> 23  # 2**(exponent - 126) is above
    clear = jnp.maximum(exponent, 2 * below)  # of subnormal units, with what they are still divided by
    up = lax.bitcast_convert_type((253 + below - clear) << 23, jnp.float32)
    down = lax.bitcast_convert_type((clear + 1 - below) << 23, jnp.float32)
    return up, jnp.where(exponent < 255, down, jnp.nan)


def _digits(y: jax.Array) -> list[jax.Array]:
    """The digits of whole numbers, lowest first."""
    out = []
    for _ in range(DIGITS):
        out.append(((y + 128) & 255) - 128)
        y = (y - out[-1]) >> 8
    return out
