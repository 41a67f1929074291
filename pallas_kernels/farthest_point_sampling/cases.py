"""Clouds of real sizes: objects of 1k and 4k points, rooms and lidar sweeps of 16k to 128k.

In bytes, points and minima once; in operations, what the definition does: 3 D a point and pick.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.case import GPUS, Case
from pallas_kernels.farthest_point_sampling import mosaic_gpu, reference, triton


def _case(name: str, kernel, B: int, N: int, m: int, D: int, gpus: tuple[str, ...], own: int) -> Case:
    return Case(
        name=f"farthest_point_sampling {name} {kernel.__name__.rsplit('.', 1)[1]}",
        run=functools.partial(kernel.sample, m=m),
        reference=functools.partial(reference.sample, m=m),
        arrays=(jax.ShapeDtypeStruct((B, N, D), jnp.float32), jax.ShapeDtypeStruct((B, N), jnp.float32)),
        make=functools.partial(_clouds, B, N, D),
        gpus=gpus,
        num_bytes=4 * B * (N * (D + 2) + 2 * m),
        operations=B * N * m * 3 * D,
        units=B * N * m,
        units_per_turn=float(own),
    )


def _clouds(B: int, N: int, D: int, rng):
    """Uniform in a cube, nothing picked yet."""
    return jnp.asarray(rng.random((B, N, D), "float32")), jnp.full((B, N), jnp.inf, jnp.float32)


def _mosaic(name: str, B: int, N: int, m: int, D: int = 3) -> Case:
    tile = mosaic_gpu.default_tile(B, N, D)
    own = -(-N // (tile.blocks * tile.warpgroups * mosaic_gpu.LANES))
    return _case(name, mosaic_gpu, B, N, m, D, ("h100",), own)


def _triton(name: str, B: int, N: int, m: int, D: int = 3) -> Case:
    own = -(-N // (32 * triton.default_tile(N, D).warps))
    return _case(name, triton, B, N, m, D, GPUS, own)


CASES: tuple[Case, ...] = (
    _mosaic("32 x 1k", 32, 1024, 512),
    _mosaic("8 x 4k", 8, 4096, 1024),
    _mosaic("8 x 16k", 8, 16384, 4096),
    _mosaic("66 x 16k", 66, 16384, 4096),
    _mosaic("1 x 40k", 1, 40960, 10240),
    _mosaic("1 x 128k", 1, 131072, 32768),
    _triton("32 x 1k", 32, 1024, 512),
    _triton("8 x 4k", 8, 4096, 1024),
    _triton("8 x 16k", 8, 16384, 4096),
    _triton("8 x 32k", 8, 32768, 8192),
    _triton("8 x 4k of 8 coordinates", 8, 4096, 1024, 8),
)
