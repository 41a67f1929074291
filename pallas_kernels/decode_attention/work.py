"""How a layer's rows are divided among programs: equal shares of all rows, wherever heads begin and end.

All rows of all heads stand in one line, cut into units (pages of a paged cache, tiles of a dense one). Each
program takes as many units as any other, and so the time follows the rows that there are, not the longest
head. A program goes over the heads that its share touches; what it finds of one is a piece:

    heads       |   0   |1|       2         |3|        a piece of program i and head j lies in slot i + j
    programs    |  0  |  1  |  2  |  3  |  4  |        (each step to the right raises one of the two)
    slots        0     1 2 3 4     5     6 7

A head's pieces lie in neighbouring slots, which a second step merges in their order: no atomics, and equal
numbers from equal input. A head without rows has no piece.

Letters: B requests, K key heads, J = B K heads, S rows of a dense cache, P pages, C rows a page.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Gpu:
    """multiprocessors: of the largest GPU of its kind; shared: KB of memory of one multiprocessor."""

    multiprocessors: int
    shared: int


GPUS = {(8, 0): Gpu(108, 164), (8, 9): Gpu(128, 100), (9, 0): Gpu(132, 228), (10, 0): Gpu(148, 228)}


def gpu_of(capability: tuple[int, int] | None) -> Gpu:
    """The GPU of this compute capability; a Hopper for None, and a small one of those that are not known."""
    return GPUS.get(capability or (9, 0), Gpu(84, 100))


class Work(NamedTuple):
    """The rows of each head, and where its units stand in the line of all."""

    units: jax.Array  # int32 [J + 1]: the first unit of each head, and where the last one's end
    first: jax.Array  # int32 [J]: a head's first row in the pool
    end: jax.Array  # int32 [J]: behind its last one


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the line of units is cut. unit: rows of one; multiple: units that are not divided."""

    programs: int
    unit: int
    multiple: int

    def size(self, start: Any, end: Any) -> Any:
        """Units that a program takes, of those from start to end."""
        step = self.programs * self.multiple
        return (end - start + step - 1) // step * self.multiple

    def first_and_size(self, units_ref: Any, J: int) -> tuple[Any, Any]:
        """The first unit of all, and how many a program takes."""
        start = units_ref[0]
        return start, self.size(start, units_ref[J])

    def slots(self, J: int) -> int:
        """Places for pieces."""
        return self.programs + J - 1


def head_of(units_ref: Any, unit: Any, J: int) -> Any:
    """How many heads end at or before a unit: the head that it belongs to, by halving."""

    def halve(_, bounds):
        low, high = bounds  # the answer lies in low .. high
        middle = jax.lax.div(low + high, 2)
        behind = units_ref[jnp.minimum(middle + 1, J)] <= unit
        more = low < high
        low, high = (
            jnp.where(more & behind, middle + 1, low),
            jnp.where(more & jnp.logical_not(behind), middle, high),
        )
        return low, high

    return jax.lax.fori_loop(0, J.bit_length(), halve, (jnp.int32(0), jnp.int32(J)))[0]


def of_pages(page_offsets: Int[Array, " offsets"], page_lengths: Int[Array, " P"], C: int) -> Work:
    """A unit is a page. All pages of a head but its last are full."""
    first, end = page_offsets[:-1], page_offsets[1:]
    last = page_lengths[jnp.maximum(end - 1, 0)]
    return Work(page_offsets, first * C, jnp.where(end > first, (end - 1) * C + last, first * C))


def of_rows(
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    *,
    K: int,
    window: int | None,
    unit: int,
) -> Work:
    """A unit is so many rows of a request, from the first that any of its queries sees to the last."""
    (B, S), int32 = key_positions.shape, jnp.int32
    seen = (key_positions >= 0) & (key_positions <= positions.max(1, keepdims=True))
    if window is not None:
        seen = seen & (key_positions > positions.min(1, keepdims=True) - window)
    row = jnp.arange(S, dtype=int32)[None]
    end = jnp.where(seen, row + 1, 0).max(1)
    first = jnp.minimum(jnp.where(seen, row, S).min(1), end)
    units = jnp.cumsum(jnp.repeat(-(-(end - first) // unit), K), dtype=int32)
    start = jnp.arange(B * K, dtype=int32) * S
    zero = jnp.zeros((1,), int32)
    return Work(jnp.concatenate([zero, units]), start + jnp.repeat(first, K), start + jnp.repeat(end, K))
