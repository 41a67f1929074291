"""The weights of several experts as one: each leaf of their common format stacked along a first axis.

    w = stack([Dense(rows) for rows in experts])                 # [X, K, N]
    w.expert(3)                                                  # the weight [K, N] of one

Experts are stored alike: one format with the same static fields. So a layer has three arrays for any number
of experts, one program multiplies by whichever is chosen, and of the others nothing is read
(`models/grouped.py`). As lossless as the format.

Letters: X experts, K inputs, N outputs.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxllm.pytree import pytree
from jaxllm.weights.dense import Dense
from jaxllm.weights.host_residual import HostResidual
from jaxllm.weights.nested_float import with_equal_exceptions


class MappedStack:
    """The arrays of all experts as one [X, ...] that nothing holds: each is a view of a mapped file."""

    def __init__(self, views: Sequence[np.ndarray]):
        self.views, self.dtype = tuple(views), views[0].dtype
        self.shape = (len(views), *views[0].shape)
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __getitem__(self, index: int) -> np.ndarray:
        return self.views[index]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All of them in memory."""
        return np.stack(self.views).astype(self.dtype if dtype is None else dtype, copy=False)


@pytree
class Experts:
    """X weights [K, N] of one format.

    holds: every leaf of `stack` has X in front of what one weight's leaf has
    """

    stack: Any  # a weight of any format whose leaves have the axis X in front

    @property
    def one(self) -> Any:
        """One expert's weight in shapes."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.stack)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, K, N)."""
        return (jax.tree.leaves(self.stack)[0].shape[0], *self.one.shape)

    @property
    def dtype(self):
        return self.one.dtype

    def expert(self, index) -> Any:
        """The weight [K, N] of one expert; the index may be traced. A view where leaves lie on the host."""

        def one(x):
            if isinstance(x, np.ndarray | MappedStack):
                return x[index]
            return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

        return jax.tree.map(one, self.stack)

    def partition_specs(self, spec: P) -> "Experts":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`; each device has all X."""
        return Experts(jax.tree.map(lambda place: P(None, *place), self.one.partition_specs(spec)))


def members(name: str, w: Any) -> list[str]:
    """The names of the weights [K, N] that one called `name` is made of: "mlp.up" has "mlp.up.0", ..."""
    return [f"{name}.{i}" for i in range(w.shape[0])] if isinstance(w, Experts) else [name]


def parts(w: Any) -> list[Any]:
    """The weights [K, N] that a weight is made of, in the order of `members`."""
    return [w.expert(i) for i in range(w.shape[0])] if isinstance(w, Experts) else [w]


def stack(weights: Sequence[Any]) -> Experts:
    """The weights [K, N] of all experts as one.

    Raises ValueError unless they are stored alike, and for residuals in host memory (DecDEC).
    """

    def kind(w):
        return jax.tree.structure(w), [(x.shape, x.dtype) for x in jax.tree.leaves(w)]

    if any(isinstance(x, HostResidual) for x in _nodes(weights[0])):
        raise ValueError("experts.stack: experts cannot fetch residuals from host memory, got HostResidual")
    weights = with_equal_exceptions(weights)
    first = kind(weights[0])
    other = next((i for i, w in enumerate(weights) if kind(w) != first), None)
    if other is not None:
        raise ValueError(
            f"experts.stack: all experts must be stored alike, got {weights[0]!r} for the first and "
            f"{weights[other]!r} for number {other}"
        )

    def together(*leaves):
        return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)

    return Experts(jax.tree.map(together, *weights))


def _nodes(w: Any) -> list[Any]:
    """The parts of a weight, residuals in host memory whole."""
    return jax.tree.leaves(w, is_leaf=lambda x: isinstance(x, HostResidual))


def is_dense(w: Any) -> bool:
    """Whether a weight holds its numbers as they are."""
    return isinstance(w.stack if isinstance(w, Experts) else w, Dense)
