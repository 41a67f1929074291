"""Grouping and interpolation of a network on clouds of 16k points, of which 4k are sampled."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.neighbours import reference, triton

SQUARED_RADIUS = 0.01  # of a cube of side 1: 70 of 16k points are nearer than 0.1


def _case(name: str, k: int, B: int, N: int, M: int) -> Case:
    is_ball = name == "ball_query"
    tile = triton.default_tile() if is_ball else triton.default_tile(k)
    radius = (jax.ShapeDtypeStruct((), jnp.float32),) if is_ball else ()
    return Case(
        name=f"{name} {k} of {B} x {N}, {M} queries triton",
        run=functools.partial(getattr(triton, name), k=k),
        reference=functools.partial(getattr(reference, name), k=k),
        arrays=(
            jax.ShapeDtypeStruct((B, N, 3), jnp.float32),
            jax.ShapeDtypeStruct((B, M, 3), jnp.float32),
            *radius,
        ),
        make=functools.partial(_clouds, B, N, M, is_ball),
        num_bytes=4 * B * (3 * (N + M) + M * (k + 1 if is_ball else 2 * k)),
        operations=B * N * M * 9,
        units=B * N * M,
        units_per_turn=tile.queries * tile.points / (32 * tile.warps),
    )


def _clouds(B: int, N: int, M: int, is_ball: bool, rng):
    points, queries = (jnp.asarray(rng.random((B, n, 3), "float32")) for n in (N, M))
    return (points, queries, jnp.float32(SQUARED_RADIUS)) if is_ball else (points, queries)


CASES: tuple[Case, ...] = (
    _case("ball_query", 32, 8, 16384, 4096),
    _case("knn", 3, 8, 4096, 16384),
    _case("knn", 16, 8, 16384, 4096),
    _case("knn", 64, 8, 16384, 4096),
)
