"""DASH-Q: each group's scale and zero point by least squares, inputs weighed by hessian_diag. Lossy.

Paper: arXiv:2604.13806 (section 5; equations as in the dossier: 1 rounding, 10 scale, 11 offset, 12 start).
With H = sum_t x_t x_t^T cut down to its diagonal h, every group of every row is a problem of its own:

    least over s > 0, l, codes q in 0 .. m = 2**bits - 1 of      F = sum_j h_j (w_j - (l + s q_j))^2

Rounding is exact for given (s, l), a weighted regression is exact for given q; the two alternate.
`mode="paper"` does just that, from the range of the weights, damped and with a ridge on s. Ours, the default
`mode="search"`, differs in:

- Starts: 10 ranges (0.3 to 1 of the whole) times 3 shifts (a third of a code), two steps each; the best of a
  group goes on. F on average about a sixth below the paper's at 2 bits, next to the exact optimum.
- No damping and no ridge there, so F falls with every step.
- The grid is rounded to what is stored within the search, and compared as stored with the start: no group
  ends above round to nearest on its own range.
- `integer_zero_point` fits with a whole zero point, one that packs into `bits` bits, rather than rounding it
  afterwards.
- `feedback` hands the grids to GPTQ's loop, with H_rho = rho H + (1 - rho) diag(H); rho = `shrinkage`, "auto"
  for the one whose error on held-out inputs is least. It pays where tokens are many more than inputs.

    DashQ(bits=2).quantize(rows, stats, name="up", dtype=jnp.bfloat16)                             # Affine

Layout while solving: [C, G, U, n], n rows side by side: sums over a group are sums of vectors. Memory:
about four times the rows [N, K] in float32 (search works on 256 rows at a time); `feedback` adds GPTQ's.
Letters: K inputs, N outputs, G = ceil(K / group_size) groups of C * U places.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxllm.ops.batches import call_in_batches
from jaxllm.ops.search import better
from jaxllm.quant.methods.gptq import feedback
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine, check_rows

ROWS = 256  # rows solved at a time: their working arrays stay in cache
UNROLL = 32  # places of a group in one fused loop
GROUPS = {2: 32, 3: 64, 4: 128}  # the paper's; other widths take the nearest
RANGES, SHIFTS = 10, 3  # starts: so many shares of the range, each at so many shifts
STEPS_PER_START = 2
STEPS_AS_STORED = 2  # at the end, each from the grid before it as stored
MIN_TRIAL_SCALE = 1e-8  # least scale while solving
RHOS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # shares of the curvature off the diagonal that "auto" tries

Places = Float[Array, "C G U n"]  # weights of n rows: G groups of C * U places
Shares = Float[Array, "C G U 1"]  # what each place weighs, 1 in all a group
PerGroup = Float[Array, "G n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DashQ:
    """Weighted least squares on affine grids.

    group_size: None is the paper's (32, 64, 128 at 2, 3, 4 bits); never more than K. damping and ridge: of
    "paper" only (alpha and lambda). h_power: exponent on hessian_diag, 0 weighs all inputs alike. shrinkage:
    rho, None is 1, with `feedback` only. scale_bits: store the scales in codes of so many bits as well, with
    integer_zero_point and no feedback (the errors of codes are then those of the coded scales).
    """

    bits: int = 2
    group_size: int | None = None
    mode: Literal["search", "paper"] = "search"
    iterations: int = 9
    damping: float = 0.5
    ridge: float = 1e-2
    h_power: float = 1.0
    integer_zero_point: bool = False
    feedback: bool = False
    shrinkage: float | Literal["auto"] | None = None
    scale_bits: int | None = None

    def __post_init__(self):
        rho = self.shrinkage
        for right, what in (
            (1 <= self.bits <= 8, f"bits must be 1 to 8, got {self.bits=}"),
            (
                self.group_size is None or self.group_size >= 1,
                f"group_size must be at least 1, got {self.group_size=}",
            ),
            (self.mode in ("search", "paper"), f"mode must be search or paper, got {self.mode=}"),
            (self.iterations >= 0, f"iterations must not be negative, got {self.iterations=}"),
            (0 < self.damping <= 1, f"damping must be above 0, at most 1, got {self.damping=}"),
            (0 <= self.ridge < float("inf"), f"ridge must be finite, not negative, got {self.ridge=}"),
            (0 <= self.h_power < float("inf"), f"h_power must be finite, not negative, got {self.h_power=}"),
            (
                self.mode == "search" or not self.integer_zero_point,
                "integer_zero_point needs mode='search', got mode='paper'",
            ),
            (not self.feedback or self.scale_bits is None, "scale_bits needs feedback=False, got True"),
            (self.feedback or rho is None, f"shrinkage needs feedback=True, got {self.shrinkage=}"),
            (
                rho is None or rho == "auto" or (not isinstance(rho, str) and 0 <= rho <= 1),
                f"shrinkage must be None, 'auto' or 0 to 1, got {self.shrinkage=}",
            ),
        ):
            if not right:
                raise ValueError(f"dash_q: {what}")
        affine.check_scale_bits("dash_q", self.scale_bits, self.integer_zero_point)

    @property
    def required_stats(self) -> frozenset[str]:
        extra = {"hessian"} if self.feedback else set()
        return frozenset({"hessian_diag"} | extra | ({"held_out"} if self.shrinkage == "auto" else set()))

    def group_size_of(self, K: int) -> int:
        """Of a weight of K inputs."""
        return min(self.group_size or GROUPS[min(max(self.bits, 2), 4)], K)

    def quantize(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> Affine:
        """The rows in affine codes."""
        need(stats, "dash_q", *sorted(self.required_stats))
        rows = rows.astype(jnp.float32)
        hessian_diag, K = stats.hessian_diag, rows.shape[1]
        assert hessian_diag is not None
        if hessian_diag.shape != (K,):
            raise ValueError(f"dash_q: hessian_diag must be [K], got {hessian_diag.shape=}, {K=}")
        check_rows(f"dash_q: {name}", rows)
        if not bool((jnp.isfinite(hessian_diag) & (hessian_diag >= 0)).all()):
            raise ValueError(f"dash_q: hessian_diag must be finite and not negative, got another in {name=}")
        scale, zero_point = fit(self, rows, hessian_diag)
        sizes = {"bits": self.bits, "group_size": self.group_size_of(K)}
        if not self.feedback:
            return affine.encode(
                rows,
                scale,
                zero_point,
                **sizes,
                dtype=dtype,
                integer_zero_point=self.integer_zero_point,
                scale_bits=self.scale_bits,
            )
        scale, zero_point = affine.round_to_storage(
            rows, scale, zero_point, **sizes, integer_zero_point=self.integer_zero_point
        )
        rhos = RHOS if self.shrinkage == "auto" else (1.0 if self.shrinkage is None else self.shrinkage,)
        codes = _fed_back(rows, scale, zero_point, stats, rhos, **sizes)
        return affine.from_codes(
            codes, scale, zero_point, **sizes, dtype=dtype, integer_zero_point=self.integer_zero_point
        )


def fit(
    method: DashQ, rows: Float[Array, "N K"], hessian_diag: Float[Array, " K"]
) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
    """Scale and zero point (in codes) of every group; of a search, as they will be stored."""
    return call_in_batches(functools.partial(_fit_rows, method, hessian_diag), rows, ROWS)


@functools.partial(jax.jit, static_argnums=0)
def _fit_rows(
    method: DashQ, hessian_diag: Float[Array, " K"], rows: Float[Array, "n K"]
) -> tuple[Float[Array, "n G"], Float[Array, "n G"]]:
    """`fit` of so many rows at once."""
    rows, group_size = rows.astype(jnp.float32), method.group_size_of(rows.shape[1])
    w, h = _cut(rows, group_size), _weights(hessian_diag, group_size, method.h_power)
    if method.mode == "paper":
        qmax, of = 2**method.bits - 1, {"damping": method.damping, "ridge": method.ridge}
        s, low = _range(w, qmax)
        s, low = descend(w, h, s, low, qmax=qmax, steps=method.iterations, **of)
        return s.T, (-low / s).T
    step, moved, centre = _stepper(method, w, h)
    scale, zero_point = polish(method, rows, w, h, step, centre, *search(method, moved, step, centre))
    return scale.T, zero_point.T


def _weights(hessian_diag: Float[Array, " K"], group_size: int, power: float) -> Shares:
    """What the places of each group weigh, [C, G, U, 1], together 1; a group of zeros: all alike."""
    h, real = affine.grouped(hessian_diag[None].astype(jnp.float32), group_size)
    # subtle: powers of large or small sums may leave float32; relative to the greatest they do not
    h = (h[0] / jnp.maximum(h[0].max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)) ** power * real
    h = jnp.where(h.sum(-1, keepdims=True) > 0, h, real)
    h = h / h.sum(-1, keepdims=True)
    C, U = _places(group_size)
    return jnp.pad(h, ((0, 0), (0, C * U - group_size))).reshape(-1, C, U, 1).transpose(1, 0, 2, 3)


def _cut(rows: Float[Array, "n K"], group_size: int) -> Places:
    """Rows [n, K] in the layout of the sums, [C, G, U, n]; places that fill up repeat the last weight."""
    C, U = _places(group_size)
    w = affine.grouped(rows, group_size)[0]
    w = jnp.pad(w, ((0, 0), (0, 0), (0, C * U - group_size)), mode="edge")
    return w.reshape(len(rows), -1, C, U).transpose(2, 1, 3, 0)


def _places(group_size: int) -> tuple[int, int]:
    # subtle: two parts at least: XLA takes a loop of one trip apart, into each of those that read its sums
    C = max(2, -(-group_size // UNROLL))
    return C, -(-group_size // C)


def _range(w: Places, qmax: int, integer_zero_point: bool = False) -> tuple[PerGroup, PerGroup]:
    """Scale and low end of the grid from the least to the greatest weight (equation 12), perhaps with 0."""
    low, high = w.min((0, 2)), w.max((0, 2))
    if integer_zero_point:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    return jnp.maximum((high - low) / qmax, MIN_TRIAL_SCALE), low


def _sum(w: Places, h: Shares, start, add):
    """`add(sums, weight, its h)` over all places of each group."""

    def some(sums, part):
        ws, hs = part
        # subtle: unrolled, the loop over places becomes one fused loop over vectors of rows; a reduction
        # over an axis takes XLA:CPU twice as long, or ten times
        for u in range(ws.shape[1]):
            sums = add(sums, ws[:, u], hs[:, u])
        return sums, None

    return jax.lax.scan(some, start, (w, h))[0]


def moments(
    w: Places, h: Shares, s: PerGroup, low: PerGroup, *, qmax: int
) -> tuple[PerGroup, PerGroup, PerGroup]:
    """sum h q, sum h q^2, sum h q w of each group, q the codes nearest to w under (s, low) (equation 1)."""
    inverse, zero_point = 1 / s, jnp.zeros_like(s)

    def add(sums, w, h):
        q = jnp.clip(jnp.round((w - low) * inverse), 0, qmax)
        hq = h * q
        return sums[0] + hq, sums[1] + hq * q, sums[2] + hq * w

    return _sum(w, h, (zero_point, zero_point, zero_point), add)


def refit(
    w: Places, h: Shares, s: PerGroup, low: PerGroup, *, qmax: int, ridge=0.0
) -> tuple[PerGroup, PerGroup, PerGroup]:
    """One step, undamped: codes by rounding, then (s, low) by regression on them (equations 10, 11).

    Returns F of these codes with the new s and low, less sum h w^2; then s, low. sum h w of every group must
    be 0. A group whose codes are all the same keeps its s.
    """
    mean, square, cross = moments(w, h, s, low, qmax=qmax)
    var = square - mean * mean
    varied = var > 1e-6 * square  # below, it is the rounding error of the difference
    s = jnp.where(varied, jnp.maximum(cross / jnp.where(varied, var + ridge, 1.0), MIN_TRIAL_SCALE), s)
    return s * (s * var - 2 * cross), s, -s * mean


def refit_code(
    w: Places, h: Shares, total: PerGroup, s: PerGroup, low: PerGroup, *, qmax: int
) -> tuple[PerGroup, PerGroup, PerGroup]:
    """The same where low = -zero_point * s whole, which stays; sum h w is `total`, whatever it be."""
    mean, square, cross = moments(w, h, s, low, qmax=qmax)
    zero_point = jnp.round(-low / s)
    cross = cross - zero_point * total
    var = square - 2 * zero_point * mean + zero_point * zero_point
    varied = var > 1e-6 * (square + zero_point * zero_point)
    s = jnp.where(varied, jnp.maximum(cross / jnp.where(varied, var, 1.0), MIN_TRIAL_SCALE), s)
    return s * (s * var - 2 * cross), s, -zero_point * s


def _mean(w: Places, h: Shares) -> PerGroup:
    return _sum(w, h, jnp.zeros((w.shape[1], w.shape[3])), lambda total, w, h: total + h * w)


def error(w: Places, h: Shares, s: PerGroup, zero_point: PerGroup, *, qmax: int) -> PerGroup:
    """F of each group on the grid (code - zero_point) * s, codes nearest."""

    def add(total, w, h):
        return total + h * (w - affine.round_to_grid(w, s, zero_point, qmax)[1]) ** 2

    return _sum(w, h, jnp.zeros_like(s), add)


def descend(
    w: Places, h: Shares, s: PerGroup, low: PerGroup, *, qmax: int, steps, damping, ridge
) -> tuple[PerGroup, PerGroup]:
    """The paper's loop: (s, low) after `steps` damped steps."""
    mean = _mean(w, h)
    centred = w - mean[None, :, None]

    def step(_, at):
        s, low = at
        _, new_s, new_low = refit(centred, h, s, low, qmax=qmax, ridge=ridge)
        return damping * new_s + (1 - damping) * s, damping * new_low + (1 - damping) * low

    s, low = jax.lax.fori_loop(0, steps, step, (s, low - mean))
    return s, low + mean


