"""SqueezeLLM: each output's weights clustered on a line, weighted by how much the loss feels each. Lossy.

arXiv:2306.07629, section 4.1: the 2**bits levels of a row minimise J = sum_k f_k (w_k - level)^2, f the
diagonal Fisher information (the square of each *sequence's* gradient, summed). Solved as Any-Precision's code
does (arXiv:2402.10517): sorted rows, where clusters are intervals; greedy k-means++; Lloyd's step on the
borders. Ours differs so:

- several starts, the best kept (`restarts=1` is the papers'), or the optimum itself (`exact`): dynamic
  programming over intervals, 2**bits * K^2 steps a row, also what tests hold the heuristic against;
- float32 on any device: rows are centred and scaled, running sums are kept as pairs of float32 (48 bits), as
  differences of plain ones lose a light cluster that stands behind a heavy one;
- nothing counts for nothing: f is at least 2**-30 of its row's mean, so that clusters of zero weight or fewer
  weighted values than levels are no special cases, and spare levels serve what is left;
- what is random depends on (seed, layer name, row) only: not on the batch, the device or the order.

Stored as a `Codebook` whose tables ascend. Memory: some ten times AT_ONCE numbers beside rows and weights.

    w = SqueezeLlm(bits=3).solve(rows, Stats(fisher=fisher), name="layers.0.up", dtype=rows.dtype)

Letters: K inputs, N outputs, m = 2**bits levels.
"""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from jaxllm.quant.codebook import Codebook, from_codes
from jaxllm.quant.stats import Stats, need

FLOOR = 2.0**-30  # least weight of a place, in units of its row's mean
LLOYD = 300  # steps at most; a hundred are rare
AT_ONCE = 2**22  # numbers of [rows at once, restarts, K], or of [rows at once, m, K] if exact
LARGEST = 65504.0  # of a float16, the type of the tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqueezeLlm:
    """Fisher-weighted k-means of each output's weights.

    restarts: how many starts of Lloyd's algorithm, of which the best is kept. exact: the optimum instead; K
    should be moderate (K^2 * 2**bits steps a row, some 3 ns each on a CPU core).
    """

    bits: int = 3
    seed: int = 0
    restarts: int = 8
    exact: bool = False

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"SqueezeLlm: bits must be 1 to 8, got bits={self.bits}")
        if self.restarts < 1:
            raise ValueError(f"SqueezeLlm: restarts must be at least 1, got restarts={self.restarts}")

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({"fisher"})

    def solve(self, rows: jax.Array, stats: Stats, *, name: str, dtype) -> Codebook:
        need(stats, "SqueezeLlm", "fisher")
        assert stats.fisher is not None
        codes, table = k_means(
            rows,
            importance(rows, stats.fisher),
            row_keys(self.seed, name, rows.shape[0]),
            bits=self.bits,
            restarts=self.restarts,
            exact=self.exact,
        )
        return from_codes(codes, table, bits=self.bits, dtype=dtype)


def row_keys(seed: int, name: str, N: int) -> Key[Array, " N"]:
    """One random key a row of the layer called `name`."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N))


def importance(rows: Float[Array, "N K"], fisher: Float[Array, "_ _"]) -> Float[Array, "N K"]:
    """Weights of the places, of mean 1 a row: the Fisher information of those that are not zero.

    A row without any counts all its places alike.
    """
    if fisher.shape != rows.shape:
        raise ValueError(f"squeeze_llm: fisher must be as the weight, got {fisher.shape=}, {rows.shape=}")
    if not isinstance(rows, jax.core.Tracer):
        if not bool((jnp.abs(rows) <= LARGEST).all()):
            raise ValueError(f"squeeze_llm: weights must be finite and at most {LARGEST:.0f} in size")
        if not bool((jnp.isfinite(fisher) & (fisher >= 0)).all()):
            raise ValueError("squeeze_llm: fisher must be finite and not negative")
    f = jnp.where(rows != 0, fisher.astype(jnp.float32), 0.0)
    greatest = f.max(1, keepdims=True)
    f = jnp.where(greatest > 0, f / jnp.where(greatest > 0, greatest, 1.0), 1.0)  # else a mean may overflow
    return jnp.maximum(f / f.mean(1, keepdims=True), FLOOR)


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


# What follows is of one row: sorted values x [K], their weights f [K], levels c [m].


def _solve(row, weight, key, *, m, restarts, exact):
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
        return (i < LLOYD) & (before != c).any()

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
