"""Weighted k-means on a line, row by row: k-means++ starts, Lloyd's algorithm, the exact optimum.

Nothing but sorting, adding up and looking up the result touches every weight. A row is sorted once; of f, f x
and f x^2 running sums are kept, as pairs of float32 (48 bits); what an interval of places costs under a level
then takes two look-ups, and where a level's interval ends a bisection (as in Any-Precision's own code, there
in float64: github.com/SyphonArch/flash1dkmeans). So a start costs m log K and not m K steps, and the optimum
m K log K and not m K^2.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Key, UInt32

from jaxllm.ops.batches import call_in_batches
from jaxllm.quant.statistics import layer_key

MAX_LLOYD_STEPS = 300  # a hundred are rare
CPU_ROWS = 16  # at once: one program of so many serves all layers of equal K, and more go no faster there
AT_ONCE = 2**22  # numbers of [rows at once, 16, K], or [rows at once, 1024, K] if exact: they stay in cache
KEYS = 1024  # that are made at once: one program for all layers of at most so many rows
BLOCKS = 64  # that running sums are made in, side by side
RADIX = 4  # of the places between two whose best start is known, one in so many is searched next
TILE = 8  # starts that are tried for each of them at once

Part = Float[Array, "..."]  # of a sum
Place = Int[Array, "..."] | int
Sums = Float[Array, "places 2 3"]  # over the first 0 .. K places; high and low parts; of f, f x, f x^2


def row_keys(seed: int, name: str, N: int) -> Key[Array, " N"]:
    """One random key a row of the layer called `name`."""
    return _keys(layer_key(seed, name), count=-(-N // KEYS) * KEYS)[:N]


@functools.partial(jax.jit, static_argnames="count")
def _keys(key: Key[Array, ""], *, count: int) -> Key[Array, " count"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))


def k_means(
    rows: Float[Array, "N K"],
    weights: Float[Array, "N K"],
    keys: Key[Array, " N"],
    *,
    bits: int,
    restarts: int = 8,
    exact: bool = False,
) -> tuple[Int32[Array, "N K"], Float[Array, "N m"]]:
    """Codes and ascending levels of each row that make sum_k weights (rows - level)^2 small.

    weights: positive, as from `importance`. What lies halfway between two levels goes to the upper one. A
    level that nothing uses stays where the search left it.
    """
    solve = functools.partial(solve_rows, m=2**bits, restarts=restarts, exact=exact)
    size = max(1, AT_ONCE // (rows.shape[1] * (1024 if exact else 16)))
    size = min(size, CPU_ROWS) if jax.default_backend() == "cpu" else size
    return call_in_batches(solve, (rows, weights, jax.random.key_data(keys)), size)


@functools.partial(jax.jit, static_argnames=("m", "restarts", "exact"))
def solve_rows(
    given: tuple[Float[Array, "n K"], Float[Array, "n K"], UInt32[Array, "n _"]],
    *,
    m: int,
    restarts: int,
    exact: bool,
) -> tuple[Int32[Array, "n K"], Float[Array, "n m"]]:
    """`k_means` of so many rows at once, of rows, weights and what keys are made of."""
    rows, weights, keys = given
    solve = functools.partial(_solve, m=m, restarts=restarts, exact=exact)
    found = rows.astype(jnp.float32), weights.astype(jnp.float32), jax.random.wrap_key_data(keys)
    return jax.vmap(solve)(*found)


def _solve(
    row: Float[Array, " K"],
    weight: Float[Array, " K"],
    key: Key[Array, ""],
    *,
    m: int,
    restarts: int,
    exact: bool,
) -> tuple[Int32[Array, " K"], Float[Array, " m"]]:
    centre = (row * weight).sum() / weight.sum()
    scale = jnp.abs(row - centre).max()
    scale = jnp.where(scale > 0, scale, 1.0)
    unit = (row - centre) / scale
    x, place = sort(unit)
    f = jnp.zeros_like(weight).at[place].add(weight)
    sums = running_sums(x, f)
    if exact:
        c, _ = lloyd(x, sums, optimum(x, sums, m))
    else:
        trials = 2 + int(math.log(m))
        # subtle: XLA:CPU compiles draws of three axes, of the same numbers, far longer
        u = jax.random.uniform(key, (restarts * m * trials,)).reshape(restarts, m, trials)
        tries, ends = jax.vmap(lambda u: lloyd(x, sums, plus_plus(x, sums, u)))(u)
        c = tries[jnp.argmin(cost(sums, ends[:, :-1], ends[:, 1:], tries).sum(1))]
    return jnp.searchsorted(middles(c), unit, side="right").astype(jnp.int32), c * scale + centre


def sort(x: Float[Array, " K"]) -> tuple[Float[Array, " K"], Int32[Array, " K"]]:
    """The values in ascending order, and of each the first place that has it.

    Weights are added up at these places; other places of a run of one value then have none.
    subtle: XLA sorts one array of integers on a CPU seven times as fast as floats, or two arrays at once.
    """
    key = _ordered_bits(jnp.where(x == 0, 0.0, x))  # -0.0 is 0.0
    ascending = jax.lax.sort(key)
    place = jnp.searchsorted(ascending, key, side="left").astype(jnp.int32)
    return jax.lax.bitcast_convert_type(_flipped(ascending), jnp.float32), place


def _ordered_bits(x: Float[Array, " K"]) -> Int32[Array, " K"]:
    return _flipped(jax.lax.bitcast_convert_type(x, jnp.int32))


def _flipped(bits: Int32[Array, " K"]) -> Int32[Array, " K"]:
    """Bits of a float32 as integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# -- running sums: pairs of float32


