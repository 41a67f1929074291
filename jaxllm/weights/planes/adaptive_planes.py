"""A format: planes of bits, of which a token reads as many as its input asks for (DP-LLM, arXiv:2508.06041).

    y = x @ W_low       or       x @ W_(low + 1)   where   estimate(x) > threshold

W_b is the weight at b bits (`bit_planes.py`). The estimate is of ||x @ (W_(low + 1) - W_low)||, what the next
bit would change:

    linear       slope * ||x|| + offset
    projection   slope * ||x @ projection.T|| + offset      k rows A (W_(low + 1) - W_low) of random A
    exact        both products, to measure the others by
    random       a number in [0, 1) that depends on x and says nothing: the same share of tokens, no choice

Widths and thresholds are arrays, one of each target, and `target` says which holds: another target is another
number in the same program. A token is a row of `x`. Rows [..., T, K] with T > 1 are a text being read, at all
bits there are, unless `tokens` says that each of them chooses, as it would where it is fed alone.

Letters: K inputs, N outputs, S targets, P pairs of neighbouring widths, k rows of a projection.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxllm.pytree import pytree, static
from jaxllm.weights.planes.bit_planes import BitPlanes
from jaxllm.weights.planes.dense_widths import DenseWidths
from pallas_kernels.any_precision_gemm import any_precision_gemm, few_rows
from pallas_kernels.dot import dot

MANY_ROWS = 16  # that do not agree

Estimator = Literal["linear", "projection", "exact", "random"]


@pytree
class AdaptivePlanes:
    """A [K, N] weight of several widths, two of which take turns.

    holds: held.seed_bits <= low < held.parent_bits == held.bits; P = parent_bits - seed_bits;
      threshold inf: always low; -inf: always low + 1; projection is None unless estimator == "projection"
    """

    held: BitPlanes | DenseWidths  # as many planes as memory allows; numbers while it is fitted
    low: jax.Array  # int32 [S]
    threshold: jax.Array  # float32 [S]
    slope: jax.Array  # float32 [P]
    offset: jax.Array  # float32 [P]
    projection: jax.Array | None  # float16 [P, k, K]
    target: jax.Array  # int32 scalar: which of the targets
    targets: tuple[float, ...] = static()  # bits a weight of the whole model, ascending
    estimator: Estimator = static()
    early: bool = static()  # the estimate reads what the block before left, where the model has it
    tokens: Literal["decoded", "all"] = static(default="decoded")

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.held.shape

    @property
    def dtype(self):
        return self.held.dtype

    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The weight's rows [N, K] at all bits there are."""
        assert isinstance(self.held, BitPlanes)
        return self.held.dequantize_rows(dtype)

    def partition_specs(self, spec: P) -> "AdaptivePlanes":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        assert isinstance(self.held, BitPlanes)
        held = jax.tree.leaves(self.held.partition_specs(spec))
        small = [P(None, None, spec[0]) if x is self.projection else P() for x in jax.tree.leaves(self)]
        return jax.tree.unflatten(jax.tree.structure(self), held + small[len(held) :])

    @property
    def low_bits(self) -> Int32[Array, ""]:
        """The lower width at the target that holds."""
        return self.low[self.target]

    def chooses(self, x: jax.Array) -> bool:
        """Whether these tokens choose their width, or are a text being read."""
        return self.tokens == "all" or x.ndim < 3 or x.shape[-2] == 1

    def estimate(self, x: Float[Array, "*B K"], pair: jax.Array) -> Float32[Array, "*B"]:
        """What the bit beyond `seed_bits + pair` would change in each token's product."""
        match self.estimator:
            case "linear":
                found = norm(x)
            case "projection":
                assert self.projection is not None
                found = norm(dot(x, self.projection[pair]))
            case "exact":
                found = norm(step(x, self.held, self.held.seed_bits + pair))
            case "random":
                found = draw(x)
        return self.slope[pair] * found + self.offset[pair]

    def is_high(self, x: Float[Array, "*B K"]) -> Bool[Array, "*B"]:
        """Which tokens read the bit more. An estimate that is no number reads none."""
        pair = self.low_bits - self.held.seed_bits
        return self.estimate(x, pair) > self.threshold[self.target]

    def read(self, high: Bool[Array, "*B"]) -> "ChosenPlanes":
        """The weight that each token reads."""
        return ChosenPlanes(self.held, self.low_bits, high)


@pytree
class ChosenPlanes:
    """An `AdaptivePlanes` whose tokens have chosen; it is made in a forward pass and never stored."""

    held: BitPlanes | DenseWidths
    low: jax.Array  # int32 scalar
    high: jax.Array  # bool, one a token: low + 1

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.held.shape


