"""The product with a weight in columns of 2 and of 4 bits, and single weights besides (arXiv:2311.16442v4).

    y[tokens, outputs] = x @ w        x in the order in which the weight stores its inputs

Inputs are cut into groups of 16, outputs into B blocks of 16. With i an input of a column group:

    2 bits   w[n, i] = (code - zero_point[n]) * (step[n] + step_zero[b]) * step_scale[b]
             zero_point 2 bits, step 4 bits; step_zero 4 bits and step_scale float16 a block b of 16 outputs
    4 bits   w[n, i] = (code - zero_point[n, g]) * scale[n, g]
             zero_point 4 bits, scale float16, for each `group4` inputs g
    16 bits  a residual added to one weight: float16 and a place of 16 bits, row in block * W + input

Arrays, first the n2 groups of 2 bits, then the n4 of 4; code j of a word at bit 2 j or 4 j; None for what
does not occur; outliers in O blocks of `reference.block_rows(W)` outputs, 0 at place 0 where one has fewer:

    two [N, n2]        four [N, n4, 2]
    step [B, n2, 2]    zero_point [B, n2]   step_zero [B, ceil(n2 / 2)]      step_scale [B, n2]
    four_scale [N, G]  four_zero_point [B, G, 2]  with G = ceil(16 n4 / group4)
    outlier [O, m]     place [O, m]

    reference       what it means; runs everywhere
    decode          words to pairs of 16-bit numbers, and the order of inputs that this takes
    triton          compute capability 8.0 and up
    mosaic_gpu      Hopper: the columns of 2 bits by TMA and wgmma, the rest by Triton
    lanes           its work in registers
    cases           real shapes

Letters: N outputs, W = 16 (n2 + n4) stored inputs.
"""

import functools

import jax
from jaxtyping import Array, Float, Float16, Float32, UInt8, UInt16, UInt32

from pallas_kernels import choice
from pallas_kernels.mixed_two_bit_gemm import mosaic_gpu, reference, triton


def mixed_two_bit_gemm(
    x: Float[Array, "*B W"],
    two: UInt32[Array, "N n2"] | None,
    step: UInt32[Array, "B n2 2"] | None,
    zero_point: UInt32[Array, "B n2"] | None,
    step_zero: UInt8[Array, "B _"] | None,
    step_scale: Float16[Array, "B n2"] | None,
    four: UInt32[Array, "N n4 2"] | None,
    four_scale: Float16[Array, "N G"] | None,
    four_zero_point: UInt32[Array, "B G 2"] | None,
    outlier: Float16[Array, "O m"] | None,
    place: UInt16[Array, "O m"] | None,
    *,
    group4: int,
    implementation: choice.Implementation | None = None,
) -> Float32[Array, "*B N"]:
    """`x @ w` in float32; weights are rounded to x's type, in the kernel their steps to float16 before.

    Raises ValueError for shapes that do not fit, NotImplementedError where a named implementation does not
    take the arrays or does not run on the device.
    """
    width = 16 * sum(0 if w is None else w.shape[1] for w in (two, four))
    if not width or not x.ndim or x.shape[-1] != width:
        raise ValueError(f"mixed_two_bit_gemm: x must have the weight's inputs, got {x.shape=}, W={width}")
    if two is not None and four is not None and two.shape[0] != four.shape[0]:
        raise ValueError(f"mixed_two_bit_gemm: both widths must have N rows, got {two.shape=}, {four.shape=}")
    if group4 < 1:
        raise ValueError(f"mixed_two_bit_gemm: a group of 4-bit inputs has some, got {group4=}")
    backends = [
        choice.Kernel(
            "triton",
            functools.partial(_of_rows, triton.mixed_two_bit_gemm, group4),
            functools.partial(triton.why_not, group4=group4),
        ),
        choice.Kernel(
            "mosaic_gpu",
            functools.partial(_of_rows, mosaic_gpu.mixed_two_bit_gemm, group4),
            functools.partial(mosaic_gpu.why_not, group4=group4),
            capability=(9, 0),
            below=(10, 0),
        ),
    ]
    return choice.run(
        "mixed_two_bit_gemm",
        (x, two, step, zero_point, step_zero, step_scale, four, four_scale, four_zero_point, outlier, place),
        reference=functools.partial(reference.mixed_two_bit_gemm, group4=group4),
        backends=backends,
        implementation=implementation,
    )


def _of_rows(kernel, group4: int, x, *weight, interpret: bool) -> jax.Array:
    """A kernel on x of any leading axes."""

    def f(x, *weight):
        rows = x.reshape(-1, x.shape[-1])
        y = kernel(rows, *weight, group4=group4, interpret=interpret)
        return y.reshape(*x.shape[:-1], -1)

    return choice.rows_together(f)(x, *weight)