def running_sums(x: Float[Array, " K"], f: Float[Array, " K"]) -> Sums:
    """Sums of f, f x and f x^2 over the first 0 .. K places."""
    K = x.shape[0]
    size = -(-K // BLOCKS)
    high, low = product(f * x, x)
    fx, fx_low = product(f, x)
    parts = jnp.stack([jnp.stack([f, fx, high]), jnp.stack([jnp.zeros_like(f), fx_low, low + fx_low * x])])
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, size * BLOCKS - K))).reshape(2, 3, BLOCKS, size)

    def add(before, new):
        now = jnp.stack(pair_sum(*before, *new))
        return now, now

    _, within = jax.lax.scan(add, jnp.zeros((2, 3, BLOCKS)), jnp.moveaxis(parts, 3, 0))
    _, above = jax.lax.scan(add, jnp.zeros((2, 3)), jnp.moveaxis(within[-1], 2, 0))
    above = jnp.moveaxis(jnp.pad(above[:-1], ((1, 0), (0, 0), (0, 0))), 0, 2)[None]  # of the blocks before
    both = jnp.stack(pair_sum(within[:, 0], within[:, 1], above[:, 0], above[:, 1]))  # [2, size, 3, BLOCKS]
    return jnp.pad(both.transpose(3, 1, 0, 2).reshape(-1, 2, 3)[:K], ((1, 0), (0, 0), (0, 0)))


def pair_sum(a: Part, a_low: Part, b: Part, b_low: Part) -> tuple[Part, Part]:
    """The sum of two pairs as a pair: Knuth's two-sum."""
    s = a + b
    t = s - a
    low = (a - (s - t)) + (b - t) + (a_low + b_low)
    high = s + low
    return high, low - (high - s)


def product(a: Part, b: Part) -> tuple[Part, Part]:
    """a b as a pair: Dekker's product."""

    def halves(x):
        t = 4097.0 * x  # 2**12 + 1
        high = t - (t - x)
        return high, x - high

    p, (a1, a2), (b1, b2) = a * b, halves(a), halves(b)
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def between(sums: Sums, start: Place, stop: Place) -> tuple[Part, Part]:
    """The sums of f, f x, f x^2 over places start .. stop - 1, as pairs."""
    a, b = sums[start], sums[stop]
    return pair_sum(b[..., 0, :], b[..., 1, :], -a[..., 0, :], -a[..., 1, :])


