"""Generation equals choosing token after token from whole forward passes, however it is batched or cut."""

import dataclasses
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import byte_tokenizer
from transformers import PreTrainedTokenizerFast

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.decoding import loop, prefill, sampling
from jaxllm.decoding.options import GenerationOptions
from jaxllm.models import inputs
from jaxllm.models.decoder import TINY, Decoder

PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [9]]
DRAWN = jl.Sampler(temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(TINY, vocab=264, windows=(4, None))
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def greedy(model):
    return jl.generate(model, None, PROMPTS, max_new_tokens=[20, 10, 15], logprobs=True)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>")


def test_greedy_tokens_and_logprobs_are_those_of_whole_passes(model, greedy):
    forward = jax.jit(lambda model, ids: jax.nn.log_softmax(model(ids)[0], axis=-1))
    for prompt, out in zip(PROMPTS, greedy, strict=True):
        ids = np.zeros((1, 32), np.int32)  # causal: what stands behind does not matter
        whole = [*prompt, *out.token_ids]
        ids[0, : len(whole)] = whole
        logp = np.asarray(forward(model, jnp.asarray(ids)))[0, len(prompt) - 1 : len(whole) - 1]
        assert logp.argmax(axis=-1).tolist() == out.token_ids
        np.testing.assert_allclose(out.logprobs, logp.max(axis=-1), atol=2e-5)
        assert out.finish_reason == "length" and out.prompt_ids == prompt


def test_each_request_gets_its_own_number_of_tokens(greedy):
    assert [len(o.token_ids) for o in greedy] == [20, 10, 15]


def test_timings_are_of_the_parts_of_a_call_and_change_no_token(model, greedy):
    assert all(out.timings is None for out in greedy)
    begin = time.perf_counter()
    outs = jl.generate(model, None, PROMPTS, max_new_tokens=[20, 10, 15], logprobs=True, timings=True)
    whole = time.perf_counter() - begin
    assert outs == greedy and len({id(out.timings) for out in outs}) == 1
    seconds = outs[0].timings
    assert seconds.prefill_s > 0 and seconds.decode_s > 0 and seconds.prefill_s + seconds.decode_s <= whole


def test_a_stream_gives_the_same_tokens_one_at_a_time(model, greedy):
    tokens = list(jl.stream(model, None, PROMPTS[0], max_new_tokens=20, logprobs=True))
    assert [t.token_id for t in tokens] == greedy[0].token_ids
    np.testing.assert_allclose([t.logprob for t in tokens], greedy[0].logprobs, atol=2e-5)


@pytest.mark.slow
def test_a_request_with_its_own_seed_does_not_depend_on_its_batch(model):
    options = {"max_new_tokens": 12, "sampler": DRAWN}
    batch = jl.generate(model, None, PROMPTS, seed=[1, 2, 3], **options)
    alone = jl.generate(model, None, PROMPTS[1:2], seed=[2], **options)
    assert alone[0].token_ids == batch[1].token_ids
    again = jl.generate(model, None, PROMPTS, seed=7, **options)
    assert again == jl.generate(model, None, PROMPTS, seed=7, **options)
    assert again != batch


def test_a_stop_token_ends_a_request_and_is_its_last(model, greedy):
    stop = greedy[0].token_ids[7]
    first = greedy[0].token_ids.index(stop)
    out = jl.generate(model, None, PROMPTS[:1], max_new_tokens=20, stop_tokens=[stop])[0]
    assert out.token_ids == greedy[0].token_ids[: first + 1]
    assert out.finish_reason == "stop"


def test_a_stop_string_ends_text_and_tokens_where_it_stands(model, tokenizer):
    plain = jl.generate(model, tokenizer, ["the end"], max_new_tokens=40, sampler=DRAWN)[0]
    stop = plain.text[20:22]
    cut = plain.text.index(stop)
    options = {"max_new_tokens": 40, "sampler": DRAWN, "stop": [stop, "never there"]}
    out = jl.generate(model, tokenizer, ["the end"], **options)[0]
    assert out.text == plain.text[:cut] and out.finish_reason == "stop"
    assert out.token_ids == plain.token_ids[: len(out.token_ids)]
    # The same request streams with the seed that request 0 of a batch folds in.
    streamed = list(jl.stream(model, tokenizer, "the end", **options))
    assert "".join(t.text for t in streamed) == out.text
    assert [t.token_id for t in streamed] == out.token_ids


def test_a_given_cache_is_continued_and_left_as_it_was(model):
    _, cache = jax.jit(model)(jnp.array([[1, 2, 3]]), model.make_cache(1, 8))
    before = jax.tree.map(np.array, cache)
    outs = jl.generate(model, None, [[4, 5], [9]], cache=cache, max_new_tokens=12)
    whole = jl.generate(model, None, [[1, 2, 3, 4, 5], [1, 2, 3, 9]], max_new_tokens=12)
    assert [o.token_ids for o in outs] == [o.token_ids for o in whole]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, cache))


