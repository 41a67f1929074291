"""Attention equals a loop over heads, queries and keys written out in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention import attention, causal_attention, heads_first


def brute_force(q, k, v, see, scale, softcap):
    """q [B, T, H, D], k and v [B, S, K, D], see(t, s) -> bool."""
    B, T, H, _ = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kh = k[b, :, h // (H // k.shape[2])]
            vh = v[b, :, h // (H // k.shape[2])]
            for t in range(T):
                scores = kh @ q[b, t, h] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                scores = np.where([see(t, s) for s in range(len(kh))], scores, -np.inf)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ vh
    return out


def example(T, S):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, n, h, 8)), jnp.float32) for n, h in ((T, 4), (S, 2), (S, 2)))


@pytest.mark.parametrize("window, softcap", [(None, None), (5, None), (70, 2.0), (1, None)])
def test_causal_attention_equals_brute_force(window, softcap):
    T = 150  # three blocks, the last one short
    q, k, v = example(T, T)
    attend = functools.partial(causal_attention, scale=0.3, window=window, softcap=softcap)
    got = jax.jit(attend)(q, k, v)

    def see(t, s):
        return s <= t and (window is None or s > t - window)

    want = brute_force(*map(np.asarray, (q, k, v)), see, 0.3, softcap)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_bias_is_added_to_the_scores():
    q, k, v = example(3, 5)
    bias = np.random.default_rng(5).normal(size=(4, 3, 5)).astype(np.float32)
    mask = jnp.ones((1, 1, 5), bool)

    @jax.jit
    def attend(q, k, v, bias):
        return attention(q, heads_first(k), heads_first(v), mask, scale=1.0, bias=bias[None])

    got = attend(q, k, v, bias)
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, 2, axis=2)) + bias[None]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bhts,bshd->bthd", weights, np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_query_that_may_see_nothing_gives_finite_numbers():
    q, k, v = example(2, 3)
    mask = jnp.zeros((1, 1, 3), bool)
    out = jax.jit(lambda q, k, v: attention(q, heads_first(k), heads_first(v), mask, scale=1.0))(q, k, v)
    assert np.isfinite(out).all()


def test_gradients_flow_through_every_block():
    q, k, v = example(130, 130)

    def loss(v):
        return causal_attention(q, k, v, scale=0.3).sum()

    assert np.abs(np.asarray(jax.jit(jax.grad(loss))(v))).min() > 0
