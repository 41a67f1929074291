"""Self-attention of a chunk with what a cache holds before it: one protocol for every model.

A layer appends the chunk's keys and values to the cache, then reads. The first chunk sees nothing but itself,
so it attends causally to its own keys and values, as the cache will give them back: rows in codes are lossy,
and results must not depend on how a text is cut. Every other chunk attends to all that the cache holds, with
itself.

Letters: B batch, T tokens of this chunk, H query heads, K key heads, E head size.
"""

from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm import cache as kv
from jaxllm.cache import Cache
from jaxllm.ops.attention import DistanceBias, causal_attention

C = TypeVar("C", bound=Cache)


def split_heads(x: Float[Array, "B T N"], head_dim: int) -> Float[Array, "B T H E"]:
    """A linear's outputs cut into heads."""
    return x.reshape(*x.shape[:2], -1, head_dim)


def extents(cache: Cache | None, positions: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """How many tokens each request may come to have: what its cache is for, or else the end of this chunk."""
    last = jnp.maximum(lengths - 1, 0)[:, None]
    ends = jnp.take_along_axis(positions, last, axis=1)[:, 0] + 1
    if cache is None:
        return ends
    of_cache = kv.split_context(cache)[1].extents
    return jnp.where(of_cache > 0, of_cache, ends)


def cached_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    cache: C | None,
    layer: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "B T H E"], C | None]:
    """What the queries read, and the cache with the chunk appended to `layer` (not yet advanced).

    cache: None attends to the chunk alone.
    lengths: tokens of the chunk that are real; the rest is padding on the right.
    window: tokens that a query sees, itself included; must be the cache's for this layer.
    softcap, bias, sinks: as in `ops.attention.attention`.
    """
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias, "sinks": sinks}
    if cache is not None:
        cache = kv.append(cache, layer, k, v, lengths)
        if not cache.is_first_chunk:  # it is so until advanced: behind the first chunk
            return kv.attend(q, cache, layer, positions, lengths, **rule), cache
        k, v = kv.round_trip(cache, layer, k, v)
    return causal_attention(q, k, v, window=window, **rule), cache


def score_rule(attention: Any) -> dict[str, Any]:
    """How the weights of a layer's attention come from its queries and keys: scale, soft cap, sinks."""
    sinks = getattr(attention, "sinks", None)
    return {
        "scale": attention.scale,
        "softcap": getattr(attention, "softcap", None),
        "sinks": None if sinks is None else sinks.get_value(),
    }
