"""An evicted cache attends as a dense one whose evicted rows are hidden, and their bytes are gone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.cache import repack
from jaxllm.cache.rows import dequantize, rotate_queries
from jaxllm.decoding import prefill
from jaxllm.eviction import kvzip, running_budget
from jaxllm.eviction.budget import ContextBudget, evict
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.ops.attention import attention

slow = partial(pytest.param, marks=pytest.mark.slow)

T = 40
LENGTHS = [40, 29, 33]
CONFIG = dataclasses.replace(TINY, layers=3, windows=(None, 8, None), context=128)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def contexts():
    rows = np.random.default_rng(0).integers(3, 120, (3, T)).astype(np.int32)
    return jnp.asarray(rows), jnp.asarray(LENGTHS, jnp.int32)


@pytest.fixture(scope="module")
def filled(model, contexts):
    """The model's cache of three contexts, with room for more."""

    def make(**options):
        cache = model.make_cache(3, 64, slack=16, **options)
        return jax.jit(lambda cache: model(contexts[0], cache, lengths=contexts[1])[1])(cache)

    return make


def drawn(seed=0, layers=2):
    return jnp.asarray(np.random.default_rng(seed).random((layers, 3, 2, T)), jnp.float32)


def chosen(scores, ratio, **options):
    """What stays of contexts of LENGTHS tokens."""
    there = (np.arange(T) < np.asarray(LENGTHS)[:, None])[:, None]
    s = np.where(there, np.asarray(scores), -np.inf).astype(np.float32)
    return ContextBudget(ratio=ratio, **options).keep(s, np.asarray(LENGTHS))


def shapes(cache):
    """All arrays' shapes and types: what a compilation is of."""
    return [(x.shape, x.dtype) for x in jax.tree.leaves(cache)]


