"""Farthest point sampling on a CPU: many picks a round, in blocks of neighbouring points. Exact.

The definition (`reference.py`) needs m dependent steps over all points. Here D(p) is the squared distance of
p to the picks so far, "p comes before q" means D(p) > D(q), or equal and a lower index, and q may be picked
*now*, whatever its turn, if

    |p - q|^2 >= D(p) for every p that comes before q.                                                  (1)

Why this is exact: whatever the definition picks before q comes before q today, as D never grows and D(q)
stays what it is, by (1), until q's turn. So q will be picked, with today's D(q). And q lowers no D(p) of a p
that comes before it, by (1) again; those that it lowers come after q, so that q's turn is over when theirs
comes. All q of a round that satisfy (1) are picked at once. The picks, sorted by (distance descending, index
ascending), are the definition's, as far as they come before the farthest point that is left; the others,
some per cent, are dropped.

Points are cut into C blocks of neighbours (`build`), each with its bounding box. A candidate is the farthest
point of its block; (1) is tested with the boxes of the blocks whose farthest comes before q: only the E
blocks with the highest can, if q is among them. A block takes the picks whose distance to its box is less
than its highest D. The distance to a box is computed in the roundings of the distance between points, each
of which is monotone, so that it is never above the computed distance to a point of the box: the tests are
exact in float32 as well.

Letters: N points, D coordinates, C blocks of n points (arrays are [n, C], so that a vector's lanes are
blocks), E candidates, m picks.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.distance import runtime_zero, squared_distance

WORD = 32  # candidates a word of bits
MAX_POINTS = 2**24  # indices are sorted as float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """blocks: C, a power of two; candidates: E of a round, a multiple of 32; per_pass: picks that a block
    takes in one pass over the points."""

    blocks: int
    candidates: int
    per_pass: int = 2


def default_tile(N: int) -> Tile:
    """About 128 points a block; more blocks repay the tests of more candidates. Measured on a Xeon."""
    blocks = max(WORD, 2 ** round(math.log2(max(N, 2) / 128)))
    return Tile(blocks=blocks, candidates=min(blocks, 32 if N <= 20000 else 64 if N <= 80000 else 128))


@functools.partial(jax.jit, static_argnames=("m", "return_minimum", "tile"))
def sample(
    points: Float[Array, "N D"],
    minimum: Float[Array, " N"],
    m: int,
    *,
    return_minimum: bool = True,
    tile: Tile | None = None,
) -> tuple[Int32[Array, " m"], Float[Array, " m"], Float[Array, " N"] | None]:
    """As `reference.sample` of one cloud; past the last pick with a distance, index 0 and distance 0.

    return_minimum: takes some tenths longer, since the picks that were dropped have lowered minima too, so
      that the others are applied again. N is at most `MAX_POINTS`.
    """
    N, _ = points.shape
    tile = default_tile(N) if tile is None else tile
    C, E = tile.blocks, min(tile.candidates, tile.blocks)
    if C < WORD or C & (C - 1) or E % WORD:
        raise ValueError(f"farthest_point_sampling: blocks are 2^i, candidates come in {WORD}s, got {tile=}")
    where = list(points.T)  # D times [N]
    zero = runtime_zero(points)
    blocks = build(where, minimum, C, zero)
    room = m + max(m // 4, 4 * E)  # picks that are dropped in the end need a place too

    def is_short(state):
        """Whether one of the first m picks is still to come."""
        far, top, distances, indices, count = state
        highest = jnp.max(top)

        def some_are_late():
            index = jnp.min(jnp.where(far == highest, blocks.ids, N))
            before = _comes_before(distances, indices, highest, index)
            return jnp.sum(before & (jnp.arange(room + E) < count), dtype=jnp.int32) < m

        return (highest > 0) & lax.cond(count >= m, some_are_late, lambda: jnp.bool_(True))

    def turn(state):
        far, top, distances, indices, count = state
        value, index, block, valid = _candidates(blocks.ids, far, top, E)
        q = [v[index] for v in where]
        before = _comes_before(value[:, None], index[:, None], value[None], index[None])
        reach = blocks.to_boxes([v[None] for v in q], block[:, None])  # [of whose box, of which point]
        chosen = valid & ~(before & (reach < value[:, None])).any(0)
        order, number = _chosen_first(chosen)
        distances = lax.dynamic_update_slice(distances, value[order], (count,))
        indices = lax.dynamic_update_slice(indices, index[order], (count,))
        far, top = blocks.take(far, top, q, chosen, tile.per_pass)
        return far, top, distances, indices, count + number

    def turns(state):
        """Rounds until all is done or the room is used up, then the best m picks alone."""
        state = lax.while_loop(lambda s: is_short(s) & (s[-1] <= room), turn, state)
        value, index = _in_order(*state[2:])
        return *state[:2], value, index, jnp.minimum(state[-1], m)

    none = jnp.full(room + E, zero)  # which varies over a mesh as the points do
    empty = none, none.astype(jnp.int32), zero.astype(jnp.int32)
    state = turns((blocks.far, _highest(blocks.far), *empty))
    _, _, value, index, _ = lax.while_loop(is_short, turns, state)
    value, index = value[:m], index[:m]
    if not return_minimum:
        return index, value, None
    return index, value, _minimum_after(blocks, where, index, jnp.sum(value > 0, dtype=jnp.int32), E, tile)


def _comes_before(value, index, than_value, than_index):
    return (value > than_value) | ((value == than_value) & (index < than_index))


def _in_order(distances, indices, count):
    """Picks by (distance descending, index ascending); behind them zeros."""
    live = jnp.arange(distances.size) < count
    value, index = lax.sort((jnp.where(live, -distances, jnp.inf), indices), num_keys=2)
    return jnp.where(value < jnp.inf, -value, jnp.float32(0)), jnp.where(value < jnp.inf, index, 0)


def _lesser(a, b):
    return jnp.where(b < a, b, a)  # jnp.minimum hands on NaN, which takes XLA:CPU three instructions


def _greater(a, b):
    return jnp.where(b > a, b, a)


def _highest(far: Float[Array, "n C"]) -> Float[Array, " C"]:
    return lax.reduce(far, jnp.float32(-1), _greater, (0,))


def _candidates(ids, far, top, E):
    """The blocks whose farthest point comes first: its D and index, the block, whether (1) can be tested.

    subtle: `top_k` goes by D alone. Where the last of E ties with a block that is left out, a blocker may be
      missing, and those that tie with it cannot be tested. If all tie, the E with the lowest indices can.
    subtle: XLA:CPU sorts instead if single elements of what `top_k` gives are taken.
    """
    index = jnp.min(jnp.where(far == top[None], ids, jnp.int32(2**30)), axis=0)
    value, block = lax.top_k(top, E)
    if E == top.size:
        return value, index[block], block, value > 0
    highest, last = jnp.max(value), jnp.min(value)

    def by_index():
        key, tied = lax.top_k(jnp.where(top == highest, -index.astype(jnp.float32), -jnp.inf), E)
        return tied, key > -jnp.inf

    block, valid = lax.cond(highest == last, by_index, lambda: (block, value > last))
    value = top[block]
    return value, index[block], block, valid & (value > 0)


def _chosen_first(chosen):
    """An order with the chosen in front, behind them anything; their number. A sort would take longer."""
    number = jnp.arange(chosen.size)
    place = jnp.sum(chosen[:, None] & (number[:, None] < number[None]), axis=0, dtype=jnp.int32)
    is_at = chosen[:, None] & (place[:, None] == number[None])
    return jnp.sum(jnp.where(is_at, number[:, None], 0), axis=0), jnp.sum(chosen, dtype=jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["x", "lo", "hi", "ids", "far", "zero"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Points in blocks: D coordinates x [n, C], boxes lo and hi [C], indices (N and up: no point) and D."""

    x: list[Float[Array, "n C"]]
    lo: list[Float[Array, " C"]]
    hi: list[Float[Array, " C"]]
    ids: Int32[Array, "n C"]
    far: Float[Array, "n C"]
    zero: Float[Array, ""]

    def to_boxes(self, q, block=None):
        """Squared distance of points to these boxes, [1, C] of all."""
        lo, hi = ([v[None] if block is None else v[block] for v in side] for side in (self.lo, self.hi))
        inside = [_lesser(_greater(v, low), high) for v, low, high in zip(q, lo, hi, strict=True)]
        return squared_distance(q, inside, self.zero)

    def take(self, far, top, q, chosen, per_pass):
        """D of all points, and its maximum in each block, after those of the points q that are chosen."""
        C = top.size
        hit = chosen[:, None] & (self.to_boxes([v[:, None] for v in q]) < top[None])
        bits = (
            hit.reshape(-1, WORD, C).astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)[None, :, None]
        )
        words = tuple(jnp.sum(bits, axis=1, dtype=jnp.uint32))  # picks that a block takes
        padded = [jnp.append(v, jnp.inf) for v in q]

        def turn(state):
            words, far = state
            for _ in range(per_pass):
                words, number = _next_bit(words)
                pick = [v[number][None] for v in padded]
                far = _lesser(far, squared_distance(self.x, pick, self.zero))
            return words, far

        def some_left(state):
            return functools.reduce(jnp.bitwise_or, state[0]).any()

        _, far = lax.while_loop(some_left, turn, (words, far))
        return far, _highest(far)


