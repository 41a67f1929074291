"""Weighted k-means on a line, row by row: k-means++ starts, Lloyd's algorithm, the exact optimum.

Nothing but sorting, adding up and looking up the result touches every weight. A row is sorted once; of f, f x
and f x^2 running sums are kept, as pairs of float32 (48 bits); what an interval of places costs under a level
then takes two look-ups, and where a level's interval ends a bisection (as in Any-Precision's own code, there
in float64: github.com/SyphonArch/flash1dkmeans). So a start costs m log K and not m K steps, and the optimum
m K log K and not m K^2.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, Key, Num, UInt32

from jaxllm.ops.batches import call_in_batches, rows_at_once
from jaxllm.quant.statistics import layer_key

MAX_LLOYD_STEPS = 300  # a hundred are rare
CPU_ROWS = 16  # at once: one program of so many serves all layers of equal K, and more go no faster there
AT_ONCE = 2**22  # numbers of [rows at once, 16, K], or [rows at once, 1024, K] if exact: they stay in cache
KEYS = 1024  # that are made at once: one program for all layers of at most so many rows
RADIX = 8  # of the places between two whose best start is known, one in so many is searched next
TILE = 16  # places whose intervals to one end are taken together

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
    size = rows_at_once(AT_ONCE // (rows.shape[1] * (1024 if exact else 16)), CPU_ROWS)

    def solve(given):
        rows, weights, keys = given
        return solve_rows(
            rows, weights, None if exact else _draws(keys, m=2**bits, restarts=restarts), m=2**bits
        )

    return call_in_batches(solve, (rows, weights, jax.random.key_data(keys)), size)


@functools.partial(jax.jit, static_argnames=("m", "restarts"))
def _draws(keys: UInt32[Array, "n _"], *, m: int, restarts: int) -> Float[Array, "n restarts m trials"]:
    """What each row's starts draw; a program of its own, for it serves every K."""
    trials = 2 + int(math.log(m))

    def one(key):
        # subtle: XLA:CPU compiles draws of three axes, of the same numbers, far longer
        return jax.random.uniform(key, (restarts * m * trials,)).reshape(restarts, m, trials)

    return jax.vmap(one)(jax.random.wrap_key_data(keys))


@functools.partial(jax.jit, static_argnames="m")
def solve_rows(
    rows: Float[Array, "n K"],
    weights: Float[Array, "n K"],
    draws: Float[Array, "n restarts m trials"] | None,
    *,
    m: int,
) -> tuple[Int32[Array, "n K"], Float[Array, "n m"]]:
    """`k_means` of so many rows at once, exact where nothing is drawn."""
    found = rows.astype(jnp.float32), weights.astype(jnp.float32), draws
    return jax.vmap(functools.partial(_solve, m=m))(*found)


def _solve(
    row: Float[Array, " K"],
    weight: Float[Array, " K"],
    draws: Float[Array, "restarts m trials"] | None,
    *,
    m: int,
) -> tuple[Int32[Array, " K"], Float[Array, " m"]]:
    centre = (row * weight).sum() / weight.sum()
    scale = jnp.abs(row - centre).max()
    scale = jnp.where(scale > 0, scale, 1.0)
    unit = (row - centre) / scale
    x, place = sort(unit)
    sums = running_sums(x, jnp.zeros_like(weight).at[place].add(weight))
    if draws is None:
        c, _ = lloyd(x, sums, optimum(x, sums, m))
    else:
        tries, ends = jax.vmap(lambda u: lloyd(x, sums, plus_plus(x, sums, u)))(draws)
        c = tries[jnp.argmin(cost(sums, ends[:, :-1], ends[:, 1:], tries).sum(1))]
    codes = (middles(c)[None] <= unit[:, None]).sum(1, dtype=jnp.int32)
    return codes, c * scale + centre


def sort(x: Float[Array, " K"]) -> tuple[Float[Array, " K"], Int32[Array, " K"]]:
    """The values in ascending order, and of each the first place that has it.

    Weights are added up at these places; other places of a run of one value then have none.
    subtle: XLA sorts one array of integers on a CPU seven times as fast as floats, or two arrays at once.
    """
    key = _ordered_bits(jnp.where(x == 0, 0.0, x))  # -0.0 is 0.0
    ascending = jax.lax.sort(key)
    place = first_from(ascending, key)
    return jax.lax.bitcast_convert_type(_flipped(ascending), jnp.float32), place


def first_from(ascending: Num[Array, " K"], x: Num[Array, "*B"]) -> Int32[Array, "*B"]:
    """The first place of which the value is at least x, K if there is none."""
    K = ascending.shape[0]
    return first_place(lambda at: ascending[at] >= x, jnp.zeros(x.shape, jnp.int32), K, K)


