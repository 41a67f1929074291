"""y = x @ W for a weight in affine group-wise codes of 1 to 8 bits: (code - zero point) * scale.

    w[k, n] = (codes[n, k] - zero_point[k // group_size, n]) * scale[k // group_size, n]

Codes lie in words along K (`pallas_kernels.words`), 32 neighbours of one output a block. A scale is a float,
or ("second order") a code, packed along N, times the step of its 16 outputs. A zero point is a float in
units of codes, or a whole code, packed along N at the width of the codes, or None: 2**(bits - 1).

Letters: B leading axes of the activation, K inputs, N outputs, G = ceil(K / group_size) groups.

    reference     the definition, in jnp
    few_rows      what XLA runs instead for a few rows on a CPU
    int8          a few rows as whole numbers of 8 bits, and words as bytes
    decode        words to pairs of 16-bit numbers, and the order of inputs that this takes
    triton        compute capability 8.0 and up: which kernel, and that for many rows
    triton_few    the one for a few rows
    triton_parts  what they are made of
    mosaic_gpu    Hopper, with TMA and wgmma: which kernel, and that for many rows or short groups
    mosaic_few    the one for a few rows
    mosaic_parts  what they are made of
    cases         real shapes
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt32

from pallas_kernels import choice
from pallas_kernels.choice import Implementation, Kernel
from pallas_kernels.dequant_gemm import few_rows, mosaic_gpu, reference, triton
from pallas_kernels.words import CODES_PER_BLOCK

__all__ = ["dequant_gemm"]


def dequant_gemm(
    x: Float[Array, "*B K"],
    codes: UInt32[Array, "N blocks bits"],
    scale: Num[Array, "*scales"],
    zero_point: Num[Array, "*zeros"] | None,
    *,
    group_size: int,
    scale_step: Float[Array, "N_16 G"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B N"]:
    """Float32 product of `x` and the weight.

    codes: bits 1 to 8, blocks = ceil(K / 32). scale: float [G, N]; with `scale_step` uint32 words
      [G, ceil(N / 32), scale_bits]. zero_point: float [G, N], uint32 words [G, ceil(N / 32), bits], or None.
    implementation: see `pallas_kernels.kernels`; None takes that of the context.
    Raises ValueError for sizes that do not fit, NotImplementedError where a named implementation does not
    take them or the device.
    """
    _check(x, codes, scale, zero_point, scale_step, group_size)
    arrays = (x, codes, scale, zero_point, scale_step)
    backends = [
        Kernel(
            "triton",
            functools.partial(_triton, group_size=group_size),
            functools.partial(triton.why_not, group_size=group_size),
        ),
        Kernel(
            "mosaic_gpu",
            functools.partial(_mosaic_gpu, group_size=group_size),
            functools.partial(mosaic_gpu.why_not, group_size=group_size),
            capability=(9, 0),
            below=(10, 0),
        ),
    ]
    plain: Callable[..., jax.Array] = functools.partial(reference.dequant_gemm, group_size=group_size)
    if few_rows.takes(x, group_size):
        by_its_rows = choice.rows_together(functools.partial(by_rows, group_size=group_size))
        plain = choice.differentiable(by_its_rows, plain)
    return choice.run(
        "dequant_gemm",
        arrays,
        reference=plain,
        backends=backends if _streams(x, group_size) else backends[::-1],
        implementation=implementation,
    )


def by_rows(x: Float[Array, "*B K"], *operands, group_size: int) -> Float[Array, "*B N"]:
    """The definition, or what is faster for the rows that x has."""
    plain = few_rows if few_rows.takes(x, group_size) else reference
    return plain.dequant_gemm(x, *operands, group_size=group_size)


def _triton(*arrays, group_size: int, interpret: bool) -> jax.Array:
    kernel = functools.partial(triton.dequant_gemm, group_size=group_size, interpret=interpret)
    return choice.rows_together(kernel, stacked=jax.vmap(kernel))(*arrays)


def _mosaic_gpu(*arrays, group_size: int, interpret: bool) -> jax.Array:
    kernel = functools.partial(mosaic_gpu.dequant_gemm, group_size=group_size, interpret=interpret)
    return choice.rows_together(kernel)(*arrays)


def _streams(x: jax.Array, group_size: int) -> bool:
    """Whether the Triton kernel comes first: it moves less, but for many rows short groups take it long."""
    K = x.shape[-1]
    few = x.size <= triton.FEW_ROWS * K
    return few or (x.size <= 16 * K and (group_size >= K or group_size % triton.LEAST_K == 0))


def _check(x, codes, scale, zero_point, scale_step, group_size: int) -> None:
    """Raises ValueError where sizes do not fit."""
    K, (N, blocks, bits) = x.shape[-1], codes.shape

    def need(holds: bool, what: str, got: str) -> None:
        if not holds:
            raise ValueError(f"dequant_gemm: {what}, got {got}")

    need(1 <= bits <= 8, "codes need 1 to 8 words a block", f"{codes.shape=}")
    need(blocks == -(-K // CODES_PER_BLOCK), "codes need ceil(K / 32) blocks", f"{codes.shape=}, {K=}")
    need(1 <= group_size <= max(K, 1), "group_size must be 1 to K", f"{group_size=}, {K=}")
    G, words = -(-K // group_size), -(-N // CODES_PER_BLOCK)
    if scale_step is None:
        need(jnp.issubdtype(scale.dtype, jnp.floating), "scale must be a float", f"{scale.dtype=}")
        need(scale.shape == (G, N), f"scale must have shape ({G}, {N})", f"{scale.shape=}")
    else:
        steps = -(-N // reference.OUTPUTS_PER_STEP)
        need(scale.dtype == jnp.uint32, "scale needs words beside scale_step", f"{scale.dtype=}")
        need(
            scale.ndim == 3 and scale.shape[:2] == (G, words) and 1 <= scale.shape[2] <= 8,
            f"scale must have shape ({G}, {words}, 1 to 8)",
            f"{scale.shape=}",
        )
        need(
            scale_step.shape == (steps, G),
            f"scale_step must have shape ({steps}, {G})",
            f"{scale_step.shape=}",
        )
    if zero_point is not None:
        shape = (G, words, bits) if zero_point.dtype == jnp.uint32 else (G, N)
        need(zero_point.shape == shape, f"zero_point must have shape {shape}", f"{zero_point.shape=}")