def masked(model, cache, keep, tokens, lengths, ends=LENGTHS):
    """Logits over the dense cache where rows of layers without a window are hidden: the oracle."""
    hidden = ~np.pad(np.asarray(keep), [(0, 0)] * 3 + [(0, 64 - keep.shape[-1])])
    hidden &= (np.arange(64)[None] < np.asarray(ends)[:, None])[None, :, None]

    def attend(q, cache, layer, positions, lengths, *, scale, softcap=None, bias=None, sinks=None):
        assert bias is None and sinks is None  # a bias: of models whose cache cannot be evicted
        if cache.windows[layer] is not None:
            return kv.dense.attend(q, cache, layer, positions, lengths, scale=scale, softcap=softcap)
        seen = kv.dense.reach(cache, layer, positions, lengths).mask()
        outs = []
        for head in range(2):  # a key head at a time, as each hides others
            gone = jnp.asarray(hidden[layer // 2, :, head])[:, None]
            part = q.reshape(*q.shape[:2], 2, 2, -1)[:, :, head]
            keys, values = (x[layer] for x in (cache.keys, cache.values))
            part = rotate_queries(part, keys)
            k, v = (dequantize(x).reshape(3, 2, 64, -1)[:, head] for x in (keys, values))
            outs.append(attention(part, k, v, seen & ~gone, scale=scale, softcap=softcap))
        return jnp.stack(outs, axis=2).reshape(q.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "attend", attend)
        return jax.jit(lambda: model(tokens, cache, lengths=lengths))()


@pytest.mark.parametrize("bits, page", [slow(None, 2), (None, 64), slow(8, 4)])
def test_evicted_equals_masked_for_chunks_ragged_heads_and_batches(model, filled, bits, page):
    cache = filled(bits=bits)
    scores = drawn().at[0, 1, 1].set(-1.0)  # a head of request 1 keeps nothing
    keep = chosen(scores, 0.3)
    assert not keep[0, 1, 1].any()
    small = evict(cache, scores, ratio=0.3, page=page)
    forward = jax.jit(lambda cache, tokens, lengths: model(tokens, cache, lengths=lengths))
    chunk = jnp.asarray(np.random.default_rng(1).integers(3, 120, (3, 7)), jnp.int32)
    lengths = jnp.asarray([7, 4, 6], jnp.int32)
    got, small = forward(small, chunk, lengths)
    want, cache = masked(model, cache, keep, chunk, lengths)
    real = np.arange(7)[None] < np.asarray(lengths)[:, None]
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-5)
    for step in range(2):  # one token at a time, at original positions
        token = jnp.full((3, 1), 7 + step, jnp.int32)
        got, small = forward(small, token, jnp.ones(3, jnp.int32))
        want, cache = masked(model, cache, keep, token, jnp.ones(3, jnp.int32))
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(small.lengths, np.asarray(LENGTHS) + np.asarray(lengths) + 2)


@pytest.mark.slow
def test_at_ratio_one_nothing_is_lost(model, filled):
    cache = filled()
    chunk = jnp.asarray([[5, 6], [7, 8], [9, 10]])
    forward = jax.jit(lambda cache: model(chunk, cache)[0])
    np.testing.assert_allclose(forward(evict(cache, drawn(), ratio=1.0)), forward(cache), atol=1e-5)


def test_each_head_keeps_its_rows_at_their_positions_and_nothing_else_is_held(filled):
    cache = filled()
    keep = chosen(drawn(), 0.25)
    small = evict(cache, drawn(), ratio=0.25, page=4, capacity=8)
    found = repack.positions_by_head(small)
    for layer in range(2):
        for b in range(3):
            for head in range(2):
                np.testing.assert_array_equal(found[layer][b][head], np.flatnonzero(keep[layer, b, head]))
    assert [keep[:, b].sum() for b in range(3)] == [n * 4 // 4 for n in LENGTHS]  # L K n / 4
    context = small.context
    pages = context.page_head.shape[0]
    page = 2 * 4 * CONFIG.head_dim * 4  # keys and values of 4 rows, float32
    tail = 2 * (2 * 6 * 8 + 6 * 24) * CONFIG.head_dim * 4 + 3 * 3 * 4  # 8 rows, a window; 3 numbers
    table = pages * (2 * 4 + 2) * 4 + 2 * 7 * 4 + (3 + 1 + 3) * 4  # positions, scores, head, filled; the rest
    assert kv.num_bytes(small) == pages * page + tail + table
    used = sum(-(-len(rows) // 4) for layer in found for b in layer for rows in b)
    assert used == int(context.page_offsets[-1, -1]) <= pages <= keep.sum() * 17 / 16 / 4 + 2 * 3 * 2


def test_contexts_of_one_size_and_budget_share_a_compilation(model, filled):
    cache = filled()
    one, two = (evict(cache, drawn(seed), ratio=0.5, page=4) for seed in (1, 2))
    assert jax.tree.structure(one) == jax.tree.structure(two) and shapes(one) == shapes(two)


def same(one, two):
    """Whether two caches keep the same rows, bit for bit."""
    for a, b in zip(repack.positions_by_head(one), repack.positions_by_head(two), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    pools = [(c.context.keys, c.context.values, c.context.scores) for c in (one, two)]
    real = [np.arange(4) < np.asarray(c.context.page_lengths)[:, None] for c in (one, two)]
    np.testing.assert_array_equal(one.context.page_offsets, two.context.page_offsets)
    used = int(one.context.page_offsets[-1, -1])
    for x, y in zip(*map(jax.tree.leaves, pools), strict=True):
        np.testing.assert_array_equal(
            np.asarray(x)[:used][real[0][:used]], np.asarray(y)[:used][real[1][:used]]
        )


@pytest.mark.parametrize("budget", ["global", "per_head", "whole_heads"])
@pytest.mark.parametrize("bits", [slow(None), 8])
def test_evicted_twice_is_evicted_once_by_the_smaller_ratio(filled, budget, bits):
    cache, options = filled(bits=bits), {"page": 4, "prefix": 2, "budget": budget}
    scores = drawn(7)[..., :24]
    half = evict(cache, scores, ratio=0.5, **options)
    once = evict(cache, scores, ratio=0.25, **options)
    same(evict(half, ratio=0.25, budget=budget, page=4), once)
    same(evict(half, scores, ratio=0.25, **options), once)
    with pytest.raises(ValueError, match="a second budget must not want what the first has evicted, got"):
        evict(once, ratio=0.5, budget=budget)
    with pytest.raises(
        ValueError, match="of the context behind prefix=2 that was evicted before, got .* prefix=1"
    ):
        evict(once, scores, ratio=0.1, prefix=1)
    if budget != "per_head":
        with pytest.raises(ValueError, match="a second budget must not want what the first has evicted"):
            evict(once, ratio=0.5, budget=budget, strict_threshold=True)


@pytest.mark.slow
def test_a_second_eviction_leaves_what_was_asked_since(model, filled):
    cache = filled()
    small = evict(cache, drawn(), ratio=0.5, page=4)
    forward = jax.jit(lambda cache, tokens: model(tokens, cache))
    turn, then = jnp.asarray([[5, 6], [7, 8], [9, 10]]), jnp.asarray([[11], [12], [13]])
    _, asked = forward(small, turn)
    again = evict(asked, ratio=0.2, page=4)
    keep = chosen(drawn(), 0.2)
    np.testing.assert_array_equal(chosen_rows(again)[..., :T], keep)
    # the turn was read with more of the context in sight, and its rows stay so
    ones = jnp.ones(3, jnp.int32)
    _, whole = masked(model, cache, chosen(drawn(), 0.5), turn, 2 * ones)
    want, _ = masked(model, whole, keep, then, ones)
    np.testing.assert_allclose(forward(again, then)[0], want, atol=1e-5)


def test_a_request_that_reads_nothing_spoils_no_other(model, filled):
    scores = drawn().at[0, 1, 1].set(-1.0)  # a head of request 1 keeps nothing
    small = evict(filled(), scores, ratio=0.3, page=4)
    token = jnp.asarray([[5], [6], [7]])
    forward = jax.jit(lambda lengths: model(token, small, lengths=lengths)[0])
    some, every = (np.asarray(forward(jnp.asarray(n, jnp.int32))) for n in ([1, 0, 1], [1, 1, 1]))
    np.testing.assert_array_equal(some[[0, 2]], every[[0, 2]])
    assert np.isfinite(some).all()


def test_a_threshold_keeps_what_reaches_it(filled):
    small = evict(filled(), drawn(), threshold=0.8, page=4)
    for layer, rows in enumerate(repack.positions_by_head(small)):
        for b, n in enumerate(LENGTHS):
            for head in range(2):
                want = np.flatnonzero(np.asarray(drawn())[layer, b, head, :n] >= 0.8)
                np.testing.assert_array_equal(rows[b][head], want)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [slow(None), 8])
def test_a_held_budget_keeps_the_best_of_old_and_new_rows_at_their_positions(model, filled, bits):
    cache = filled(bits=bits)
    scores = drawn(8)
    small = running_budget.evict_to_budget(cache, scores, tokens=12, recent=2, sinks=1, capacity=8, page=4)
    forward = jax.jit(lambda cache, tokens, lengths: model(tokens, cache, lengths=lengths))
    chunk = jnp.asarray(np.random.default_rng(1).integers(3, 120, (3, 7)), jnp.int32)
    lengths = np.asarray([7, 4, 6], np.int32)
    _, read = forward(small, chunk, lengths)
    new = jax.random.uniform(jax.random.key(2), (2, 3, 2, 7))
    again = running_budget.evict_to_budget(read, new, tokens=12, recent=2, sinks=1, capacity=8, page=4)
    assert shapes(small) == shapes(again)  # a budget, whatever was read: one compilation
    ends = np.asarray(LENGTHS)
    held = {(i, b, h): range(n) for b, n in enumerate(ends) for i in range(2) for h in range(2)}

    def value(i, b, h, t):
        return scores[i, b, h, t] if t < LENGTHS[b] else new[i, b, h, t - LENGTHS[b]]

    for found, grown in ((small, 0), (again, lengths)):
        ends = np.asarray(LENGTHS) + grown
        for b, n in enumerate(ends):
            mine = {key: rows for key, rows in held.items() if key[1] == b}
            since = range(LENGTHS[b], n)  # nothing at first
            pairs = [(key, t) for key, rows in mine.items() for t in [*rows, *since]]
            stay = {(key, t) for key, t in pairs if t < 1 or t >= n - 2}
            rest = sorted((p for p in pairs if p not in stay), key=lambda p: (-value(*p[0], p[1]), p))
            stay |= set(rest[: 12 * 4 - len(stay)])
            for key in mine:
                held[key] = sorted(t for k, t in stay if k == key)
                np.testing.assert_array_equal(repack.positions_by_head(found)[key[0]][b][key[2]], held[key])
    keep = np.zeros((2, 3, 2, 64), bool)
    for (i, b, h), rows in held.items():
        keep[i, b, h, rows] = True
    if bits is None:  # old rows and new ones go on at their own positions
        _, whole = masked(model, cache, chosen_rows(small), chunk, jnp.asarray(lengths))
        got, _ = forward(again, jnp.full((3, 1), 7), jnp.ones(3, jnp.int32))
        want, _ = masked(model, whole, keep, jnp.full((3, 1), 7), jnp.ones(3, jnp.int32), ends)
        np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(
        ValueError, match="evict_to_budget: tokens must be more than sinks and recent together"
    ):
        running_budget.evict_to_budget(cache, scores, tokens=3, recent=2, sinks=1)
    with pytest.raises(ValueError, match=r"evict_to_budget: scores must be \[L, B, K, S\] of"):
        running_budget.evict_to_budget(cache, scores[..., :20], tokens=12)
    with pytest.raises(ValueError, match="evict_to_budget: scores must be finite"):
        running_budget.evict_to_budget(cache, scores.at[0, 0, 0, 3].set(jnp.inf), tokens=12)
    protected = evict(cache, scores[..., 20:], ratio=0.5, prefix=20)
    with pytest.raises(
        ValueError, match="tokens must be at least the 2[0-9] a head that always stay, got tokens=12"
    ):
        running_budget.evict_to_budget(protected, jnp.zeros((2, 3, 2, 0)), tokens=12)


def chosen_rows(small):
    """What a cache keeps of its context, as a mask over 64 rows."""
    keep = np.zeros((2, 3, 2, 64), bool)
    for i, layer in enumerate(repack.positions_by_head(small)):
        for b, request in enumerate(layer):
            for h, rows in enumerate(request):
                keep[i, b, h, rows] = True
    return keep


@pytest.mark.slow
def test_questions_share_a_context_and_do_not_see_each_other(model, filled):
    small = evict(filled(), drawn(), ratio=0.3, page=4)
    prompts = [[5, 6, 7], [9], [11, 12], [5, 6, 7]]
    one = jl.generate(model, None, prompts, max_new_tokens=5, cache=kv.select(small, jnp.asarray([1] * 4)))
    alone = [
        jl.generate(model, None, [p], max_new_tokens=5, cache=kv.select(small, jnp.asarray([1])))[0]
        for p in prompts
    ]
    assert [o.token_ids for o in one] == [o.token_ids for o in alone]
    assert one[0].token_ids == one[3].token_ids
    mixed = kv.select(small, jnp.asarray([2, 1, 1, 0]))
    assert mixed.context.keys is small.context.keys  # nothing is copied
    both = jl.generate(model, None, prompts, max_new_tokens=5, cache=mixed)
    assert both[1].token_ids == alone[1].token_ids and both[2].token_ids == alone[2].token_ids


@pytest.mark.slow
def test_rows_of_later_turns_survive_a_question_that_is_taken_back(model, filled):
    small = evict(filled(), drawn(), ratio=0.3, page=4)
    forward = jax.jit(lambda cache, tokens: model(tokens, cache))
    turn = jnp.asarray([[5, 6], [7, 8], [9, 10]])
    question, other = jnp.asarray([[11], [12], [13]]), jnp.asarray([[14], [15], [16]])
    _, after = forward(small, turn)
    want, _ = forward(after, question)
    _, asked = forward(after, other)
    got, _ = forward(kv.truncate(asked, after.lengths), question)
    np.testing.assert_array_equal(got, want)
    back = kv.truncate(asked, jnp.zeros(3, jnp.int32))  # the context cannot be taken back
    np.testing.assert_array_equal(back.lengths, small.lengths)


def test_what_is_written_may_be_given_away_and_the_cache_it_came_from_stays(model, filled):
    cache = filled()
    small = evict(cache, drawn(), ratio=0.3)

    def step(context, tail):
        return kv.split_context(model(jnp.full((3, 1), 5), kv.with_context(context, tail))[1])[1]

    context, tail = kv.split_context(small)
    tail = jax.jit(step, donate_argnums=1)(context, tail)
    np.testing.assert_array_equal(tail.lengths, cache.lengths + 1)
    assert not any(x.is_deleted() for x in jax.tree.leaves((context, cache)))


@pytest.mark.slow
def test_a_longer_answer_than_there_is_room_for_is_given_room(model, filled):
    small = evict(filled(), drawn(), ratio=0.3, capacity=8)
    out = jl.generate(model, None, [[5], [6], [7]], max_new_tokens=30, cache=small)
    assert all(len(o.token_ids) == 30 for o in out)


# -- which rows stay


def test_the_number_kept_is_exact_and_smaller_budgets_are_nested():
    scores = jnp.round(drawn(3) * 8) / 8  # many are equal
    before = None
    for ratio in (0.05, 0.1, 0.3, 0.5, 0.99, 1.0):
        keep = chosen(scores, ratio)
        assert [int(keep[:, b].sum()) for b in range(3)] == [
            max(1, int(ratio * 4 * n + 1e-6)) for n in LENGTHS
        ]
        assert before is None or (keep | ~before).all()
        before = keep
    one = chosen(scores, 0.3)[:, 0].reshape(-1)
    order = np.argsort(-np.asarray(scores)[:, 0].reshape(-1), kind="stable")
    np.testing.assert_array_equal(np.flatnonzero(one), np.sort(order[: one.sum()]))


def test_budgets_spread_as_they_say():
    scores, lengths = drawn(4), np.asarray(LENGTHS)
    uniform = chosen(scores, 0.3, rule="per_head")
    assert (uniform.sum(-1) == [[[int(0.3 * n)] * 2 for n in LENGTHS]] * 2).all()
    heads = chosen(scores, 0.5, rule="whole_heads")
    greatest = np.where(np.arange(T) < lengths[:, None, None], scores, -1).max(-1)
    for b, n in enumerate(LENGTHS):
        assert sorted(heads[:, b].sum(-1).ravel()) == [0, 0, n, n]
        whole = heads[:, b].all(-1) | (heads[:, b].sum(-1) == n)
        assert greatest[:, b][whole].min() > greatest[:, b][~whole].max()
    poor = scores.at[1, :, 0].add(-2.0)
    assert not chosen(poor, 0.3)[1, :, 0].any()
    safe = chosen(poor, 0.3, safeguard=0.5)
    assert (safe[1, :, 0].sum(-1) == [int(0.15 * n) for n in LENGTHS]).all()
    assert [safe[:, b].sum() for b in range(3)] == [int(1.2 * n) for n in LENGTHS]


def test_the_strict_threshold_keeps_one_less():
    scores = drawn(5)
    ours, strict = chosen(scores, 0.3), chosen(scores, 0.3, strict_threshold=True)
    for b, n in enumerate(LENGTHS):
        flat = np.sort(np.asarray(scores)[:, b, :, :n].ravel())[::-1]
        threshold = flat[max(int(len(flat) * 0.3) - 1, 0)]
        want = np.asarray(scores)[:, b] > threshold
        want[..., n:] = False
        np.testing.assert_array_equal(strict[:, b], want)
        assert strict[:, b].sum() == ours[:, b].sum() - 1 and (ours[:, b] | ~strict[:, b]).all()


def test_prefix_and_what_follows_the_context_always_stay(filled):
    cache = filled()
    scores = drawn(6)[..., :20]
    small = evict(cache, scores, ratio=0.1, prefix=4, page=4)
    for layer in repack.positions_by_head(small):
        for b, request in enumerate(layer):
            for rows in request:
                assert set(range(4)) <= set(rows) and set(range(24, LENGTHS[b])) <= set(rows)
                assert len(rows) < LENGTHS[b]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ratio": 0.0}, "ratio must lie above 0 and be at most 1, got 0.0"),
        ({"ratio": 1.5}, "at most 1, got 1.5"),
        ({}, "exactly one of ratio, tokens and threshold"),
        ({"threshold": 0.5, "budget": "whole_heads"}, "a threshold must be all of a budget"),
        ({"threshold": float("-inf")}, "a threshold must be a finite number, got -inf"),
        ({"ratio": 0.5, "page": 0}, "capacity and page must be at least 1, got capacity=64, page=0"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"ratio": 0.5, "prefix": 30}, r"within the \[40, 29, 33\] tokens held, got prefix=30, T=40"),
        ({"ratio": 0.5, "safeguard": 2.0}, "safeguard must be 0 to 1"),
        ({"ratio": 0.5, "safeguard": 0.5, "budget": "whole_heads"}, "safeguard must go with the plain"),
        ({"ratio": 0.5, "strict_threshold": True, "budget": "per_head"}, "strict_threshold must go with"),
    ],
)
def test_wrong_use_is_one_line(filled, change, message):
    with pytest.raises(ValueError, match=message):
        evict(filled(), drawn(), **change)


def test_scores_of_another_cache_or_not_numbers_or_none_are_refused(filled):
    cache = filled()
    with pytest.raises(ValueError, match=r"scores must be \[L, B, K, T\] = \(2, 3, 2, 'T'\) of this cache"):
        evict(cache, drawn(layers=3), ratio=0.5)
    with pytest.raises(ValueError, match="scores must be finite"):
        evict(cache, drawn().at[0, 0, 0, 0].set(jnp.nan), ratio=0.5)
    with pytest.raises(ValueError, match="scores must be given for a cache that was not evicted"):
        evict(cache, ratio=0.5)


@pytest.mark.slow
def test_a_tensor_parallel_model_evicts_and_answers_as_one_device_does():
    config = dataclasses.replace(CONFIG, width=64, heads=8, kv_heads=4, context=256)
    model = Decoder(config, rngs=nnx.Rngs(0))
    split = jl.shard(model, jl.make_mesh(data=2, model=4))
    rows = [list(range(3, 43)), [5, 9, 2, 7] * 8]
    outs = []
    for one in (model, split):
        cache = prefill.prefill(one, rows, slack=64)
        scores = kvzip.kvzip_scores(one, cache, rows)
        small = evict(cache, scores, ratio=0.3)
        answers = jl.generate(one, None, [[8], [9]], max_new_tokens=6, cache=small)
        outs.append((np.asarray(scores), [o.token_ids for o in answers]))
    np.testing.assert_allclose(outs[0][0], outs[1][0], atol=1e-5)
    assert outs[0][1] == outs[1][1]
