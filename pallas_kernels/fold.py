"""A few rows times a weight in codes, as XLA's CPU compiler makes fast loops of it.

Where codes are unpacked into an array, neighbouring codes of a word become neighbouring numbers, which XLA's
loops on a CPU do one by one. Here the codes stay where they are: with K inputs cut into R terms of C numbers,
in whatever order suits the words,

    partial[n, c] = sum over r of w[n, r, c] x[r, c]        one loop over c: words, shifts, masks, 8 lanes
    y[n] = sum over c of partial[n, c]                      a dot with ones

so that only sums are stored, a 32nd of the weights. All terms depend on x: a decoding loop has nothing to
unpack ahead of time. What bounds it is XLA's loop of 8 lanes. Of 3 bits two fields are added, of a table all
but one of its levels are selected away, so these stay behind 4 affine bits (`benchmarks/low_bits.py`).

Letters: M rows of x, K inputs, N outputs, R terms, C numbers a term, n outputs.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Int32, UInt32

from pallas_kernels.dot import tie
from pallas_kernels.words import parts

FEW_ROWS = 8  # of x: each is folded by itself, where unpacking would serve all
LANES = 8  # sums that go on side by side


def folded(
    x: Float[Array, "M R C"],
    operands: tuple[jax.Array, ...],
    apart: Callable[..., tuple[jax.Array, ...]],
    partial_sums: Callable[[tuple[jax.Array, ...], Float[Array, "R C"]], jax.Array],
) -> Float[Array, "M N"]:
    """Float32 products of the rows of x with a weight.

    apart(*operands): arrays in which what is read side by side lies side by side, copies that wait for x.
    partial_sums(arrays, one row of x) gives [N, C]. Both are called while tracing.
    """
    # subtle: what depends on codes alone would be taken out of the loop over rows, or one around all; and the
    # copies would be made for all layers ahead, were they not tied to x in the step that makes them
    x, operands = jax.lax.optimization_barrier((x.astype(jnp.float32), operands))
    copies = tie(x, apart(*operands))

    def product(row):
        row, arrays = jax.lax.optimization_barrier((row, copies))
        return sum_of_rows(jax.lax.optimization_barrier(partial_sums(arrays, row)))

    # each row would be compiled, were it not for the loop
    return product(x[0])[None] if len(x) == 1 else jax.lax.map(product, x)


def sum_of_rows(partial: Float[Array, "n C"]) -> Float[Array, " n"]:
    """subtle: a reduction here would be merged with what it sums, into a loop that goes number by number."""
    ones = jnp.ones((partial.shape[1],), jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(partial, ones, (((1,), (0,)), ((), ())), precision=highest)


def words_apart(codes: UInt32[Array, "n C words"]) -> tuple[UInt32[Array, "n C"], ...]:
    """The first word of all blocks, the second of all, and so on."""
    return tuple(codes[:, :, i] for i in range(codes.shape[2]))


def blocks_of_32(x: Float[Array, "*B K"]) -> Float[Array, "M 32 C"]:
    """Rows with the inputs of a block of 32 apart: term r has input r of every block; zeros fill up."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % 32)))
    return rows.reshape(rows.shape[0], -1, 32).swapaxes(1, 2)


class Field(NamedTuple):
    """Where a part of a code lies in a block of words, and what it is worth."""

    word: int
    shift: int
    width: int
    input: int  # of the 32 of a block
    worth: float


