"""Real shapes: layers of Llama-3-8B and Qwen2.5-7B, one of eight shards of a 70B."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.case import GPUS, Case
from pallas_kernels.codebook_gemm import mosaic_gpu, reference, triton
from pallas_kernels.words import CODES_PER_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A weight [K, N] in codes, M rows of x."""

    name: str
    M: int
    N: int
    K: int
    bits: int
    dtype: str = "bfloat16"
    backends: tuple[str, ...] = ("triton",)


BOTH = ("mosaic_gpu", "triton")
SHAPES = (
    Shape(name="llama-3-8b down, 4 bits, 1 row", M=1, N=4096, K=14336, bits=4, backends=BOTH),
    Shape(name="llama-3-8b down, 3 bits, 1 row", M=1, N=4096, K=14336, bits=3, backends=BOTH),
    Shape(name="llama-3-8b k, 4 bits, 1 row", M=1, N=1024, K=4096, bits=4, backends=BOTH),
    Shape(name="qwen2.5-7b up, 3 bits, float16, 4 rows", M=4, N=18944, K=3584, bits=3, dtype="float16"),
    Shape(name="70b shard, 2 bits, 8 rows", M=8, N=3584, K=8192, bits=2, backends=BOTH),
    Shape(name="llama-3-8b up, 4 bits, 16 rows", M=16, N=14336, K=4096, bits=4),
    Shape(name="llama-3-8b down, 8 bits, 1 row", M=1, N=4096, K=14336, bits=8, backends=BOTH),
    Shape(name="llama-3-8b q, 4 bits, float32, 4 rows", M=4, N=4096, K=4096, bits=4, dtype="float32"),
    Shape(name="llama-3-8b up, 4 bits, 256 rows", M=256, N=14336, K=4096, bits=4, backends=BOTH),
    Shape(name="70b shard, 4 bits, 2048 rows", M=2048, N=3584, K=8192, bits=4, backends=("mosaic_gpu",)),
)


def case(shape: Shape, backend: str) -> Case:
    """A backend's kernel at a shape."""
    blocks = -(-shape.K // CODES_PER_BLOCK)
    arrays = (
        jax.ShapeDtypeStruct((shape.M, shape.K), jnp.dtype(shape.dtype)),
        jax.ShapeDtypeStruct((shape.N, blocks, shape.bits), jnp.uint32),
        jax.ShapeDtypeStruct((shape.N, 2**shape.bits), jnp.float16),
    )
    run: Callable[..., jax.Array]
    gpus: tuple[str, ...]
    if backend == "triton":
        tile = triton.default_tile(shape.M, shape.N, blocks, bits=shape.bits, capability=(9, 0))
        run, gpus = triton.codebook_gemm, GPUS  # each with its own tile; counted is that of Hopper
        passes, per_turn = tile.passes(shape.M), tile.weights_per_turn
    else:
        of_mosaic = mosaic_gpu.default_tile(shape.M, shape.N, shape.K, shape.bits)
        run, gpus = functools.partial(mosaic_gpu.codebook_gemm, tile=of_mosaic), ("h100",)
        passes, per_turn = -(-shape.M // of_mosaic.rows), mosaic_gpu.WEIGHTS_PER_TURN
    return Case(
        name=f"codebook_gemm, {shape.name}, {backend}",
        run=run,
        reference=reference.codebook_gemm,
        arrays=arrays,
        gpus=gpus,
        num_bytes=sum(a.size * a.dtype.itemsize for a in arrays) + 4 * shape.M * shape.N,
        operations=2 * shape.M * shape.N * shape.K,
        units=shape.N * shape.K * passes,
        units_per_turn=per_turn,
    )


CASES: tuple[Case, ...] = tuple(case(shape, backend) for shape in SHAPES for backend in shape.backends)
