"""Attention over keys and values that are at hand: the meaning, in jnp, for every backend.

Grouped queries (Ainslie et al., arXiv:2305.13245): query head j reads key head j // G. Scores, softmax and
the sum over values are accumulated in float32. Letters: B batch, T queries, S keys, H query heads, K key
heads, G = H / K, J = B K, E head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# What is added to the scores [B, H, T, S] for distances [B, T, S], negative for keys behind.
DistanceBias = Callable[[jax.Array], jax.Array]

# What a hidden key scores: finite, so that a row that may see nothing (padding) stays free of NaN.
MASK_VALUE = -1e30


def attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    v: Float[Array, "J S E"],
    mask: Bool[Array, "#B #T S"],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "#B H T S"] | None = None,
) -> Float[Array, "B T H E"]:
    """Softmax attention where `mask` says which key each query may see.

    k, v: J = B K blocks of rows, one a request and key head, as `heads_first` makes them.
    softcap: scores are bent to it by `soft_cap` (Gemma 2).
    bias: added to the scores (T5's relative positions).
    """
    B, T, H, E = q.shape
    J, S = k.shape[:2]
    K, G = J // B, H * B // J
    q = q.reshape(B, T, K, G, E).transpose(0, 2, 3, 1, 4).reshape(J, G * T, E)
    scores = jnp.einsum("jnd,jsd->jns", q, k, **FLOAT32).reshape(B, K, G, T, S) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(-1, K, G, T, S)
    scores = soft_cap(scores, softcap)
    scores = jnp.where(mask[:, None, None], scores, MASK_VALUE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(J, G * T, S)
    out = jnp.einsum("jns,jsd->jnd", weights, v, **FLOAT32).astype(v.dtype)
    return out.reshape(B, K, G, T, E).transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """Scores or logits bent to `cap * tanh(x / cap)`, as they are for None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def heads_first(x: Float[Array, "B T K E"]) -> Float[Array, "J T E"]:
    """Keys or values as `attention` and the caches hold them: one block of rows a request and head.

    subtle: one axis J = B K, not two. With an axis of size 1 XLA:CPU rewrites the product to drop it, fuses
      that with the write into the cache, and then copies the cache at every step.
    """
    B, T, K, E = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * K, T, E)


FLOAT32 = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}


def causal_attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
) -> Float[Array, "B T H E"]:
    """Attention of a chunk to itself: token t sees tokens max(0, t - window + 1) to t.

    Queries are taken in at most eight blocks, each against the keys it can see and no others, which saves up
    to 44 % of the work, and each block is recomputed in the backward pass, so that scores are never stored.
    """
    T = q.shape[1]
    k, v = heads_first(k), heads_first(v)
    size = max(64, -(-T // 8))
    block = jax.checkpoint(
        lambda q, k, v, mask, bias: attention(q, k, v, mask, scale=scale, softcap=softcap, bias=bias)
    )
    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = 0 if window is None else max(0, start - window + 1)
        distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :]
        mask = distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        added = None if bias is None else bias(-distance[None])  # [1, H, T, S]
        seen = k[:, first:end], v[:, first:end]
        outs.append(block(q[:, start:end], *seen, mask[None], added))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
