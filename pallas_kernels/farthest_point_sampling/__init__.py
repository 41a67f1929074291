"""Farthest point sampling: m times the point that is farthest from those picked before. Exact.

    indices, squared_distances = farthest_point_sampling(points, m)

Everywhere the same indices and the same bits (`pallas_kernels.distance`), ties to the lowest index. It is the
greedy sequence of Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985), which Eldar et
al., "The farthest point strategy for progressive image sampling" (1997) made known for sampling. Its first k
picks are the sample of size k.

    reference       what it means, in jnp
    blocks          the same on a CPU: many picks a round, in blocks of neighbouring points
    triton          one program a cloud, minima in registers, up to 32k points
    mosaic_gpu      Hopper: a cluster of blocks a cloud, up to 128k points
    cases           clouds of real sizes

Letters: B clouds (any leading axes), N points, D coordinates, m picks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import choice
from pallas_kernels.choice import Implementation
from pallas_kernels.distance import runtime_zero, squared_distance
from pallas_kernels.farthest_point_sampling import blocks, mosaic_gpu, reference, triton

# From so many points and picks on, sorting the points into blocks saves more than it costs on a CPU.
POINTS_FOR_BLOCKS, PICKS_FOR_BLOCKS, MAX_COORDINATES_OF_BLOCKS = 6000, 256, 8


def farthest_point_sampling(
    points: Float[Array, "*B N D"],
    m: int,
    *,
    start: int | Int[Array, "*B"] | None = None,
    mask: Bool[Array, "*B N"] | None = None,
    initial: Float[Array, "*B N"] | None = None,
    return_minimum: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """int32 indices [*B, m] of points far apart, and float32 squared distances [*B, m] to the picks before.

    start: the first pick, whose distance is infinity; None is the farthest by `initial`, else the lowest
      index. One that may not be picked counts as None.
    mask: points that may be picked; others, and those with a coordinate that is not finite, are ignored.
    initial: squared distances to points picked earlier (that minimum, to go on from there); negative where a
      point may not be picked.
    return_minimum: also float32 [*B, N], the squared distance of every point to the nearest pick, -1 where
      it may not be picked.

    A point is picked once: when all that are left coincide with picks, they follow in the order of their
    indices at distance 0; when none is left, -1 at distance 0.

    No gradient goes through: take that of `points[indices]`. Raises ValueError for shapes, and for a start
    out of range as far as it is known; NotImplementedError where a named implementation cannot run.
    """
    *B, N, D = points.shape
    if points.dtype != jnp.float32:
        raise ValueError(f"farthest_point_sampling: points must be float32, got {points.dtype}")
    if m < 1 or N < 1 or D < 1:
        raise ValueError(f"farthest_point_sampling: there must be points and picks, got {N=}, {D=}, {m=}")
    if isinstance(start, int) and not 0 <= start < N:
        raise ValueError(f"farthest_point_sampling: start must be one of N points, got {start=}, {N=}")
    for name, a, shape in (("start", start, (*B,)), ("mask", mask, (*B, N)), ("initial", initial, (*B, N))):
        if a is not None and not isinstance(a, int) and a.shape != shape:
            raise ValueError(f"farthest_point_sampling: {name} must have shape {shape}, got {a.shape}")
    if isinstance(start, int):
        start = jnp.full(tuple(B), start, jnp.int32)
    return _sample(points, start, mask, initial, m, return_minimum, implementation)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _sample(points, start, mask, initial, m, return_minimum, implementation):
    *B, N, D = points.shape
    points = lax.stop_gradient(points).reshape(-1, N, D)
    allowed = jnp.isfinite(points).all(-1)
    if mask is not None:
        allowed = allowed & mask.reshape(-1, N)
    minimum = jnp.full(points.shape[:2], jnp.inf)
    if initial is not None:
        minimum = lax.stop_gradient(initial).astype(jnp.float32).reshape(-1, N)
    allowed = allowed & (minimum >= 0)
    minimum = jnp.where(allowed, minimum, jnp.float32(-1))
    points = jnp.where(allowed[..., None], points, jnp.float32(0))

    firsts = []
    if start is not None:
        index, distance, minimum = jax.vmap(_first)(points, minimum, start.reshape(-1).astype(jnp.int32))
        firsts = [(index, distance)]
    if m > len(firsts):
        index, distance, minimum = _core(m - len(firsts), return_minimum, implementation)(points, minimum)
        firsts.append((index, distance))
    index, distance = (
        jnp.concatenate([a.reshape(len(points), -1) for a in parts], 1) for parts in zip(*firsts, strict=True)
    )
    index, distance = reference.complete(index, distance, allowed, start is not None)
    out = index.reshape(*B, m), distance.reshape(*B, m)
    return (*out, minimum.reshape(*B, N)) if return_minimum else out


def _first(points, minimum, start):
    """The pick that is given, or the farthest if it may not be picked."""
    highest = jnp.max(minimum)
    farthest = jnp.min(jnp.where(minimum == highest, jnp.arange(minimum.size, dtype=jnp.int32), minimum.size))
    index = jnp.where(minimum[start] >= 0, start, farthest)
    x = list(points.T)
    distance = squared_distance(x, [v[index] for v in x], runtime_zero(points))
    return index, minimum[index], jnp.minimum(minimum, distance)


def _core(m: int, return_minimum: bool, implementation: Implementation | None) -> Callable:
    """The picks of clouds [B, N, D] from their minima [B, N] on, by one of the implementations."""
    backends = (
        choice.Kernel(
            "mosaic_gpu", functools.partial(mosaic_gpu.sample, m=m), mosaic_gpu.why_not, (9, 0), (10, 0)
        ),
        choice.Kernel("triton", functools.partial(triton.sample, m=m), triton.why_not),
    )

    @jax.custom_batching.custom_vmap
    def core(points, minimum):
        return choice.run(
            "farthest_point_sampling",
            (points, minimum),
            reference=functools.partial(_by_xla, m=m, return_minimum=return_minimum),
            backends=backends,
            implementation=implementation,
        )

    @core.def_vmap
    def more_clouds(size, is_batched, *arrays):
        whole = [
            a if batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, batched in zip(arrays, is_batched, strict=True)
        ]
        out = core(*(a.reshape(-1, *a.shape[2:]) for a in whole))
        return tuple(a.reshape(size, -1, *a.shape[1:]) for a in out), (True,) * 3

    return core


def _by_xla(points, minimum, *, m: int, return_minimum: bool):
    """The definition; on a CPU, by blocks where that is faster."""
    plain = functools.partial(reference.sample, m=m)
    _, N, D = points.shape
    few = N < POINTS_FOR_BLOCKS or m < PICKS_FOR_BLOCKS
    if few or D > MAX_COORDINATES_OF_BLOCKS or N > blocks.MAX_POINTS:
        return plain(points, minimum)

    def by_blocks(points, minimum):
        def one(cloud):
            index, distance, after = blocks.sample(*cloud, m, return_minimum=return_minimum)
            return index, distance, cloud[1] if after is None else after

        return lax.map(one, (points, minimum))

    return lax.platform_dependent(points, minimum, cpu=by_blocks, default=plain)
