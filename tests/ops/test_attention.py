"""Attention equals a loop over heads, queries and keys written out in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm.ops.attention as tiles
from jaxllm.ops.attention import Reach, attention, causal_attention, heads_first


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


@pytest.mark.parametrize(
    "T, recomputed", [(tiles.MIN_BLOCK, 0), (tiles.MIN_BLOCK + 1, 2), (4 * tiles.MIN_BLOCK, 4), (1030, 4)]
)
def test_a_short_text_is_one_block_that_is_not_recomputed_and_a_long_one_at_most_four(T, recomputed):
    shapes = (jax.ShapeDtypeStruct((1, T, heads, 4), jnp.float32) for heads in (4, 2, 2))
    jaxpr = jax.make_jaxpr(functools.partial(causal_attention, scale=0.3))(*shapes)
    assert sum(eqn.primitive.name in ("checkpoint", "remat2") for eqn in jaxpr.eqns) == recomputed


@pytest.fixture
def small_tiles(monkeypatch):
    """Many of them, none of which divides what it is cut from."""
    monkeypatch.setattr(tiles, "MAX_SCORES", 0)
    monkeypatch.setattr(tiles, "TILE_SCORES", 0)
    monkeypatch.setattr(tiles, "TILE_KEYS", 19)


@pytest.mark.parametrize("window, softcap, biased", [(None, None, True), (30, 2.0, False)])
def test_tiles_give_what_whole_rows_give_and_so_do_their_gradients(small_tiles, window, softcap, biased):
    T = 45
    q, k, v = example(T, T)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2 * T)), jnp.float32)

    def bias(distance):  # [B, T, S] -> [B, H, T, S]
        return jnp.moveaxis(table.T[distance + T], -1, 1)

    rule = {"scale": 0.3, "softcap": softcap}
    at = jnp.arange(T)[None]
    mask = Reach(at, at, window=window).mask()

    def whole(q, k, v):
        added = bias(at[:, None] - at[:, :, None]) if biased else None
        return attention(q, heads_first(k), heads_first(v), mask, bias=added, **rule)

    def tiled(q, k, v):
        return causal_attention(q, k, v, window=window, bias=bias if biased else None, **rule)

    def both(f):
        return jax.jit(lambda *x: (f(*x), jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))(*x)))(q, k, v)

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), both(tiled), both(whole))


def test_one_query_is_never_cut_into_tiles():
    assert not tiles.needs_tiles(jnp.zeros((1, 1, 32, 128)), 2**25)
    assert tiles.needs_tiles(jnp.zeros((1, 2, 32, 128)), 2**25)
