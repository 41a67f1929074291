"""A format: another one, and single weights of it that are kept apart as they were (dense and sparse).

    y = x @ (base, where the kept weights stand in place of its own)               arXiv:2306.07629

What a table or a grid would have to stretch for, or what the loss feels most, is stored by itself. It stands
in place of what the base says there and is not added to it: of a base that can be read at several widths
(`bit_planes.read_at`) that differs, and the kept weight must not. Outputs are cut into blocks of R rows of W
inputs, each with m places, so that arrays are of one shape and a block lies with its outputs on a mesh:

    kept [O, m] float16         places [O, m] uint16: row in block * W + input

A block with fewer repeats its first; one without any keeps its weight at place 0. R is 16, or as many rows
as 16 bits can address a place in. Bits a weight: the base's and 32 m / (R W). Kept weights are exact up to
float16.

    w = encode(base, rows, highest(jnp.abs(rows), 300), 300)        # the largest of each block

Single weights of `mixed_columns`, and those of other tools' files (`added`), lie so, too, but are added to
what stands there: `pack`, `put_into_rows`, with 0 at place 0 where a block has fewer.

Letters: K inputs, N outputs, W stored inputs (K here), O blocks of outputs, m places in each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Shaped, UInt16

from jaxllm.pytree import pytree, static
from pallas_kernels.mixed_two_bit_gemm.reference import add_to_rows, block_rows


@pytree
class DenseAndSparse:
    """A [K, N] weight: any format, and weights that stand in place of some of its own.

    added: they are added to these, as other tools have it, and 0 fills up a block with fewer than m.
    holds: kept.shape == places.shape == (ceil(N / block_rows(K)), m)
    """

    base: Any  # any weight format [K, N]
    kept: jax.Array  # float16 [O, m]
    places: jax.Array  # uint16 [O, m]
    added: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        rows = self.base.dequantize_rows(jnp.float32 if self.added else dtype)
        return put_into_rows(rows, self.kept, self.places, added=self.added).astype(dtype)

    def is_kept(self) -> Bool[Array, "N K"]:
        """Which weights are not the base's."""
        marks = jnp.float16((self.kept != 0) | (not self.added))  # an added 0 fills up a block
        return put_into_rows(jnp.zeros(self.shape[::-1]), marks, self.places, added=self.added) > 0

    def partition_specs(self, spec: P) -> "DenseAndSparse":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        Always cut along N, in whole blocks; where the weight is cut along K instead, N is cut over those
        devices: the places of a shard would not be those of its inputs.
        """
        K, N = spec
        axis = K if N is None else N
        inner = jax.tree.leaves(self.base.partition_specs(P(None, axis)))
        return jax.tree.unflatten(jax.tree.structure(self), [*inner, P(axis, None), P(axis, None)])


def in_blocks(rows: Shaped[Array, "N W"], change: Callable) -> Shaped[Array, "N W"]:
    """`change` on the rows as [O, R * W], one line a block."""
    N, W = rows.shape
    return change(_blocks(rows)).reshape(-1, W)[:N]


def _blocks(rows: Shaped[Array, "N W"]) -> Shaped[Array, "O RW"]:
    N, W = rows.shape
    R = block_rows(W)
    return jnp.pad(rows, ((0, -N % R), (0, 0))).reshape(-1, R * W)


@functools.partial(jax.jit, static_argnames="m", inline=True)
def highest(score: Float[Array, "N W"], m: int, last: int | jax.Array | None = None) -> Bool[Array, "N W"]:
    """Where the m highest scores above 0 of each block are.

    last: how many of a last block that is short of rows; None for its share of m.
    """
    N, W = score.shape
    R = block_rows(W)
    last = m * (N % R) // R if last is None else last

    def mark(flat):
        best, at = jax.lax.top_k(flat, m)
        rank = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
        block = jax.lax.broadcasted_iota(jnp.int32, best.shape, 0)
        taken = (best > 0) & (rank < jnp.where(block < N // R, m, last))
        return jax.vmap(lambda line, i, t: line.at[i].set(t))(jnp.zeros(flat.shape, bool), at, taken)

    return in_blocks(score, mark)


@functools.partial(jax.jit, static_argnames="m", inline=True)
def pack(rest: Float[Array, "N W"], m: int) -> tuple[Float[Array, "O m"], UInt16[Array, "O m"]]:
    """Values and places of what is not 0, by place; zeros at place 0 fill up each block."""
    flat = _blocks(rest.astype(jnp.float16))
    used, at = jax.lax.top_k((flat != 0).astype(jnp.float32), m)
    return jnp.take_along_axis(flat, at, axis=1), jnp.where(used > 0, at, 0).astype(jnp.uint16)


def put_into_rows(
    rows: Float[Array, "N W"], values: Float[Array, "O m"], places: UInt16[Array, "O m"], *, added: bool
) -> Float[Array, "N W"]:
    """The rows with each value at its place, added to what stands there or instead of it."""

    if added:
        return add_to_rows(rows, values, places)

    def put(line, at, value):
        return line.at[at.astype(jnp.int32)].set(value.astype(line.dtype))

    return in_blocks(rows, lambda flat: jax.vmap(put)(flat, places, values))


@functools.partial(jax.jit, static_argnames="m", inline=True)
def encode(base: Any, rows: Float[Array, "N K"], kept: Bool[Array, "N K"], m: int) -> DenseAndSparse:
    """The format of a base, and of the weights `kept`, at most m in each block."""
    used, at = jax.lax.top_k(_blocks(kept.astype(jnp.float32)), m)  # by place
    at = jnp.where(used > 0, at, at[:, :1])
    weights = jnp.take_along_axis(_blocks(rows.astype(jnp.float16)), at, axis=1)
    return DenseAndSparse(base, weights, at.astype(jnp.uint16))