@pytest.mark.slow
def test_a_long_prompt_behind_a_cache_is_read_in_pieces_that_fit_the_window(model):
    _, cache = model(jnp.array([[1, 2, 3]]), model.make_cache(1, 40))
    assert kv.max_chunk(cache) == 1
    rest = list(range(20, 33))
    out = jl.generate(model, None, [rest], cache=cache, max_new_tokens=5)[0]
    assert out.token_ids == jl.generate(model, None, [[1, 2, 3, *rest]], max_new_tokens=5)[0].token_ids


def test_nearby_shapes_share_a_compilation(model):
    jl.generate(model, None, [[1] * 9, [2] * 12, [3]], max_new_tokens=13)
    sizes = loop.decode_until._cache_size(), prefill.read._cache_size()
    jl.generate(model, None, [[1] * 11, [2] * 10, [3] * 4], max_new_tokens=15)
    assert (loop.decode_until._cache_size(), prefill.read._cache_size()) == sizes


def test_another_sampler_compiles_the_prefill_not_again(model):
    jl.generate(model, None, PROMPTS, max_new_tokens=4)
    size = prefill.read._cache_size()
    jl.generate(model, None, PROMPTS, max_new_tokens=4, sampler=jl.Sampler(temperature=1.0, top_k=5))
    assert prefill.read._cache_size() == size


def test_generation_ends_where_the_context_does(model):
    out = jl.generate(model, None, [[1] * 60], max_new_tokens=50, stop_tokens=[])[0]
    assert len(out.token_ids) == 4 and out.finish_reason == "length"


def test_buckets_are_at_most_half_too_large():
    sizes = [inputs.bucket(n) for n in range(1, 200)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 18


def test_a_chat_is_laid_out_by_the_template(model, tokenizer):
    with pytest.raises(ValueError, match="must have a chat template"):
        jl.chat(model, tokenizer, [{"role": "user", "content": "hi"}])
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}:"
    try:
        out = jl.chat(model, tokenizer, [{"role": "user", "content": "the"}], max_new_tokens=3)
    finally:
        tokenizer.chat_template = None
    ids = [tokenizer.bos_token_id, *tokenizer.encode("the:", add_special_tokens=False)]
    assert out.prompt_ids == ids


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one prompt is needed"),
        ("text", {}, "prompts must be a list of prompts, got the text 'text'"),
        ([[]], {}, "must not be empty, got no tokens as number 0"),
        ([""], {}, "must not be empty, got '' as number 0"),
        (["text"], {}, "text needs a tokenizer"),
        ([[1], [2, 264]], {}, "token ids must lie in 0 to 263, got 264 in prompt 1"),
        ([[-1]], {}, "token ids must lie in 0 to 263, got -1 in prompt 0"),
        ([[1] * 64], {}, "must leave room in the context of 64 tokens, got 64 as number 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"seed": [1, 2]}, "seed must be one number or one a prompt, got 2 for 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        jl.generate(model, None, prompts, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_the_compiled_loop_holds_no_second_copy_of_the_weights(dtype, usual_compiler):
    """XLA:CPU likes to take conversions of weights out of the loop, and then holds the model twice."""
    config = dataclasses.replace(TINY, width=256, ffn=512, vocab=8192, heads=8, head_dim=32)
    model = Decoder(config, rngs=None, dtype=dtype)
    request, state = jax.eval_shape(_started, model)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    memory = (
        loop.decode_until.lower(model, request, state, step)
        .compile(compiler_options=usual_compiler)
        .memory_analysis()
    )
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    assert memory.temp_size_in_bytes < weights / 20


def _started(model):
    """A run of one request about to enter the loop."""
    request = loop.Requests(
        limits=jnp.ones((1,), jnp.int32),
        keys=sampling.request_keys(0, 1),
        stop_tokens=jnp.zeros((1,), jnp.int32),
        sampling=jl.Sampler().params(),
    )
    tokens, lengths = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
    logits, cache = model(tokens, model.make_cache(1, 16), lengths=lengths, logits="last")
    state = loop.first_tokens(model, request, tokens, lengths, logits, cache, N=8, logprobs=False)
    return request, state


@pytest.mark.parametrize("function", [jl.generate, jl.stream, jl.chat])
def test_signatures_spell_the_options_out(function):
    shown = inspect.signature(function).parameters
    assert {field.name for field in dataclasses.fields(GenerationOptions)} <= shown.keys()
    assert "options" not in shown and shown["max_new_tokens"].default == 64