def _stepper(method: DashQ, w: Places, h: Shares):
    """The undamped step, the weights it is for, and what was taken from them [G, n]."""
    qmax = 2**method.bits - 1
    mean = _mean(w, h)
    if method.integer_zero_point:
        return functools.partial(refit_code, w, h, mean, qmax=qmax), w, jnp.zeros_like(mean)
    centred = w - mean[None, :, None]
    return functools.partial(refit, centred, h, qmax=qmax), centred, mean


def search(method: DashQ, w: Places, step: Callable, centre: PerGroup) -> tuple[PerGroup, PerGroup]:
    """Scale and zero point (in codes) of the best of many starts, refined; all of `_stepper`."""
    qmax, starts = 2**method.bits - 1, RANGES * SHIFTS
    whole, low = _range(w, qmax, method.integer_zero_point)
    middle = low + whole * (qmax / 2)

    def start(i):
        part = 0.3 + 0.7 * (i // SHIFTS).astype(jnp.float32) / (RANGES - 1)
        shift = (i % SHIFTS - SHIFTS // 2).astype(jnp.float32)
        s = jnp.maximum(part * whole, MIN_TRIAL_SCALE)
        low = middle - s * (qmax / 2)
        if method.integer_zero_point:
            return s, -s * jnp.clip(jnp.round(-low / s) + shift, 0, qmax)
        return s, low + s * (shift / SHIFTS)

    def attempt(i, best):  # the last goes on from the best: one loop, as each would be compiled
        last = i == starts
        grid = (jnp.where(last, a, b) for a, b in zip(best[1:], start(i), strict=True))
        steps = jnp.where(last, method.iterations, STEPS_PER_START)
        new = jax.lax.fori_loop(0, steps, lambda _, at: step(*at[1:]), (none, *grid))
        return better(new, best)

    none = jnp.full_like(whole, jnp.inf)
    _, s, low = jax.lax.fori_loop(0, starts + 1, attempt, (none, whole, low))
    return s, -(low + centre) / s


def polish(
    method: DashQ,
    rows: Float[Array, "n K"],
    w: Places,
    h: Shares,
    step: Callable,
    centre: PerGroup,
    s: PerGroup,
    zero_point: PerGroup,
) -> tuple[PerGroup, PerGroup]:
    """Grid as stored: the best of round to nearest, one mean a group, (s, zero_point) and its refits."""
    qmax, integer_zero_point = 2**method.bits - 1, method.integer_zero_point
    sizes = {"bits": method.bits, "group_size": method.group_size_of(rows.shape[1])}
    whole, low = _range(w, qmax, integer_zero_point)

    def candidate(s, zero_point):
        stored = affine.round_to_storage(
            rows, s.T, zero_point.T, **sizes, integer_zero_point=integer_zero_point
        )
        s, zero_point = (x.T for x in stored)
        return error(w, h, s, zero_point, qmax=qmax), s, zero_point

    # Three grids given (a zero point that no grid has is stored as the mean), then refits of the last.
    scales = jnp.stack([whole, s, s])
    zero_points = jnp.stack([-low / whole, jnp.full_like(zero_point, jnp.inf), zero_point])

    def compare(i, state):
        best, grid = state
        given = scales[i], zero_points[i]
        new = candidate(*(jnp.where(i < len(scales), a, b) for a, b in zip(given, grid, strict=True)))
        _, s, low = step(new[1], -new[1] * new[2] - centre)
        return better(new, best), (s, -(low + centre) / s)

    start = (jnp.full_like(s, jnp.inf), s, zero_point), (s, zero_point)
    best, _ = jax.lax.fori_loop(0, len(scales) + STEPS_AS_STORED, compare, start)
    return best[1:]


def _fed_back(
    rows: Float[Array, "N K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"],
    stats: Stats,
    rhos: tuple[float, ...],
    *,
    bits: int,
    group_size: int,
):
    """Codes by GPTQ's loop under the H_rho whose error on held-out inputs is least (one rho: no choice)."""
    assert stats.hessian is not None
    best, least = None, float("inf")
    for rho in rhos:
        hessian = rho * stats.hessian + (1 - rho) * jnp.diag(jnp.diag(stats.hessian))
        codes = feedback(rows, hessian, scale, zero_point, bits=bits, group_size=group_size)
        if len(rhos) == 1:
            return codes
        grid = (jnp.repeat(x, group_size, axis=1)[:, : rows.shape[1]] for x in (scale, zero_point))
        found = float(_loss(rows, codes, *grid, stats.held_out))
        if best is None or found < least:
            best, least = codes, found
    return best


@jax.jit
def _loss(
    rows: Float[Array, "N K"],
    codes: UInt8[Array, "N K"],
    scale: Float[Array, "N K"],
    zero_point: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
) -> Float[Array, ""]:
    """tr(E H E^T), E the error of the rows."""
    off = rows - (codes.astype(jnp.float32) - zero_point) * scale
    return (jnp.matmul(off, hessian, precision=jax.lax.Precision.HIGHEST) * off).sum()
