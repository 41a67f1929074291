"""A format: another one, whose inputs are scaled first (AWQ, arXiv:2306.00978)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxllm.pytree import pytree
from jaxllm.weights import affine
from jaxllm.weights.affine import Affine


@pytree
class Scaled:
    """A [K, N] weight in affine codes whose inputs are multiplied first: y = (x * inverse) @ weight.

    holds: shape == weight.shape; inverse.shape == (K,)
    """

    weight: Affine
    inverse: jax.Array  # float16 [K]

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype

    def dequantize_rows(self, dtype=jnp.float32) -> jax.Array:
        """The rows [N, K] that multiply x itself."""
        return (self.weight.dequantize_rows() * self.inverse.astype(jnp.float32)[None]).astype(dtype)

    def partition_specs(self, spec: P) -> "Scaled":
        """Where each leaf goes when the logical [K, N] axes are laid out as `spec`."""
        places = [*jax.tree.leaves(self.weight.partition_specs(spec)), P(spec[0])]
        return jax.tree.unflatten(jax.tree.structure(self), places)


def matmul(x: Float[Array, "*B K"], w: Scaled) -> Float[Array, "*B N"]:
    """`x @ w` in float32: x is scaled in float32, then rounded back to its type."""
    inverse = w.inverse.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    scaled = (x.astype(jnp.float32) * inverse).astype(x.dtype)
    return affine.matmul(scaled, w.weight)
