"""A softmax over some of the rows that queries see, not yet divided by its sum, and how two become one.

Milakov and Gimelshein, arXiv:1805.02867. Letters: J heads, n queries, S keys, E head size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

FLOAT32 = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
# What a hidden key scores: finite, so that a row that may see nothing (padding) stays free of NaN.
MASK_VALUE = -1e30
HIDDEN = -3e38  # what it scores where the greatest may be MASK_VALUE: 2^(HIDDEN - MASK_VALUE) is 0
LOG2E = math.log2(math.e)  # kernels take powers of 2


class PartialSoftmax(NamedTuple):
    """Total 0 and out 0 where no row is seen."""

    greatest: Float[Array, "*J n"]  # score
    total: Float[Array, "*J n"]  # sum of weights e^(score - greatest)
    out: Float[Array, "*J n E"]  # sum of weighted values


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """Scores bent to `cap * tanh(x / cap)`, as they are for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def partial_softmax(
    q: Float[Array, "J n E"],
    k: Float[Array, "J S E"],
    v: Float[Array, "J S E"],
    seen: Bool[Array, "J _ S"],
    *,
    scale: float,
    softcap: float | None,
    bias: Float[Array, "J n S"] | None = None,
) -> PartialSoftmax:
    """Of the rows of some keys; bias: added to the scores."""
    scores = jnp.einsum("jne,jse->jns", q, k, **FLOAT32) * scale
    scores = soft_cap(scores if bias is None else scores + bias, softcap)
    scores = jnp.where(seen, scores, MASK_VALUE)
    greatest = scores.max(-1)
    weights = jnp.where(seen, jnp.exp(scores - greatest[..., None]), 0.0)
    out = jnp.einsum("jns,jse->jne", weights.astype(v.dtype), v, **FLOAT32)
    return PartialSoftmax(greatest, weights.sum(-1), out)


def merge(one: PartialSoftmax, other: PartialSoftmax) -> PartialSoftmax:
    """The softmax over the rows of both."""
    greatest = jnp.maximum(one.greatest, other.greatest)
    a, b = jnp.exp(one.greatest - greatest), jnp.exp(other.greatest - greatest)
    out = a[..., None] * one.out + b[..., None] * other.out
    return PartialSoftmax(greatest, a * one.total + b * other.total, out)


def divided(softmax: PartialSoftmax, sinks: Float[Array, "*J n"] | None = None) -> Float[Array, "*J n E"]:
    """What a softmax over all rows gives, 0 where it saw none.

    sinks: a score of each query that takes its share of the weights and has no value.
    """
    greatest, total, out = softmax
    if sinks is None:
        return out / jnp.where(total > 0, total, 1.0)[..., None]
    top = jnp.maximum(greatest, sinks)
    shrink = jnp.exp(greatest - top)
    return out * (shrink / (shrink * total + jnp.exp(sinks - top)))[..., None]
