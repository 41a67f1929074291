"""The widths at which tokens read a model's linears in planes, seen through a tap.

read = WidthTap(model)
model(tokens, tap=read)
read.widths["layers.3.mlp.up"], read.mean()

Embeddings, heads, tables and estimators do not count, as in DP-LLM's effective bits (arXiv:2508.06041;
section 2.1).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.models.linears import linear_weights
from jaxllm.weights.planes.adaptive_planes import AdaptivePlanes
from jaxllm.weights.planes.bit_planes import BitPlanes


class WidthTap:
    """A tap that notes the width at which each token reads each linear in planes; it changes nothing."""

    def __init__(self, model):
        self.weights = linear_weights(model)
        self.widths: dict[str, jax.Array] = {}  # float32, one a token

    def __call__(self, path: str, x: jax.Array) -> jax.Array:
        name, _, end = path.rpartition(".")
        w = self.weights.get(name)
        if end == "high" and isinstance(w, AdaptivePlanes):
            self.widths[name] = (w.low_bits + x.astype(jnp.int32)).astype(jnp.float32)
        elif end == "in" and isinstance(w, BitPlanes):
            self.widths[name] = jnp.full(x.shape[:-1], w.bits, jnp.float32)
        return x

    def mean(self) -> Float[Array, "*B"]:
        """Bits a weight that each token read; ValueError where no linear is in planes."""
        if not self.widths:
            raise ValueError("WidthTap: the model must have any-precision weights, got none")
        sizes = {name: math.prod(self.weights[name].shape) for name in self.widths}
        total = sum(sizes.values())
        parts = [bits * (sizes[name] / total) for name, bits in self.widths.items()]
        return sum(parts[1:], parts[0])
