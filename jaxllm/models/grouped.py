"""The product over experts: each row of activations times the weight of its own expert.

    groups = group(chosen, experts=X)                            # once a layer
    y = grouped_matmul(x, w, groups)                             # [R, K] x [X, K, N] -> [R, N]

Rows are sorted by expert into tiles of one expert each, the last of an expert filled up with rows that nobody
reads. On a CPU, and for stored codes anywhere, tiles are taken one by one: only the chosen expert's codes are
read, and no more than one expert is ever dequantized. Dense weights on an accelerator take all tiles in one
`jax.lax.ragged_dot`. What a row gets does not depend on which others are there, but for rounding.

Letters: R rows, X experts, K inputs, N outputs, M tiles of t rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.pytree import pytree, static
from jaxllm.weights.dense import Dense
from jaxllm.weights.experts import Experts
from jaxllm.weights.matmul import matmul

MAX_TILE = 128  # rows


@pytree
class Groups:
    """Which rows go to which expert, M tiles of t rows."""

    chosen: jax.Array  # int32 [R]: the expert of each row
    source: jax.Array  # int32 [M t]: the row that stands there; any one where a tile is filled up
    place: jax.Array  # int32 [R]: where a row stands
    expert: jax.Array  # int32 [M]: the expert of each tile
    used: jax.Array  # int32 []: tiles that have rows
    sizes: jax.Array  # int32 [X]: places in the tiles of each expert
    tile: int = static()  # t


def tile_rows(R: int, X: int) -> int:
    """Rows of a tile: about as many as an expert gets, so that most experts are read once."""
    return min(1 << max(-(-R // X) - 1, 0).bit_length(), MAX_TILE)


def group(chosen: Int[Array, " R"], *, experts: int) -> Groups:
    """The rows in tiles by the expert of each; rows of one expert stay in their order."""
    (R,), X = chosen.shape, experts
    t = tile_rows(R, X)
    M = min(R, R // t + X)  # at most: one tile of each expert is not full
    counts = jnp.zeros((X,), jnp.int32).at[chosen].add(1)
    tiles = -(-counts // t)
    ends = jnp.cumsum(tiles)
    order = jnp.argsort(chosen, stable=True)
    of_sorted = chosen[order]
    rank = jnp.arange(R, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[of_sorted]
    place = jnp.zeros((R,), jnp.int32).at[order].set((ends - tiles)[of_sorted] * t + rank)
    source = jnp.zeros((M * t,), jnp.int32).at[place].set(jnp.arange(R, dtype=jnp.int32))
    expert = jnp.searchsorted(ends, jnp.arange(M, dtype=jnp.int32), side="right").astype(jnp.int32)
    return Groups(chosen, source, place, jnp.minimum(expert, X - 1), ends[-1], tiles * t, t)


def grouped_matmul(x: Float[Array, "R K"], w: Experts, groups: Groups, out_dtype=None) -> Float[Array, "R N"]:
    """Each row times the weight of its expert, accumulated in float32, in `out_dtype` (that of `x` if None).

    Raises ValueError when the inner sizes differ.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"grouped_matmul: x needs w's K as last axis, got {x.shape=}, {w.shape=}")
    x = x[groups.source]
    if isinstance(w.stack, Dense) and jax.default_backend() != "cpu":
        y = ragged_product(x, w.stack.rows, groups.sizes).astype(out_dtype)
    else:
        y = product_by_tiles(x, w, groups, out_dtype)
    return y[groups.place]


def product_by_tiles(x: Float[Array, "n K"], w: Experts, groups: Groups, out_dtype) -> Float[Array, "n N"]:
    """The product of sorted rows, a tile at a time; tiles without rows are left out."""
    tiles = x.reshape(-1, groups.tile, x.shape[-1])

    @jax.checkpoint  # else each tile would keep its expert's numbers for the backward pass
    def product(tile, expert):
        return matmul(tile, w.expert(expert), out_dtype)

    def one(of_tile):
        number, expert, tile = of_tile
        empty = jnp.zeros((groups.tile, w.shape[2]), out_dtype)
        return jax.lax.cond(number < groups.used, product, lambda tile, expert: empty, tile, expert)

    y = jax.lax.map(one, (jnp.arange(len(tiles)), groups.expert, tiles))
    return y.reshape(-1, y.shape[-1])


def ragged_product(
    x: Float[Array, "n K"], rows: Float[Array, "X N K"], sizes: Int[Array, " X"]
) -> Float[Array, "n N"]:
    """The float32 product of sorted rows with dense weights, all tiles at once."""
    return jax.lax.ragged_dot(
        x,
        rows.swapaxes(1, 2).astype(x.dtype),
        sizes,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