def cost(sums: Sums, start: Place, stop: Place, c: Part) -> Part:
    """sum f (x - c)^2 of places start .. stop - 1.

    With D the sums of f, f x, f x^2 there, (D2 - c D1) - c (D1 - c D0).
    """
    high, low = between(sums, start, stop)
    less, less_low = product(high[..., :2], c[..., None])
    less_low = less_low + low[..., :2] * c[..., None]
    t, t_low = pair_sum(high[..., 1:], low[..., 1:], -less, -less_low)  # D1 - c D0, D2 - c D1
    whole, whole_low = product(t[..., 0], c)
    whole_low = whole_low + t_low[..., 0] * c
    return jnp.maximum(sum(pair_sum(t[..., 1], t_low[..., 1], -whole, -whole_low)), 0.0)


def mass_and_mean(sums: Sums, start: Place, stop: Place, origin: Part) -> tuple[Part, Part]:
    """Of places start .. stop - 1 the mass, and the mean from `origin` on: (D1 - origin D0) / D0."""
    high, low = between(sums, start, stop)
    less, less_low = product(high[..., 0], origin)
    moment = sum(pair_sum(high[..., 1], low[..., 1], -less, -less_low - low[..., 0] * origin))
    mass = high[..., 0] + low[..., 0]
    return mass, moment / mass


# -- levels


def middles(c: Float[Array, " m"]) -> Float[Array, " m-1"]:
    return 0.5 * (c[1:] + c[:-1])


def borders(x: Float[Array, " K"], c: Float[Array, " m"]) -> Int32[Array, " m+1"]:
    """Where each level's places begin, and K."""
    inner = jnp.searchsorted(x, middles(c), side="left").astype(jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), inner, jnp.full(1, x.shape[0], jnp.int32)])


def lloyd_step(
    x: Float[Array, " K"], sums: Sums, c: Float[Array, " m"], ends: Int32[Array, " m+1"]
) -> Float[Array, " m"]:
    """The weighted mean of each level's places; a level that has none stays."""
    start, stop = ends[:-1], ends[1:]
    mass, moment, _ = between(sums, start, stop)[0].T
    mean = jnp.clip(moment / mass, x[jnp.minimum(start, x.shape[0] - 1)], x[stop - 1])
    return jnp.where(stop > start, mean, c)


def lloyd(
    x: Float[Array, " K"], sums: Sums, c: Float[Array, " m"]
) -> tuple[Float[Array, " m"], Int32[Array, " m+1"]]:
    """The levels, and their borders, once Lloyd's steps repeat them."""

    def step(state):
        i, _, c, _ = state
        ends = borders(x, c)
        return i + 1, c, lloyd_step(x, sums, c, ends), ends

    def moves(state):
        i, before, c, _ = state
        return (i == 0) | ((i < MAX_LLOYD_STEPS) & (before != c).any())

    none = jnp.zeros(len(c) + 1, jnp.int32)
    return jax.lax.while_loop(moves, step, (0, c, c, none))[1::2]