def packed_fields(bits: int) -> list[Field]:
    """All parts of the 32 codes in a block of `bits` words (`words.py`)."""
    found, word, below = [], 0, bits
    for p in parts(bits):
        below -= p
        for i in range(p):
            found += [Field(word, p * j, p, i * (32 // p) + j, 2.0**below) for j in range(32 // p)]
            word += 1
    return found


def packed_inputs(x: Float[Array, "*B K"], bits: int) -> Float[Array, "M R C"]:
    """Rows of x as `packed_sums` reads them: an input for each field, divided by the field's place.

    subtle: so a code is masked where it stands, and never shifted. Exact unless it underflows. The highest
      field of a word is shifted, as it would not fit a signed number; a single bit chooses x or 0.
    """
    of = packed_fields(bits)
    factors = [f.worth / 2.0**f.shift if 1 < f.width and f.shift + f.width < 32 else f.worth for f in of]
    order, factor = np.array([f.input for f in of]), np.array(factors, np.float32)
    return blocks_of_32(x)[:, order] * factor[None, :, None]


def packed_sums(words: tuple[UInt32[Array, "n C"], ...], x: Float[Array, "R C"]) -> Float[Array, "n C"]:
    """For each block of 32 codes the sum of codes times inputs: of `words_apart` and `packed_inputs`."""
    terms = []
    for r, f in enumerate(packed_fields(len(words))):
        word, mask = words[f.word], np.uint32((2**f.width - 1) << f.shift)
        if f.width == 1:
            terms.append(jnp.where((word & mask) != 0, x[r][None], np.float32(0)))
        else:
            code = word & mask if f.shift + f.width < 32 else word >> np.uint32(f.shift)
            terms.append(code.astype(jnp.int32).astype(jnp.float32) * x[r][None])
    return added(terms)


def added(terms: list[jax.Array]) -> jax.Array:
    """Their sum, some sums side by side: in one, each addition would wait for the one before.

    Not for trees of selections, which would hold too many numbers at once.
    """
    lanes = [functools.reduce(operator.add, terms[i::LANES]) for i in range(min(LANES, len(terms)))]
    return functools.reduce(operator.add, lanes)


def chosen(masks: list[jax.Array], levels: list[jax.Array]) -> jax.Array:
    """The level that the bits of a code point to, lowest bit first: a tree of selections."""
    for mask in masks:
        levels = [jnp.where(mask, levels[i + 1], levels[i]) for i in range(0, len(levels), 2)]
    return levels[0]


def in_pairs(table: Float16[Array, "N levels"]) -> tuple[UInt32[Array, "N pairs"], Float32[Array, " N"]]:
    """Levels two to a word, the odd one above, each row times a power of two; and what takes that back.

    A row's greatest level becomes 2**14 to 2**15, so that one which is not a normal float16 then, and counts
    as 0, is below the greatest by 2**-28.
    """
    magnitudes = jax.lax.bitcast_convert_type(table, jnp.uint16) & np.uint16(0x7FFF)
    greatest = jax.lax.bitcast_convert_type(magnitudes.max(axis=1), jnp.float16)
    exponent = jnp.maximum(_biased_exponent(greatest), 103)  # of the least float16 that is not 0
    scaled = (table.astype(jnp.float32) * _power_of_two(268 - exponent)[:, None]).astype(jnp.float16)
    bits = jax.lax.bitcast_convert_type(scaled, jnp.uint16).astype(jnp.uint32)
    not_finite = jnp.where(jnp.isfinite(greatest), np.float32(0), np.float32(np.nan))
    return bits[:, 0::2] | (bits[:, 1::2] << 16), _power_of_two(exponent - 14) + not_finite


def _biased_exponent(x: Float[Array, "*B"]) -> Int32[Array, "*B"]:
    """126 and what frexp gives, of numbers that are not negative; 0 of 0."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 23


def _power_of_two(biased: Int32[Array, "*B"]) -> Float32[Array, "*B"]:
    """2**(biased - 127)."""
    return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def chosen_of_pairs(masks: list[jax.Array], pairs: list[jax.Array]) -> Float32[Array, "n C"]:
    """The level that the bits of a code point to, lowest bit first, times 2**-112: of 16 levels 8 selections.

    The bits of a float16 as those of a float32, whose exponent counts from 112 lower.
    """
    word = chosen(masks[1:], pairs)
    word = jnp.where(masks[0], word, word << 16)
    spread = jax.lax.bitcast_convert_type(word, jnp.int32) >> 3  # the sign fills the exponent's upper bits
    bits = jax.lax.bitcast_convert_type(spread, jnp.uint32) & np.uint32(0x8FFFE000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def to_exponent(x: Float[Array, "M K"], exponent: int) -> tuple[Float32[Array, "M K"], Float32[Array, "M 1"]]:
    """Each row times a power of two, its greatest number below 2**exponent then, and what takes that back.

    At most 2**126. Others may become infinite where the greatest is.
    """
    x = x.astype(jnp.float32)
    own = jnp.maximum(_biased_exponent(jnp.abs(x).max(axis=1, keepdims=True)), exponent)
    return x * _power_of_two(exponent + 253 - own), _power_of_two(own + 1 - exponent)
