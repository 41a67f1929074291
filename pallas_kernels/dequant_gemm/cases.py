"""Real shapes: layers of Llama-3-8B and Qwen2.5-7B, one of eight shards of a 70B."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.dequant_gemm import mosaic_gpu, reference, triton
from pallas_kernels.wgmma import ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A weight [K, N] in codes, M rows of x. zero: "whole", "float", None; scale_bits: None for floats."""

    name: str
    M: int
    N: int
    K: int
    bits: int = 4
    group_size: int = 128
    dtype: str = "bfloat16"
    zero: str | None = "whole"
    scale_bits: int | None = None
    backends: tuple[str, ...] = ("triton",)

    def arrays(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """x, codes, scale, zero point, step of scales."""
        array = jax.ShapeDtypeStruct
        G, words = -(-self.K // self.group_size), -(-self.N // 32)
        floats, step = array((G, self.N), jnp.float16), None
        scale = floats
        if self.scale_bits is not None:
            scale = array((G, words, self.scale_bits), jnp.uint32)
            step = array((-(-self.N // reference.OUTPUTS_PER_STEP), G), jnp.float16)
        zeros = {None: None, "float": floats, "whole": array((G, words, self.bits), jnp.uint32)}
        x = array((self.M, self.K), jnp.dtype(self.dtype))
        codes = array((self.N, -(-self.K // 32), self.bits), jnp.uint32)
        return x, codes, scale, zeros[self.zero], step


BOTH = ("triton", "mosaic_gpu")
SHAPES = (
    Shape(name="llama-3-8b q, 1 row", M=1, N=4096, K=4096, backends=BOTH),
    Shape(name="llama-3-8b up, 8 rows", M=8, N=14336, K=4096),
    Shape(name="llama-3-8b down, 3 bits, 1 row", M=1, N=4096, K=14336, bits=3, zero="float", backends=BOTH),
    Shape(name="llama-3-8b k, 8 bits, 4 rows", M=4, N=1024, K=4096, bits=8),
    Shape(
        name="llama-3-8b q, groups of 32, 1 row", M=1, N=4096, K=4096, group_size=32, zero=None, backends=BOTH
    ),
    Shape(name="llama-3-8b q, float32, 1 row", M=1, N=4096, K=4096, dtype="float32"),
    Shape(name="qwen2.5-7b up, float16, 16 rows", M=16, N=18944, K=3584, dtype="float16"),
    Shape(
        name="70b shard, 2 bits, coded scales, 1 row",
        M=1,
        N=3584,
        K=8192,
        bits=2,
        scale_bits=6,
        backends=BOTH,
    ),
    Shape(name="qwen2.5-7b down, 6 bits, 1 row", M=1, N=3584, K=18944, bits=6, backends=BOTH),
    Shape(name="llama-3-8b up, 3 bits, 4 rows", M=4, N=14336, K=4096, bits=3, backends=BOTH),
    Shape(name="llama-3-8b up, 256 rows", M=256, N=14336, K=4096, backends=BOTH),
    Shape(name="llama-3-8b up, 2048 rows", M=2048, N=14336, K=4096, zero=None, backends=("mosaic_gpu",)),
)


def case(shape: Shape, backend: str) -> Case:
    """A backend's kernel at a shape."""
    arrays = shape.arrays()
    sizes = (shape.M, shape.N, shape.K)
    run: Callable[..., Any]
    gpus: tuple[str, ...]
    if backend == "triton":
        of_triton = triton.default_tile(*sizes, shape.group_size, shape.dtype, shape.bits, (9, 0))
        run = functools.partial(triton.dequant_gemm, group_size=shape.group_size, tile=of_triton)
        units_per_turn, gpus = of_triton.n * of_triton.k / (32 * of_triton.num_warps), ("h100", "a100", "l4")
    else:
        tile = mosaic_gpu.default_tile(*sizes, shape.bits)
        run = functools.partial(mosaic_gpu.dequant_gemm, group_size=shape.group_size, tile=tile)
        inputs = mosaic_gpu.inputs_of_turn(shape.M, shape.K, shape.group_size)
        units_per_turn, gpus = ROWS * inputs / 128, ("h100",)
    moved = sum(a.size * a.dtype.itemsize for a in arrays if a is not None)
    return Case(
        name=f"dequant_gemm, {shape.name}, {backend}",
        run=run,
        reference=functools.partial(reference.dequant_gemm, group_size=shape.group_size),
        arrays=arrays,
        gpus=gpus,
        num_bytes=moved + 4 * shape.M * shape.N,
        operations=2 * shape.M * shape.N * shape.K,
        units=shape.N * shape.K,
        units_per_turn=units_per_turn,
    )


CASES: tuple[Case, ...] = tuple(case(shape, backend) for shape in SHAPES for backend in shape.backends)