def _next_bit(words):
    """Takes each block's lowest bit: what is left, and its number, that of all bits where there was none."""
    number = jnp.full(words[0].shape, WORD * len(words), jnp.int32)
    rest, free = [], jnp.ones(words[0].shape, bool)
    for w, word in enumerate(words):
        lowest = word & (~word + 1)
        mine = free & (word != 0)
        number = jnp.where(mine, WORD * w + WORD - 1 - lax.clz(lowest).astype(jnp.int32), number)
        rest.append(jnp.where(mine, word ^ lowest, word))
        free = free & ~mine
    return tuple(rest), number


def _minimum_after(blocks, where, index, count, E, tile):
    """D [N] after the first `count` picks and no others."""
    index = jnp.pad(index, (0, -index.size % E))

    def turn(i, state):
        some = lax.dynamic_slice(index, (E * i,), (E,))
        live = E * i + jnp.arange(E) < count
        return blocks.take(*state, [v[some] for v in where], live, tile.per_pass)

    far, _ = lax.fori_loop(0, (count + E - 1) // E, turn, (blocks.far, _highest(blocks.far)))
    N = where[0].size
    return jnp.zeros(N, jnp.float32).at[blocks.ids.ravel()].set(far.ravel(), mode="drop")


def build(where: list[Float[Array, " N"]], minimum: Float[Array, " N"], C: int, zero: jax.Array) -> Blocks:
    """C blocks of equal size: cut up to 16 ways along the longest side of its box, and each part again.

    Points with a negative minimum are in no box, and stand behind the others.
    """
    N, D = where[0].size, len(where)
    n = -(-N // C)
    ids = jnp.arange(n * C, dtype=jnp.int32)
    coordinates = jnp.stack([*where, minimum])
    coordinates = jnp.pad(coordinates, ((0, 0), (0, n * C - N)), constant_values=-1)
    parts = 1
    while True:
        sorted_coordinates = coordinates[:, ids].reshape(D + 1, parts, -1)
        *x, far = sorted_coordinates
        lo = [jnp.min(jnp.where(far >= 0, v, jnp.inf), axis=1) for v in x]
        hi = [jnp.max(jnp.where(far >= 0, v, -jnp.inf), axis=1) for v in x]
        if parts == C:
            turned = [v.T for v in x]
            return Blocks(turned, lo, hi, ids.reshape(C, n).T, far.T, zero)
        side = jnp.stack(hi) - jnp.stack(lo)
        longest = jnp.argmax(side, axis=0)[None]
        width = jnp.max(side, axis=0)[:, None]
        start = jnp.take_along_axis(jnp.stack(lo), longest, axis=0)[0][:, None]
        along = jnp.take_along_axis(jnp.stack(x), longest[..., None], axis=0)[0]
        size = along.shape[1]
        bits = max(1, (size - 1).bit_length())  # of a place in its part; a coordinate has the others
        steps = 2 ** (32 - bits) - 2
        step = jnp.clip((along - start) / width * jnp.float32(steps), 0, steps)
        code = jnp.where(far >= 0, step, jnp.float32(0)).astype(jnp.uint32)
        code = jnp.where(far >= 0, jnp.minimum(code, jnp.uint32(steps)), jnp.uint32(steps + 1))
        key = lax.sort((code << bits) | jnp.arange(size, dtype=jnp.uint32)[None], dimension=1)
        place = (key & jnp.uint32(2**bits - 1)).astype(jnp.int32)
        ids = jnp.take_along_axis(ids.reshape(parts, size), place, axis=1).ravel()
        parts *= min(16, C // parts)
