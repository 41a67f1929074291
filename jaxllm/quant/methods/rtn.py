"""Round to nearest: each weight to the closest point of its group's affine grid. The baseline. Lossy.

The grid runs from a group's least weight to its greatest, 0 included. With `clip` the range is stretched by
the factor, and the zero point moved by the code, that leave the least squared error in the group, each input
weighed by its hessian_diag sum_t x_t^2 if calibration gives it: what GPTQ implementations call MSE clipping
(arXiv:2210.17323; they take the exponent 2.4, no weights, and leave the zero point), and AWQ's clip search
(arXiv:2306.00978) with inputs taken as independent. The grid as it was is among those tried, so clipping
never raises that error but by rounding to float16.

    Rtn(bits=3, group_size=32, clip=True).quantize(rows, stats, name="up", dtype=jnp.bfloat16)        # Affine

Memory: about four times the rows. Letters: K inputs, N outputs, G = ceil(K / group_size) groups.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.search import better
from jaxllm.quant.statistics import Stats
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine

# Factors on the range, tried in this order; of equal errors the first wins. Then smaller steps about each
# group's best one, and with them the whole zero point moved by a code.
RANGES = (1.0, *(1.1 - i / 20 for i in range(17)))
FINE = tuple((step, move) for step in (0.0, -1 / 40, 1 / 40) for move in (0, -1, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rtn:
    """Round to nearest.

    integer_zero_point: a whole code of `bits` bits, not a float16. clip: search the range.
    scale_bits: store the scales in codes of so many bits as well (`affine.double_quantize_scales`).
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    integer_zero_point: bool = True
    clip: bool = False
    scale_bits: int | None = None

    def __post_init__(self):
        check_grid("rtn", self.bits, self.group_size)
        affine.check_scale_bits("rtn", self.scale_bits, self.integer_zero_point or self.symmetric)

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"hessian_diag"}) if self.clip else frozenset()

    def quantize(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> Affine:
        """The rows, rounded. Without `stats.hessian_diag` every input of a clipped group weighs the same."""
        K, hessian_diag = rows.shape[1], stats.hessian_diag
        if hessian_diag is not None and hessian_diag.shape != (K,):
            raise ValueError(f"rtn: statistics must be of K inputs, got {K=}, {hessian_diag.shape=}")
        scale, zero_point = self.grid(rows, hessian_diag)
        kept = None if self.symmetric else zero_point
        sizes = {"bits": self.bits, "group_size": min(self.group_size, rows.shape[1])}
        return affine.encode(
            rows,
            scale,
            kept,
            **sizes,
            dtype=dtype,
            integer_zero_point=self.integer_zero_point,
            scale_bits=self.scale_bits,
        )

    def grid(
        self, rows: Float[Array, "N K"], weight: Float[Array, " K"] | None = None
    ) -> tuple[Float[Array, "N G"], Float[Array, "N G"]]:
        """Scale and zero point (in codes) of each group, as they will be stored."""
        return _grid(self, rows, jnp.ones(rows.shape[1]) if weight is None else weight)


def check_grid(who: str, bits: int, group_size: int) -> None:
    """Raises ValueError for sizes that no affine grid has."""
    if not 1 <= bits <= 8:
        raise ValueError(f"{who}: bits must be 1 to 8, got {bits=}")
    if group_size < 1:
        raise ValueError(f"{who}: group_size must be at least 1, got {group_size=}")


def clip_error(
    rows: Float[Array, "N K"],
    scale: Float[Array, "N G"],
    zero_point: Float[Array, "N G"],
    weight: Float[Array, " K"],
    *,
    bits: int,
    group_size: int,
) -> Float[Array, "N G"]:
    """sum_k weight_k (w_k - its nearest grid point)^2 of each group."""
    g, real = affine.grouped(rows, group_size)
    h = affine.grouped(weight[None], group_size)[0][0] * real
    _, values = affine.round_to_grid(g, scale[..., None], zero_point[..., None], 2**bits - 1)
    return (h[None] * (g - values) ** 2).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _grid(method: Rtn, rows, weight):
    rows = rows.astype(jnp.float32)
    sizes = {"bits": method.bits, "group_size": min(method.group_size, rows.shape[1])}
    qmax = 2**method.bits - 1

    def at(stretch, move=0):
        scale, zero_point = affine.min_max(rows, symmetric=method.symmetric, clip_ratio=stretch, **sizes)
        zero_point = None if zero_point is None else jnp.clip(zero_point + move, 0, qmax)
        return affine.round_to_storage(
            rows, scale, zero_point, integer_zero_point=method.integer_zero_point, **sizes
        )

    if not method.clip:
        return at(1.0)
    # subtle: a group of dead inputs only would take any range; with equal weights it takes a sensible one
    weight = weight / jnp.maximum(weight.max(), jnp.finfo(jnp.float32).tiny) + 1e-6

    # One loop, so that a candidate is compiled once: factors on the range, then steps about the best of them.
    first, moves = len(RANGES), [one for one in FINE if not (method.symmetric and one[1])]
    values = jnp.asarray([*RANGES, *(step for step, _ in moves)], jnp.float32)
    shifts = jnp.asarray([0] * first + [shift for _, shift in moves], jnp.float32)

    def try_one(i, state):
        best, centre = state
        centre = jnp.where(i == first, best[1], centre)
        stretch = jnp.where(i < first, values[i], centre + values[i])
        scale, zero_point = at(stretch, shifts[i])
        error = clip_error(rows, scale, zero_point, weight, **sizes)
        return better((error, stretch, scale, zero_point), best, is_first=i == 0), centre

    nothing = jnp.zeros((rows.shape[0], -(-rows.shape[1] // sizes["group_size"])))
    best, _ = jax.lax.fori_loop(0, len(values), try_one, ((nothing,) * 4, nothing))
    return best[2:]
