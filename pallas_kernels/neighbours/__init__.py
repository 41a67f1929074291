"""Points near to queries: within a radius, or the k nearest. Exact, with the same bits everywhere.

    indices, counts = ball_query(points, queries, radius, k)        the k lowest indices within the radius
    indices, squared_distances = knn(points, queries, k)            the k nearest

Ties go to the lowest index (`pallas_kernels.distance` says why all agree which distances are equal). What
`ball_query` gives is what PointNet++ groups by (Qi et al., arXiv:1706.02413, section 3.2, and the authors'
kernels): the first k in the order of indices, filled up with the first.

    reference       what they mean, in jnp: all distances, tile by tile
    triton          kernels for NVIDIA GPUs
    cases           clouds of real sizes

Letters: B clouds (any leading axes), N points, M queries, D coordinates, k neighbours.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import choice
from pallas_kernels.choice import Implementation
from pallas_kernels.neighbours import reference, triton


def ball_query(
    points: Float[Array, "*B N D"],
    queries: Float[Array, "*B M D"],
    radius: float | Float[Array, ""],
    k: int,
    *,
    mask: Bool[Array, "*B N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Int32[Array, "*B M k"], Int32[Array, "*B M"]]:
    """The k lowest indices of points nearer than `radius` to each query, and how many there are in all.

    Nearer: float32 squared distance < float32 radius * radius. A count may exceed k; then points are left
    out. Where it is less, the first index follows the last; where it is 0, all are -1.
    mask: points that may be found; others, and those with a coordinate that is not finite, are not.
    Raises ValueError for shapes; NotImplementedError where a named implementation cannot run.
    """
    _check("ball_query", points, queries, k, mask)
    radius = jnp.asarray(radius, jnp.float32)
    return _ball_query(points, queries, radius, mask, k, implementation)


def knn(
    points: Float[Array, "*B N D"],
    queries: Float[Array, "*B M D"],
    k: int,
    *,
    mask: Bool[Array, "*B N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Int32[Array, "*B M k"], Float[Array, "*B M k"]]:
    """The k nearest points of each query, by (squared distance, index), and these squared distances.

    Where there are fewer than k, -1 at infinity. mask: points that may be found; others, and those with a
    coordinate that is not finite, are not. No gradient goes through: take that of `points[indices]`.
    Raises ValueError for shapes; NotImplementedError where a named implementation cannot run.
    """
    _check("knn", points, queries, k, mask)
    return _knn(points, queries, mask, k, implementation)


def _check(who: str, points: jax.Array, queries: jax.Array, k: int, mask: jax.Array | None) -> None:
    *B, N, D = points.shape
    if points.dtype != jnp.float32 or queries.dtype != jnp.float32:
        raise ValueError(f"{who}: points and queries must be float32, got {points.dtype}, {queries.dtype}")
    if queries.ndim != points.ndim or queries.shape[:-2] != tuple(B) or queries.shape[-1] != D:
        raise ValueError(f"{who}: queries must be {(*B, 'M', D)} as points, got {queries.shape}")
    if k < 1 or N < 1 or D < 1:
        raise ValueError(f"{who}: there must be points and neighbours, got {N=}, {D=}, {k=}")
    if mask is not None and mask.shape != (*B, N):
        raise ValueError(f"{who}: mask must have shape {(*B, N)}, got {mask.shape}")


@functools.partial(jax.jit, static_argnums=(4, 5))
def _ball_query(points, queries, radius, mask, k, implementation):
    arrays = (*_clouds(points, queries, mask), lax.stop_gradient(radius * radius))
    kernel = choice.Kernel(
        "triton", functools.partial(triton.ball_query, k=k), functools.partial(triton.why_not_ball_query, k=k)
    )
    core = _batched("ball_query", functools.partial(reference.ball_query, k=k), kernel, implementation)
    index, count = core(*arrays)
    place = jnp.arange(k, dtype=jnp.int32)
    index = jnp.where(place[None, None] < count[..., None], index, index[..., :1])
    index = jnp.where(count[..., None] > 0, index, -1)
    *B, M, _ = queries.shape
    return index.reshape(*B, M, k), count.reshape(*B, M)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _knn(points, queries, mask, k, implementation):
    kernel = choice.Kernel(
        "triton", functools.partial(triton.knn, k=k), functools.partial(triton.why_not_knn, k=k)
    )
    core = _batched("knn", functools.partial(reference.knn, k=k), kernel, implementation)
    index, distance = core(*_clouds(points, queries, mask))
    shape = (*queries.shape[:-1], k)
    return index.reshape(shape), distance.reshape(shape)


def _clouds(points, queries, mask):
    """[B, N, D] and [B, M, D]; points that may not be found are NaN, which is near to nobody."""
    allowed = jnp.isfinite(points).all(-1) if mask is None else jnp.isfinite(points).all(-1) & mask
    points = jnp.where(allowed[..., None], points, jnp.nan)
    return tuple(lax.stop_gradient(a).reshape(-1, *a.shape[-2:]) for a in (points, queries))


def _batched(
    who: str, meaning: Callable, kernel: choice.Kernel, implementation: Implementation | None
) -> Callable:
    """One of the implementations, where `vmap` makes more clouds of it. What follows two clouds is shared."""

    def run(*arrays):
        return choice.run(who, arrays, reference=meaning, backends=(kernel,), implementation=implementation)

    core = jax.custom_batching.custom_vmap(run)

    @core.def_vmap
    def more_clouds(size, is_batched, *arrays):
        points, queries, *shared = arrays
        if any(is_batched[2:]):  # a radius for every cloud: one after the other
            whole = [
                a if b else jnp.broadcast_to(a, (size, *a.shape))
                for a, b in zip(arrays, is_batched, strict=True)
            ]
            return lax.map(lambda one: core(*one), tuple(whole)), (True, True)
        points, queries = (
            (a if b else jnp.broadcast_to(a, (size, *a.shape))).reshape(-1, *a.shape[-2:])
            for a, b in zip((points, queries), is_batched[:2], strict=True)
        )
        out = core(points, queries, *shared)
        return tuple(a.reshape(size, -1, *a.shape[1:]) for a in out), (True, True)

    return core
