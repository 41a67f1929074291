"""LNQ: a table of levels for each output and codes into it, fitted by turns to the full curvature. Lossy.

Paper: GuidedQuant, arXiv:2505.07004. Of each output row w it minimizes F = (w - P c)^T H (w - P c) over the
levels c and the assignment P, by turns (its algorithm 2), and F never rises:

    levels   c = (P^T H P)^-1 P^T H w                                               eq. 9
    codes    each input in turn: the level nearest w_i - sum_{r != i} H_ir (wq_r - w_r) / H_ii     eq. 11

H is sum_t x_t x_t^T, or with `guided` that of the end loss (eq. 7), one for each of `output_groups` groups of
consecutive outputs. Starts from k-means weighted by H's diagonal. Differs in:

- unguided is unguided: it needs no gradients (the published code takes them in any case);
- damping is relative, always on, and the damped H serves codes, levels and objective alike; an input that
  is always 0 just goes to its nearest level, an H of 0 throughout counts as the identity;
- the ridge of eq. 9 pulls towards the levels there were, not towards 0, in units of each level's own
  curvature: no scale matters, a level without weights stays, and the step cannot raise F;
- each row keeps the best it has met; after the table is rounded to float16, the codes get one more descent;
- with `outliers`, some weights are kept apart in float16 (`outliers.py`, by size and by H's diagonal): their
  errors are 0 in F, so that neither levels nor codes make up for them.

    Lnq(bits=3).quantize(rows, stats, name="up", dtype=jnp.bfloat16)                         # Codebook

Memory: about six times the rows [N, K], three times H [K, K], and AT_ONCE numbers, in float32; with outliers
the rows once more.
Layout: inputs lead, [K, N], so that one step of the descent is contiguous; blocks of inputs stay in cache.
Letters: K inputs, N outputs, m = 2**bits levels, g groups of outputs, B inputs a block, R rows at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

from jaxllm.ops.batches import LEAST_ROWS, call_in_batches, map_in_batches
from jaxllm.ops.search import better
from jaxllm.quant.methods.curvature import check_curvature, curvature, damped
from jaxllm.quant.methods.k_means import k_means, row_keys
from jaxllm.quant.methods.outliers import check_share, free_of, put_back, set_apart, where_free
from jaxllm.quant.statistics import Stats
from jaxllm.weights.affine import check_rows
from jaxllm.weights.codebook import Codebook, from_codes, look_up
from jaxllm.weights.sparse import DenseAndSparse

INPUTS_PER_PRODUCT = 128  # inputs whose pull from all others is gathered in one product
AT_ONCE = 2**24  # numbers of [R, K, m] while levels are fitted
RIDGE = 1e-5  # of a level's own curvature
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lnq:
    """Layer-wise non-uniform quantization.

    iterations: turns of levels and codes (the paper's T); cycles: sweeps of the codes a turn. damping: times
    the mean of H's diagonal, added to it. guided: H of the end loss, for `output_groups` groups of outputs.
    outliers: the share of weights that are kept in float16, at most 0.05; None for none.
    """

    bits: int = 3
    guided: bool = False
    output_groups: int = 1
    iterations: int = 2
    cycles: int = 4
    damping: float = 1e-4
    seed: int = 0
    outliers: float | None = None

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"lnq: bits must be 1 to 8, got bits={self.bits}")
        if self.iterations < 0 or self.cycles < 0:
            raise ValueError(f"lnq: iterations and cycles must not be negative, got {self}")
        check_curvature("lnq", self.damping, self.guided, self.output_groups)
        check_share("lnq", self.outliers)

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"guided_hessian" if self.guided else "hessian"})

    def quantize(
        self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype
    ) -> Codebook | DenseAndSparse:
        """The rows in codes and tables."""
        check_rows("lnq", rows)
        N = rows.shape[0]
        hessians = curvature(
            stats, "lnq", guided=self.guided, output_groups=self.output_groups, shape=rows.shape
        )
        hessian_diag = jnp.diagonal(hessians, axis1=1, axis2=2)  # [g, K]
        felt = jnp.repeat(hessian_diag, N // len(hessians), axis=0)
        inner, weights, kept = set_apart(rows, felt, self.outliers, who="lnq")
        codes, _ = k_means(inner, weights, row_keys(self.seed, name, N), bits=self.bits)
        codes, table = lnq(
            inner,
            hessians,
            codes,
            kept,
            bits=self.bits,
            iterations=self.iterations,
            cycles=self.cycles,
            damping=self.damping,
        )
        base = from_codes(codes, table, bits=self.bits, dtype=dtype)
        return put_back(base, rows, kept, self.outliers)


def lnq(
    rows: Float[Array, "N K"],
    hessians: Float[Array, "g K K"],
    codes: Integer[Array, "N K"],
    kept: Bool[Array, "N K"] | None = None,
    *,
    bits: int,
    iterations: int = 2,
    cycles: int = 4,
    damping: float = 1e-4,
) -> tuple[UInt8[Array, "N K"], Float[Array, "N m"]]:
    """Codes and float16 levels no worse than any assignment to start from.

    hessians: one for each group of N / g consecutive rows. kept: weights that are stored apart, without an
    error whatever their codes. A level that `codes` does not use starts at 0.
    """
    N, g = len(rows), len(hessians)
    if N % g:
        raise ValueError(f"lnq: output_groups must divide N, got output_groups={g}, {N=}")
    parts = (jnp.split(a, g) for a in (rows.astype(jnp.float32), codes.astype(jnp.uint8)))
    solved = []
    for part, code, h, free in zip(*parts, hessians, free_of(kept, g), strict=True):
        solve = functools.partial(_alternate, damped(h, damping), 2**bits, iterations, cycles)
        solved.append(call_in_batches(solve, (part, code, free), max(N // g, LEAST_ROWS)))
    new_codes, tables = zip(*solved, strict=True)
    return jnp.concatenate(new_codes), jnp.concatenate(tables)


def _alternate(hessian, m: int, iterations: int, cycles: int, given):
    """The turns, for rows that share one H."""
    rows, codes, free = given
    table = refit(rows, hessian, codes, means(rows, jnp.diag(hessian), codes, free, m=m), free)
    best = objective(rows, hessian, codes, table, free), codes, table
    for _ in range(iterations):
        codes = descend(rows, hessian, codes, table, free, cycles=cycles)
        table = refit(rows, hessian, codes, table, free)
        best = better((objective(rows, hessian, codes, table, free), codes, table), best)
    _, codes, table = best
    table = table.astype(jnp.float16).astype(jnp.float32)
    swept = descend(rows, hessian, codes, table, free, cycles=min(cycles, 1))
    before, after = ((objective(rows, hessian, c, table, free), c) for c in (codes, swept))
    return better(after, before)[1], table.astype(jnp.float16)


@jax.jit
def objective(
    rows: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    codes: Integer[Array, "N K"],
    table: Float[Array, "N m"],
    free: Float[Array, "N K"] | None = None,
) -> Float[Array, " N"]:
    """F of each row."""
    error = where_free(rows - look_up(table, codes), free)
    return (jnp.matmul(error, hessian, precision=HIGHEST) * error).sum(1)


@functools.partial(jax.jit, static_argnames="m")
def means(
    rows: Float[Array, "N K"],
    weight: Float[Array, " K"],
    codes: Integer[Array, "N K"],
    free: Float[Array, "N K"] | None = None,
    *,
    m: int,
) -> Float[Array, "N m"]:
    """The weighted mean of the weights of each code; 0 of a code that is not used."""

    def one(row, code, free):
        mass = where_free(weight, free)
        total = jnp.zeros(m).at[code].add(mass)
        return jnp.zeros(m).at[code].add(mass * row) / jnp.where(total > 0, total, 1.0)

    return jax.vmap(one)(rows, codes, free)


@jax.jit
def refit(
    rows: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    codes: Integer[Array, "N K"],
    table: Float[Array, "N m"],
    free: Float[Array, "N K"] | None = None,
) -> Float[Array, "N m"]:
    """The levels of least F for these codes, by three steps from the levels there are.

    A step minimizes F + sum_l RIDGE A_ll (c_l - old_l)^2, A = P^T H P, which cannot raise F. What the ridge
    leaves of the error shrinks by RIDGE over the direction's curvature (in units of the levels' own) a step.
    """
    m = table.shape[1]

    def one(row):
        w, code, c, free = row
        p = jax.nn.one_hot(code, m)
        p = p if free is None else p * free[:, None]
        hp = jnp.matmul(hessian, p, precision=HIGHEST)  # [K, m]: the cost of it all
        a = jnp.matmul(p.T, hp, precision=HIGHEST)
        root = jnp.sqrt(jnp.where(jnp.diag(a) > 0, jnp.diag(a), 1.0))
        factor = jnp.linalg.cholesky(a / (root[:, None] * root[None]) + RIDGE * jnp.eye(m))
        for _ in range(3):
            pull = jnp.matmul(where_free(w - c[code], free), hp, precision=HIGHEST)
            step = jax.scipy.linalg.cho_solve((factor, True), pull / root) / root
            c = jnp.where(jnp.isfinite(step).all(), c + step, c)
        return c

    size = AT_ONCE // (rows.shape[1] * m)
    return map_in_batches(one, (rows, codes.astype(jnp.int32), table, free), size)


@jax.jit
def descend(
    rows: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    codes: Integer[Array, "N K"],
    table: Float[Array, "N m"],
    free: Float[Array, "N K"] | None = None,
    *,
    cycles: int | Int[Array, ""],
) -> UInt8[Array, "N K"]:
    """Codes after sweeps over all inputs, each put where F is least while the others stay (eq. 11).

    The lowest code of levels equally near. Equal, code for code, to taking the inputs one at a time: the
    pull on a block from inputs outside it is gathered in one product, as it holds while the block changes.
    """
    K = rows.shape[1]
    size = min(INPUTS_PER_PRODUCT, K)
    more = -K % size
    levels = table.T  # [m, N]
    w = jnp.pad(rows.T, ((0, more), (0, 0)))
    error = jnp.pad(where_free(look_up(table, codes) - rows, free).T, ((0, more), (0, 0)))
    has_level = None if free is None else jnp.pad(free.T, ((0, more), (0, 0)))
    pull = hessian / jnp.diag(hessian)[:, None]
    pull = jnp.pad(pull.at[jnp.arange(K), jnp.arange(K)].set(0.0), (0, more))  # none of an input on itself
    codes = jnp.pad(codes.T.astype(jnp.uint8), ((0, more), (0, 0)))

    def block(i, state):
        error, codes = state
        at = i % (len(w) // size) * size
        across = jax.lax.dynamic_slice_in_dim(pull, at, size)  # [B, K]
        within = jax.lax.dynamic_slice_in_dim(across, at, size, axis=1)
        across = jax.lax.dynamic_update_slice_in_dim(across, jnp.zeros_like(within), at, axis=1)
        weights = jax.lax.dynamic_slice_in_dim(w, at, size)
        counts = None if has_level is None else jax.lax.dynamic_slice_in_dim(has_level, at, size)
        target = weights - jnp.matmul(across, error, precision=HIGHEST)

        def column(j, state):
            here, code = state
            u = target[j] - jnp.matmul(within[j], here, precision=HIGHEST)
            level, c = _nearest(u, levels)
            left = where_free(level - weights[j], None if counts is None else counts[j])
            return here.at[j].set(left), code.at[j].set(c)

        here = jax.lax.dynamic_slice_in_dim(error, at, size)
        code = jax.lax.dynamic_slice_in_dim(codes, at, size)
        here, code = jax.lax.fori_loop(0, size, column, (here, code))
        error = jax.lax.dynamic_update_slice_in_dim(error, here, at, 0)
        return error, jax.lax.dynamic_update_slice_in_dim(codes, code, at, 0)

    steps = cycles * (len(w) // size)
    return jax.lax.fori_loop(0, steps, block, (error, codes))[1][:K].T


def _nearest(u: Float[Array, " N"], levels: Float[Array, "m N"]):
    """The nearest level of each row's target, and its code."""

    def closer(c, best):
        return better((jnp.abs(u - levels[c]), levels[c], c.astype(jnp.uint8)), best)

    start = jnp.full(u.shape, jnp.inf), jnp.zeros_like(u), jnp.zeros(u.shape, jnp.uint8)
    _, level, code = jax.lax.fori_loop(0, len(levels), closer, start, unroll=min(len(levels), 16))
    return level, code