def norm(x: Float[Array, "*B K"]) -> Float32[Array, "*B"]:
    """The length of each row."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def at_width(x: Float[Array, "*B K"], held: BitPlanes | DenseWidths, bits) -> Float32[Array, "*B N"]:
    """The product at a width, a number or an array."""
    if isinstance(held, DenseWidths):
        return dot(x, held.rows[bits])
    return any_precision_gemm(x, held.planes, held.tables, bits)


def step(x: Float[Array, "*B K"], held: BitPlanes | DenseWidths, low) -> Float32[Array, "*B N"]:
    """What the bit beyond `low` changes in the product."""
    return above(x, held, low) - at_width(x, held, low)


def draw(x: Float[Array, "*B K"]) -> Float32[Array, "*B"]:
    """A number in [0, 1) of each row's bits; the same on any number of devices."""
    words = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    odd = 2 * jnp.arange(x.shape[-1], dtype=jnp.uint32) + 1
    mixed = (words ^ (words >> 15)) * jnp.uint32(0x2C1B3C6D) * jnp.expand_dims(odd, range(x.ndim - 1))
    total = (mixed ^ (mixed >> 12)).sum(axis=-1, dtype=jnp.uint32) * jnp.uint32(0x297A2D39)
    return ((total ^ (total >> 15)) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def matmul(x: Float[Array, "*B K"], w: AdaptivePlanes | ChosenPlanes) -> Float[Array, "*B N"]:
    """`x @ w` in float32, each row at the width that it chooses, or at all bits where none does."""
    if isinstance(w, AdaptivePlanes):
        if isinstance(w.held, BitPlanes) and not w.chooses(x):
            return at_width(x, w.held, w.held.bits)
        w = w.read(w.is_high(x))
    held, low, high = w.held, w.low, w.high
    if high.size == 1:
        return at_width(x, held, low + high.reshape(()).astype(jnp.int32))
    if isinstance(held, BitPlanes) and row_by_row(x, held):
        widths = low + high.ravel().astype(jnp.int32)
        y = jax.lax.map(
            lambda row: at_width(row[0][None], held, row[1])[0], (x.reshape(-1, x.shape[-1]), widths)
        )
        return y.reshape(*x.shape[:-1], held.shape[1])
    all_high = high.all()
    first = at_width(x, held, low + all_high.astype(jnp.int32))  # of rows that agree all there is to do

    def both() -> jax.Array:
        return jnp.where(high[..., None], above(x, held, low), first)

    if high.size >= MANY_ROWS:
        return both()
    return jax.lax.cond(high.any() & ~all_high, both, lambda: first)


def row_by_row(x: Float[Array, "*B K"], held: BitPlanes) -> bool:
    """Whether each row is a product of its own: a CPU makes few rows of small tables one by one anyway.

    So rows that differ cost what their widths do (four requests in `docs/results/precision.md`).
    """
    small = held.parent_bits <= few_rows.MOST_BITS
    return small and few_rows.takes(x, held.tables)


def above(x: Float[Array, "*B K"], held: BitPlanes | DenseWidths, low: jax.Array) -> Float32[Array, "*B N"]:
    """The product at `low + 1`, which the narrowest width never is."""
    if isinstance(held, DenseWidths):
        return at_width(x, held, low + 1)
    return any_precision_gemm(x, held.planes, held.tables[1:], low + 1)


def always(w: BitPlanes, targets: tuple[float, ...], *, early: bool = False) -> AdaptivePlanes:
    """A weight that reads all its planes for every token, at each target."""
    S, pairs = len(targets), w.parent_bits - w.seed_bits
    return AdaptivePlanes(
        held=w,
        low=jnp.full((S,), w.parent_bits - 1, jnp.int32),
        threshold=jnp.full((S,), -jnp.inf, jnp.float32),
        slope=jnp.ones((pairs,), jnp.float32),
        offset=jnp.zeros((pairs,), jnp.float32),
        projection=None,
        target=jnp.zeros((), jnp.int32),
        targets=tuple(targets),
        estimator="linear",
        early=early,
    )


def is_adaptive(w: object) -> bool:
    """Whether a weight chooses its width."""
    return isinstance(w, AdaptivePlanes)


def any_adaptive(tree) -> bool:
    """Whether some weight of a model, or any tree, chooses its width."""
    return any(map(is_adaptive, jax.tree.leaves(tree, is_leaf=is_adaptive)))


def every_token_chooses(tree):
    """The model, or any tree, with each token choosing its widths also where a text is read at once."""

    def one(w):
        return dataclasses.replace(w, tokens="all") if is_adaptive(w) else w

    return jax.tree.map(one, tree, is_leaf=is_adaptive)