def plus_plus(x: Float[Array, " K"], sums: Sums, u: Float[Array, "m trials"]) -> Float[Array, " m"]:
    """Greedy k-means++: each next level is the best of a few places drawn, by `u`, by their share of J."""
    K, m = x.shape[0], u.shape[0]
    border = jnp.arange(m + 1, dtype=jnp.int32)
    level = border[:m]

    def bisect(start, stop, c, share):
        """The first place of start .. stop - 1 up to which more than `share` is spent under level c."""

        def halve(_, state):
            low, high = state
            at = (low + high) // 2
            more = cost(sums, start, at + 1, c) > share
            return jnp.where(more, low, jnp.minimum(at + 1, high)), jnp.where(more, at, high)

        return jnp.clip(jax.lax.fori_loop(0, K.bit_length(), halve, (start, stop - 1))[0], 0, K - 1)

    def step(i, state):
        c, ends = state  # i levels and their borders; behind them the last, which has no places
        spent = jnp.cumsum(cost(sums, ends[:-1], ends[1:], c))
        share = u[i] * spent[-1]
        j = jnp.minimum((spent[None] <= share[:, None]).sum(1, dtype=jnp.int32), i - 1)
        share = share - jnp.where(j > 0, spent[j - 1], 0.0)
        v = x[bisect(ends[j], ends[j + 1], c[j], share)]
        right = jnp.where(v < c[j], j, j + 1)  # what stands behind the new level: i where nothing does
        left = jnp.maximum(right - 1, 0)
        first, last = right == 0, right == i
        here = jnp.minimum(right, m - 1)
        start, stop = jnp.searchsorted(x, 0.5 * (jnp.stack([c[left], c[here]]) + v[None])).astype(jnp.int32)
        start, stop = jnp.where(first, 0, start), jnp.where(last, K, stop)
        middle = jnp.where(last, K, jnp.where(first, 0, ends[here]))
        before, after, now = cost(
            sums,
            jnp.stack([start, middle, start]),
            jnp.stack([middle, stop, stop]),
            jnp.stack([c[left], c[here], v]),
        )
        best = jnp.argmax(before + after - now)
        at = right[best]
        c = jnp.where(level < at, c, jnp.where(level == at, v[best], jnp.roll(c, 1)))
        ends = jnp.where(border <= at, ends, jnp.roll(ends, 1))
        ends = jnp.where(border == at, start[best], jnp.where(border == at + 1, stop[best], ends))
        return jnp.where(level <= i, c, c[i]), jnp.where(border <= i, ends, K)

    total = sums[-1, :, 0].sum()
    mass = sums[1:, :, 0].sum(1)
    first = x[jnp.minimum((mass <= u[0, 0] * total).sum(), K - 1)]
    ends = jnp.where(border == 0, 0, K)
    return jax.lax.fori_loop(1, m, step, (jnp.full(m, first), ends))[0]


# -- the optimum


def optimum(x: Float[Array, " K"], sums: Sums, m: int) -> Float[Array, " m"]:
    """The levels of least J, by dynamic programming over where the last interval starts.

    best_j(e), the least J of the first e places in at most j intervals, is the least over s < e of
    best_{j-1}(s) and what places s .. e - 1 cost. The first interval is a sum, the last has one end only, K.
    """
    K = x.shape[0]
    places = jnp.arange(K, dtype=jnp.int32)

    def grow(best, _):
        start = best_starts(sums, best)
        best = best[start] + least_cost(look_up(sums, start), look_up(sums, places))
        return jnp.where(places > 0, best, 0.0), start

    from_first = least_cost(look_up(sums, jnp.zeros_like(places)), look_up(sums, places))
    best, starts = jax.lax.scan(grow, from_first, length=m - 2)
    last = best + least_cost(look_up(sums, places), look_up(sums, jnp.full_like(places, K)))
    last = jnp.argmin(last).astype(jnp.int32)
    _, inner = jax.lax.scan(lambda e, start: (start[e], start[e]), last, starts, reverse=True)
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), inner, last[None], jnp.full(1, K, jnp.int32)])
    origin = x[ends[:-1]]
    mass, mean = mass_and_mean(sums, ends[:-1], ends[1:], origin)
    return origin + jnp.where(mass > 0, mean, 0.0)  # an interval of no places stands at the first


