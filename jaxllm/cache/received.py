"""How much attention keys receive: what every score of eviction is made of. Exact.

Letters: B requests, T queries, H query heads, K key heads, G = H / K, J = B K, S keys, D head size.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.attention import FLOAT32, HIDDEN

BLOCK = 128  # queries at once: weights take J G BLOCK S numbers


def received(
    q: Float[Array, "B T H D"],
    k: Float[Array, "J S D"],
    seen: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    share: Float[Array, "B T"] | None = None,
    reduce: Literal["max", "sum"] = "max",
) -> Float[Array, "B K G S"]:
    """The greatest weight, or the sum of weights, that each key is given by any query, in float32.

    seen: which keys a query may see; one that sees none gives nothing. share: weights of each query count so
    much (1 if None). Queries are taken some at a time, so memory does not grow with T.
    """
    B, T, H, D = q.shape
    K = k.shape[0] // B
    G, size = H // K, min(BLOCK, T)
    blocks = -(-T // size)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * size - T)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    cut = lambda x: pad(x).reshape(B, blocks, size, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    share = jnp.ones((B, T), jnp.float32) if share is None else share

    def step(best, part):
        q, seen, share = part
        q = q.reshape(B, size, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B * K, G * size, D)
        scores = jnp.einsum("jnd,jsd->jns", q, k, **FLOAT32).reshape(B, K, G, size, -1) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        shown = seen[:, None, None]
        weights = jax.nn.softmax(jnp.where(shown, scores, HIDDEN), axis=-1)
        weights = jnp.where(shown, weights, 0.0) * share[:, None, None, :, None]
        if reduce == "sum":
            return best + weights.sum(3), None
        return jnp.maximum(best, weights.max(3)), None

    start = jnp.zeros((B, K, G, k.shape[1]), jnp.float32)
    return jax.lax.scan(step, start, (cut(q), cut(seen), cut(share)))[0]
