"""GPTQ: codes whose errors later inputs make up for, column by column. Lossy.

Paper: arXiv:2210.17323, algorithm 1: minimizes tr(E H E^T), E = W - Q, H = sum_t x_t x_t^T, greedily from the
first input to the last. Differs in how, not in what it computes:

- With H = U D U^T, U unit upper triangular, tr(E H E^T) = sum_j D_jj ((E U)_j)^2, so input j is best
  rounded at w_j + sum_{i<j} (w_i - q_i) U_ij. This equals the published recursion on the Cholesky factor
  of the inverse (arXiv:2307.13304, theorem 6) and inverts nothing; weights are read, never updated.
- Grids are rounded to what is stored before the first column, so what was made up for is what is stored.
- `act_order=True` takes inputs by falling H_jj. Grids are fitted before, in the order that is stored, so
  that nothing has to be known about the order afterwards (published code: `static_groups`).
- A clipped grid weighs input j by D_jj, what is left of its hessian_diag once those before it are known: its
  weight in the sum above. With `rounds` > 1 a row's grids are fitted again, to the weights as corrected in
  the round before, and the row's best round is kept: never worse than one round, `rounds=1` is the paper.
- With inputs as they come, another candidate of `rounds` > 1 fits a group's grid when it is reached, with
  every correction from inputs before the group (published code: with those from blocks of 128 before). Alone
  it is mostly better where grids are clipped and worse where they are not; the better one of each row is what
  counts.
  KL on unseen text, once and by hand on 2026-11-30 (fitted before, its two rounds, when reached, the better
  one; that no row gets worse is tested):

      pico draft, 2 bits, groups of 32     0.852  0.840  0.887  0.819    clipped   0.499  0.473  0.467  0.444
      pico draft, 3 bits, groups of 64     0.162  0.156  0.162  0.152    clipped   0.133  0.133  0.130  0.131
      pico target, 3 bits, groups of 128   0.109  0.106  0.108  0.103    clipped   0.086  0.082  0.084  0.081

  With stories260K, 2 to 4 bits, groups of 32 to 128, 28 settings in all: of the 14 that clip the better one
  was the best in 12 and within 0.4 % in 2; of those that do not, in 10 and within 0.4 % in 2, and in 2 of
  stories260K, whose KL does not follow the errors of its layers, 2 and 8 % worse than fitting once.

- An input that is always 0 keeps its weight, rounded; damping is relative, so H may have any scale.

`guided` (arXiv:2505.07004, eq. 7) takes H from the gradients of the end loss, one for each of `output_groups`
of consecutive outputs.

    Gptq(bits=3, group_size=32).quantize(rows, stats, name="up", dtype=jnp.bfloat16)               # Affine
    codes = feedback(rows, hessian, scale, zero_point, bits=2, group_size=32)         # on a grid of one's own

Memory: about three times the rows [N, K] and three times H [K, K], in float32.
Layout: inputs lead, [K, N], so that a column of the paper is contiguous; blocks of inputs stay in cache.
Letters: K inputs, N outputs, G = ceil(K / group_size) grids a row, g groups of outputs, B inputs a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxllm.ops.batches import LEAST_ROWS, call_in_batches
from jaxllm.ops.search import Candidate, better
from jaxllm.quant.methods.curvature import check_curvature, curvature, damped
from jaxllm.quant.methods.rtn import Rtn, check_grid
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine, check_rows

INPUTS_PER_PRODUCT = 128  # inputs whose corrections are gathered in one product
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ on affine grids.

    act_order: inputs by falling hessian_diag; False: as they come. rounds: how often grids are fitted: once
    before, then to what was corrected, and with inputs as they come also when each group is reached; the best
    is kept, row by row. damping: times the mean of H's diagonal, added to it. clip, symmetric,
    integer_zero_point: as in `Rtn`. guided: H of the end loss, for `output_groups` groups of outputs.
    """

    bits: int = 4
    group_size: int = 32
    act_order: bool = True
    rounds: int = 2
    damping: float = 0.01
    symmetric: bool = False
    clip: bool = True
    integer_zero_point: bool = True
    guided: bool = False
    output_groups: int = 1

    def __post_init__(self):
        check_grid("gptq", self.bits, self.group_size)
        check_curvature("gptq", self.damping, self.guided, self.output_groups)
        if self.rounds < 1:
            raise ValueError(f"gptq: rounds must be at least 1, got rounds={self.rounds}")

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"guided_hessian" if self.guided else "hessian"})

    def quantize(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> Affine:
        """The rows in affine codes; ValueError if H cannot be factored."""
        check_rows("gptq", rows)
        hessians = curvature(
            stats, "gptq", guided=self.guided, output_groups=self.output_groups, shape=rows.shape
        )
        parts = jnp.split(rows.astype(jnp.float32), len(hessians))
        solved = [self._part(part, h) for part, h in zip(parts, hessians, strict=True)]
        codes, scale, zero_point = (jnp.concatenate(column) for column in zip(*solved, strict=True))
        kept = None if self.symmetric else zero_point
        sizes = {"bits": self.bits, "group_size": min(self.group_size, rows.shape[1])}
        return affine.from_codes(
            codes, scale, kept, **sizes, dtype=dtype, integer_zero_point=self.integer_zero_point
        )

    def _part(self, rows, hessian):
        """Codes, scale and zero point of the rows that share one H."""
        grid = Rtn(
            bits=self.bits,
            group_size=min(self.group_size, rows.shape[1]),
            symmetric=self.symmetric,
            integer_zero_point=self.integer_zero_point,
            clip=self.clip,
        )
        order, upper, pivots = _factored(hessian, self.damping, self.act_order)

        def solve(rows):
            best, target = _nothing(rows, grid=grid)
            for i in range(self.rounds):
                best, target = fit_round(
                    best, target, rows, upper, pivots, order, is_first=np.bool_(i == 0), grid=grid
                )
            if self.rounds > 1 and not self.act_order:
                best = better(_refitted(rows, upper, pivots, grid), best)
            return best[1:]

        return call_in_batches(solve, rows, max(len(rows), LEAST_ROWS))


def feedback(
    rows: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"],
    *,
    bits: int,
    group_size: int,
    act_order: bool = True,
    damping: float = 0.01,
) -> UInt8[Array, "N K"]:
    """Codes on grids given beforehand, as `affine.round_to_storage` gives them."""
    N, K = rows.shape
    if scale.shape != (N, -(-K // group_size)):
        raise ValueError(
            f"gptq: scale must be [N, ceil(K / group_size)], got {scale.shape=}, {rows.shape=}, {group_size=}"
        )
    order, upper, pivots = _factored(hessian, damping, act_order)
    return _given(rows, upper, pivots, order, scale, zero_point, bits=bits, group_size=group_size)[0]


def refitted(
    rows: Float[Array, "N K"], hessian: Float[Array, "K K"], grid: Rtn, *, damping: float = 0.01
) -> tuple[UInt8[Array, "N K"], Float[Array, "N G"], Float[Array, "N G"]]:
    """Codes, scale and zero point, inputs as they come; a group's grid is fitted when it is reached."""
    _, upper, pivots = _factored(hessian, damping, False)
    return _refitted(rows, upper, pivots, grid)[1:]


def _factored(hessian, damping: float, act_order: bool):
    order, upper, pivots, is_finite = _factor(hessian, damping=damping, act_order=act_order)
    if not isinstance(is_finite, jax.core.Tracer) and not bool(is_finite):
        raise ValueError(f"gptq: hessian must be finite and positive definite once damped, got {damping=}")
    return order, upper, pivots


@functools.partial(jax.jit, static_argnames=("damping", "act_order"))
def _factor(hessian, *, damping: float, act_order: bool):
    """The order of inputs; U of H = U D U^T in it, 0 on and below the diagonal; D with inputs as they come.

    And whether they are finite. A lower Cholesky factor of H read backwards is an upper one of H.
    """
    order = jnp.argsort(-jnp.diag(hessian)) if act_order else jnp.arange(len(hessian))  # ties as they come
    backwards = order[::-1]
    whole = damped(hessian, damping)
    upper = jax.lax.linalg.cholesky(whole[backwards[:, None], backwards[None]], symmetrize_input=False)[
        ::-1, ::-1
    ]
    root = jnp.diag(upper)
    above = jnp.triu(upper / root[None], 1)
    return order, above, jnp.zeros_like(root).at[order].set(root**2), jnp.isfinite(above).all()


@functools.partial(jax.jit, static_argnames="grid")
def fit_round(
    best: Candidate,
    target: Float[Array, "N K"],
    rows: Float[Array, "N K"],
    upper: Float[Array, "K K"],
    pivots: Float[Array, " K"],
    order: Int[Array, " K"],
    *,
    is_first: Bool[Array, ""],
    grid: Rtn,
) -> tuple[Candidate, Float[Array, "N K"]]:
    """The better of `best` and of codes on grids fitted to `target`; and the weights as those corrected them.

    A candidate: of each row tr(E H E^T), codes, scale and zero point.
    """
    scale, zero_point = grid.grid(target, pivots)
    sizes = {"bits": grid.bits, "group_size": grid.group_size}
    codes, loss, target = _given(rows, upper, pivots, order, scale, zero_point, **sizes)
    return better((loss, codes, scale, zero_point), best, is_first=is_first), target


@functools.partial(jax.jit, static_argnames="grid")
def _nothing(rows, *, grid: Rtn) -> tuple[Candidate, Float[Array, "N K"]]:
    """A candidate and a target to begin with."""
    # subtle: computed where the rows lie, as later rounds' are, or `fit_round` would be compiled twice
    (N, K), zero = rows.shape, 0 * rows[0, 0]
    empty = jnp.full((N, -(-K // grid.group_size)), zero)
    return (jnp.full(N, zero), jnp.full((N, K), zero, jnp.uint8), empty, empty), rows + zero


@functools.partial(jax.jit, static_argnames=("bits", "group_size"))
def _given(
    rows: Float[Array, "N K"],
    upper: Float[Array, "K K"],
    pivots: Float[Array, " K"],
    order: Int[Array, " K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"],
    *,
    bits: int,
    group_size: int,
) -> tuple[UInt8[Array, "N K"], Float[Array, " N"], Float[Array, "N K"]]:
    """Codes on grids given, and of those tr(E H E^T) of each row [N] and the weights as corrected [N, K]."""
    K = rows.shape[1]
    columns, upper = _pad(rows.T.astype(jnp.float32)[order], upper, INPUTS_PER_PRODUCT)
    grid = (scale.T.astype(jnp.float32), zero_point.T.astype(jnp.float32))
    of = jnp.pad(order // group_size, (0, len(columns) - K))  # which grid serves an input

    def block(b, state):
        errors, codes = state
        start = _corrected(columns, upper, errors, b, INPUTS_PER_PRODUCT)
        here = jax.lax.dynamic_slice_in_dim(of, b * INPUTS_PER_PRODUCT, INPUTS_PER_PRODUCT)
        return _block(columns, upper, start, (*grid, here), errors, codes, b, 2**bits - 1)

    state = jnp.zeros_like(columns), jnp.zeros(columns.shape, jnp.uint8)
    errors, codes = jax.lax.fori_loop(0, len(columns) // INPUTS_PER_PRODUCT, block, state)
    correction = jnp.matmul(upper.T, errors, precision=HIGHEST)
    loss = _loss(pivots[order], (errors + correction)[:K])
    back = jnp.argsort(order)
    return codes[back].T, loss, (columns + correction)[back].T


@functools.partial(jax.jit, static_argnames=("grid",))
def _refitted(rows, upper, pivots, grid: Rtn):
    """Of each row tr(E H E^T), codes, scale and zero point; a group's grid is fitted when it is reached."""
    (N, K), group_size = rows.shape, grid.group_size
    columns, upper = _pad(rows.T.astype(jnp.float32), upper, group_size)
    G = len(columns) // group_size
    pivots = jnp.pad(pivots.astype(jnp.float32), (0, len(columns) - K))
    of = jnp.zeros(group_size, jnp.int32)

    def block(b, state):
        errors, codes, scales, zeros = state
        start = _corrected(columns, upper, errors, b, group_size)
        weights = jax.lax.dynamic_slice_in_dim(columns, b * group_size, group_size)
        within = jax.lax.dynamic_slice(upper, (b * group_size, b * group_size), (group_size, group_size))
        # subtle: `start` is what input j is rounded at once those before it in its group were rounded without
        #   error. The best weights given only the blocks before are these, what the published updates hold.
        best = weights + solve_triangular(within, start - weights, trans=1, unit_diagonal=True)
        # Places that fill up a short last group repeat its first weight, which changes no range.
        real = b * group_size + jnp.arange(group_size) < K
        fitted = jnp.where(real[:, None], best, best[:1]).T
        scale, zero_point = grid.grid(
            fitted, jax.lax.dynamic_slice_in_dim(pivots, b * group_size, group_size)
        )
        errors, codes = _block(
            columns, upper, start, (scale.T, zero_point.T, of), errors, codes, b, 2**grid.bits - 1
        )
        return errors, codes, scales.at[b].set(scale[:, 0]), zeros.at[b].set(zero_point[:, 0])

    state = (
        jnp.zeros_like(columns),
        jnp.zeros(columns.shape, jnp.uint8),
        jnp.zeros((G, N)),
        jnp.zeros((G, N)),
    )
    errors, codes, scales, zeros = jax.lax.fori_loop(0, G, block, state)
    corrected = errors + jnp.matmul(upper.T, errors, precision=HIGHEST)
    return _loss(pivots, corrected), codes[:K].T, scales.T, zeros.T


def _loss(pivots, corrected):
    """tr(E H E^T) of each row, D and E U of the same inputs."""
    return jnp.einsum("k,kn->n", pivots, corrected**2, precision=HIGHEST)


def _pad(columns, upper, block: int):
    """Whole blocks: inputs of weight 0 at the end that correct no other."""
    more = -len(columns) % block
    return jnp.pad(columns, ((0, more), (0, 0))), jnp.pad(upper, (0, more))


def _corrected(
    columns: Float[Array, "K N"], upper: Float[Array, "K K"], errors: Float[Array, "K N"], b, size: int
) -> Float[Array, "B N"]:
    """A block's weights [size, N] with the corrections from all blocks before it."""
    here = jax.lax.dynamic_slice_in_dim(columns, b * size, size)
    into = jax.lax.dynamic_slice_in_dim(upper, b * size, size, axis=1)  # [K, size]
    return here + jnp.matmul(into.T, errors, precision=HIGHEST)


def _block(
    columns: Float[Array, "K N"],
    upper: Float[Array, "K K"],
    start: Float[Array, "B N"],
    grid: tuple[Float[Array, "G N"], Float[Array, "G N"], Int[Array, " B"]],
    errors: Float[Array, "K N"],
    codes: UInt8[Array, "K N"],
    b,
    qmax: int,
) -> tuple[Float[Array, "K N"], UInt8[Array, "K N"]]:
    """Rounds block `b` input by input; `errors` and `codes` with its rows filled in.

    start: its weights, corrected for the blocks before. grid: scales, zero points, which one each input has.
    """
    size = len(start)
    scale, zero_point, of = grid
    weights = jax.lax.dynamic_slice_in_dim(columns, b * size, size)
    within = jax.lax.dynamic_slice(upper, (b * size, b * size), (size, size)).T

    # subtle: `x[j]` and `.at[j].set` look each time whether j is negative or outside
    at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)

    def column(j, state):
        made, code = state  # errors of the block's inputs so far, 0 for those to come
        w = at(start, j) + jnp.matmul(at(within, j), made, precision=HIGHEST)
        s, z = at(scale, at(of, j)), at(zero_point, at(of, j))
        c, value = affine.round_to_grid(w, s, z, qmax)
        return put(made, at(weights, j) - value, j), put(code, c.astype(jnp.uint8), j)

    state = jnp.zeros_like(start), jnp.zeros(start.shape, jnp.uint8)
    made, code = jax.lax.fori_loop(0, size, column, state)
    return (
        jax.lax.dynamic_update_slice_in_dim(errors, made, b * size, 0),
        jax.lax.dynamic_update_slice_in_dim(codes, code, b * size, 0),
    )
