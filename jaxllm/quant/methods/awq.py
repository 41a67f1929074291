"""AWQ: inputs that carry much are stored on a finer grid, by scaling them up before rounding. Lossy.

Paper: arXiv:2306.00978, section 3.2, and its code's clip search. Row k of the weight is multiplied by
s_k = (mean |x_k|)^r and x_k by 1 / s_k at run time; r is searched in 20 steps of [0, 1) for the least squared
error of the layer's outputs on sample inputs, round to nearest; then each group's range is shrunk by up to
half, for the least error of the group's own contribution. Differs in:

- the published scales are folded into the layer before and shared by all that read it; here each weight has
  its own 1 / s_k in float16 and scales x itself, so that any linear can have them: 16 / N bits more;
- an asymmetric grid shrinks at both ends, in the published ten steps;
- errors are taken through the sample's curvature X^T X: the same numbers for less work.

    w = Awq(bits=4, group_size=32).quantize(rows, stats, name="up", dtype=jnp.bfloat16)           # Scaled
    y = matmul(x, w)

r = 0 and the whole range are among the candidates: on the sample, never worse than round to nearest.
Memory: about four times the rows [N, K] and two matrices [K, K], in float32.
Letters: K inputs, N outputs, G = ceil(K / group_size) groups, n sample inputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.search import better
from jaxllm.quant.methods.rtn import check_grid
from jaxllm.quant.statistics import Stats, need
from jaxllm.weights import affine
from jaxllm.weights.affine import check_rows
from jaxllm.weights.scaled import Scaled

CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))
MAX_INPUT_SCALE = 2.0**8  # greatest s and 1 / s: float16 holds both well
HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Awq:
    """Activation-aware scaling, then a clip search.

    steps: how many powers r = 0, 1/steps, 2/steps ... are tried. clip: search the range. symmetric and
    integer_zero_point: as in `Rtn`.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    integer_zero_point: bool = True
    steps: int = 20
    clip: bool = True

    def __post_init__(self):
        check_grid("awq", self.bits, self.group_size)
        if self.steps < 1:
            raise ValueError(f"awq: steps must be at least 1, got steps={self.steps}")

    @property
    def required_stats(self) -> frozenset[str]:
        return frozenset({"mean", "sample"})

    def quantize(self, rows: Float[Array, "N K"], stats: Stats, *, name: str, dtype) -> Scaled:
        """The rows, scaled and rounded."""
        need(stats, "awq", "mean", "sample")
        assert stats.mean is not None and stats.sample is not None
        check_rows("awq", rows)
        K = rows.shape[1]
        if stats.mean.shape != (K,) or stats.sample.shape[1] != K:
            raise ValueError(f"awq: statistics must be of K inputs, got {K=}, {stats.sample.shape=}")
        inverse, scale, zero_point = _search(self, rows, stats.mean, stats.sample)
        kept = None if self.symmetric else zero_point
        sizes = {"bits": self.bits, "group_size": min(self.group_size, K)}
        scaled = rows.astype(jnp.float32) / inverse.astype(jnp.float32)[None]
        return Scaled(
            affine.encode(
                scaled, scale, kept, **sizes, dtype=dtype, integer_zero_point=self.integer_zero_point
            ),
            inverse,
        )


@functools.partial(jax.jit, static_argnums=0)
def _search(method: Awq, rows, mean, sample):
    """1 / s [K] in float16, scale and zero point [N, G]."""
    rows, sample = rows.astype(jnp.float32), sample.astype(jnp.float32)
    second = jnp.matmul(sample.T, sample, precision=HIGHEST)
    live = mean > 0  # an input that is always 0 keeps s = 1
    level = jnp.log(jnp.where(live, mean, 1.0))
    level = jnp.where(live, level - level.sum() / jnp.maximum(live.sum(dtype=jnp.float32), 1.0), 0.0)

    def inverse_at(r):
        return (1 / jnp.clip(jnp.exp(r * level), 1 / MAX_INPUT_SCALE, MAX_INPUT_SCALE)).astype(jnp.float16)

    def loss(r):
        inverse = inverse_at(r).astype(jnp.float32)[None]
        scaled = rows / inverse
        error = rows - _round(method, scaled, *_grid(method, scaled, 1.0)) * inverse
        return (jnp.matmul(error, second, precision=HIGHEST) * error).sum()

    powers = jnp.arange(method.steps) / method.steps
    inverse = inverse_at(powers[jnp.argmin(jax.lax.map(loss, powers))])
    wide = inverse.astype(jnp.float32)
    scale, zero_point = _clipped(method, rows / wide[None], second * wide[:, None] * wide[None])
    return inverse, scale, zero_point


def _clipped(method: Awq, rows, second):
    """Scale and zero point after the clip search: of each group, least e (X^T X) e^T of its own inputs."""
    if not method.clip:
        return _grid(method, rows, 1.0)
    K = rows.shape[1]
    group_size = min(method.group_size, K)
    G = -(-K // group_size)
    full = jnp.pad(second, (0, G * group_size - K)).reshape(G, group_size, G, group_size)
    blocks = full[jnp.arange(G), :, jnp.arange(G)]  # [G, group_size, group_size]

    def candidate(clip_ratio):
        scale, zero_point = _grid(method, rows, clip_ratio)
        error = jnp.pad(rows - _round(method, rows, scale, zero_point), ((0, 0), (0, G * group_size - K)))
        error = error.reshape(-1, G, group_size)
        pushed = jnp.einsum("nga,gab->ngb", error, blocks, precision=HIGHEST)
        return (pushed * error).sum(-1), scale, zero_point

    ratios = jnp.asarray(CLIP_RATIOS, jnp.float32)
    return jax.lax.fori_loop(
        1, len(CLIP_RATIOS), lambda i, best: better(candidate(ratios[i]), best), candidate(1.0)
    )[1:]


def _grid(method: Awq, rows, clip_ratio):
    sizes = {"bits": method.bits, "group_size": min(method.group_size, rows.shape[1])}
    scale, zero_point = affine.min_max(rows, symmetric=method.symmetric, clip_ratio=clip_ratio, **sizes)
    return affine.round_to_storage(
        rows, scale, zero_point, integer_zero_point=method.integer_zero_point, **sizes
    )


def _round(method: Awq, rows, scale, zero_point):
    """Each weight's nearest grid point."""
    N, K = rows.shape
    g, _ = affine.grouped(rows, min(method.group_size, K))
    _, values = affine.round_to_grid(g, scale[..., None], zero_point[..., None], 2**method.bits - 1)
    return values.reshape(N, -1)[:, :K]
