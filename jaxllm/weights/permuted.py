"""Any format whose inputs are stored in another order: what act-order GPTQ files come as. Lossless.

GPTQ (arXiv:2210.17323) with act-order quantizes inputs in the order of their curvature, and groups are of
neighbours in that order, so that an input's group has to be looked up. Sorted by group, the inputs of each
are together again, and any format will do; in turn x is sorted the same way at run time:

    y = x[..., order] @ weight

    w = Permuted(affine.quantize(x[order], bits=4, group_size=32), order)

Bits a weight: the format's and 32 / N.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxllm.pytree import pytree


@pytree
class Permuted:
    """A [K, N] weight held as its rows in another order of inputs.

    holds: shape == weight.shape; sort(order) == arange(K)
    """

    weight: Any  # any weight format [K, N]
    order: jax.Array  # int32 [K]: the input that each stored one is

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype

    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The rows [N, K] that multiply x itself."""
        return self.weight.dequantize_rows(dtype)[:, jnp.argsort(self.order)]

    def partition_specs(self, spec: P) -> "Permuted":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`.

        Always cut along N; where the weight is cut along K instead, N is cut over those devices: the sorted
        inputs of a shard would not be the shard of the inputs.
        """
        K, N = spec
        inner = self.weight.partition_specs(P(None, K if N is None else N))
        return jax.tree.unflatten(jax.tree.structure(self), [*jax.tree.leaves(inner), P(None)])


def gather(x: Float[Array, "*B K"], w: Permuted) -> Float[Array, "*B K"]:
    """The inputs in the order in which the weight has them."""
    return jnp.take(x, w.order, axis=-1, mode="clip")  # in range, so that nothing needs filling
