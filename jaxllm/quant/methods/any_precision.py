"""Any-Precision: one stored weight that can be read at every width from `seed_bits` to `parent_bits`. Lossy.

arXiv:2402.10517. A row's weights are clustered into 2**seed_bits levels; then every cluster is cut in two,
width by width, so that a code of b + 1 bits is a code of b bits and one bit more:

    w[k, n] at b bits = tables[b - seed_bits][n, codes[n, k] >> (parent_bits - b)]           float16 levels

The codes are stored as planes, one a bit, the highest first: reading b bits reads the first b planes and the
table of that width, nothing else. Code k lies in word k // 32 at bit k % 32 of its plane; the order of the
authors' CUDA kernel is an exact permutation of that (`to_cuda_planes`).

How ours differs: a cluster is cut where J = sum f (w - level)^2 falls most, of all places, by running sums
from both ends (`split="paper"`: their bisection for a cut that Lloyd's algorithm would leave alone, which
misses the best one in three of ten clusters). The seed, and what counts for nothing: see `squeeze_llm`.
`seeder="lnq"` nests under a guided LNQ seed (arXiv:2505.07004) instead: its codes make up for each other's
errors and lie far from their weights, so cuts alone undo it. They start each width's search, which is LNQ
restricted to it: levels by eq. 9, each code between its two halves by eq. 11, by turns. F = (w - P c)^T H
(w - P c) then falls with the width (before the tables are rounded to float16).

With `outliers`, some weights are kept apart in float16 (`outliers.py`), the same at every width, and count
for nothing in any table. The authors' code adds them to levels that should be 0 there, and are nearly.

    w = AnyPrecision(parent_bits=8).quantize(rows, Stats(fisher=fisher), name="up", dtype=rows.dtype)
    read_at(w, 4).dequantize_rows()                    # the same planes, four of them read

Bits a weight: parent_bits + 16 * (2**(parent_bits + 1) - 2**seed_bits) / K, so K should be in the thousands.
From a k-means seed, codes ascend with the weights and every table ascends.

Letters: K inputs, N outputs, B planes, W = ceil(K / 32) words.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Integer

from jaxllm.ops.batches import call_in_batches, map_in_batches, rows_at_once
from jaxllm.quant.methods.curvature import curvature, damped
from jaxllm.quant.methods.k_means import (
    CPU_ROWS,
    Sums,
    first_from,
    k_means,
    mass_and_mean,
    row_keys,
    running_sums,
    sort,
)
from jaxllm.quant.methods.lnq import lnq, refit
from jaxllm.quant.methods.outliers import check_share, free_of, put_back, set_apart, where_free
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights.planes.bit_planes import BitPlanes, from_codes
from jaxllm.weights.sparse import DenseAndSparse

AT_ONCE = 2**20  # numbers of [rows at once, K] while cutting clusters
SIDE_BY_SIDE = 64  # rows whose halves are chosen together: their errors stay in cache
DAMPING = 1e-4  # of the mean of the curvature's diagonal, as for the LNQ seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyPrecision:
    """A parent of `parent_bits` bits, grown from a seed of `seed_bits`.

    bits: the width it is first read at, by default the parent's. split: "exact", or "paper" for its binary
    search. seeder: "squeeze_llm" (Fisher-weighted k-means) or "lnq" (guided, for `output_groups` of
    consecutive outputs), for a parent that is mostly read at its seed's width or one bit above it: of pico,
    seeded at 2 bits, KL is 0.25 against 0.57 there, 0.070 against 0.093 at 3, but 0.026 against 0.019 at 4,
    for 28 CPU seconds against 12 (docs/results/quantization.md) and a guided Hessian a linear. restarts,
    exact_seed: see `squeeze_llm.SqueezeLlm`. turns: of LNQ's search at each width above its seed; more are
    better near the seed and worse from three bits above it on, where 0 is best. outliers: the share of
    weights that are kept in float16, at most 0.05; None for none.
    """

    parent_bits: int = 8
    seed_bits: int = 3
    bits: int | None = None
    seed: int = 0
    split: Literal["exact", "paper"] = "exact"
    seeder: Literal["squeeze_llm", "lnq"] = "squeeze_llm"
    restarts: int = 8
    exact_seed: bool = False
    output_groups: int = 1
    turns: int = 2
    outliers: float | None = None

    def __post_init__(self):
        s, b, p = self.seed_bits, self.first_bits, self.parent_bits
        if not 1 <= s <= b <= p <= 8:
            got = f"seed_bits={s}, bits={b}, parent_bits={p}"
            raise ValueError(f"AnyPrecision: 1 <= seed_bits <= bits <= parent_bits <= 8 must hold, got {got}")
        if self.split not in ("exact", "paper"):
            raise ValueError(f"AnyPrecision: split must be exact or paper, got split={self.split}")
        if self.seeder not in ("squeeze_llm", "lnq"):
            raise ValueError(f"AnyPrecision: seeder must be squeeze_llm or lnq, got seeder={self.seeder}")
        if self.restarts < 1 or self.turns < 0:
            got = f"restarts={self.restarts}, turns={self.turns}"
            raise ValueError(f"AnyPrecision: restarts must be at least 1 and turns at least 0, got {got}")
        if self.output_groups < 1 or (self.output_groups > 1 and self.seeder != "lnq"):
            got = f"output_groups={self.output_groups}, seeder={self.seeder}"
            raise ValueError(f"AnyPrecision: output_groups must be 1, or more with seeder=lnq, got {got}")
        check_share("AnyPrecision", self.outliers)

    @property
    def first_bits(self) -> int:
        """The width it is first read at."""
        return self.parent_bits if self.bits is None else self.bits

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"fisher" if self.seeder == "squeeze_llm" else "guided_hessian"})

    def quantize(self, rows: jax.Array, stats: Stats, *, name: str, dtype) -> BitPlanes | DenseAndSparse:
        """The rows in planes, and a table of levels a width."""
        keys = row_keys(self.seed, name, rows.shape[0])
        hessians, felt = self._curvature(rows, stats)
        inner, weights, kept = set_apart(rows, felt, self.outliers, who="AnyPrecision")
        codes, table = k_means(
            inner, weights, keys, bits=self.seed_bits, restarts=self.restarts, exact=self.exact_seed
        )
        if hessians is None:
            codes, tables = upscale(inner, weights, codes, table, to=self.parent_bits, split=self.split)
        else:
            codes, table = ascending(*lnq(inner, hessians, codes, kept, bits=self.seed_bits))
            codes, tables = guided_upscale(
                inner,
                weights,
                codes,
                table,
                kept,
                hessians=hessians,
                to=self.parent_bits,
                split=self.split,
                turns=self.turns,
            )
        planes = from_codes(codes, (table, *tables), bits=self.first_bits, dtype=dtype)
        return put_back(planes, rows, kept, self.outliers)

    def _curvature(
        self, rows: Float[Array, "N K"], stats: Stats
    ) -> tuple[Float[Array, "g K K"] | None, Float[Array, "N K"]]:
        """The guided Hessians, where the seed is LNQ's, and how much the loss feels each weight."""
        if self.seeder == "squeeze_llm":
            need(stats, "AnyPrecision", "fisher")
            assert stats.fisher is not None
            return None, stats.fisher
        g = self.output_groups
        hessians = curvature(stats, "AnyPrecision", guided=True, output_groups=g, shape=rows.shape)
        hessian_diag = jnp.diagonal(hessians, axis1=1, axis2=2)  # [g, K]
        return hessians, jnp.repeat(hessian_diag, len(rows) // g, axis=0)


@jax.jit
def ascending(
    codes: Integer[Array, "N K"], table: Float[Array, "N m"]
) -> tuple[Int32[Array, "N K"], Float[Array, "N m"]]:
    """The same levels in ascending order, and the codes that point to them there."""
    order = jnp.argsort(table, axis=1)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32)
    codes = jnp.take_along_axis(rank, codes.astype(jnp.int32), axis=1)
    return codes, jnp.take_along_axis(table, order, axis=1)


