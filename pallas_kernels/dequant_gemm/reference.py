"""What `dequant_gemm` means; also what runs on a CPU, a TPU and an old GPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels.dot import depend_on, dot
from pallas_kernels.words import from_blocks

OUTPUTS_PER_STEP = 16  # outputs whose scales share a step


def dequant_gemm(
    x: Float[Array, "*B K"],
    codes: UInt32[Array, "N blocks bits"],
    scale: Num[Array, "*scales"],
    zero_point: Num[Array, "*zeros"] | None,
    scale_step: Float[Array, "N_16 G"] | None,
    *,
    group_size: int,
) -> Float[Array, "*B N"]:
    """The weight in float32, rounded to the type of x, then a dot: what every kernel must agree with."""
    words = (codes, scale, zero_point, scale_step)
    codes, scale, zero_point, scale_step = depend_on(x, words)
    N, bits = codes.shape[0], codes.shape[-1]
    s = scales(scale, scale_step, N)
    z = zero_points(zero_point, (s.shape[0], N), bits)
    return dot(x, rows(codes, s, z, x.shape[-1], group_size).astype(x.dtype))


def rows(
    codes: UInt32[Array, "N blocks bits"],
    s: Float[Array, "G N"],
    z: Float[Array, "G N"],
    K: int,
    group_size: int,
) -> Float[Array, "N K"]:
    """The weight's rows, (code - z) * s."""
    G, N = s.shape
    c = jnp.pad(from_blocks(codes, K), ((0, 0), (0, G * group_size - K))).astype(jnp.float32)
    w = (c.reshape(N, G, group_size) - z.T[:, :, None]) * s.T[:, :, None]
    return w.reshape(N, -1)[:, :K]


def scales(scale: Num[Array, "*scales"], scale_step: Float[Array, "N_16 G"] | None, N: int) -> jax.Array:
    """float32 [G, N]: of floats, or of codes times the step of their 16 outputs."""
    if scale_step is None:
        return scale.astype(jnp.float32)
    step = jnp.repeat(scale_step.T.astype(jnp.float32), OUTPUTS_PER_STEP, axis=1)[:, :N]
    return from_blocks(scale, N).astype(jnp.float32) * step


def zero_points(zero_point: Num[Array, "*zeros"] | None, shape: tuple[int, ...], bits: int) -> jax.Array:
    """float32 [G, N], in units of codes."""
    if zero_point is None:
        return jnp.full(shape, 2.0 ** (bits - 1), jnp.float32)
    whole = zero_point.dtype == jnp.uint32
    return (from_blocks(zero_point, shape[1]) if whole else zero_point).astype(jnp.float32)
