"""The dense cache holds what was appended, per request, and forgets what it is told to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import cache as kv

B, K, H, E = 2, 2, 4, 8
ONES = jnp.ones((B,), jnp.int32)


def tokens(T, seed=0):
    """q, k, v of T tokens for B requests."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, T, n, E)).astype(np.float32) for n in (H, K, K))


def make(window=None, capacity=32, slack=0):
    return kv.dense.make(
        B, windows=(window,), kv_heads=K, head_dim=E, capacity=capacity, slack=slack, dtype=jnp.float32
    )


@jax.jit
def feed(cache, k, v, lengths):
    return kv.advance(kv.append(cache, 0, k, v, lengths), lengths)


@jax.jit
def read(cache, q, positions):
    """Attention of one query a request at `positions` (the newest token)."""
    before = kv.truncate(cache, positions)
    return kv.attend(q, before, 0, positions[:, None], ONES, scale=0.4)


def direct(q, k, v, position, window):
    """The same for request 0, from the whole sequence."""
    first = 0 if window is None else max(0, position - window + 1)
    out = []
    for h in range(H):
        kh, vh = k[0, first : position + 1, h // 2], v[0, first : position + 1, h // 2]
        scores = kh @ q[0, 0, h] * 0.4
        weights = np.exp(scores - scores.max())
        out.append(weights / weights.sum() @ vh)
    return np.stack(out)


@pytest.mark.parametrize("window, slack", [(None, 0), (4, 0), (4, 6)])
def test_attending_equals_attention_over_the_whole_sequence(window, slack):
    _, k, v = tokens(20)
    cache = make(window, slack=slack)
    cache = feed(cache, k[:, :9], v[:, :9], jnp.array([9, 5]))
    for t in range(9, 20):
        cache = feed(cache, k[:, t : t + 1], v[:, t : t + 1], ONES)
        q = tokens(1, seed=t)[0]
        got = read(cache, q, cache.lengths - 1)
        np.testing.assert_allclose(got[0, 0], direct(q, k, v, t, window), atol=2e-6)


def test_padding_is_never_seen():
    _, k, v = tokens(6)
    short = jnp.array([3, 6])
    noise = k.copy()
    noise[0, 3:] = 1e9
    q = tokens(1)[0]
    outs = [read(feed(make(), keys, v, short), q, short - 1) for keys in (k, noise)]
    np.testing.assert_array_equal(*outs)


def test_a_ring_keeps_window_plus_slack_rows_and_survives_a_rollback_of_the_slack():
    _, k, v = tokens(30)
    cache = make(window=4, capacity=64, slack=5)
    assert cache.keys[0].shape == (B * K, 9, E)
    cache = feed(cache, k[:, :20], v[:, :20], 20 * ONES)
    cache = feed(cache, k[:, 20:25], v[:, 20:25], 5 * ONES)
    back = kv.truncate(cache, 20 * ONES)
    q = tokens(1)[0]
    np.testing.assert_allclose(read(back, q, back.lengths - 1)[0, 0], direct(q, k, v, 19, 4), atol=2e-6)


def test_a_chunk_longer_than_the_slack_allows_is_refused():
    _, k, v = map(jnp.asarray, tokens(7))
    cache = feed(make(window=4, capacity=64, slack=5), k, v, 7 * ONES)
    assert kv.dense.max_chunk(cache) == 6
    with pytest.raises(ValueError, match="append: a chunk must fit, got T=7 tokens, max_chunk=6"):
        kv.append(cache, 0, k, v, 7 * ONES)


def test_select_forks_requests_and_with_capacity_keeps_them():
    _, k, v = tokens(5)
    cache = feed(make(capacity=8), k, v, jnp.array([5, 2]))
    fork = kv.select(cache, jnp.array([1, 0, 1]))
    assert fork.lengths.tolist() == [2, 5, 2]
    np.testing.assert_array_equal(fork.keys[0][K : 2 * K], cache.keys[0][:K])
    wide = kv.dense.with_capacity(cache, 20)
    assert wide.capacity == 20 and wide.keys[0].shape[1] == 20
    q = tokens(1)[0]
    np.testing.assert_allclose(read(wide, q, cache.lengths - 1), read(cache, q, cache.lengths - 1), atol=1e-6)


def test_bytes_are_those_of_the_arrays_held():
    cache = make(window=4, capacity=64, slack=5)
    assert kv.num_bytes(cache) == 2 * B * K * 9 * E * 4 + 2 * 4 * B  # lengths, extents
