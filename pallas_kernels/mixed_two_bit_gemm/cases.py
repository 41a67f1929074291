"""Real shapes of the product with columns of 2 and 4 bits: Llama-3-8B, Qwen2.5-7B, and an eighth of a 70B."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import GPUS, Case, random_arrays
from pallas_kernels.mixed_two_bit_gemm import lanes, mosaic_gpu, reference, triton
from pallas_kernels.wgmma import ROWS

GROUP4 = 128


def shapes(M: int, N: int, W: int, n4: int, outliers: int, dtype) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """x and a weight's arrays, n4 of the W / 16 column groups at 4 bits, so many outliers a block."""
    n2, B, G, blocks = W // 16 - n4, -(-N // 16), -(-16 * n4 // GROUP4), -(-N // reference.block_rows(W))
    shape, u32 = jax.ShapeDtypeStruct, jnp.uint32
    two = [
        shape((N, n2), u32),
        shape((B, n2, 2), u32),
        shape((B, n2), u32),
        shape((B, -(-n2 // 2)), jnp.uint8),
        shape((B, n2), jnp.float16),
    ]
    four = [shape((N, n4, 2), u32), shape((N, G), jnp.float16), shape((B, G, 2), u32)]
    sparse = [shape((blocks, outliers), jnp.float16), shape((blocks, outliers), jnp.uint16)]
    return (
        shape((M, W), dtype),
        *(two if n2 else [None] * 5),
        *(four if n4 else [None] * 3),
        *(sparse if outliers else [None] * 2),
    )


def random_weight(arrays, rng: np.random.Generator):
    """Numbers for the arrays: steps of a size that weights have, places within their blocks."""
    made: list = list(random_arrays(arrays, rng))
    R = reference.block_rows(arrays[0].shape[1])
    for at, size in ((5, 0.002), (7, 0.01), (9, 0.1)):  # step_scale, four_scale, outlier
        if made[at] is not None:
            made[at] = jnp.float16(size) * (1 + jnp.abs(made[at]))
    if made[10] is not None:
        made[10] = (made[10].astype(jnp.int32) % (R * arrays[0].shape[1])).astype(jnp.uint16)
    return tuple(made)


def _case(
    model: str, M: int, N: int, W: int, *gpus: str,
    four: float = 0.25, outliers: float = 0.002, dtype=jnp.float16, backend: str = "triton",
) -> Case:  # fmt: skip
    """A share of the inputs at 4 bits, and of the weights besides."""
    n4, m = int(four * W) // 16, int(outliers * reference.block_rows(W) * W)
    arrays = shapes(M, N, W, n4, m, dtype)
    kernel: Callable[..., Any]
    if backend == "triton":
        of_triton = triton.default_tile(M, N, W)
        kernel, tokens = triton.mixed_two_bit_gemm, of_triton.tokens
        units_per_turn = of_triton.rows * of_triton.words * 16 / (32 * of_triton.warps)
    else:
        kernel, tokens = mosaic_gpu.mixed_two_bit_gemm, mosaic_gpu.default_tile(M, N, 16 * (W // 16 - n4)).m
        units_per_turn = ROWS * lanes.WORDS_A_STAGE * 16 / 128
    return Case(
        name=f"mixed_two_bit_gemm {model} {M}x{N}x{W} {four:g}+{outliers:g} {jnp.dtype(dtype)} {backend}",
        run=functools.partial(kernel, group4=GROUP4),
        reference=functools.partial(reference.mixed_two_bit_gemm, group4=GROUP4),
        arrays=arrays,
        make=functools.partial(random_weight, arrays),
        gpus=gpus,
        num_bytes=sum(a.size * a.dtype.itemsize for a in arrays if a is not None) + M * N * 4,
        operations=2 * M * N * (W + int(outliers * W)),
        units=N * W * -(-M // tokens),  # a weight is decoded once for each tile of tokens
        units_per_turn=units_per_turn,
    )


LLAMA, QWEN, SHARD = "Llama-3-8B", "Qwen2.5-7B", "70B/8"
# Not every case for every GPU: one compiles for 20 seconds.
CASES: tuple[Case, ...] = (
    _case(LLAMA, 1, 4096, 4096, *GPUS, four=0.0, outliers=0.0),
    _case(LLAMA, 1, 14336, 4096, "h100", "a100"),
    _case(LLAMA, 8, 4096, 14336, "h100"),
    _case(LLAMA, 8, 4096, 14336, "h100", backend="mosaic_gpu"),
    _case(SHARD, 16, 3584, 8192, "h100", "a100", dtype=jnp.bfloat16),
    _case(SHARD, 16, 3584, 8192, "h100", dtype=jnp.bfloat16, backend="mosaic_gpu"),
    _case(QWEN, 64, 3584, 3584, "l4"),
    _case(LLAMA, 256, 14336, 4096, "h100", backend="mosaic_gpu"),
    _case(LLAMA, 2048, 4096, 4096, "h100", "l4"),
    _case(LLAMA, 2048, 4096, 4096, "h100", four=0.0, outliers=0.0, backend="mosaic_gpu"),
)
