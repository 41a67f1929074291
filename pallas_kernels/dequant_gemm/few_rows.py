"""A few rows on a CPU: sums over codes and inputs where the codes stand (`pallas_kernels.fold`).

    y[n] = sum over groups g of scale[g, n] (sum of codes x - zero_point[g, n] sum of x)

Exact codes times float32 inputs, the scale on the sum of 32: nearer to the weight than the reference, which
rounds it to the type of x first. An infinite input gives NaN where the reference may give infinity.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels.dequant_gemm.reference import scales, zero_points
from pallas_kernels.fold import FEW_ROWS, folded, packed_inputs, packed_sums, words_apart
from pallas_kernels.words import CODES_PER_BLOCK


def takes(x: Float[Array, "*B K"], group_size: int) -> bool:
    """Whether it is the faster way here: a CPU, few rows, and groups of whole blocks."""
    K = x.shape[-1]
    whole = group_size % CODES_PER_BLOCK == 0 or group_size >= K
    return jax.default_backend() == "cpu" and whole and 0 < x.size <= FEW_ROWS * K


@functools.partial(jax.jit, static_argnames="group_size")  # a model has few shapes: each is traced once
def dequant_gemm(
    x: Float[Array, "*B K"],
    codes: UInt32[Array, "N blocks bits"],
    scale: Num[Array, "*scales"],
    zero_point: Num[Array, "*zeros"] | None,
    scale_step: Float[Array, "N_16 G"] | None,
    *,
    group_size: int,
) -> Float[Array, "*B N"]:
    """The product."""
    x, codes, scale, zero_point, scale_step = jax.lax.optimization_barrier(
        (x, codes, scale, zero_point, scale_step)
    )
    (N, blocks, bits), K = codes.shape, x.shape[-1]
    s = scales(scale, scale_step, N)
    z = zero_points(zero_point, s.shape, bits)
    G, per_group = len(s), min(blocks, -(-group_size // CODES_PER_BLOCK))

    def partial_sums(arrays, row):
        *words, s = arrays
        sums = packed_sums(tuple(words), row)
        if blocks == G * per_group:
            return (sums.reshape(-1, G, per_group) * s[:, :, None]).reshape(-1, blocks)
        return sums * jnp.repeat(s, per_group, axis=1)[:, :blocks]  # a last group is shorter

    def apart(codes, s):
        return *words_apart(codes), s

    y = folded(packed_inputs(x, bits), (codes, s.T), apart, partial_sums)
    rows = jnp.pad(x.reshape(-1, K).astype(jnp.float32), ((0, 0), (0, max(0, G * group_size - K))))
    of_groups = rows.reshape(rows.shape[0], G, -1).sum(axis=-1)
    y = y - jnp.dot(of_groups, s * z, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*x.shape[:-1], N)
