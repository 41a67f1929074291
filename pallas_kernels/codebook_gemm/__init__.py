"""y = x @ W for a weight of codes, 1 to 8 bits each, into one table an output.

    w[k, n] = table[n, codes[n, k]]                                                      float16 levels

Codes lie in words along K (`pallas_kernels.words`), 32 neighbours of one output a block. The order of the
levels carries no meaning.

Letters: B leading axes of the activation, K inputs, N outputs, blocks = ceil(K / 32).

    reference     the definition, in jnp
    few_rows      what XLA runs instead for a few rows on a CPU
    cells         words made ready for the look-up
    lookup        tables in registers, four levels an instruction
    lanes         the same in the lanes of a warpgroup, and tables in shared memory
    pieces        float32 activations as rows of float16
    triton        kernels for compute capability 8.0 and up
    mosaic_gpu    kernel for Hopper
    cases         real shapes
"""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Float16, UInt32

from pallas_kernels import choice
from pallas_kernels.choice import Implementation, Kernel
from pallas_kernels.codebook_gemm import few_rows, mosaic_gpu, reference, triton
from pallas_kernels.words import CODES_PER_BLOCK

__all__ = ["codebook_gemm"]


def codebook_gemm(
    x: Float[Array, "*B K"],
    codes: UInt32[Array, "N blocks bits"],
    table: Float16[Array, "N levels"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*B N"]:
    """Float32 product of `x` and the weight; levels = 2**bits.

    implementation: see `pallas_kernels.kernels`; None takes that of the context.
    Raises ValueError for sizes that do not fit, NotImplementedError where a named implementation does not
    take them or the device.
    """
    _check(x, codes, table)
    plain: Callable[..., jax.Array] = reference.codebook_gemm
    if few_rows.takes(x, codes.shape[2]):
        plain = choice.differentiable(choice.rows_together(by_rows), plain)
    return choice.run(
        "codebook_gemm",
        (x, codes, table),
        reference=plain,
        backends=[
            Kernel("mosaic_gpu", _mosaic_gpu, mosaic_gpu.why_not, capability=(9, 0), below=(10, 0)),
            Kernel("triton", triton.codebook_gemm, triton.why_not),
        ],
        implementation=implementation,
    )


def by_rows(
    x: Float[Array, "*B K"], codes: UInt32[Array, "N blocks bits"], table: Float16[Array, "N levels"]
) -> Float[Array, "*B N"]:
    """The definition, or what is faster for the rows that x has."""
    plain = few_rows if few_rows.takes(x, codes.shape[2]) else reference
    return plain.codebook_gemm(x, codes, table)


def _mosaic_gpu(*arrays, interpret: bool) -> jax.Array:
    kernel = functools.partial(mosaic_gpu.codebook_gemm, interpret=interpret)
    return choice.rows_together(kernel)(*arrays)


def _check(x: jax.Array, codes: jax.Array, table: jax.Array) -> None:
    K = x.shape[-1]
    N, blocks, bits = codes.shape
    if not 1 <= bits <= 8:
        raise ValueError(f"codebook_gemm: codes must have 1 to 8 bits, got {codes.shape=}")
    if blocks != -(-K // CODES_PER_BLOCK):
        raise ValueError(f"codebook_gemm: codes must have ceil(K / 32) blocks, got {blocks=}, {K=}")
    if table.shape != (N, 2**bits):
        raise ValueError(f"codebook_gemm: table must be [N, 2**bits], got {table.shape=}, {N=}, {bits=}")
