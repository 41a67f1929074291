"""All widths of a weight side by side, as numbers: what precision is fitted on, never stored.

    DenseWidths(rows)                      one product at any of them
    BlendedWidths(rows, average)           a product between two of them, differentiable in where

A program of these does not depend on how many bits a weight has: one serves all layers of a shape. Rows are
float16, as the tables that they are read from: 2 bytes a weight and width.

Letters: W widths, the narrowest first, K inputs, N outputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.pytree import pytree, static
from jaxllm.weights.planes.bit_planes import BitPlanes
from pallas_kernels.dot import dot


@pytree
class DenseWidths:
    """A [K, N] weight at each of its widths; width 0 is the narrowest."""

    rows: jax.Array  # float16 [W, N, K]
    dtype: object = static()  # numpy dtype: what it was quantized from

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.rows.shape[-1], self.rows.shape[-2]

    @property
    def seed_bits(self) -> int:
        """The narrowest."""
        return 0


@pytree
class BlendedWidths:
    """A [K, N] weight whose product lies between those at two widths: DP-LLM's second phase (section 2.4).

    y = (1 - f) x W_l + f x W_(l + 1),   l = floor(average), f = average - l
    """

    rows: jax.Array  # float16 [W, N, K]
    average: jax.Array  # float32 scalar, 0 .. W - 1

    @property
    def shape(self) -> tuple[int, int]:
        """The logical shape (K, N)."""
        return self.rows.shape[-1], self.rows.shape[-2]


def all_widths(w: BitPlanes) -> Float[Array, "W N K"]:
    """The weight's rows at each width from the seed's to all planes that there are."""
    widths = range(w.seed_bits, w.parent_bits + 1)
    return jnp.stack([w.at(b).dequantize_rows(jnp.float16) for b in widths])


def blend(x: Float[Array, "*B K"], w: BlendedWidths) -> Float[Array, "*B N"]:
    """`x @ w` in float32; its gradient in `average` is that of what the next width changes."""
    low = jnp.clip(jnp.floor(w.average), 0, w.rows.shape[0] - 2).astype(jnp.int32)
    lower, upper = w.rows[low].astype(jnp.float32), w.rows[low + 1].astype(jnp.float32)
    return dot(x, lower + (w.average - low.astype(jnp.float32)) * (upper - lower))
