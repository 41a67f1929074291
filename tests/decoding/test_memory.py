"""What a long text takes beside the model and its cache: linear in its length, whatever is done with it."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
import jaxllm.ops.attention as tiles
from jaxllm.decoding import prefill, run
from jaxllm.models import t5
from jaxllm.models.decoder import TINY, Config, Decoder
from jaxllm.models.t5 import T5

perplexity = importlib.import_module("jaxllm.measure.perplexity")
CONTEXT = 2**15
HELD = 2 * 4 * tiles.MAX_SCORES  # bytes that do not grow with the text
A_TOKEN = 2**13  # bytes that may grow with each token, of a layer of 32 heads


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def decoder(**sizes) -> Decoder:
    narrow = {"layers": 1, "width": 16, "ffn": 16, "head_dim": 8, "context": CONTEXT}
    return Decoder(Config(**narrow, **sizes), rngs=None)


@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_a_chunk_at_the_end_of_32k_takes_memory_linear_in_them(usual_compiler, bits):
    model = decoder(heads=32, kv_heads=8, vocab=128)

    def begun():
        return dataclasses.replace(model.make_cache(1, CONTEXT, bits=bits), is_first_chunk=False)

    tail = jax.eval_shape(begun)
    program = prefill.read.lower(model, None, None, None, ints(1, prefill.CHUNK), tail, ints(1))
    held = program.compile(compiler_options=usual_compiler).memory_analysis().temp_size_in_bytes
    scores = 4 * 32 * prefill.CHUNK * CONTEXT
    assert held < HELD + A_TOKEN * CONTEXT < scores / 10


@pytest.mark.slow
def test_32k_at_once_take_memory_linear_in_them(usual_compiler):
    model = decoder(heads=32, kv_heads=8, vocab=128)
    tail = jax.eval_shape(lambda: model.make_cache(1, CONTEXT))
    program = prefill.read.lower(model, None, None, None, ints(1, CONTEXT), tail, ints(1))
    held = program.compile(compiler_options=usual_compiler).memory_analysis().temp_size_in_bytes
    assert held < HELD + A_TOKEN * CONTEXT


@pytest.mark.parametrize("T", [2**9, pytest.param(CONTEXT, marks=pytest.mark.slow)])
def test_a_window_over_262144_entries_keeps_what_a_call_may_take(usual_compiler, T):
    model = decoder(heads=2, kv_heads=1, vocab=2**18)
    assert perplexity._rows_per_call(model, T, None) == 1 and T * 2**18 > perplexity.CALL_LOGITS
    program = perplexity._predict.lower(model, ints(1, T), ints(1), ints(1, T), None)
    held = program.compile(compiler_options=usual_compiler).memory_analysis().temp_size_in_bytes
    assert held < 2 * 4 * perplexity.CALL_LOGITS


@pytest.mark.slow
def test_an_encoder_over_16k_tokens_takes_memory_linear_in_them(usual_compiler):
    S, sizes = 2**14, {"width": 16, "heads": 32, "head_dim": 8, "ffn": 16, "vocab": 128}
    model = T5(t5.Config(encoder_layers=1, layers=1, **sizes), rngs=None)
    program = jax.jit(T5.encode).lower(model, ints(1, S), ints(1))
    held = program.compile(compiler_options=usual_compiler).memory_analysis().temp_size_in_bytes
    assert held < HELD + A_TOKEN * S < 4 * 32 * S * S / 10


@pytest.mark.slow
def test_tiles_of_a_source_give_what_all_of_it_gives(monkeypatch):
    model = T5(t5.TINY, rngs=nnx.Rngs(0))
    source, target = (jnp.asarray(np.arange(2 * n).reshape(2, n) % 97 + 3, jnp.int32) for n in (23, 9))
    lengths = jnp.asarray([23, 14], jnp.int32)

    def ask():
        return jax.jit(lambda model: model(target, memory=model.encode(source, lengths))[0])(model)

    want = ask()
    for name, size in (("MAX_SCORES", 0), ("TILE_SCORES", 0), ("TILE_KEYS", 7), ("MIN_QUERIES", 5)):
        monkeypatch.setattr(tiles, name, size)
    np.testing.assert_allclose(ask(), want, atol=2e-5)


def test_slices_of_rows_give_what_all_logits_at_once_give(monkeypatch):
    model, ids = Decoder(TINY, rngs=nnx.Rngs(0)), np.arange(30) % 7
    want = perplexity.score(model, [ids], batch=1)
    monkeypatch.setattr(perplexity, "CALL_LOGITS", 5 * TINY.vocab)
    perplexity._predict.clear_cache()
    got = perplexity.score(model, [ids], batch=1)
    np.testing.assert_allclose(got.logprobs[0], want.logprobs[0], atol=1e-5)
    np.testing.assert_array_equal(got.greedy[0], want.greedy[0])


@pytest.mark.parametrize("windows", [(4, None), pytest.param((), marks=pytest.mark.slow)])
def test_a_prompt_in_pieces_is_continued_as_one_that_is_read_at_once(monkeypatch, windows):
    model = Decoder(dataclasses.replace(TINY, windows=windows), rngs=nnx.Rngs(0))
    prompts = [[5 * i % 97 + 3 for i in range(n)] for n in (40, 23)]
    want = jl.generate(model, None, prompts, max_new_tokens=6, logprobs=True)
    pieces, read = [], prefill.read

    def counted(*args):
        pieces.append(args[4].shape[1])
        return read(*args)

    monkeypatch.setattr(run, "CHUNK", 8)
    monkeypatch.setattr(prefill, "read", counted)
    got = jl.generate(model, None, prompts, max_new_tokens=6, logprobs=True)
    assert [out.token_ids for out in got] == [out.token_ids for out in want]
    assert pieces == [8] * 6
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("evicted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tiles_of_a_cache_give_what_whole_rows_give(monkeypatch, evicted):
    model = Decoder(dataclasses.replace(TINY, windows=(5, None)), rngs=nnx.Rngs(0))
    ids = [[5 * i % 97 + 3 for i in range(n)] for n in (30, 21)]
    cache = jl.prefill(model, ids, slack=16)
    if evicted:
        cache = jl.eviction.evict(cache, jl.eviction.random_scores(model, ids), ratio=0.5, capacity=16)
    tokens = jnp.asarray([row[:12] for row in ids])

    def ask():
        forward = jax.jit(lambda model, cache: model(tokens, cache, lengths=jnp.asarray([12, 7]))[0])
        return forward(model, cache)

    want = ask()
    for name, size in (("MAX_SCORES", 0), ("TILE_SCORES", 0), ("TILE_KEYS", 7), ("MIN_QUERIES", 5)):
        monkeypatch.setattr(tiles, name, size)
    got = ask()
    for b, n in enumerate((12, 7)):
        np.testing.assert_allclose(got[b, :n], want[b, :n], atol=2e-5)
