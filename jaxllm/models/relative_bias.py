"""T5's positions: a number for each bucket of distances and each head, added to the scores of attention.

Raffel et al., arXiv:1910.10683, section 2.1. Letters: B batch, T queries, S keys, H heads.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.models.layers import normal


def bucket_of_distance(buckets: int, max_distance: int, *, causal: bool) -> np.ndarray:
    """The bucket of each distance, key position - query position, from -max_distance on.

    Half of a direction's buckets are for one distance each, the others grow with its logarithm.
    """
    count = buckets if causal else buckets // 2
    exact = count // 2
    distance = np.arange(max_distance + 1, dtype=np.float32)
    # in float32, as whoever trained the tables computed it
    grown = np.log(np.maximum(distance, 1) / np.float32(exact))
    grown = grown / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    bucket = np.where(distance < exact, distance, np.minimum(exact + np.trunc(grown), count - 1))
    behind, ahead = bucket[:0:-1], bucket[1:]
    ahead = np.zeros_like(ahead) if causal else ahead + count
    return np.concatenate([behind, bucket[:1], ahead]).astype(np.int32)


class RelativeBias(nnx.Module):
    """A table [buckets, H], looked up by distance."""

    def __init__(
        self,
        buckets: int,
        max_distance: int,
        heads: int,
        *,
        causal: bool,
        std: float,
        rngs: nnx.Rngs | None,
        dtype,
    ):
        self.table = nnx.Param(normal(rngs, (buckets, heads), std, dtype))
        self.max_distance = max_distance
        self.causal = causal

    def __call__(self, distance: Int[Array, "*B T S"]) -> Float[Array, "*B H T S"]:
        """Float32 numbers to add to scores, for distances key position - query position."""
        far, table = self.max_distance, self.table.get_value()
        of_distance = table[bucket_of_distance(table.shape[0], far, causal=self.causal)]
        bias = of_distance.astype(jnp.float32)[jnp.clip(distance, -far, far) + far]  # [.., T, S, H]
        return jnp.moveaxis(bias, -1, -3)
