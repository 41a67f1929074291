"""Rows in codes: how near they are, what they weigh, and that a cache of them is still a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.cache.coded import QuantizedRows
from jaxllm.decoding import run
from jaxllm.models import decoder, gpt, t5
from jaxllm.models.decoder import TINY, Decoder

B, K, H, E = 2, 2, 4, 16
ONES = jnp.ones((B,), jnp.int32)


def rows(shape, **options):
    return QuantizedRows.zeros(shape, **{"bits": 4, "rotated": False, "dtype": jnp.float32} | options)


def groups_of(x, group_size):
    """x cut into groups along its last axis, the last filled up."""
    more = -x.shape[-1] % group_size
    return np.pad(x, ((0, 0), (0, 0), (0, more)), mode="edge").reshape(*x.shape[:2], -1, group_size)


@pytest.mark.parametrize(
    "bits, size, group_size", [(2, 64, 64), (4, 64, 64), (8, 64, 64), (4, 40, 16), (4, 7, 7)]
)
def test_no_number_is_off_by_more_than_half_a_scale(bits, size, group_size):
    x = np.asarray(jax.random.normal(jax.random.key(size), (5, size)))
    x = np.stack([x, x * 1e-6, x * 5e3, 0 * x + 0.3, x + 100])  # plain, tiny, great, constant, far from 0
    like = rows(x.shape, bits=bits, group_size=group_size)
    held = jax.jit(lambda x: like.quantize(x).dequantize())(x)
    g = groups_of(x, group_size)
    span = g.max(-1) - g.min(-1) + np.abs(g.min(-1)) * 2.0**-9  # low is rounded down by this at most
    scale = np.maximum(span / (2**bits - 1) * (1 + 2.0**-9), 2.0**-14)
    error = groups_of(np.abs(np.asarray(held) - x), group_size)
    assert (error <= scale[..., None] / 2 * (1 + 1e-3) + np.abs(g) * 1e-6).all()


def test_numbers_beyond_what_16_bits_hold_are_cut_off_and_nan_stays():
    x = jnp.array([[[1e6, -1e6, 0.0, 5.0], [jnp.nan, 1.0, 2.0, 3.0]]])
    got = rows((1, 2, 4), bits=8).quantize(x).dequantize()
    np.testing.assert_allclose(got[0, 0], [32000, -32000, 0, 0], atol=140)
    assert jnp.isnan(got[0, 1]).any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_is_its_grid_and_then_its_codes_lowest_first(bits):
    top = 2**bits - 1
    codes = np.arange(32) % (top + 1)
    codes[:2] = 0, top  # the grid is then known
    held = rows((1, 1, 32), bits=bits).quantize(jnp.asarray(codes, jnp.float32)[None, None])
    words = np.asarray(held.words)[0, 0]
    assert len(words) == 1 + bits
    assert words[0] & 0xFFFF == 0  # low is 0.0
    scale = np.asarray([words[0] >> 16], np.uint16).view(np.float16)[0]
    assert 1 <= scale <= 1.002
    got = [int(word) >> at & top for word in words[1:] for at in range(0, 32, bits)]
    assert got == codes.tolist()


@pytest.mark.parametrize(
    "bits, size, group_size, want", [(4, 64, None, 4.5), (8, 64, None, 8.5), (4, 128, 64, 4.5)]
)
def test_bits_a_number_are_those_of_codes_and_grids(bits, size, group_size, want):
    cache = kv.dense.make(
        3, windows=(None, 4), kv_heads=2, head_dim=size, capacity=20, slack=1,
        dtype=jnp.bfloat16, bits=bits, group_size=group_size,
    )  # fmt: skip
    numbers = 2 * 3 * 2 * (20 + 5) * size
    assert kv.num_bytes(cache) == numbers * want / 8 + 2 * 4 * 3  # lengths, extents


@pytest.mark.parametrize("bits, group_size, size", [(3, None, 8), (16, None, 8), (4, 9, 8), (4, 0, 8)])
def test_rows_that_cannot_be_are_refused_in_one_line(bits, group_size, size):
    with pytest.raises(
        ValueError, match="cache: bits must be 2, 4 or 8, group_size 1 to head_dim, got bits="
    ):
        rows((1, 1, size), bits=bits, group_size=group_size)


def test_rotated_keys_score_as_the_keys_themselves():
    keys = jax.random.split(jax.random.key(0), 2)
    q, k = (jax.random.normal(key, (3, 7, E)) for key in keys)
    held = rows((3, 7, E), bits=8, rotated=True).quantize(k)
    got = jnp.einsum("jtd,jsd->jts", held.rotate_queries(q), held.dequantize())
    plain = held.round_trip(k)
    np.testing.assert_allclose(got, jnp.einsum("jtd,jsd->jts", q, plain), atol=1e-5)
    np.testing.assert_allclose(got, jnp.einsum("jtd,jsd->jts", q, k), atol=0.2)


def test_rotation_saves_keys_with_one_great_channel():
    k = jax.random.normal(jax.random.key(0), (4, 50, 64)).at[..., 5].multiply(30.0)
    error = [
        float(jnp.abs(rows(k.shape, rotated=rotated).round_trip(k) - k)[..., 6:].mean())
        for rotated in (False, True)
    ]
    assert error[1] < 0.5 * error[0]


# -- a cache of them


def tokens(T, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, E)), jnp.float32) for n in (H, K, K))


def make(window=None, size=32, slack=0, **options):
    options = {"bits": 4, "dtype": jnp.float32} | options
    return kv.dense.make(B, windows=(window,), kv_heads=K, head_dim=E, capacity=size, slack=slack, **options)


append = jax.jit(kv.append, static_argnums=1)


@jax.jit
def feed(cache, k, v, lengths):
    return kv.advance(kv.append(cache, 0, k, v, lengths), lengths)


@jax.jit
def read(cache, q, positions):
    return kv.attend(q, kv.truncate(cache, positions), 0, positions[:, None], ONES, scale=0.3)


@pytest.mark.parametrize("window, slack", [(None, 0), (4, 6)])
def test_attending_reads_what_a_plain_cache_of_the_numbers_read_back_would(window, slack):
    _, k, v = tokens(20)
    coded, plain = make(window, slack=slack), make(window, slack=slack, bits=None)
    near = jax.jit(kv.round_trip, static_argnums=1)(coded, 0, k, v)
    assert all(x is y for x, y in zip(kv.round_trip(plain, 0, k, v), (k, v), strict=True))
    for cut in (slice(0, 9), slice(9, 14), slice(14, 19), slice(19, 20)):
        n = jnp.array([cut.stop - cut.start, 1])  # ragged
        coded, plain = feed(coded, k[:, cut], v[:, cut], n), feed(plain, *(x[:, cut] for x in near), n)
        q = tokens(1, seed=cut.start)[0]
        at = coded.lengths - 1
        np.testing.assert_allclose(read(coded, q, at), read(plain, q, at), atol=1e-5)


def test_truncate_select_and_with_capacity_keep_rows_bit_for_bit():
    _, k, v = tokens(9)
    cache = feed(make(size=12), k, v, jnp.array([9, 5]))
    fork = kv.select(cache, jnp.array([1, 0, 1]))
    assert fork.lengths.tolist() == [5, 9, 5]
    np.testing.assert_array_equal(fork.keys[0].words[K : 2 * K], cache.keys[0].words[:K])
    wide = kv.dense.with_capacity(cache, 20)
    assert wide.keys[0].shape == (B * K, 20, E) and wide.capacity == 20
    np.testing.assert_array_equal(wide.values[0].words[:, :12], cache.values[0].words)
    again = append(kv.truncate(cache, 4 * ONES), 0, k[:, 4:5], v[:, 4:5], ONES)
    np.testing.assert_array_equal(again.keys[0].words[:, 4], cache.keys[0].words[:, 4])  # rows stand alone


def test_a_cache_survives_trees_jit_and_donation():
    _, k, v = tokens(3)
    cache = feed(make(), k, v, 3 * ONES)
    same = jax.tree.map(lambda x: x, cache)
    assert jax.tree.structure(same) == jax.tree.structure(cache)
    assert jax.tree.map(lambda _: None, cache) is not None
    want = append(cache, 0, k, v, 3 * ONES)
    step = jax.jit(lambda cache: kv.append(cache, 0, k, v, 3 * ONES), donate_argnums=0)
    got = step(jax.tree.map(jnp.copy, cache))
    jax.tree.map(np.testing.assert_array_equal, got, want)


# -- models


CONFIGS = {
    "full": dataclasses.replace(TINY, head_dim=16),
    "windows": dataclasses.replace(TINY, head_dim=16, windows=(4, None), qk_norm=True),
}


@pytest.fixture(scope="module")
def models():
    return {name: Decoder(config, rngs=nnx.Rngs(3)) for name, config in CONFIGS.items()}


def assert_same_but_for_rounding(got, want, plain):
    """Sums in another order may tip one number, or one float16 of a grid, to its neighbour: never many."""
    assert float(jnp.abs(got - want).mean()) < 0.1 * float(jnp.abs(plain - want).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name, bits", [("full", 8), pytest.param("windows", 4, marks=pytest.mark.slow)])
def test_chunks_tokens_and_the_whole_text_give_the_same_logits(models, name, bits):
    model = models[name]
    text = jax.random.randint(jax.random.key(0), (2, 18), 0, 128)
    run = jax.jit(lambda model, t, cache: model(t, cache))
    want, _ = run(model, text, model.make_cache(2, 24, bits=bits))
    plain, _ = run(model, text, model.make_cache(2, 24))
    assert 1e-4 < float(jnp.abs(plain - want).max()) < (1.5 if bits == 4 else 0.1)
    for cuts in ((7, 4, 4, 1, 1, 1), (1,) * 18):
        cache, got, at = model.make_cache(2, 24, slack=8, bits=bits), [], 0
        for T in cuts:
            logits, cache = run(model, text[:, at : at + T], cache)
            got.append(logits)
            at += T
        assert_same_but_for_rounding(jnp.concatenate(got, axis=1), want, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windows"])
def test_generation_streams_continues_and_does_not_depend_on_the_batch(models, name):
    model = models[name]
    prompts = [[1, 2, 3, 4, 5, 6], [7] * 5]
    outs = jl.generate(model, None, prompts, max_new_tokens=6, cache=jl.CacheOptions(bits=4))
    for prompt, out in zip(prompts, outs, strict=True):
        stream = jl.stream(model, None, prompt, max_new_tokens=6, cache=jl.CacheOptions(bits=4))
        assert [token.token_id for token in stream] == out.token_ids
    _, cache = jax.jit(lambda m: m(jnp.array([[1, 2, 3]]), m.make_cache(1, 8, slack=8, bits=4)))(model)
    before = jax.tree.map(np.asarray, cache)
    again = jl.generate(model, None, [[4, 5, 6]], max_new_tokens=6, cache=cache)
    assert again[0].token_ids == outs[0].token_ids
    jax.tree.map(np.testing.assert_array_equal, cache, before)
    with pytest.raises(
        ValueError, match="bits must be None where a start, which has its own, is given, got 4"
    ):
        jl.CacheOptions(start=cache, bits=4)


@pytest.mark.slow
def test_every_model_takes_a_cache_in_codes():
    small = gpt.Gpt(gpt.TINY, rngs=nnx.Rngs(0))
    text = jnp.array([[1, 2, 3, 4, 5, 6]])
    run = jax.jit(lambda model, text, cache: model(text, cache))
    want, _ = run(small, text, small.make_cache(1, 8, bits=8))
    got, cache = run(small, text[:, :3], small.make_cache(1, 8, bits=8))
    got = jnp.concatenate([got, run(small, text[:, 3:], cache)[0]], axis=1)
    assert_same_but_for_rounding(got, want, run(small, text, small.make_cache(1, 8))[0])
    both = t5.T5(t5.TINY, rngs=nnx.Rngs(0))
    out = jl.generate(
        both, None, [[3, 4, 5]], max_new_tokens=4, cache=jl.CacheOptions(bits=8), stop_tokens=()
    )
    assert len(out[0].token_ids) == 4


@pytest.mark.slow
def test_perplexity_is_that_of_the_cached_model(models):
    model = models["full"]
    text = np.asarray(jax.random.randint(jax.random.key(1), (60,), 0, 128))
    plain, coarse, fine = (
        jl.perplexity(model, text, context=20, cache=jl.CacheOptions(bits=bits)) for bits in (None, 4, 8)
    )
    assert plain.tokens == coarse.tokens == fine.tokens
    logits = jax.jit(lambda model, t: model(t, model.make_cache(1, 19, bits=4))[0])(model, text[None, :19])
    logp = jax.nn.log_softmax(logits)[0, jnp.arange(19), text[1:20]]
    first = jl.perplexity(model, text[:20], context=20, cache=jl.CacheOptions(bits=4))
    np.testing.assert_allclose(first.nll_per_token, -logp.mean(), rtol=1e-4)
    assert abs(fine.nll_per_token - plain.nll_per_token) < 2e-3
    assert coarse.nll_per_token != plain.nll_per_token


def test_a_decoding_loop_updates_the_codes_in_place(models, usual_compiler):
    """Neither a copy of the cache nor a float32 one of more than a layer is held beside it."""
    config = dataclasses.replace(TINY, layers=6, head_dim=32, context=1024)
    model = Decoder(config, rngs=nnx.Rngs(0))
    cache = jax.eval_shape(
        lambda: dataclasses.replace(model.make_cache(2, 1024, bits=4), is_first_chunk=False)
    )

    def step(model, cache, tokens):
        def one(_, state):
            logits, cache = model(state[1], state[0], logits="last")
            return cache, jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)

        return jax.lax.fori_loop(0, 8, one, (cache, tokens))

    run = jax.jit(step, donate_argnums=1).lower(model, cache, jax.ShapeDtypeStruct((2, 1), jnp.int32))
    memory = run.compile(compiler_options=usual_compiler).memory_analysis()
    layer = 2 * config.kv_heads * 1024 * config.head_dim * 4  # keys of one layer in float32
    assert memory.temp_size_in_bytes < 4 * layer


def test_names_are_those_of_the_public_interface():
    assert kv.QuantizedRows is QuantizedRows and decoder.kv is kv and run.kv is kv
