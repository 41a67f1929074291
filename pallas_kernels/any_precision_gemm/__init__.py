"""y = x @ W for a weight of bit planes, of which the first few are read (arXiv:2402.10517).

    w[k, n] at b bits = tables[b - seed_bits][n, codes[n, k] >> (planes - b)]           float16 levels

Bit k % 32 of word k // 32 of a plane belongs to input k; the highest plane comes first. The width is part of
the program, or an array: then one program reads as many planes as the width says, and its time falls with it.

Letters: B leading axes of the activation, K inputs, N outputs, blocks = ceil(K / 32).

    reference     the definition, in jnp
    few_rows      what XLA runs instead for a few rows on a CPU
    cells         planes made ready for the look-up
    triton        kernels for compute capability 8.0 and up; most of them is that of `codebook_gemm`
    mosaic_gpu    kernel for Hopper
    cases         real shapes
"""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Float16, Int, UInt32

from pallas_kernels import choice
from pallas_kernels.any_precision_gemm import few_rows, mosaic_gpu, reference, triton
from pallas_kernels.choice import Implementation, Kernel
from pallas_kernels.words import CODES_PER_BLOCK

__all__ = ["any_precision_gemm"]


def any_precision_gemm(
    x: Float[Array, "*B K"],
    planes: UInt32[Array, "planes N blocks"],
    tables: tuple[Float16[Array, "N _"], ...],
    bits: int | Int[Array, ""],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*B N"]:
    """Float32 product of `x` and the weight at `bits` bits.

    planes: as many as the widest table has bits, the highest first. tables: [N, 2**b] for
      b = seed_bits .. planes, the narrowest first. bits: seed_bits .. planes; of an array, which may be
      traced, a width outside is taken for the nearest.
    implementation: see `pallas_kernels.kernels`; None takes that of the context.
    Raises ValueError for sizes that do not fit and for a width that is not stored, NotImplementedError where
    a named implementation does not take them or the device.
    """
    _check(x, planes, tables, bits)
    seed = tables[0].shape[1].bit_length() - 1
    static = isinstance(bits, int)
    arrays = (x, planes, (tables[bits - seed],)) if static else (x, planes, tuple(tables), bits)
    plain: Callable[..., jax.Array] = reference.any_precision_gemm
    if few_rows.takes(x, arrays[2]):
        plain = choice.differentiable(choice.rows_together(by_rows), plain)
    return choice.run(
        "any_precision_gemm",
        arrays,
        reference=plain,
        backends=[
            Kernel("mosaic_gpu", _mosaic_gpu, mosaic_gpu.why_not, capability=(9, 0), below=(10, 0)),
            Kernel("triton", triton.any_precision_gemm, triton.why_not),
        ],
        implementation=implementation,
    )


def by_rows(x: jax.Array, planes: jax.Array, tables: tuple[jax.Array, ...], *bits: jax.Array) -> jax.Array:
    """The definition, or what is faster for the rows that x has."""
    plain = few_rows if few_rows.takes(x, tables) else reference
    return plain.any_precision_gemm(x, planes, tables, *bits)


def _mosaic_gpu(*arrays, interpret: bool) -> jax.Array:
    kernel = functools.partial(mosaic_gpu.any_precision_gemm, interpret=interpret)
    return choice.rows_together(kernel)(*arrays)


def _check(x: jax.Array, planes: jax.Array, tables: tuple[jax.Array, ...], bits: int | jax.Array) -> None:
    K = x.shape[-1]
    P, N, blocks = planes.shape
    if blocks != -(-K // CODES_PER_BLOCK):
        raise ValueError(f"any_precision_gemm: planes must have ceil(K / 32) words, got {blocks=}, {K=}")
    sizes = [table.shape for table in tables]
    if not 1 <= len(tables) <= P <= 8 or sizes != [(N, 2**b) for b in range(P - len(tables) + 1, P + 1)]:
        raise ValueError(
            "any_precision_gemm: tables must be [N, 2**b] for b = seed_bits .. planes, "
            f"got tables={sizes}, {planes.shape=}"
        )
    if isinstance(bits, int) and not P - len(tables) + 1 <= bits <= P:
        raise ValueError(
            f"any_precision_gemm: bits must be {P - len(tables) + 1} to {P}, as stored, got {bits=}"
        )