def best_starts(sums: Sums, best: Float[Array, " K"]) -> Int32[Array, " K"]:
    """Of each e the least s < e for which best[s] and the cost of places s .. e - 1 are least together.

    That cost is concave Monge, so s never falls as e grows (X. Wu, J. Algorithms 12, 1991): what is known of
    two ends bounds all between them. Stage by stage, RADIX - 1 ends between each two known ones try all
    starts that the two allow, which for all of them are K and a few; TILE by TILE, so that shapes are fixed.
    """
    K = best.shape[0]
    stages = max(1, math.ceil(math.log(K, RADIX) - 1e-9))
    member = jnp.arange(1, RADIX, dtype=jnp.int32)[:, None]

    def stage(start, stride, groups):
        tiles = -(-K // TILE) + groups  # as many as there can be
        low_end = jnp.arange(groups, dtype=jnp.int32) * RADIX * stride
        e = jnp.minimum(
            low_end[None] + member * stride, K
        )  # [members, groups]; K, which is no end here, fills
        low = start[jnp.minimum(low_end, K)]
        high = jnp.maximum(start[jnp.minimum(low_end + RADIX * stride, K)], low)
        after = jnp.cumsum((high - low) // TILE + 1).astype(jnp.int32)
        first = jnp.pad(after[:-1], (1, 0))  # tile of each group
        marks = jnp.zeros(tiles, jnp.int32).at[first[1:]].add(1, mode="promise_in_bounds")
        group = jnp.cumsum(marks).astype(jnp.int32)  # of each tile
        s = (low - TILE * first)[group] + TILE * jnp.arange(tiles, dtype=jnp.int32)
        s = jnp.minimum(s[None] + jnp.arange(TILE, dtype=jnp.int32)[:, None], K - 1)[
            :, None
        ]  # [TILE, 1, tiles]
        end = e[:, group]  # [members, tiles]
        until = look_up(sums, end)

        def one(_, s):  # a loop, so that XLA computes each cost once, and not for each use of it
            through = best[s] + least_cost(look_up(sums, s), until)
            return None, jnp.where(s < end, through, jnp.inf)

        _, through = jax.lax.scan(one, None, s)  # [TILE, members, tiles]
        slot = (member - 1) * groups + group[None]

        def least(of_tiles, nothing):
            empty = jnp.full(e.size, nothing)
            return empty.at[slot.ravel()].min(of_tiles.ravel(), mode="promise_in_bounds")

        lowest = least(functools.reduce(jnp.minimum, through), jnp.inf)[slot]
        found = least(jnp.where(through <= lowest[None], s, K - 1).min(0), jnp.int32(K - 1))
        return start.at[e].set(jnp.where(e < K, found.reshape(e.shape), K - 1))

    def coarse(i, start):
        return stage(start, jnp.int32(RADIX) ** (stages - 1 - i), -(-K // RADIX**2))

    start = jnp.full(K + 1, K - 1, jnp.int32).at[0].set(0)
    start = jax.lax.fori_loop(0, stages - 1, coarse, start)
    return stage(start, 1, -(-K // RADIX))[:K]


def look_up(sums: Sums, at: Int32[Array, "..."]) -> tuple[Part, ...]:
    """The sums over the first `at` places: high parts of f, f x, f x^2, then low parts."""
    both = sums.reshape(-1, 6).at[at].get(mode="promise_in_bounds")
    return tuple(both[..., i] for i in range(6))


def least_cost(start: tuple[Part, ...], stop: tuple[Part, ...]) -> Part:
    """`cost` at the mean, of the places between two that were looked up; of three long products it needs two.

    At c = D1 / D0 as rounded, D1 - c D0 is next to zero: in (D2 - c D1) - c (D1 - c D0) it needs no low part.
    """
    (mass, mass_low), (moment, moment_low), (square, square_low) = (
        pair_sum(stop[i], stop[i + 3], -start[i], -start[i + 3]) for i in range(3)
    )
    c = jnp.where(mass > 0, moment / mass, 0.0)

    def left(a, a_low, b, b_low):  # of a - c b
        less, less_low = product(b, c)
        return (a - less) + (a_low - less_low - c * b_low)

    left_square = left(square, square_low, moment, moment_low)
    return jnp.maximum(left_square - c * left(moment, moment_low, mass, mass_low), 0.0)
