"""Real shapes: layers of Llama-3-8B and Qwen2.5-7B, one of eight shards of a 70B; 3 to 6 bits are stored."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.any_precision_gemm import mosaic_gpu, reference, triton
from pallas_kernels.case import GPUS, Case, random_arrays
from pallas_kernels.words import CODES_PER_BLOCK

SEED_BITS, PLANES = 3, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A weight [K, N] of planes read at `bits` bits, M rows of x; traced: the width is an operand."""

    name: str
    M: int
    N: int
    K: int
    bits: int
    traced: bool = False
    dtype: str = "bfloat16"
    backends: tuple[str, ...] = ("triton",)


BOTH = ("mosaic_gpu", "triton")
SHAPES = (
    Shape(name="llama-3-8b down, 3 bits, 1 row", M=1, N=4096, K=14336, bits=3, backends=BOTH),
    Shape(name="llama-3-8b down, 4 bits, 1 row", M=1, N=4096, K=14336, bits=4, backends=BOTH),
    Shape(name="llama-3-8b down, 6 bits, 1 row", M=1, N=4096, K=14336, bits=6, backends=BOTH),
    *(
        Shape(
            name=f"llama-3-8b down, traced {bits} bits, 1 row", M=1, N=4096, K=14336, bits=bits, traced=True
        )
        for bits in (3, 6)
    ),
    Shape(
        name="llama-3-8b up, traced 4 bits, 8 rows", M=8, N=14336, K=4096, bits=4, traced=True, backends=BOTH
    ),
    Shape(name="70b shard, 3 bits, 4 rows", M=4, N=3584, K=8192, bits=3),
    Shape(name="qwen2.5-7b up, 4 bits, float16, 16 rows", M=16, N=18944, K=3584, bits=4, dtype="float16"),
    Shape(name="llama-3-8b up, 4 bits, 256 rows", M=256, N=14336, K=4096, bits=4, backends=BOTH),
)


def static(product, x, planes, table, **options):
    """A product at the width of its table."""
    return product(x, planes, (table,), **options)


def traced(product, x, planes, bits, *tables, **options):
    """A product at a width that it is told when it runs."""
    return product(x, planes, tables, bits, **options)


def case(shape: Shape, backend: str) -> Case:
    """A backend's kernel at a shape."""
    blocks = -(-shape.K // CODES_PER_BLOCK)
    array = jax.ShapeDtypeStruct
    x = array((shape.M, shape.K), jnp.dtype(shape.dtype))
    planes = array((PLANES, shape.N, blocks), jnp.uint32)
    widths = range(SEED_BITS, PLANES + 1) if shape.traced else (shape.bits,)
    tables = tuple(array((shape.N, 2**bits), jnp.float16) for bits in widths)
    arrays = (x, planes, array((), jnp.int32), *tables) if shape.traced else (x, planes, *tables)

    def make(rng: np.random.Generator):
        made = random_arrays(arrays, rng)
        return (*made[:2], jnp.int32(shape.bits), *made[3:]) if shape.traced else made

    kernel: Callable[..., jax.Array]
    gpus: tuple[str, ...]
    if backend == "triton":
        tile = triton.default_tile(shape.M, shape.N, blocks, bits=max(widths), capability=(9, 0))
        kernel, gpus = triton.any_precision_gemm, GPUS  # each with its own tile; counted is that of Hopper
        passes, per_turn = tile.passes(shape.M), tile.weights_per_turn
    else:
        of_mosaic = mosaic_gpu.default_tile(shape.M, shape.N, shape.K, max(widths))
        kernel, gpus = functools.partial(mosaic_gpu.any_precision_gemm, tile=of_mosaic), ("h100",)
        passes, per_turn = -(-shape.M // of_mosaic.rows), mosaic_gpu.WEIGHTS_PER_TURN
    adapted = traced if shape.traced else static
    read = 4 * shape.bits * shape.N * blocks + 2 * shape.N * 2**shape.bits  # what the width asks for
    return Case(
        name=f"any_precision_gemm, {shape.name}, {backend}",
        run=functools.partial(adapted, kernel),
        reference=functools.partial(adapted, reference.any_precision_gemm),
        arrays=arrays,
        make=make,
        gpus=gpus,
        num_bytes=read + x.size * x.dtype.itemsize + 4 * shape.M * shape.N,
        operations=2 * shape.M * shape.N * shape.K,
        units=shape.N * shape.K * passes,
        units_per_turn=per_turn,
        loops_above=max(widths) - shape.bits,  # those of wider codes are longer
    )


CASES: tuple[Case, ...] = tuple(case(shape, backend) for shape in SHAPES for backend in shape.backends)
