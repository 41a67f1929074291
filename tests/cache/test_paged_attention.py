"""Attention over pages is what `attend_reference` says: one softmax over each head's rows, gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import cache as kv
from jaxllm.cache import dense, paged
from jaxllm.eviction.budget import evict
from pallas_kernels.decode_attention import reference as walk

E, CONTEXT, ROOM = 8, 30, 16
LENGTHS = [30, 17, 24]
append = jax.jit(kv.append, static_argnums=1)
attend = jax.jit(kv.attend, static_argnums=2, static_argnames="scale")


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(K, bits=None, windows=(None, 6, None)):
    """A dense cache of three contexts, ragged."""
    sizes = {"kv_heads": K, "head_dim": E, "capacity": CONTEXT + ROOM, "slack": ROOM}
    cache = dense.make(3, windows=windows, dtype=jnp.float32, bits=bits, **sizes)
    return written(cache, K, CONTEXT, LENGTHS, seed=0)


def written(cache, K, T, lengths, seed):
    """The cache with a chunk in each layer, advanced."""
    lengths = jnp.asarray(lengths, jnp.int32)
    chunks = [
        [random((len(lengths), T, K, E), (seed, layer, i)) for i in range(2)]
        for layer in range(len(cache.windows))
    ]
    return append_all(cache, chunks, lengths)


@jax.jit
def append_all(cache, chunks, lengths):
    for layer, (k, v) in enumerate(chunks):
        cache = kv.append(cache, layer, k, v, lengths)
    return kv.advance(cache, lengths)


def evicted(cache, K, empty=()):
    """A third of the rows, and nothing of some heads (layer, context, head)."""
    scores = np.random.default_rng(1).random((2, 3, K, CONTEXT)).astype(np.float32)
    for head in empty:
        scores[head] = 0
    return evict(cache, jnp.asarray(scores), threshold=0.66, capacity=ROOM, page=4)


def both(q, cache, layer, T, lengths, **rule):
    """What `attend` reads behind a chunk that was appended and not counted yet, and what it should."""
    lengths = jnp.asarray(lengths, jnp.int32)
    positions = cache.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    real = np.arange(T) < np.asarray(lengths)[:, None]

    @jax.jit
    def run(q, cache):
        ways = kv.attend, paged.attend_reference
        return [way(q, cache, layer, positions, lengths, **rule) for way in ways]

    return [np.asarray(x)[real] for x in run(q, cache)]


@pytest.mark.parametrize(
    "K, G, T, bits, softcap",
    [
        pytest.param(2, 2, 1, None, None, marks=pytest.mark.slow),
        (2, 1, 5, None, 1.5),
        (1, 4, 3, 8, None),
        (2, 2, 4, 4, 2.0),
        pytest.param(24, 1, 1, None, None, marks=pytest.mark.slow),
        (3, 12, ROOM, None, None),  # more queries than a tile takes
    ],
)
def test_attending_equals_the_reference(K, G, T, bits, softcap):
    cache = evicted(filled(K, bits), K, empty=[np.s_[0, 1, 0], np.s_[1, 2], np.s_[1, 0, K - 1]])
    lengths = [T, max(1, T - 2), T]
    layer = 2  # the context's second: pages of another come before
    k, v = (random((3, T, K, E), (2, i)) for i in range(2))
    seen = append(cache, layer, k, v, jnp.asarray(lengths, jnp.int32))
    q = random((3, T, K * G, E), 3)
    np.testing.assert_allclose(*both(q, seen, layer, T, lengths, scale=0.4, softcap=softcap), atol=2e-6)


def test_requests_that_share_contexts_each_read_their_own():
    small = evicted(filled(2), 2, empty=[np.s_[0, 1, 0]])
    shared = kv.select(small, jnp.asarray([1, 1, 0, 1, 0]))  # three read one, none the last
    shared = written(shared, 2, 3, [3, 1, 2, 3, 0], seed=4)
    T, lengths = 2, [2, 2, 1, 2, 2]
    k, v = (random((5, T, 2, E), (5, i)) for i in range(2))
    shared = append(shared, 0, k, v, jnp.asarray(lengths, jnp.int32))
    np.testing.assert_allclose(*both(random((5, T, 4, E), 6), shared, 0, T, lengths, scale=0.4), atol=2e-6)


def test_a_mask_hides_rows_of_the_tail_and_none_of_the_context():
    small = evicted(filled(2), 2)
    T = 3
    k, v = (random((3, T, 2, E), (7, i)) for i in range(2))
    small = append(small, 2, k, v, jnp.full(3, T, jnp.int32))
    mask = jnp.asarray(np.random.default_rng(8).random((3, T, ROOM)) < 0.5)
    got, want = both(random((3, T, 4, E), 9), small, 2, T, [T] * 3, scale=0.4, mask=mask)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_layer_with_a_window_is_read_as_before_eviction():
    whole = filled(2)
    T, lengths = 4, jnp.asarray([4, 2, 3], jnp.int32)
    positions = whole.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    q, k, v = (random((3, T, n, E), (10, i)) for i, n in enumerate((4, 2, 2)))
    got, want = (
        kv.attend(q, append(cache, 1, k, v, lengths), 1, positions, lengths, scale=0.4)
        for cache in (evicted(whole, 2), whole)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("B, K, T", [(6, 16, 1), (1, 24, 100)])
def test_many_heads_of_which_most_have_nothing_are_read_as_they_are(B, K, T):
    rng, rows = np.random.default_rng(0), 40
    sizes = {"kv_heads": K, "head_dim": E, "capacity": rows, "slack": 0}
    cache = kv.dense.make(B, windows=(None,), dtype=jnp.float32, **sizes)
    k, v = (jnp.asarray(rng.normal(size=(B, rows, K, E)), jnp.float32) for _ in range(2))
    n = jnp.full(B, rows, jnp.int32)
    cache = kv.advance(append(cache, 0, k, v, n), n)
    keep = rng.random((1, B, K, rows)) < 0.3
    keep.reshape(B * K, rows)[3 : B * K - 9] = False  # nearly all heads
    keep.reshape(B * K, rows)[B * K // 2] = True
    small = evict(cache, jnp.asarray(keep, jnp.float32), threshold=0.5, capacity=T, page=2)
    most = max(walk.MIN_PAGES, min(walk.MAX_PAGES, walk.MAX_QUERIES // T))  # pages of a tile
    assert small.context.page_offsets.shape[1] - 1 > most
    q, new, more = (jnp.asarray(rng.normal(size=(B, T, K, E)), jnp.float32) for _ in range(3))
    one = jnp.full(B, T, jnp.int32)
    small = append(small, 0, new, more, one)
    positions = jnp.broadcast_to(rows + jnp.arange(T, dtype=jnp.int32), (B, T))
    got = np.asarray(attend(q, small, 0, positions, one, scale=0.5))
    for b in range(B):
        for h in range(K):
            kept = np.flatnonzero(keep[0, b, h])
            keys = np.concatenate([np.asarray(k)[b, kept, h], np.asarray(new)[b, :, h]])
            values = np.concatenate([np.asarray(v)[b, kept, h], np.asarray(more)[b, :, h]])
            scores = np.asarray(q)[b, :, h] @ keys.T * 0.5
            scores[:, len(kept) :][~np.tri(T, dtype=bool)] = -np.inf
            e = np.exp(scores - scores.max(-1, keepdims=True))
            np.testing.assert_allclose(got[b, :, h], e @ values / e.sum(-1, keepdims=True), atol=1e-5)
