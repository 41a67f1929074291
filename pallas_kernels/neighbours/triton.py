"""Neighbours in Pallas-Triton: a program takes some queries, and all points in parts of ascending index.

ball query      points of a part that are in a ball get their place by a prefix sum and are written there;
                parts without any cost their distances alone
knn             the k nearest so far are in registers, in no order; while a part has a nearer point than the
                farthest of them, it takes its place; in the end they are sorted

A program is one warp, and a part as many points as it has lanes: nothing waits at a barrier, and what goes
over the points of a part goes over lanes. Distances are compared as the whole numbers that their bits are, of
which `redux.sync` finds the least.

Neither is bound by memory: coordinates are read once a program, from the caches, and a pair costs ten
instructions. There is no Mosaic GPU kernel beside these: a product on tensor cores would round distances
otherwise, and for the rest it lacks prefix sums and has no advantage over this.

Checked: numbers in the interpreter and lowering (jax 0.10.2 and 0.12), compiled for sm_80, sm_89, sm_90a and
sm_100a without spills (0.12). Never run on a GPU.

Letters: N points, M queries, D coordinates, k neighbours; Q queries a program, P points a part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int32

from pallas_kernels import compat, tiles
from pallas_kernels.distance import runtime_zero, squared_distance, triton_square

MAX_COORDINATES = 8
MAX_NEIGHBOURS = 128
NONE = 2**30  # above every index
INFINITY = 0x7F800000  # its bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """queries: of a program; points: of a part; both powers of two. warps: of a program."""

    queries: int
    points: int
    warps: int


@tiles.measured("neighbours triton")
def default_tile(k: int = 1) -> Tile:
    """Guesses: no GPU has measured them. k: neighbours that are held in registers."""
    return Tile(queries=16 if k <= 8 else 8, points=32, warps=1)


def why_not_ball_query(points, queries, squared_radius, *, k: int) -> str | None:
    return _why_not(points, k=None)


def why_not_knn(points, queries, *, k: int) -> str | None:
    return _why_not(points, k=k)


def _why_not(points: Float[Array, "B N D"], k: int | None) -> str | None:
    D = points.shape[2]
    if D > MAX_COORDINATES:
        return f"takes at most {MAX_COORDINATES} coordinates, got {D}"
    if k is not None and k > MAX_NEIGHBOURS:
        return f"takes at most {MAX_NEIGHBOURS} neighbours, got {k}"
    return None


def ball_query(
    points: Float[Array, "B N D"],
    queries: Float[Array, "B M D"],
    squared_radius: Float[Array, ""],
    k: int,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "B M k"], Int32[Array, "B M"]]:
    """As `reference.ball_query`."""
    tile = default_tile() if tile is None else tile
    scalars = jnp.stack([runtime_zero(points), squared_radius])
    kernel = functools.partial(_ball_query, k=k, tile=tile, interpret=interpret)
    index, count = _call(
        "ball_query", kernel, points, queries, scalars, k + 1, jnp.int32, None, tile, interpret
    )
    return index[..., :k], count


def knn(
    points: Float[Array, "B N D"],
    queries: Float[Array, "B M D"],
    k: int,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Int32[Array, "B M k"], Float[Array, "B M k"]]:
    """As `reference.knn`."""
    tile = default_tile(k) if tile is None else tile
    kernel = functools.partial(_knn, k=k, tile=tile, interpret=interpret)
    scalars = runtime_zero(points)[None]
    index, distance = _call("knn", kernel, points, queries, scalars, k, jnp.float32, k, tile, interpret)
    return jnp.where(distance < jnp.inf, index, -1), distance


def _call(name, kernel, points, queries, scalars, k, second_type, second_width, tile, interpret):
    """Pads with NaN, which is near to nobody, and runs a program for every `tile.queries` queries."""
    B, N, D = points.shape
    M = queries.shape[1]
    x = _padded(points.transpose(0, 2, 1), tile.points)
    q = _padded(queries.transpose(0, 2, 1), tile.queries)
    rows = q.shape[2]
    second = () if second_width is None else (second_width,)
    index, other = pl.pallas_call(
        kernel,
        grid=(B, rows // tile.queries),  # a cloud, a tile of queries
        in_specs=[
            pl.BlockSpec((None, D, x.shape[2]), lambda b, i: (b, 0, 0)),
            pl.BlockSpec((None, D, tile.queries), lambda b, i: (b, 0, i)),
            pl.BlockSpec(scalars.shape, lambda b, i: (0,)),
        ],
        out_specs=[
            pl.BlockSpec((None, tile.queries, k), lambda b, i: (b, i, 0)),
            pl.BlockSpec((None, tile.queries, *second), lambda b, i: (b, i, *(0,) * len(second))),
        ],
        out_shape=[
            compat.output((B, rows, k), jnp.int32, points, queries),
            compat.output((B, rows, *second), second_type, points, queries),
        ],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(x, q, scalars)
    return index[:, :M], other[:, :M]


def _padded(a: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % multiple)), constant_values=jnp.nan)


def _distances(x_ref, q_ref, zero, part, tile: Tile, interpret: bool):
    """Squared distances [Q, P] of a part, and the indices [1, P] of its points."""
    D = x_ref.shape[0]
    here = pl.ds(part * tile.points, tile.points)
    q, x = [q_ref[d, :][:, None] for d in range(D)], [x_ref[d, here][None] for d in range(D)]
    index = lax.broadcasted_iota(jnp.int32, (1, tile.points), 1) + part * tile.points
    return squared_distance(x, q, zero, square=triton_square(interpret)), index


def _is_any(flags: Int32[Array, "Q P"]) -> jax.Array:
    return jnp.max(jnp.max(flags, axis=0)) > 0  # over a thread's queries first, then once over lanes


def _ball_query(x_ref, q_ref, scalars_ref, index_ref, count_ref, *, k, tile, interpret):
    zero, squared_radius = scalars_ref[0], scalars_ref[1]
    row = lax.broadcasted_iota(jnp.int32, (tile.queries, 1), 0)

    def take(part, count):
        distance, index = _distances(x_ref, q_ref, zero, part, tile, interpret)
        near = (distance < squared_radius).astype(jnp.int32)

        def write():
            place = count[:, None] + jnp.cumsum(near, axis=1) - near
            fits = (near > 0) & (place < k)
            # the interpreter writes all, and what does not fit to place k, which is cut off
            where = index_ref.at[jnp.broadcast_to(row, near.shape), jnp.where(fits, place, k)]
            plt.store(where, jnp.broadcast_to(index, near.shape), mask=fits)
            return count + jnp.sum(near, axis=1)

        return lax.cond(_is_any(near), write, lambda: count)

    parts = x_ref.shape[1] // tile.points
    count_ref[...] = lax.fori_loop(0, parts, take, jnp.zeros((tile.queries,), jnp.int32))


def _knn(x_ref, q_ref, scalars_ref, index_ref, distance_ref, *, k, tile, interpret):
    zero = scalars_ref[0]
    places = pl.next_power_of_2(k)
    place = lax.broadcasted_iota(jnp.int32, (tile.queries, places), 1)
    # places beyond k never give way: they are nearer than everything
    nearest = jnp.where(place < k, INFINITY, -1), place + NONE

    def farthest(nearest):
        return jnp.max(nearest[0], axis=1)

    def take(part, nearest):
        distance, index = _distances(x_ref, q_ref, zero, part, tile, interpret)
        distance = lax.bitcast_convert_type(jnp.where(distance < jnp.inf, distance, jnp.inf), jnp.int32)

        def some_are_nearer(state):
            distance, _, worst = state
            return _is_any((distance < worst[:, None]).astype(jnp.int32))

        def replace(state):
            distance, nearest, worst = state
            values, indices = nearest
            best = jnp.min(distance, axis=1)
            who = jnp.min(jnp.where(distance == best[:, None], index, NONE), axis=1)
            better = (best < worst)[:, None]
            last = jnp.max(jnp.where(values == worst[:, None], indices, -1), axis=1)[:, None]
            goes = better & (indices == last)
            nearest = jnp.where(goes, best[:, None], values), jnp.where(goes, who[:, None], indices)
            distance = jnp.where(better & (index == who[:, None]), INFINITY, distance)
            return distance, nearest, farthest(nearest)

        _, nearest, _ = lax.while_loop(some_are_nearer, replace, (distance, nearest, farthest(nearest)))
        return nearest

    nearest = lax.fori_loop(0, x_ref.shape[1] // tile.points, take, nearest)
    gone = 2 * NONE - 1

    def write(i, nearest):
        values, indices = nearest
        best = jnp.min(values, axis=1)
        who = jnp.min(jnp.where(values == best[:, None], indices, gone), axis=1)
        index_ref[:, i] = who
        distance_ref[:, i] = lax.bitcast_convert_type(best, jnp.float32)
        is_best = (values == best[:, None]) & (indices == who[:, None])
        return jnp.where(is_best, gone, values), jnp.where(is_best, gone, indices)

    nearest = jnp.where(place < k, nearest[0], gone), nearest[1]
    lax.fori_loop(0, k, write, nearest)