def first_place(
    holds: Callable[[Place], Bool[Array, "*B"]], start: Int32[Array, "*B"], stop: Place, K: int
) -> Int32[Array, "*B"]:
    """The first of places start .. stop - 1 for which `holds`, as for all behind it; stop if there is none.

    One number is carried, and `holds` compiled once: `jnp.searchsorted` carries two.
    """
    halvings = K.bit_length()

    def halve(i, low):
        at = low + (1 << halvings >> (i + 1))
        return jnp.where((at <= stop) & ~holds(jnp.minimum(at, stop) - 1), at, low)

    return jax.lax.fori_loop(0, halvings, halve, start)


def _ordered_bits(x: Float[Array, " K"]) -> Int32[Array, " K"]:
    return _flipped(jax.lax.bitcast_convert_type(x, jnp.int32))


def _flipped(bits: Int32[Array, " K"]) -> Int32[Array, " K"]:
    """Bits of a float32 as integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# -- running sums: pairs of float32


def running_sums(x: Float[Array, " K"], f: Float[Array, " K"]) -> Sums:
    """Sums of f, f x and f x^2 over the first 0 .. K places.

    By doubling: at step i each place has the sum of the last 2**i, and takes that of those before them. So
    the additions are K log K, all side by side.
    """
    K = x.shape[0]
    square, square_low = product(f * x, x)
    fx, fx_low = product(f, x)
    pair = jnp.stack([f, fx, square]), jnp.stack([jnp.zeros_like(f), fx_low, square_low + fx_low * x])

    def double(i, pair):
        before = (
            jax.lax.dynamic_slice_in_dim(jnp.pad(a, ((0, 0), (K, 0))), K - (1 << i), K, 1) for a in pair
        )
        return pair_sum(*pair, *before)

    pair = jax.lax.fori_loop(0, (K - 1).bit_length(), double, pair)
    return jnp.pad(jnp.stack(pair).transpose(2, 0, 1), ((1, 0), (0, 0), (0, 0)))


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
    inner = first_from(x, middles(c))
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

    def step(i, state):
        c, ends = state  # i levels and their borders; behind them the last, which has no places
        spent = jnp.cumsum(cost(sums, ends[:-1], ends[1:], c))
        share = u[i] * spent[-1]
        j = jnp.minimum((spent[None] <= share[:, None]).sum(1, dtype=jnp.int32), i - 1)
        share = share - jnp.where(j > 0, spent[j - 1], 0.0)
        start, stop, level_of = ends[j], ends[j + 1], c[j]
        drawn = first_place(lambda at: cost(sums, start, at + 1, level_of) > share, start, stop - 1, K)
        v = x[jnp.clip(drawn, 0, K - 1)]
        right = jnp.where(v < c[j], j, j + 1)  # what stands behind the new level: i where nothing does
        left = jnp.maximum(right - 1, 0)
        first, last = right == 0, right == i
        here = jnp.minimum(right, m - 1)
        start, stop = first_from(x, 0.5 * (jnp.stack([c[left], c[here]]) + v[None]))
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

    An end behind the tile of a start cuts the interval in two: up to where the tile stops, which is the same
    for all e and j, and from there on, the same for all s of the tile. Only the parts need pairs of float32:
    to join them cancels nothing. Intervals within a tile are listed, once for all j.
    """
    K = x.shape[0]
    tiles = -(-K // TILE)
    places = jnp.arange(tiles * TILE, dtype=jnp.int32).reshape(tiles, TILE).T
    cut = jnp.minimum(places, K)  # what stands at K and behind it is no start and no end

    def cost(start, stop):
        spent, *_ = interval(sums, jnp.minimum(start, K), jnp.minimum(stop, K), 0.0)
        return jnp.where(start < stop, spent, jnp.inf)

    stop = jnp.minimum((places // TILE + 1) * TILE, K)
    spent, mass, mean = interval(sums, cut, stop, x[jnp.minimum(stop, K - 1)])
    within = cost(places[:, None], places[None])  # [starts, ends, tiles]

    def grow(best, _):
        until = best + spent

        def least_through(tile, e):
            stop = jnp.minimum((tile + 1) * TILE, K)
            rest, rest_mass, rest_mean = interval(sums, stop, e, x[jnp.minimum(stop, K - 1)])
            rest = jnp.where(stop <= e, rest, jnp.inf)

            def one(i, least):
                first_mass = mass[i][tile]
                both = first_mass + rest_mass
                share = jnp.where(both > 0, rest_mass / both, 0.0)
                apart = jnp.square(rest_mean - mean[i][tile])
                return jnp.minimum(least, until[i][tile] + rest + first_mass * share * apart)

            return jax.lax.fori_loop(0, TILE, one, jnp.full(e.shape, jnp.inf))

        least, tile = best_tiles(least_through, K)
        least = functools.reduce(jnp.minimum, best[:, None] + within, least[cut])
        return jnp.where(places > 0, least, 0.0), (best, tile)

    def start_of(e, layer):
        best, tile = layer
        among = jnp.stack([tile[e], e // TILE])
        s = places[:, among]
        s = s.ravel()[jnp.argmin(best[:, among] + cost(s, e))]
        return s, s

    from_first = jnp.where(places > 0, cost(jnp.zeros_like(places), places), 0.0)
    best, layers = jax.lax.scan(grow, from_first, length=m - 2)
    last = places.ravel()[jnp.argmin(best + cost(places, jnp.full_like(places, K)))]
    _, inner = jax.lax.scan(start_of, last, layers, reverse=True)
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), inner, last[None], jnp.full(1, K, jnp.int32)])
    origin = x[ends[:-1]]
    mass, mean = mass_and_mean(sums, ends[:-1], ends[1:], origin)
    return origin + jnp.where(mass > 0, mean, 0.0)  # an interval of no places stands at the first


def best_tiles(
    least_through: Callable[[Place, Place], Part], K: int
) -> tuple[Float[Array, " ends"], Int32[Array, " ends"]]:
    """Of each end e < K the least `least_through(tile, e)`, inf where e is not behind the tile, and its tile.

    The cost of an interval is concave Monge, so the best start, and its tile, never falls as e grows (X. Wu,
    J. Algorithms 12, 1991): what is known of two ends bounds all between them. Stage by stage, RADIX - 1 ends
    between each two known ones try all tiles that the two allow, which for all of them are K / TILE and one
    each, so that shapes are fixed.
    """
    stages = max(1, math.ceil(math.log(K, RADIX) - 1e-9))
    final = -(-K // TILE) - 1  # the last tile, which no end is behind
    member = jnp.arange(1, RADIX, dtype=jnp.int32)[:, None]

    def stage(i, known, groups):
        least, best = known
        stride = RADIX ** (stages - 1 - i)
        border = jnp.arange(groups + 1, dtype=jnp.int32) * RADIX * stride
        e = jnp.minimum(border[None, :-1] + member * stride, K)  # [members, groups]; K, no end here, fills
        bound = jax.lax.cummax(best[jnp.minimum(border, K)])  # of two as good as equal the earlier may win
        after = jnp.cumsum(jnp.diff(bound) + 1).astype(jnp.int32)
        first = jnp.pad(after[:-1], (1, 0))  # row of each group in a list of all that is tried
        marks = jnp.zeros(final + 1 + groups, jnp.int32).at[first[1:]].add(1, mode="promise_in_bounds")
        group = jnp.cumsum(marks).astype(jnp.int32)  # of each row
        tile = (bound[:-1] - first)[group] + jnp.arange(len(group), dtype=jnp.int32)
        tile = jnp.minimum(tile, final)[None]
        through = least_through(tile, jnp.minimum(e, K - 1)[:, group])
        slot = ((member - 1) * groups + group[None]).ravel()

        def lowest(of_rows, nothing):
            of_ends = jnp.full(e.size, nothing).at[slot].min(of_rows.ravel(), mode="promise_in_bounds")
            return of_ends.reshape(e.shape)

        now = lowest(through, jnp.inf)
        found = lowest(jnp.where(through <= now[:, group], tile, final), jnp.int32(final))
        return least.at[e].set(now), best.at[e].set(jnp.where(e < K, found, final))

    def coarse(i, known):
        return stage(i, known, -(-K // RADIX**2))

    known = jnp.full(K + 1, jnp.inf), jnp.full(K + 1, final, jnp.int32).at[0].set(0)
    return stage(stages - 1, jax.lax.fori_loop(0, stages - 1, coarse, known), -(-K // RADIX))


def interval(sums: Sums, start: Place, stop: Place, origin: Part | float) -> tuple[Part, Part, Part]:
    """Of places start .. stop - 1 `cost` at their mean, their mass, and the mean from `origin` on.

    Of three long products it takes two: at c = D1 / D0 as rounded, D1 - c D0 is next to zero, and in
    (D2 - c D1) - c (D1 - c D0) it needs no low part.
    """
    a, b = (sums.reshape(-1, 6).at[at].get(mode="promise_in_bounds") for at in (start, stop))
    (mass, mass_low), (moment, moment_low), (square, square_low) = (
        pair_sum(b[..., i], b[..., i + 3], -a[..., i], -a[..., i + 3]) for i in range(3)
    )
    c = jnp.where(mass > 0, moment / mass, 0.0)

    def left(a, a_low, b, b_low):  # of a - c b
        less, less_low = product(b, c)
        return (a - less) + (a_low - less_low - c * b_low)

    off = left(moment, moment_low, mass, mass_low)
    spent = jnp.maximum(left(square, square_low, moment, moment_low) - c * off, 0.0)
    # x is within -1 .. 1; what a mass of nothing but rounding gives is not
    mean = jnp.where(mass > 0, jnp.clip((c - origin) + off / mass, -2.0, 2.0), 0.0)
    return spent, jnp.maximum(mass, 0.0), mean
