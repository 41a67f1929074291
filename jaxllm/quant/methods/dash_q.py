"""DASH-Q: each group's scale and zero by least squares, inputs weighed by their energy. Lossy.

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
- `zero_code` fits with a whole zero, one that packs into `bits` bits, rather than rounding it afterwards.
- `feedback` hands the grids to GPTQ's loop, with H_rho = rho H + (1 - rho) diag(H); rho = `shrinkage`, "auto"
  for the one whose error on held-out inputs is least. It pays where tokens are many more than inputs.

    DashQ(bits=2).solve(rows, stats, name="up", dtype=jnp.bfloat16)                             # Affine

Layout while solving: [C, G, U, n], n rows side by side: sums over a group are sums of vectors. Memory:
about four times the rows [N, K] in float32 (search works on 256 rows at a time); `feedback` adds GPTQ's.
Letters: K inputs, N outputs, G = ceil(K / group) groups of C * U places.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.quant.methods.gptq import feedback
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine, check_rows

ROWS = 256  # rows solved at a time: their working arrays stay in cache
UNROLL = 64  # places of a group in one fused loop
GROUPS = {2: 32, 3: 64, 4: 128}  # the paper's; other widths take the nearest
RANGES, SHIFTS, TRY, POLISH = 10, 3, 2, 2
MIN_TRIAL_SCALE = 1e-8  # least scale while solving
RHOS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DashQ:
    """Weighted least squares on affine grids.

    group: None is the paper's (32, 64, 128 at 2, 3, 4 bits); never more than K. damping and ridge: of "paper"
    only (alpha and lambda). h_power: exponent on the energies, 0 weighs all inputs alike. shrinkage: rho,
    None is 1, with `feedback` only. scale_bits: store the scales in codes of so many bits as well, with
    zero_code and no feedback (the errors of codes are then those of the coded scales).
    """

    bits: int = 2
    group: int | None = None
    mode: Literal["search", "paper"] = "search"
    iterations: int = 9
    damping: float = 0.5
    ridge: float = 1e-2
    h_power: float = 1.0
    zero_code: bool = False
    feedback: bool = False
    shrinkage: float | Literal["auto"] | None = None
    scale_bits: int | None = None

    def __post_init__(self):
        rho = self.shrinkage
        for right, what in (
            (1 <= self.bits <= 8, f"bits must be 1 to 8, got {self.bits=}"),
            (self.group is None or self.group >= 1, f"group must be at least 1, got {self.group=}"),
            (self.mode in ("search", "paper"), f"mode must be search or paper, got {self.mode=}"),
            (self.iterations >= 0, f"iterations must not be negative, got {self.iterations=}"),
            (0 < self.damping <= 1, f"damping must be above 0, at most 1, got {self.damping=}"),
            (0 <= self.ridge < float("inf"), f"ridge must be finite, not negative, got {self.ridge=}"),
            (0 <= self.h_power < float("inf"), f"h_power must be finite, not negative, got {self.h_power=}"),
            (self.mode == "search" or not self.zero_code, "zero_code needs mode='search', got mode='paper'"),
            (not self.feedback or self.scale_bits is None, "scale_bits needs feedback=False, got True"),
            (self.feedback or rho is None, f"shrinkage needs feedback=True, got {self.shrinkage=}"),
            (
                rho is None or rho == "auto" or (not isinstance(rho, str) and 0 <= rho <= 1),
                f"shrinkage must be None, 'auto' or 0 to 1, got {self.shrinkage=}",
            ),
        ):
            if not right:
                raise ValueError(f"dash_q: {what}")
        affine.check_scale_bits("dash_q", self.scale_bits, self.zero_code)

    @property
    def required_stats(self) -> frozenset[str]:
        extra = {"hessian"} if self.feedback else set()
        return frozenset({"hessian_diag"} | extra | ({"held_out"} if self.shrinkage == "auto" else set()))

    def solve(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> Affine:
        """The rows in affine codes."""
        need(stats, "dash_q", *sorted(self.required_stats))
        rows = rows.astype(jnp.float32)
        energy, K = stats.hessian_diag, rows.shape[1]
        assert energy is not None
        if energy.shape != (K,):
            raise ValueError(f"dash_q: diagonal must be [K], got {energy.shape=}, {K=}")
        check_rows(f"dash_q: {name}", rows)
        if not bool((jnp.isfinite(energy) & (energy >= 0)).all()):
            raise ValueError(f"dash_q: diagonal must be finite and not negative, got another in {name=}")
        sizes = {"bits": self.bits, "group": min(self.group or _paper_group(self.bits), K)}
        scale, zero = fit(
            rows,
            energy,
            **sizes,
            mode=self.mode,
            iterations=self.iterations,
            damping=self.damping,
            ridge=self.ridge,
            h_power=self.h_power,
            zero_code=self.zero_code,
        )
        if not self.feedback:
            return affine.encode(
                rows,
                scale,
                zero,
                bits=self.bits,
                group=sizes["group"],
                dtype=dtype,
                zero_code=self.zero_code,
                scale_bits=self.scale_bits,
            )
        scale, zero = affine.stored(rows, scale, zero, **sizes, zero_code=self.zero_code)
        rhos = RHOS if self.shrinkage == "auto" else (1.0 if self.shrinkage is None else self.shrinkage,)
        codes = _fed_back(rows, scale, zero, stats, rhos, **sizes)
        return affine.from_codes(codes, scale, zero, **sizes, dtype=dtype, zero_code=self.zero_code)


def _paper_group(bits: int) -> int:
    return GROUPS[min(max(bits, 2), 4)]


@functools.partial(
    jax.jit,
    static_argnames=("bits", "group", "mode", "iterations", "damping", "ridge", "h_power", "zero_code"),
)
def fit(
    rows: Float[Array, "N K"],
    energy: Float[Array, " K"],
    *,
    bits: int,
    group: int,
    mode: str = "search",
    iterations: int = 9,
    damping: float = 0.5,
    ridge: float = 1e-2,
    h_power: float = 1.0,
    zero_code: bool = False,
) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
    """Scale and zero (in codes) of every group; of a search, as `affine.stored` rounds them."""
    N, top = rows.shape[0], 2**bits - 1
    blocks = -(-N // ROWS)
    n = -(-N // (16 * blocks)) * 16  # whole vectors
    h = _weights(energy, group, h_power)

    def block(rows):
        w = _cut(rows, group)
        if mode == "paper":
            s, low = descend(w, h, *_range(w, top), top=top, steps=iterations, damping=damping, ridge=ridge)
            return s, -low / s
        s, zero = search(w, h, top=top, iterations=iterations, zero_code=zero_code)
        return _polish(rows, w, h, s, zero, bits=bits, group=group, zero_code=zero_code)

    padded = jnp.pad(rows.astype(jnp.float32), ((0, blocks * n - N), (0, 0)))
    scale, zero = jax.lax.map(block, padded.reshape(blocks, n, -1))  # [blocks, G, n]
    back = lambda x: x.transpose(0, 2, 1).reshape(blocks * n, -1)[:N]  # noqa: E731
    return back(scale), back(zero)


def _weights(energy, group: int, power: float):
    """What the places of each group weigh, [C, G, U, 1], together 1; a group without energy: all alike."""
    h, real = affine.grouped(energy[None].astype(jnp.float32), group)
    # subtle: powers of large or small sums may leave float32; relative to the greatest they do not
    h = (h[0] / jnp.maximum(h[0].max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)) ** power * real
    h = jnp.where(h.sum(-1, keepdims=True) > 0, h, real)
    h = h / h.sum(-1, keepdims=True)
    C, U = _places(group)
    return jnp.pad(h, ((0, 0), (0, C * U - group))).reshape(-1, C, U, 1).transpose(1, 0, 2, 3)


def _cut(rows, group: int):
    """Rows [n, K] in the layout of the sums, [C, G, U, n]; places that fill up repeat the last weight."""
    C, U = _places(group)
    w = affine.grouped(rows, group)[0]
    w = jnp.pad(w, ((0, 0), (0, 0), (0, C * U - group)), mode="edge")
    return w.reshape(len(rows), -1, C, U).transpose(2, 1, 3, 0)


def _places(group: int) -> tuple[int, int]:
    C = -(-group // UNROLL)
    return C, -(-group // C)


def _range(w, top: int, zero_code: bool = False):
    """Scale and low end of the grid from the least to the greatest weight (equation 12), perhaps with 0."""
    low, high = w.min((0, 2)), w.max((0, 2))
    if zero_code:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    return jnp.maximum((high - low) / top, MIN_TRIAL_SCALE), low


def _sum(w, h, start, add):
    """`add(sums, weight, its h)` over all places of each group."""

    def some(sums, part):
        ws, hs = part
        # subtle: unrolled, the loop over places becomes one fused loop over vectors of rows; a reduction
        # over an axis takes XLA:CPU twice as long, or ten times
        for u in range(ws.shape[1]):
            sums = add(sums, ws[:, u], hs[:, u])
        return sums, None

    return jax.lax.scan(some, start, (w, h))[0]


def moments(w, h, s, low, *, top: int):
    """sum h q, sum h q^2, sum h q w of each group, q the codes nearest to w under (s, low) (equation 1)."""
    inverse, zero = 1 / s, jnp.zeros_like(s)

    def add(sums, w, h):
        q = jnp.clip(jnp.round((w - low) * inverse), 0, top)
        hq = h * q
        return sums[0] + hq, sums[1] + hq * q, sums[2] + hq * w

    return _sum(w, h, (zero, zero, zero), add)


def refit(w, h, s, low, *, top: int, ridge=0.0):
    """One step, undamped: codes by rounding, then (s, low) by regression on them (equations 10, 11).

    Returns F of these codes with the new s and low, less sum h w^2; then s, low. sum h w of every group must
    be 0. A group whose codes are all the same keeps its s.
    """
    mean, square, cross = moments(w, h, s, low, top=top)
    var = square - mean * mean
    varied = var > 1e-6 * square  # below, it is the rounding error of the difference
    s = jnp.where(varied, jnp.maximum(cross / jnp.where(varied, var + ridge, 1.0), MIN_TRIAL_SCALE), s)
    return s * (s * var - 2 * cross), s, -s * mean


def refit_code(w, h, total, s, low, *, top: int):
    """The same where low = -zero * s with a whole zero, which stays; sum h w is `total`, whatever it be."""
    mean, square, cross = moments(w, h, s, low, top=top)
    zero = jnp.round(-low / s)
    cross = cross - zero * total
    var = square - 2 * zero * mean + zero * zero
    varied = var > 1e-6 * (square + zero * zero)
    s = jnp.where(varied, jnp.maximum(cross / jnp.where(varied, var, 1.0), MIN_TRIAL_SCALE), s)
    return s * (s * var - 2 * cross), s, -zero * s


def _mean(w, h):
    return _sum(w, h, jnp.zeros((w.shape[1], w.shape[3])), lambda total, w, h: total + h * w)


def error(w, h, s, zero, *, top: int):
    """F of each group on the grid (code - zero) * s, codes nearest."""

    def add(total, w, h):
        q = jnp.clip(jnp.round(w / s + zero), 0, top)
        return total + h * (w - (q - zero) * s) ** 2

    return _sum(w, h, jnp.zeros_like(s), add)


def descend(w, h, s, low, *, top: int, steps, damping, ridge):
    """The paper's loop: (s, low) after `steps` damped steps."""
    mean = _mean(w, h)
    centred = w - mean[None, :, None]

    def step(_, at):
        s, low = at
        _, new_s, new_low = refit(centred, h, s, low, top=top, ridge=ridge)
        return damping * new_s + (1 - damping) * s, damping * new_low + (1 - damping) * low

    s, low = jax.lax.fori_loop(0, steps, step, (s, low - mean))
    return s, low + mean


