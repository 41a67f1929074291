"""A format: another one, and numbers added to a few single weights (dense and sparse, arXiv:2306.07629).

    y = x @ base + x @ S        S: float16 at a few places, 0 elsewhere

What a table or a grid would have to stretch for, or what the loss feels most, is put right by itself. The
layout is that of the single weights of `mixed_columns`, too: outputs are cut into blocks of R rows of W
inputs, each with m places, so that arrays are of one shape and a block lies with its outputs on a mesh:

    values [O, m] float16       places [O, m] uint16: row in block * W + input; unused: 0 at 0

R is 16, or as many rows as 16 bits can address a place in. Bits a weight: the base's and 32 m / (R W).
Lossless where a value holds what the base lacks, up to float16.

    w = encode(base, rows, highest(jnp.abs(rows), 300), 300)        # the largest of each block

Letters: K inputs, N outputs, W stored inputs (K here), O blocks of outputs, m places in each, T tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Shaped, UInt16

from jaxllm.pytree import pytree

OUTPUTS_PER_BLOCK = 16
TOKENS_AT_ONCE = 32  # of which all products with single weights are in memory


@pytree
class DenseAndSparse:
    """A [K, N] weight: any format, and numbers to add to some of its weights.

    holds: values.shape == places.shape == (ceil(N / block_rows(K)), m)
    """

    base: Any  # any weight format [K, N]
    values: jax.Array  # float16 [O, m]
    places: jax.Array  # uint16 [O, m]

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K], one an output."""
        return add_to_rows(self.base.dequantize_rows(jnp.float32), self.values, self.places).astype(dtype)

    def partition_specs(self, spec: P) -> "DenseAndSparse":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        Always cut along N, in whole blocks; where the weight is cut along K instead, N is cut over those
        devices: the places of a shard would not be those of its inputs.
        """
        K, N = spec
        axis = K if N is None else N
        inner = jax.tree.leaves(self.base.partition_specs(P(None, axis)))
        return jax.tree.unflatten(jax.tree.structure(self), [*inner, P(axis, None), P(axis, None)])


def block_rows(W: int) -> int:
    """Rows of a block: 16, or as many as 16 bits can address a place in."""
    if W > 2**16:
        raise ValueError(f"sparse: outliers need at most 65536 inputs, got {W=}")
    return min(OUTPUTS_PER_BLOCK, 2 ** ((2**16 // W).bit_length() - 1))


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


def add_to_rows(
    rows: Float[Array, "N W"], values: Float[Array, "O m"], places: UInt16[Array, "O m"]
) -> Float[Array, "N W"]:
    """The rows with each value added at its place."""

    def add(line, at, value):
        return line.at[at.astype(jnp.int32)].add(value.astype(line.dtype))

    return in_blocks(rows, lambda flat: jax.vmap(add)(flat, places, values))


@functools.partial(jax.jit, static_argnames="m", inline=True)
def encode(base: Any, rows: Float[Array, "N K"], kept: Bool[Array, "N K"], m: int) -> DenseAndSparse:
    """The format of a base, and of what it lacks of the weights `kept`, at most m in each block."""
    lacks = jnp.where(kept, rows - base.dequantize_rows(jnp.float32), 0.0)
    return DenseAndSparse(base, *pack(lacks, m))


def product(x: Float[Array, "*B K"], w: DenseAndSparse) -> Float[Array, "*B N"]:
    """What the single weights add to the base's product, in float32."""
    K, N = w.shape
    R, blocks = block_rows(K), len(w.places)
    places = w.places.astype(jnp.int32)
    outputs = (places // K + R * jnp.arange(blocks, dtype=jnp.int32)[:, None]).reshape(-1)
    inputs, values = (places % K).reshape(-1), w.values.astype(jnp.float32).reshape(-1, 1)

    def some(tokens: Float[Array, "T K"]) -> Float[Array, "T N"]:
        terms = tokens.T[inputs].astype(jnp.float32) * values  # [O m, T]
        return jnp.zeros((blocks * R, len(tokens))).at[outputs].add(terms)[:N].T

    tokens = x.reshape(-1, K)
    if len(tokens) <= TOKENS_AT_ONCE:
        y = some(tokens)
    else:
        y = jax.lax.map(lambda token: some(token[None])[0], tokens, batch_size=TOKENS_AT_ONCE)
    return y.reshape(*x.shape[:-1], N)
