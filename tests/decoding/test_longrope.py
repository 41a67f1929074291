"""A rotation with two lists of factors turns all of a request's tokens by one of them, however it is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.rope import Rope

ORIGINAL = 16
ROPE = Rope(
    kind="longrope", original_context=ORIGINAL, short_factors=(1.0,) * 4, long_factors=(2.0, 5.0, 8.0, 11.0)
)
IDS = [3 + 7 * i % 90 for i in range(40)]


@pytest.fixture(scope="module")
def model():
    model = Decoder(dataclasses.replace(TINY, rope=ROPE), rngs=nnx.Rngs(0))
    for layer in model.layers:  # so that it looks far back
        for linear in (layer.attention.q, layer.attention.k):
            linear.w.set_value(jax.tree.map(lambda x: 4 * x, linear.w.get_value()))
    return model


@jax.jit
def last_logits(model, tokens, lengths):
    return model(tokens, lengths=lengths, logits="last")[0]


def whole_passes(model, prompt: list[int], n: int) -> list[int]:
    """What is chosen where each token is read off a pass over all before it."""
    row = list(prompt)
    for _ in range(n):
        tokens = np.zeros((1, 48), np.int32)
        tokens[0, : len(row)] = row
        row.append(int(last_logits(model, tokens, np.asarray([len(row)])).argmax()))
    return row[len(prompt) :]


# what is fed in all: below the boundary, at it, one past it, across it from farther off, behind it
CASES = [(10, 5), (12, 5), (12, 6), (10, 20), (15, 12), (16, 8), (17, 8)]


def test_what_is_written_across_the_boundary_is_what_whole_passes_say(model):
    prompts, wanted = [IDS[:n] for n, _ in CASES], [most for _, most in CASES]
    outs = jl.generate(model, None, prompts, max_new_tokens=wanted, stop_tokens=())
    want = [whole_passes(model, prompt, most) for prompt, most in zip(prompts, wanted, strict=True)]
    assert [out.token_ids for out in outs] == want
    # and the boundary matters: the short list would have said something else
    short = nnx.clone(model)
    for layer in short.layers:
        layer.attention.rope = dataclasses.replace(ROPE, original_context=1000)
    assert whole_passes(short, IDS[:10], 20) != want[3]


@pytest.mark.slow
def test_a_stream_passes_the_boundary_as_generate_does(model):
    made = jl.stream(model, None, IDS[:10], max_new_tokens=20, stop_tokens=())
    assert [token.token_id for token in made] == whole_passes(model, IDS[:10], 20)


@pytest.mark.parametrize(
    "n, extent, by",
    [
        pytest.param(40, None, "long", marks=pytest.mark.slow),
        (14, None, "long"),
        pytest.param(9, ORIGINAL, "short", marks=pytest.mark.slow),
    ],
)
def test_a_cache_keeps_its_list_in_pieces_evicted_and_on_the_disk(model, tmp_path, n, extent, by):
    ids = IDS[:n]
    cache = jl.prefill(model, [ids], chunk=8, slack=64, extent=extent)
    plain = nnx.clone(model)  # of one list, whatever the length
    factors = ROPE.long_factors if by == "long" else ROPE.short_factors
    for layer in plain.layers:
        layer.attention.rope = dataclasses.replace(ROPE, short_factors=factors, long_factors=factors)
    tokens = np.asarray([[*ids, 9]], np.int32)
    want = jax.jit(lambda model, tokens: model(tokens, logits="last")[0])(plain, tokens)

    @jax.jit
    def ask(model, cache):
        return model(jnp.asarray([[9]]), jl.cache.with_capacity(cache, 66), logits="last")[0]

    np.testing.assert_allclose(ask(model, cache), want, atol=1e-5)
    scores = jl.eviction.kvzip_scores(model, cache, [ids], chunk=16)
    small = jl.eviction.evict(cache, scores, ratio=1.0)
    jl.cache.save(small, tmp_path / "small", model)
    again = jl.cache.load(tmp_path / "small", model)
    np.testing.assert_allclose(ask(model, again), want, atol=1e-5)


def test_a_cache_for_short_texts_is_not_continued_past_the_boundary(model):
    cache = jl.prefill(model, [IDS[:9]], extent=ORIGINAL)
    assert (
        len(jl.generate(model, None, [[9]], max_new_tokens=7, stop_tokens=(), cache=cache)[0].token_ids) == 7
    )
    said = r"cache must be prepared for the 17 tokens .* \(the rotation changes past 16\), got one for 16"
    with pytest.raises(ValueError, match=said):
        jl.generate(model, None, [[9]], max_new_tokens=8, cache=cache)
    with pytest.raises(ValueError, match=r"prefill: extent must lie in 9 \(the longest row\) to 64, got 65"):
        jl.prefill(model, [IDS[:9]], extent=65)


def test_drafts_stay_before_the_boundary(model):
    spec = jl.Speculation(draft=jl.LookupDraft(), tokens=3)
    with pytest.raises(ValueError, match="speculation needs texts of at most 16 tokens, .* got up to 19"):
        jl.generate(model, None, [IDS[:10]], max_new_tokens=10, speculation=spec)
    before = {"max_new_tokens": 6, "stop_tokens": ()}
    (plain,), (out,) = (jl.generate(model, None, [IDS[:10]], speculation=s, **before) for s in (None, spec))
    assert out.token_ids == plain.token_ids
