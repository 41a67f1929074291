"""A sink of a head is one more key that every query sees, with a score of its own and no value (GPT-OSS)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import cache as kv
from jaxllm.cache import dense, paged
from jaxllm.eviction.budget import evict
from jaxllm.ops.attention import Reach, attention, heads_first, tiled_attention
from pallas_kernels.kvzip_score import attention_per_key

B, T, K, G, E = 2, 5, 2, 2, 8
RNG = np.random.default_rng(0)
Q, KEYS, VALUES = (RNG.standard_normal((B, T, h, E)).astype(np.float32) for h in (K * G, K, K))
SINKS = np.array([-1.0, 0.0, 2.0, 30.0], np.float32)
CAUSAL = np.tril(np.ones((1, T, T), bool))


def weights_and_outputs():
    """By loops, in float64: [B, T, H, S] and [B, T, H, E]."""
    weights = np.zeros((B, T, K * G, T))
    for b, t, h in np.ndindex(B, T, K * G):
        scores = KEYS[b, : t + 1, h // G].astype(np.float64) @ Q[b, t, h] * 0.4
        e = np.exp(scores - max(scores.max(), SINKS[h]))
        weights[b, t, h, : t + 1] = e / (e.sum() + np.exp(SINKS[h] - max(scores.max(), SINKS[h])))
    values = np.repeat(VALUES, G, axis=2)
    return weights, np.einsum("bths,bshe->bthe", weights, values)


def test_whole_rows_tiles_and_scores_of_keys_know_the_sinks():
    at = jnp.arange(T)[None]

    @jax.jit
    def ways(q, k, v, sinks):
        k, v = heads_first(k), heads_first(v)
        whole = attention(q, k, v, jnp.asarray(CAUSAL), scale=0.4, sinks=sinks)
        tiles = tiled_attention(q, k, v, Reach(at, at), scale=0.4, sinks=sinks)
        seen = jnp.broadcast_to(CAUSAL, (B, T, T))
        return whole, tiles, attention_per_key(q, k, seen, scale=0.4, sinks=sinks, reduce="sum")

    weights, want = weights_and_outputs()
    whole, tiles, received = ways(Q, KEYS, VALUES, SINKS)
    np.testing.assert_allclose(whole, want, atol=1e-5)
    np.testing.assert_allclose(tiles, want, atol=1e-5)
    of_keys = weights.sum(1).reshape(B, K, G, T)
    np.testing.assert_allclose(received, of_keys, atol=1e-5)
    assert (weights.sum(-1)[:, :, 3] < 1e-6).all()  # the greatest sink takes all


def test_a_cache_of_which_pairs_were_evicted_knows_the_sinks():
    cache = dense.make(B, windows=(None,), kv_heads=K, head_dim=E, capacity=12, slack=0, dtype=jnp.float32)
    full = jnp.full((B,), T, jnp.int32)

    @jax.jit
    def filled(cache, k, v):
        return kv.advance(kv.append(cache, 0, k, v, full), full)

    scores = RNG.random((1, B, K, T)).astype(np.float32)
    cache = evict(filled(cache, KEYS, VALUES), jnp.asarray(scores), ratio=0.6, capacity=4, page=2)

    @jax.jit
    def both(cache, q, k, v, sinks):
        cache = kv.append(cache, 0, k, v, full[:B] * 0 + 3)
        positions = T + jnp.broadcast_to(jnp.arange(3), (B, 3))
        rule = {"scale": 0.4, "sinks": sinks}
        return [
            way(q, cache, 0, positions, full * 0 + 3, **rule) for way in (kv.attend, paged.attend_reference)
        ]

    got, want = both(cache, Q[:, :3], KEYS[:, :3] + 1, VALUES[:, :3], SINKS)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(np.asarray(want)[:, :, 3]).max() < 1e-6 < np.abs(np.asarray(want)[:, :, 0]).max()