def upscale(
    rows: Float[Array, "N K"],
    weights: Float[Array, "N K"],
    codes: Integer[Array, "N K"],
    table: Float[Array, "N m"],
    *,
    to: int,
    split: str = "exact",
) -> tuple[Int32[Array, "N K"], tuple[Float[Array, "N _"], ...]]:
    """Codes of `to` bits, and the tables of every width above that of `table`, by cutting clusters in two.

    weights: positive, as from `importance`. The lower half of a cluster takes the even code. What
    cannot be cut (one value, or nothing) stays even; a level that nothing uses is its parent's. Memory: some
    thirty times AT_ONCE numbers beside rows, weights and codes.
    """
    grow = functools.partial(_grow, to=to, split=split)
    size = rows_at_once(AT_ONCE // rows.shape[1], CPU_ROWS)
    return call_in_batches(grow, (rows, weights, codes.astype(jnp.int32), table), size)


@functools.partial(jax.jit, static_argnames=("to", "split"))
def _grow(given, *, to: int, split: str) -> tuple[Int32[Array, "n K"], tuple[Float[Array, "n _"], ...]]:
    """`upscale` of so many rows at once."""
    rows, weights, codes, table = given
    seed = table.shape[1].bit_length() - 1
    found = rows.astype(jnp.float32), weights.astype(jnp.float32), codes, table
    codes, tables = jax.vmap(functools.partial(_upscale, seed=seed, to=to, split=split))(*found)
    return codes, tuple(tables[:, i, : 2 ** (seed + 1 + i)] for i in range(to - seed))


def guided_upscale(
    rows: Float[Array, "N K"],
    weights: Float[Array, "N K"],
    codes: Integer[Array, "N K"],
    table: Float[Array, "N m"],
    kept: Bool[Array, "N K"] | None = None,
    *,
    hessians: Float[Array, "g K K"],
    to: int,
    split: str = "exact",
    turns: int = 2,
) -> tuple[Int32[Array, "N K"], tuple[Float[Array, "N _"], ...]]:
    """As `upscale`, but codes and tables of every width fitted to the full curvature, F never rising.

    hessians: one for each group of N / g consecutive rows, damped as LNQ does. weights: what the first cuts
    go by. kept: as of `lnq.lnq`. turns: of codes and levels at each width. Memory: H and its pull [K, K], and
    what `refit` holds.
    """
    g, found = len(hessians), []
    parts = (jnp.split(a, g) for a in (rows, weights, codes, table))
    for h, *part in zip(hessians, *parts, free_of(kept, g), strict=True):
        solve = functools.partial(_guided, damped(h, DAMPING), to=to, split=split, turns=turns)
        size = rows_at_once(max(len(rows) // g, SIDE_BY_SIDE), SIDE_BY_SIDE)
        found.append(call_in_batches(solve, tuple(part), size))
    parents, tables = zip(*found, strict=True)
    joined = tuple(jnp.concatenate(of_width) for of_width in zip(*tables, strict=True))
    return jnp.concatenate(parents), joined


def _guided(
    hessian: Float[Array, "K K"],
    given: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None],
    *,
    to: int,
    split: str,
    turns: int,
) -> tuple[Int32[Array, "n K"], list[Float[Array, "n _"]]]:
    """The rows of one group: rows, weights, codes [n, K], a table [n, m], and which of them are free."""
    rows, weights, codes, table, free = given
    pull = hessian / jnp.diag(hessian)[:, None]
    pull = pull.at[jnp.arange(len(pull)), jnp.arange(len(pull))].set(0.0)
    codes, table, tables = codes.astype(jnp.int32), table.astype(jnp.float32), []
    while table.shape[1] < 2**to:
        bits = table.shape[1].bit_length()
        codes, _ = upscale(rows, weights, codes, table, to=bits, split=split)
        table = refit(rows, hessian, codes, jnp.repeat(table, 2, axis=1), free)
        for _ in range(turns):
            codes = choose_halves(rows, pull, codes, table, free)
            table = refit(rows, hessian, codes, table, free)
        tables.append(table)
    return codes, tables


@functools.partial(jax.jit, static_argnames="cycles")
def choose_halves(
    rows: Float[Array, "N K"],
    pull: Float[Array, "K K"],
    codes: Int32[Array, "N K"],
    table: Float[Array, "N m"],
    free: Float[Array, "N K"] | None = None,
    *,
    cycles: int = 4,
) -> Int32[Array, "N K"]:
    """The codes with last bits chosen anew, each in turn where F is least while the others stay.

    pull: H over its diagonal, row by row, its own diagonal 0.
    """
    K = rows.shape[1]

    def one(row):
        w, code, levels, free = row
        lower, upper = levels[code & ~1], levels[code | 1]

        def place(j, error):
            i = j % K
            goal = w[i] - jnp.dot(pull[i], error, precision=jax.lax.Precision.HIGHEST)
            up = jnp.abs(goal - upper[i]) < jnp.abs(goal - lower[i])
            left = jnp.where(up, upper[i], lower[i]) - w[i]
            return error.at[i].set(where_free(left, None if free is None else free[i]))

        error = jax.lax.fori_loop(0, cycles * K, place, where_free(levels[code] - w, free))
        up = error + w
        return (code & ~1) | (jnp.abs(up - upper) < jnp.abs(up - lower)).astype(jnp.int32)

    return map_in_batches(one, (rows, codes, table, free), SIDE_BY_SIDE)


# What follows is of one row, sorted by code, then value: a cluster is an interval of places.


def _upscale(
    row: Float[Array, " K"],
    weight: Float[Array, " K"],
    codes: Int32[Array, " K"],
    table: Float[Array, " m"],
    *,
    seed: int,
    to: int,
    split: str,
) -> tuple[Int32[Array, " K"], Float[Array, "widths M"]]:
    K, M = row.shape[0], 2**to
    bits = K.bit_length()  # of a place
    values, rank = sort(row)
    key = codes << bits | rank
    ascending = jax.lax.sort(key)
    place = first_from(ascending, key)
    x = values[ascending & (2**bits - 1)]
    sums = running_sums(x, jnp.zeros_like(weight).at[place].add(weight))
    cut_clusters = _best_cuts if split == "exact" else _paper_cuts
    at = jnp.arange(K, dtype=jnp.int32)

    def level(state, _):
        codes, table = state
        ends = first_from(codes, jnp.arange(M + 1, dtype=jnp.int32))
        cut = cut_clusters(x, sums, codes, ends)
        codes = 2 * codes + (at > cut[codes]).astype(jnp.int32)
        pair = jnp.where(cut == K, table, jnp.stack(_levels(x, sums, cut, ends)))
        table = pair.T.ravel()[:M]
        return (codes, table), table

    # all tables are of the last one's size, so that one program serves every width
    wide = jnp.pad(table.astype(jnp.float32), (0, M - table.shape[0]))
    (codes, _), tables = jax.lax.scan(level, (ascending >> bits, wide), length=to - seed)
    return codes[place], tables


def _parts(
    x: Float[Array, " K"],
    sums: Sums,
    cut: Int32[Array, " n"],
    start: Int32[Array, " n"],
    stop: Int32[Array, " n"],
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]:
    """Of the parts start .. cut and cut + 1 .. stop - 1 the masses, and the means from x[start] on.

    From there and not from 0, lest narrow clusters vanish in float32.
    """
    origin = x[jnp.minimum(start, x.shape[0] - 1)]
    below = mass_and_mean(sums, start, cut + 1, origin)
    above = mass_and_mean(sums, cut + 1, stop, origin)
    return below[0], above[0], below[1], above[1]


def _best_cuts(
    x: Float[Array, " K"], sums: Sums, codes: Int32[Array, " K"], ends: Int32[Array, " borders"]
) -> Int32[Array, " M"]:
    """The last place of each cluster's lower part where J falls most, K if nothing can be cut."""
    K, M = x.shape[0], ends.shape[0] - 1
    at, stop = jnp.arange(K, dtype=jnp.int32), ends[codes + 1]
    mass, mass_on, below, above = _parts(x, sums, at, ends[codes], stop)
    # zero inside a run of one value, which is never cut, and at a cluster's end
    gain = mass * (mass_on / (mass + mass_on)) * (below - above) ** 2
    gain = jnp.where((at + 1 < stop) & (x < jnp.roll(x, -1)), gain, 0.0)
    most = jnp.zeros(M).at[codes].max(gain)
    return jnp.full(M, K, jnp.int32).at[codes].min(jnp.where((gain > 0) & (gain == most[codes]), at, K))


def _paper_cuts(
    x: Float[Array, " K"], sums: Sums, codes: Int32[Array, " K"], ends: Int32[Array, " borders"]
) -> Int32[Array, " M"]:
    """A place where the midpoint of both means lies between the two parts, by bisection."""
    K = x.shape[0]
    start, stop = ends[:-1], ends[1:]
    first = jnp.minimum(start, K - 1)

    def halve(_, state):
        low, high = state  # the cut is one of these places or between them
        at = (low + high) // 2
        here = jnp.clip(at, 0, K - 2)
        *_, below, above = _parts(x, sums, here, start, stop)
        border = x[first] + 0.5 * (below + above)
        up, down = border > x[here + 1], border < x[here]
        low, high = jnp.where(down, low, at), jnp.where(up, high, at)
        return low + up.astype(jnp.int32), high - down.astype(jnp.int32)

    cut, _ = jax.lax.fori_loop(0, K.bit_length() + 1, halve, (start, stop - 2))
    cut = jnp.clip(cut, start, stop - 2)  # rounding may point outside where a part has next to no weight
    cuttable = (stop - start > 1) & (x[first] < x[stop - 1])
    return jnp.where(cuttable, cut, K)


def _levels(
    x: Float[Array, " K"], sums: Sums, cut: Int32[Array, " M"], ends: Int32[Array, " borders"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """The means of the two parts of each cluster."""
    K = x.shape[0]
    left, right = jnp.minimum(cut, K - 1), jnp.minimum(cut + 1, K - 1)
    first = jnp.minimum(ends[:-1], K - 1)
    *_, below, above = _parts(x, sums, left, ends[:-1], ends[1:])
    return (
        jnp.clip(x[first] + below, x[first], x[left]),
        jnp.clip(x[first] + above, x[right], x[ends[1:] - 1]),
    )
