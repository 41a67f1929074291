"""A few rows on a CPU: a tree of selections over the bits of codes, where they stand (`fold`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, UInt32

from pallas_kernels.fold import (
    FEW_ROWS,
    blocks_of_32,
    chosen,
    chosen_of_pairs,
    folded,
    in_pairs,
    packed_fields,
    to_exponent,
    words_apart,
)
from pallas_kernels.words import CODES_PER_BLOCK

MOST_BITS = 4  # with more, the tree is longer than a look-up


def takes(x: Float[Array, "*B K"], bits: int) -> bool:
    """Whether it is the faster way here: a CPU, few rows, small tables."""
    return jax.default_backend() == "cpu" and bits <= MOST_BITS and 0 < x.size <= FEW_ROWS * x.shape[-1]


@jax.jit  # a model has few shapes: each is traced once
def codebook_gemm(
    x: Float[Array, "*B K"], codes: UInt32[Array, "N blocks bits"], table: Float16[Array, "N levels"]
) -> Float[Array, "*B N"]:
    """The product, levels times float32 inputs."""
    N, _, bits = codes.shape
    places = bit_places(bits)

    def masks(words, r):
        return [(words[word] & np.uint32(1 << at)) != 0 for word, at in places[r]]

    y = by_levels(x.reshape(-1, x.shape[-1]), codes, levels_of(table), words_apart, masks)
    return y.reshape(*x.shape[:-1], N)


Levels = tuple[jax.Array, jax.Array | None]


def levels_of(table: Float16[Array, "N levels"]) -> Levels:
    """A table as it is read: of 16 levels in pairs with an exponent, of fewer as it is.

    It depends on the table alone: made outside of a loop, or of a branch in it, it is made once.
    """
    # Of fewer levels the tree is no longer than the way by pairs.
    return in_pairs(table) if table.shape[1] == 2**MOST_BITS else (table, None)


def by_levels(
    x: Float[Array, "M K"],
    codes: UInt32[Array, "..."],
    ready: Levels,
    words: Callable[[jax.Array], tuple[jax.Array, ...]],
    masks: Callable[[tuple[jax.Array, ...], int], list[jax.Array]],
) -> Float[Array, "M N"]:
    """Products with the levels that codes point to.

    words(codes): [N, C] each. masks(words, r): the bits of input r of each block of 32, lowest first.
    """
    levels, of_table = ready
    if of_table is not None:
        x, of_x = to_exponent(x, 97)  # times 2**15 from the table and 2**-112 from the bits: in the middle
    else:
        levels = levels.astype(jnp.float32)
    select = chosen if of_table is None else chosen_of_pairs

    def partial_sums(arrays, row):
        *of_codes, levels = arrays
        by_code = [levels[:, i, None] for i in range(levels.shape[1])]
        sums = jnp.zeros(of_codes[0].shape, jnp.float32)
        for r in range(CODES_PER_BLOCK):
            sums = sums + select(masks(tuple(of_codes), r), by_code) * row[r][None]
        return sums

    def apart(codes, levels):
        return *words(codes), levels

    y = folded(blocks_of_32(x), (codes, levels), apart, partial_sums)
    if of_table is not None:
        y = y * np.float32(2.0**112) * of_table[None] * of_x  # in an order that does not overflow between
    return y


def bit_places(bits: int) -> list[list[tuple[int, int]]]:
    """Word and bit of each bit, the lowest first, of each of the 32 codes in a block."""
    places: list[list[tuple[int, int]]] = [[] for _ in range(32)]
    for field in reversed(packed_fields(bits)):  # parts from the low end
        places[field.input] += [(field.word, field.shift + b) for b in range(field.width)]
    return places
