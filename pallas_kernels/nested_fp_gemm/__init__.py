"""NestedFP's product: one weight in two bytes, read as an exact float16 or as a float8 (arXiv:2506.02024).

    y[tokens, outputs] = x @ w        upper, lower uint8 [N, K], w = 2**shift * (both)

In "fp16" the bytes are joined in registers to the float16 they were cut from, bit by bit; "fp8" multiplies
float8 tokens by the upper bytes alone, which are the bits of float8_e4m3fn: half the traffic; "traced" is one
of the two, as a scalar says at run time.

    reference       what each mode means; runs everywhere
    few_rows        what XLA runs instead for a few rows on a CPU
    mosaic_gpu      Hopper: TMA, warp specialisation, wgmma with joined weights in registers
    ptx             the join of four weights at once
    plain           the same pipeline over plain float16 weights, to measure the others by
    triton          compute capability 8.0 and up
    cases           real shapes

Letters: M tokens, N outputs, K inputs.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels import choice
from pallas_kernels.nested_fp_gemm import few_rows, mosaic_gpu, reference, triton

Mode = Literal["fp16", "fp8", "traced"]


def nested_fp_gemm(
    x: Float[Array, "*B K"],
    upper: UInt8[Array, "N K_upper"],
    lower: UInt8[Array, "N_lower K_lower"],
    switch: Int32[Array, "..."] | None = None,
    *,
    mode: Mode = "fp16",
    shift: int = 0,
    implementation: choice.Implementation | None = None,
) -> Float32[Array, "*B N"]:
    """`x @ w` in float32, in a mode: "traced" is the one that `switch` says (0 fp16, else fp8).

    upper, lower: of encoded weights (`reference`). Of other pairs of bytes, which no float16 below 1.875 is
      cut into, implementations make different numbers. shift: the weight is 2**shift times what is stored.
    Raises ValueError for shapes that do not fit or a mode without its switch, NotImplementedError where a
    named implementation does not take the arrays or does not run on the device.
    """
    if upper.ndim != 2 or lower.shape != upper.shape:
        raise ValueError(
            f"nested_fp_gemm: upper and lower must be [N, K], got {upper.shape=}, {lower.shape=}"
        )
    if not upper.dtype == lower.dtype == jnp.uint8:
        raise ValueError(f"nested_fp_gemm: upper and lower must be uint8, got {upper.dtype=}, {lower.dtype=}")
    if not x.ndim or x.shape[-1] != upper.shape[1]:
        raise ValueError(f"nested_fp_gemm: x must have upper's K inputs, got {x.shape=}, {upper.shape=}")
    if mode not in ("fp16", "fp8", "traced"):
        raise ValueError(f"nested_fp_gemm: mode must be fp16, fp8 or traced, got {mode=}")
    if (mode == "traced") != (switch is not None):
        raise ValueError(f"nested_fp_gemm: a switch is for mode traced, got {mode=}, {switch=}")
    if switch is not None and switch.ndim:
        raise ValueError(f"nested_fp_gemm: switch must be one number for all rows, got {switch.shape=}")
    on_hopper = functools.partial(mosaic_gpu.nested_fp_gemm, mode=mode, shift=shift)
    elsewhere = functools.partial(triton.nested_fp_gemm, mode=mode, shift=shift)
    backends = (
        choice.Kernel(
            "mosaic_gpu",
            functools.partial(_of_rows, on_hopper),
            mosaic_gpu.why_not,
            capability=(9, 0),
            below=(10, 0),
        ),
        choice.Kernel("triton", functools.partial(_of_rows, elsewhere), triton.why_not),
    )
    plain: Callable[..., jax.Array] = functools.partial(reference.nested_fp_gemm, mode=mode, shift=shift)
    if few_rows.takes(x):
        by_its_rows = choice.rows_together(functools.partial(by_rows, mode=mode, shift=shift))
        plain = choice.differentiable(by_its_rows, plain)
    return choice.run(
        "nested_fp_gemm",
        (x, upper, None if mode == "fp8" else lower, switch),
        reference=plain,
        backends=backends,
        implementation=implementation,
    )


def by_rows(x: Float[Array, "*B K"], *operands, mode: Mode, shift: int) -> Float32[Array, "*B N"]:
    """The definition, or what is faster for the rows that x has."""
    plain = few_rows if few_rows.takes(x) else reference
    return plain.nested_fp_gemm(x, *operands, mode=mode, shift=shift)


def _of_rows(kernel, x, upper, lower, switch, *, interpret: bool) -> jax.Array:
    """The kernel on x of any leading axes."""

    def f(x, upper, lower, switch):
        y = kernel(x.reshape(-1, x.shape[-1]), upper, lower, switch, interpret=interpret)
        return y.reshape(*x.shape[:-1], -1)

    return choice.rows_together(f)(x, upper, lower, switch)
