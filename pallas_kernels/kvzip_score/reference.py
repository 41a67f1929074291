"""How much attention keys receive, in jnp: queries some at a time, each time against the keys they may see.

Letters: B requests, T queries, H query heads, K key heads, G = H / K, J = B K, S keys, E head size.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.decode_attention.partial_softmax import FLOAT32, MASK_VALUE, soft_cap

# queries at once at least, and how often at most: weights take J G S T / 8 numbers
MIN_QUERIES, MAX_PASSES = 64, 8


def attention_per_key(
    q: Float[Array, "B T H E"],
    k: Float[Array, "J S E"],
    seen: Bool[Array, "B T S"],
    sinks: Float[Array, " H"] | None,
    share: Float[Array, "B T"] | None,
    *,
    scale: float,
    softcap: float | None,
    reduce: Literal["max", "sum"],
) -> Float[Array, "B K G S"]:
    """The greatest weight, or the sum of weights, of each key."""
    (B, T, H, E), (J, S, _) = q.shape, k.shape
    K, G = J // B, H * B // J
    size = max(MIN_QUERIES, -(-T // MAX_PASSES))
    share = seen.any(-1).astype(jnp.float32) * (1.0 if share is None else share)
    out = jnp.zeros((B, K, G, S), jnp.float32)
    for start in range(0, T, size):
        end = min(start + size, T)
        n = S - T + end
        asked = q[:, start:end].reshape(B, end - start, K, G, E).transpose(0, 2, 3, 1, 4).reshape(J, -1, E)
        scores = jnp.einsum("jnd,jsd->jns", asked, k[:, :n], **FLOAT32)
        scores = soft_cap(scores.reshape(B, K, G, end - start, n) * scale, softcap)
        scores = jnp.where(seen[:, None, None, start:end, :n], scores, MASK_VALUE)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(1, K, G, 1, 1)
            scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        part, weights = share[:, None, None, start:end] / weights.sum(-1), weights[..., :n]
        weights = weights * part[..., None]
        if reduce == "sum":
            out = out.at[..., :n].add(weights.sum(3))
        else:
            out = out.at[..., :n].max(weights.max(3))
    return out
