"""KVzip's scores are the greatest attention that keys receive while their context is repeated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.decoding import prefill
from jaxllm.eviction import kvzip
from jaxllm.eviction.budget import evict
from jaxllm.eviction.kvzip import RepeatPrompt, kvzip_scores
from jaxllm.models import gpt
from jaxllm.models.decoder import TINY, Decoder
from pallas_kernels.kvzip_score import attention_per_key

CONFIG = dataclasses.replace(TINY, layers=3, windows=(None, 8, None), context=256)
ROWS = [list(range(3, 43)), [5, 9, 2, 7] * 8]
REPLAY = RepeatPrompt(first=(100, 101), later=(102,), bridge=(103,), seed=4)
PREFIX = [90, 91, 92]


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def filled(model, rows=ROWS, prefix=PREFIX, **options):
    cache = model.make_cache(len(rows), 64, slack=64, **options)
    whole = [prefix + row for row in rows]
    tokens = np.zeros((len(rows), max(map(len, whole))), np.int32)
    for i, row in enumerate(whole):
        tokens[i, : len(row)] = row
    lengths = jnp.asarray([*map(len, whole)], jnp.int32)
    return jax.jit(lambda cache: model(jnp.asarray(tokens), cache, lengths=lengths)[1])(cache)


@jax.jit
def one_pass(model, tokens):
    """What the layers show of tokens without a cache."""
    seen = {}

    def tap(name, x):
        seen[name] = x
        return x

    model(tokens, tap=tap)
    return seen


def looked_at(model, row, fed, keys_at):
    """Queries and keys of each layer of one pass over prefix + row + fed, no cache: the oracle."""
    n, every = len(PREFIX) + len(row), len(PREFIX) + len(row) + len(fed)
    tokens = jnp.asarray([PREFIX + row + fed + [0] * (128 - every)])  # filled up: later tokens change nothing
    seen = {name: x[:, :every] for name, x in one_pass(model, tokens).items()}
    found = []
    for layer in (0, 2):
        at = f"layers.{layer}.attention."
        q, k, v = (np.asarray(seen[at + what][0], np.float64) for what in ("queries", "keys", "values"))
        h = np.asarray(seen[at + "q.in"][0], np.float64)
        weights = np.zeros((2, 2, len(fed), n + len(fed)))
        for head in range(2):
            for g in range(2):
                scores = q[n:, 2 * head + g] @ k[:, head].T * CONFIG.head_dim**-0.5
                hidden = np.arange(n + len(fed))[None] > n + np.arange(len(fed))[:, None]
                if keys_at is not None:
                    hidden |= (np.arange(n + len(fed)) >= len(PREFIX)) & ~np.isin(
                        np.arange(n + len(fed)), [*keys_at, *range(n, n + len(fed))]
                    )
                scores[hidden] = -np.inf
                weights[head, g] = np.exp(scores - scores.max(-1, keepdims=True))
                weights[head, g] /= weights[head, g].sum(-1, keepdims=True)
        found.append((weights, v, h[n:]))
    return found


def test_one_chunk_is_the_greatest_weight_of_the_whole_softmax(model):
    got = np.asarray(kvzip_scores(model, filled(model), ROWS, replay=REPLAY, prefix=3, chunk=64))
    assert got.shape == (2, 2, 2, 40)
    for b, row in enumerate(ROWS):
        for layer, (weights, _, _) in enumerate(looked_at(model, row, [100, 101, 103, *row], None)):
            want = weights.max((1, 2))[:, 3 : 3 + len(row)]
            np.testing.assert_allclose(got[layer, b, :, : len(row)], want, rtol=1e-4, atol=1e-6)
            assert (got[layer, b, :, len(row) :] == 0).all()


@pytest.mark.slow
def test_contexts_of_about_one_length_share_a_compilation(model):
    size = kvzip.score_chunk._cache_size()
    for n in (126, 128):  # in chunks: twice their length does not fit
        row = [5 + i % 80 for i in range(n)]
        kvzip_scores(model, prefill.prefill(model, [row], slack=128), [row])
    assert kvzip.score_chunk._cache_size() == size + 1


def test_a_context_that_can_be_repeated_whole_is_repeated_whole(model):
    row = [5 + i % 80 for i in range(124)]  # 124 + 124 + 8 of a seed: just the model's context
    cache = prefill.prefill(model, [row], slack=128)
    whole = kvzip_scores(model, cache, [row], chunk=124)
    np.testing.assert_array_equal(kvzip_scores(model, cache, [row]), whole)
    assert (np.asarray(kvzip_scores(model, cache, [row], chunk=64)) != whole).any()


def test_positions_past_the_context_are_warned_of_and_score_as_a_model_of_a_longer_context(model):
    short = Decoder(dataclasses.replace(CONFIG, context=64), rngs=nnx.Rngs(0))  # the same weights
    cache, options = filled(model), {"replay": REPLAY, "prefix": 3, "chunk": 64}
    with pytest.raises(ValueError, match=r"context of 64, got 43 \+ 46 tokens; .*past_context=True"):
        kvzip_scores(short, cache, ROWS, **options)
    with pytest.warns(UserWarning, match=r"past the model's context of 64, to 43 \+ 46 tokens"):
        past = kvzip_scores(short, cache, ROWS, past_context=True, **options)
    np.testing.assert_array_equal(past, kvzip_scores(model, cache, ROWS, **options))
    learned = gpt.Gpt(dataclasses.replace(gpt.TINY, context=64), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="past_context must be False without rotary positions, got a Gpt"):
        kvzip_scores(learned, filled(learned), ROWS, past_context=True, **options)


def test_chunks_look_at_their_own_keys_and_never_score_less_than_the_whole_softmax(model):
    cache = filled(model)
    got = np.asarray(kvzip_scores(model, cache, ROWS, replay=REPLAY, prefix=3, chunk=16))
    for b, row in enumerate(ROWS):
        for at in range(0, len(row), 16):
            part = row[at : at + 16]
            fed = [100, 101, 103, *part] if at == 0 else [102, *row[at - 4 : at], 103, *part]
            own = range(3 + at, 3 + at + len(part))
            some, whole = looked_at(model, row, fed, own), looked_at(model, row, fed, None)
            for layer in range(2):
                want = some[layer][0].max((1, 2))[:, 3 + at : 3 + at + len(part)]
                here = got[layer, b, :, at : at + len(part)]
                np.testing.assert_allclose(here, want, rtol=1e-4, atol=1e-6)
                assert (here >= whole[layer][0].max((1, 2))[:, 3 + at : 3 + at + len(part)] - 1e-6).all()


def test_output_aware_scores_weigh_by_how_far_a_value_moves_the_output(model):
    cache = filled(model)
    got = np.asarray(kvzip_scores(model, cache, ROWS, replay=REPLAY, prefix=3, chunk=64, output_aware=True))
    for layer, (weights, v, h) in enumerate(looked_at(model, ROWS[0], [100, 101, 103, *ROWS[0]], None)):
        rows = np.asarray(model.layers[2 * layer].attention.o.w.get_value().rows, np.float64)
        parts = rows.reshape(rows.shape[0], 2, 2, -1)
        want = np.zeros((2, 40))
        for head in range(2):
            for g in range(2):
                moved = np.linalg.norm(v[3:43, head] @ parts[:, head, g].T, axis=1)
                share = (weights[head, g, :, 3:43] / np.linalg.norm(h, axis=1)[:, None]).max(0)
                want[head] = np.maximum(want[head], share * moved)
        np.testing.assert_allclose(got[layer, 0], want, rtol=1e-3)


@pytest.mark.slow
def test_scoring_leaves_the_cache_as_it_was_and_knows_caches_in_codes(model):
    cache = filled(model)
    before = jax.tree.map(np.array, cache)
    plain = kvzip_scores(model, cache, ROWS, replay=REPLAY, prefix=3, chunk=64)
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    coded = kvzip_scores(model, filled(model, bits=8), ROWS, replay=REPLAY, prefix=3, chunk=64)
    np.testing.assert_allclose(coded, plain, atol=0.02)
    small = evict(cache, plain, ratio=0.3, prefix=3)
    forward = jax.jit(lambda cache: model(jnp.asarray([[8], [9]]), cache)[0])
    assert np.isfinite(forward(small)).all()


def test_another_model_family_is_scored_too():
    model = gpt.Gpt(dataclasses.replace(gpt.TINY, context=128), rngs=nnx.Rngs(0))
    cache = filled(model, prefix=[])
    got = kvzip_scores(model, cache, ROWS, replay=REPLAY)
    assert got.shape[0] == len(model.layers) and float(got.max()) <= 1.0 and float(got[:, 0].min()) > 0


@pytest.mark.slow
def test_many_queries_at_once_give_what_all_of_them_give(monkeypatch):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 11, 4, 8), (4, 16, 8)))
    seen = jnp.asarray(rng.random((2, 11, 16)) < 0.6).at[0, 3].set(False)
    seen &= (jnp.arange(16)[None] <= 5 + jnp.arange(11)[:, None])[None]  # the last 11 are the queries' own
    share = jnp.asarray(rng.random((2, 11)), jnp.float32)
    for reduce in ("max", "sum"):
        whole = attention_per_key(q, k, seen, scale=0.3, share=share, reduce=reduce)
        monkeypatch.setattr("pallas_kernels.kvzip_score.reference.MIN_QUERIES", 4)
        some = attention_per_key(q, k, seen, scale=0.3, share=share, reduce=reduce)
        monkeypatch.undo()
        np.testing.assert_allclose(some, whole, atol=1e-6)
        other = q[:, :, jnp.asarray([1, 0, 3, 2])]
        turned = attention_per_key(other, k, seen, scale=0.3, share=share, reduce=reduce)
        np.testing.assert_allclose(turned, whole[:, :, ::-1], atol=1e-6)  # the order of a group's queries


def test_prompts_are_the_published_ones():
    class Letters:
        chat_template = None

        def encode(self, text, add_special_tokens):
            return [ord(c) for c in text]

    replay = RepeatPrompt.from_tokenizer(Letters())

    def text(ids):
        return "".join(map(chr, ids))

    assert text(replay.before(None)) == "\n\nRepeat the previous context exactly.\n"
    last = np.asarray([ord(c) for c in "abcdefgh"])
    assert text(replay.before(last)) == (
        "\n\nRepeat the part of the previous context exactly, starting with abcdefgh\n"
    )


def test_wrong_contexts_and_repetitions_that_do_not_fit_are_one_line(model):
    cache = filled(model)

    def score(rows, **options):
        return kvzip_scores(model, cache, rows, **({"replay": REPLAY, "prefix": 3, "chunk": 64} | options))

    with pytest.raises(ValueError, match=r"must be what the cache holds behind prefix=3, got \[39, 32\]"):
        score([ROWS[0][:-1], ROWS[1]])
    other = [*ROWS[1][:20], 77, *ROWS[1][21:]]
    with pytest.raises(ValueError, match="must be what the cache holds, got another token 20 of request 1"):
        score([ROWS[0], other])
    with pytest.raises(ValueError, match="chunk must be at least 16 tokens, got chunk=4"):
        score(ROWS, chunk=4)
    with pytest.raises(ValueError, match=r"must fit the model's context of 256, got 43 \+ 343 tokens"):
        score(ROWS, replay=RepeatPrompt(first=(1,) * 303))
    evicted = evict(cache, jnp.ones((2, 2, 2, 40)), ratio=0.5, prefix=3)
    with pytest.raises(ValueError, match="must hold every token, got a PagedCache of some"):
        kvzip_scores(model, evicted, ROWS, prefix=3)
