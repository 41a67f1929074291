"""Weighted k-means on a line, row by row: k-means++ starts, Lloyd's algorithm, the exact optimum."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from jaxllm.quant.statistics import layer_key

MAX_LLOYD_STEPS = 300  # a hundred are rare
AT_ONCE = 2**22  # numbers of [rows at once, restarts, K], or of [rows at once, m, K] if exact


def row_keys(seed: int, name: str, N: int) -> Key[Array, " N"]:
    """One random key a row of the layer called `name`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(layer_key(seed, name), jnp.arange(N))


@functools.partial(jax.jit, static_argnames=("bits", "restarts", "exact"))
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
    K, m = rows.shape[1], 2**bits
    solve = functools.partial(_solve, m=m, restarts=restarts, exact=exact)
    size = AT_ONCE // (K * (m if exact else restarts))
    given = rows.astype(jnp.float32), weights.astype(jnp.float32), keys
    return jax.lax.map(lambda row: solve(*row), given, batch_size=max(1, size))


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
    x, f = jax.lax.sort((unit, weight), num_keys=1)
    sums = running_sums(x, f)
    if exact:
        c = lloyd(x, sums, optimum(x, f, m))
    else:
        u = jax.random.uniform(key, (restarts, m, 2 + int(math.log(m))))
        tries = jax.vmap(lambda u: lloyd(x, sums, plus_plus(x, f, u)))(u)
        c = tries[jnp.argmin(jax.vmap(lambda c: objective(x, f, c))(tries))]
    return assign(unit, c), c * scale + centre


def assign(x: Float[Array, " K"], c: Float[Array, " m"]) -> Int32[Array, " K"]:
    """The nearest of ascending levels; the upper one of two equally near."""
    return jnp.searchsorted(middles(c), x, side="right").astype(jnp.int32)


def middles(c: Float[Array, " m"]) -> Float[Array, " m-1"]:
    return 0.5 * (c[1:] + c[:-1])


def objective(x: Float[Array, " K"], f: Float[Array, " K"], c: Float[Array, " m"]) -> Float[Array, ""]:
    """J of the levels, added up directly: nothing cancels."""
    return (f * (x - c[assign(x, c)]) ** 2).sum()


def running_sums(x: Float[Array, " K"], f: Float[Array, " K"]) -> Float[Array, "4 K+1"]:
    """Sums of f and of f x over the first 0 .. K places, each as a float32 and what it was rounded by."""
    values, K = jnp.stack([f, f * x]), x.shape[0]

    def double(_, state):  # of `size` places up to each -> of twice as many
        size, a, a_low = state
        b, b_low = (
            jax.lax.dynamic_slice_in_dim(jnp.pad(s, ((0, 0), (K, 0))), K - size, K, 1) for s in (a, a_low)
        )
        s = a + b
        t = s - a
        low = (a - (s - t)) + (b - t) + (a_low + b_low)  # Knuth's two-sum: s + low is a + b to twice the bits
        high = s + low
        return 2 * size, high, low - (high - s)

    start = 1, values, jnp.zeros_like(values)
    _, high, low = jax.lax.fori_loop(0, (K - 1).bit_length(), double, start)
    return jnp.pad(jnp.concatenate([high, low]), ((0, 0), (1, 0)))


def lloyd_step(
    x: Float[Array, " K"], sums: Float[Array, "4 K+1"], c: Float[Array, " m"]
) -> Float[Array, " m"]:
    """The weighted mean of what is nearest each level; a level that has nothing stays."""
    K = x.shape[0]
    borders = jnp.searchsorted(x, middles(c), side="left").astype(jnp.int32)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), borders])
    stop = jnp.concatenate([borders, jnp.full(1, K, jnp.int32)])
    part = sums[:, stop] - sums[:, start]
    mass, moment = part[:2] + part[2:]
    mean = jnp.clip(moment / mass, x[jnp.minimum(start, K - 1)], x[stop - 1])
    return jnp.where(stop > start, mean, c)


def lloyd(x: Float[Array, " K"], sums: Float[Array, "4 K+1"], c: Float[Array, " m"]) -> Float[Array, " m"]:
    """Lloyd's steps until the levels repeat."""

    def step(state):
        i, _, c = state
        return i + 1, c, lloyd_step(x, sums, c)

    def moves(state):
        i, before, c = state
        return (i < MAX_LLOYD_STEPS) & (before != c).any()

    return jax.lax.while_loop(moves, step, (0, c, lloyd_step(x, sums, c)))[2]


def plus_plus(
    x: Float[Array, " K"], f: Float[Array, " K"], u: Float[Array, "m trials"]
) -> Float[Array, " m"]:
    """Greedy k-means++: each next level is the best of a few places drawn, by `u`, by their share of J."""
    K, m = x.shape[0], u.shape[0]

    def draw(share, u):
        up_to = jnp.cumsum(share)
        return x[jnp.minimum(jnp.searchsorted(up_to, u * up_to[-1], side="right"), K - 1)]

    def step(i, state):
        distance, c = state
        tried = draw(f * distance, u[i])
        left = jnp.minimum(distance[None], (x[None] - tried[:, None]) ** 2)  # [trials, K]
        best = jnp.argmin((f[None] * left).sum(1))
        return left[best], c.at[i].set(tried[best])

    first = draw(f, u[0, 0])
    start = (x - first) ** 2, jnp.full(m, first)
    return jnp.sort(jax.lax.fori_loop(1, m, step, start)[1])


def optimum(x: Float[Array, " K"], f: Float[Array, " K"], m: int) -> Float[Array, " m"]:
    """The levels of least J, by dynamic programming over where the last interval starts.

    best[j, e] is the least J of the first e places in at most j intervals. Place by place, the interval from
    each start s grows by one, its mass, mean and cost updated as Welford does: sums of positive terms only.
    """
    K = x.shape[0]
    s = jnp.arange(K)

    def grow(state, place):
        mass, mean, cost, best = state
        e, x_e, f_e = place
        grown = s <= e
        total, shift = mass + f_e, x_e - mean
        cost = jnp.where(grown, cost + mass * f_e / total * shift**2, 0.0)
        mean = jnp.where(grown, mean + f_e / total * shift, 0.0)
        mass = jnp.where(grown, total, 0.0)
        through = jnp.where(grown[None], best[:-1, :-1] + cost[None], jnp.inf)  # [m, K]: last starts at s
        least = through.min(1)
        best = jax.lax.dynamic_update_slice(best, least[:, None], (1, e + 1))
        start = jnp.where(through <= least[:, None], s[None], K).min(1)  # argmin, which is slow on a CPU
        return (mass, mean, cost, best), (start, mean[start])

    zero = jnp.zeros(K)
    state = zero, zero, zero, jnp.full((m + 1, K + 1), jnp.inf).at[:, 0].set(0.0)
    _, (starts, means) = jax.lax.scan(grow, state, (s, x, f))  # [K, m] each

    def back(e, j):
        return jnp.where(e > 0, starts[e - 1, j], 0), jnp.where(e > 0, means[e - 1, j], x[0])

    _, c = jax.lax.scan(back, jnp.int32(K), jnp.arange(m - 1, -1, -1))
    return c[::-1]