def search(w, h, *, top: int, iterations: int, zero_code: bool):
    """Scale and zero (in codes) of the best of many starts, refined."""
    step, w, centre = _stepper(w, h, top, zero_code)
    whole, low = _range(w, top, zero_code)
    middle = low + whole * (top / 2)

    def begin(i):
        part = 0.3 + 0.7 * (i // SHIFTS).astype(jnp.float32) / (RANGES - 1)
        shift = (i % SHIFTS - SHIFTS // 2).astype(jnp.float32)
        s = jnp.maximum(part * whole, MIN_TRIAL_SCALE)
        low = middle - s * (top / 2)
        if zero_code:
            return s, -s * jnp.clip(jnp.round(-low / s) + shift, 0, top)
        return s, low + s * (shift / SHIFTS)

    def attempt(i, best):
        last = i == RANGES * SHIFTS  # all starts tried: on with the best
        s, low = (jnp.where(last, b, a) for a, b in zip(begin(i), best[1:], strict=True))
        start = jnp.full_like(s, jnp.inf), s, low
        return _least(
            best, jax.lax.fori_loop(0, jnp.where(last, iterations, TRY), lambda _, at: step(*at[1:]), start)
        )

    start = jnp.full_like(whole, jnp.inf), whole, low
    _, s, low = jax.lax.fori_loop(0, RANGES * SHIFTS + 1, attempt, start)
    return s, -(low + centre) / s


def _stepper(w, h, top: int, zero_code: bool):
    """The undamped step, the weights it is for, and what was taken from them."""
    mean = _mean(w, h)
    if zero_code:
        return functools.partial(refit_code, w, h, mean, top=top), w, jnp.zeros_like(mean)
    centred = w - mean[None, :, None]
    return functools.partial(refit, centred, h, top=top), centred, mean


def _polish(rows, w, h, s, zero, *, bits: int, group: int, zero_code: bool):
    """Scale and zero as stored: the best of round to nearest, one mean a group, (s, zero) and its refits."""
    top = 2**bits - 1
    step, _, centre = _stepper(w, h, top, zero_code)
    whole, low = _range(w, top, zero_code)

    def attempt(i, state):
        best, new_s, new_zero = state
        new = affine.stored(rows, new_s.T, new_zero.T, bits=bits, group=group, zero_code=zero_code)
        new_s, new_zero = (x.T for x in new)
        best = _least(best, (error(w, h, new_s, new_zero, top=top), new_s, new_zero))
        _, new_s, low = step(new_s, -new_s * new_zero - centre)
        after = new_s, -(low + centre) / new_s
        mean = s, jnp.full_like(zero, jnp.inf)  # a zero that no grid has: stored as the mean
        turn = lambda *of: jax.lax.select_n(jnp.minimum(i, 2), *of)  # noqa: E731
        return best, *(turn(*of) for of in zip(mean, (s, zero), after, strict=True))

    start = (jnp.full_like(s, jnp.inf), s, zero), whole, -low / whole
    return jax.lax.fori_loop(0, 3 + POLISH, attempt, start)[0][1:]


def _least(best, other):
    """Of two (error, ...) the one with the smaller error, group by group; the first of equals."""
    return tuple(jnp.where(other[0] < best[0], b, a) for a, b in zip(best, other, strict=True))


def _fed_back(rows, scale, zero, stats: Stats, rhos, *, bits: int, group: int):
    """Codes by GPTQ's loop under the H_rho whose error on held-out inputs is least (one rho: no choice)."""
    assert stats.hessian is not None
    best, least = None, float("inf")
    for rho in rhos:
        hessian = rho * stats.hessian + (1 - rho) * jnp.diag(jnp.diag(stats.hessian))
        codes = feedback(rows, hessian, scale, zero, bits=bits, group=group)
        if len(rhos) == 1:
            return codes
        grid = (jnp.repeat(x, group, axis=1)[:, : rows.shape[1]] for x in (scale, zero))
        found = float(_loss(rows, codes, *grid, stats.held_out))
        if best is None or found < least:
            best, least = codes, found
    return best


@jax.jit
def _loss(rows, codes, scale, zero, hessian):
    """tr(E H E^T), E the error of the rows."""
    off = rows - (codes.astype(jnp.float32) - zero) * scale
    return (jnp.matmul(off, hessian, precision=jax.lax.Precision.HIGHEST) * off).sum()
