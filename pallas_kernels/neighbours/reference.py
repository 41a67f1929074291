"""What neighbours are, in jnp: all distances of some queries at a time, so that memory is bounded.

Letters: N points, M queries, D coordinates, k neighbours.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.distance import runtime_zero, squared_distance

EXACT = 2**24  # whole numbers in float32, of which `top_k` is fast on a CPU


def ball_query(
    points: Float[Array, "B N D"], queries: Float[Array, "B M D"], squared_radius: Float[Array, ""], k: int
) -> tuple[Int32[Array, "B M k"], Int32[Array, "B M"]]:
    """The k lowest indices of points nearer than the radius, and how many points are; what follows means
    nothing. Points and queries that are NaN are near to none."""
    N = points.shape[1]
    number = jnp.arange(N, dtype=jnp.float32 if N <= EXACT else jnp.int32)
    none = -jnp.ones((), number.dtype) * N

    def of_tile(distances):
        near = distances < squared_radius
        lowest, _ = lax.top_k(jnp.where(near, -number[None], none), min(k, N))
        return -lowest.astype(jnp.int32), jnp.sum(near, axis=1, dtype=jnp.int32)

    index, count = _by_tiles(points, queries, of_tile)
    return _widened(index, k, 0), count


def knn(
    points: Float[Array, "B N D"], queries: Float[Array, "B M D"], k: int
) -> tuple[Int32[Array, "B M k"], Float[Array, "B M k"]]:
    """The k nearest by (squared distance, index), and these distances; -1 at infinity where there are fewer.
    Points and queries that are NaN, or too far for float32, are nobody's neighbours."""

    def of_tile(distances):
        near = jnp.where(distances < jnp.inf, distances, jnp.inf)
        negative, index = lax.top_k(-near, min(k, near.shape[1]))  # the first of equal ones
        return jnp.where(negative > -jnp.inf, index, -1), -negative

    index, distance = _by_tiles(points, queries, of_tile)
    return _widened(index, k, -1), _widened(distance, k, jnp.inf)


def _by_tiles(points, queries, of_tile: Callable):
    """`of_tile` of squared distances [tile, N], for every cloud and all queries."""
    M, D = queries.shape[1:]
    numbers = 2**19 if jax.default_backend() == "cpu" else 2**24  # of a tile: what a core's cache holds
    tile = max(1, min(M, numbers // points.shape[1]))
    zero = runtime_zero(points)

    def of_cloud(cloud):
        x, q = cloud  # [D, N], [tiles, tile, D]

        def one(q):
            return of_tile(squared_distance([v[None] for v in x], [q[:, d, None] for d in range(D)], zero))

        return lax.map(one, q)

    padded = jnp.pad(queries, ((0, 0), (0, -M % tile), (0, 0)))
    out = lax.map(of_cloud, (points.transpose(0, 2, 1), padded.reshape(len(queries), -1, tile, D)))
    return tuple(a.reshape(a.shape[0], -1, *a.shape[3:])[:, :M] for a in out)


def _widened(a: jax.Array, k: int, value: int | float) -> jax.Array:
    return jnp.pad(a, ((0, 0), (0, 0), (0, k - a.shape[2])), constant_values=value)
