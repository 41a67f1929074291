"""The decoder means the same however it is run: at once, in chunks, token by token, ragged, in pieces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.cache import truncate
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.rope import Rope

EVERYTHING = dataclasses.replace(
    TINY,
    windows=(5, None),
    qk_norm=True,
    post_norms=True,
    qkv_bias=True,
    tied=True,
    norm_offset=1.0,
    embedding_scale=5.0,
    attention_softcap=3.0,
    logit_softcap=4.0,
    local_rope=Rope(theta=100.0),
)


@pytest.fixture(scope="module", params=[TINY, EVERYTHING], ids=["plain", "everything"])
def case(request):
    """A model, tokens [3, 24], and the logits of one whole pass."""
    model = Decoder(request.param, rngs=nnx.Rngs(0))
    forward = jax.jit(lambda model, *args, **more: model(*args, **more), static_argnames="logits")
    tokens = jax.random.randint(jax.random.key(1), (3, 24), 0, TINY.vocab)
    return model, forward, tokens, forward(model, tokens)[0]


def test_chunks_steps_and_rollback_give_the_logits_of_one_pass(case):
    model, forward, tokens, want = case
    request, at = np.arange(3), np.array([9, 7, 3])
    cache = model.make_cache(3, 32, slack=6)
    logits, cache = forward(model, tokens[:, :9], cache, lengths=jnp.asarray(at, jnp.int32))
    for i in range(3):
        np.testing.assert_allclose(logits[i, : at[i]], want[i, : at[i]], atol=2e-5)
    for _ in range(3):  # token by token
        logits, cache = forward(model, tokens[request, at][:, None], cache, logits="last")
        np.testing.assert_allclose(logits, want[request, at], atol=2e-5)
        at += 1
    for _ in range(2):  # a chunk behind a cache, then again after forgetting its last four tokens
        where = (request[:, None], at[:, None] + np.arange(6))
        logits, longer = forward(model, tokens[where], cache)
        np.testing.assert_allclose(logits, want[where], atol=2e-5)
        at += 2
        cache = truncate(longer, jnp.asarray(at, jnp.int32))


def test_padding_tokens_do_not_matter(case):
    model, forward, tokens, _ = case
    lengths = jnp.array([9, 4, 1], jnp.int32)
    other = jnp.where(jnp.arange(9)[None, :] < lengths[:, None], tokens[:, :9], 0)
    outs = [forward(model, t, lengths=lengths, logits="last")[0] for t in (tokens[:, :9], other)]
    np.testing.assert_array_equal(*outs)


def test_last_logits_are_those_of_the_last_real_token(case):
    model, forward, tokens, want = case
    lengths = jnp.array([24, 5, 1], jnp.int32)
    got, cache = forward(model, tokens, lengths=lengths, logits="last")
    assert cache is None
    np.testing.assert_allclose(got, want[np.arange(3), lengths - 1], atol=2e-5)


def test_pieces_called_alone_make_the_whole(case):
    model, _, tokens, want = case
    x = jax.jit(lambda model: model.embed(tokens))(model)
    one = jax.jit(lambda layer, x: layer(x)[0])
    for layer in model.layers:
        x = one(layer, x)
    got = jax.jit(lambda model, x: model.unembed(x))(model, x)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_tap_sees_every_linear_and_can_change_it(case):
    model, _, tokens, want = case
    seen = {}

    def look(name, x):
        seen[name] = x.shape
        return x

    same = jax.jit(lambda model: model(tokens, tap=look)[0])(model)
    np.testing.assert_allclose(same, want, atol=2e-5)
    for part in (
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.o",
        "mlp.gate",
        "mlp.down",
    ):
        assert {f"layers.1.{part}.in", f"layers.1.{part}.out"} <= set(seen)
    for name in ("queries", "keys", "values"):
        assert seen[f"layers.0.attention.{name}"][:2] == (3, 24)
    assert seen["layers.1.out"] == (3, 24, 32)

    def change(n, x):
        return 0 * x if n == "layers.0.mlp.down.out" else x

    changed = jax.jit(lambda model: model(tokens, tap=change)[0])(model)
    assert np.abs(np.asarray(changed) - np.asarray(want)).max() > 1e-2


def test_a_tap_of_zeros_can_be_differentiated(case):
    model, _, tokens, _ = case

    @jax.jit
    @jax.grad
    def slope(zero, model):
        def tap(n, x):
            return x + zero if n == "layers.0.attention.q.out" else x

        return model(tokens[:1, :6], tap=tap)[0].sum()

    gradient = slope(jnp.zeros((1, 6, 32)), model)
    assert np.abs(np.asarray(gradient)).max() > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_models_follow_the_float32_one_and_give_float32_logits(dtype):
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    half = jax.tree.map(lambda x: x.astype(dtype), model)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocab)
    forward = jax.jit(lambda model: model(tokens)[0])
    want, got = forward(model), forward(half)
    assert got.dtype == jnp.float32 and half.dtype == dtype
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_step_time_work_does_not_grow_with_layers_of_unused_cache(usual_compiler):
    """The compiled step copies no cache: what it writes beside its donated operand is small."""
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    token = jnp.zeros((1, 1), jnp.int32)

    def temporary(rows):
        cache = dataclasses.replace(model.make_cache(1, rows), is_first_chunk=False)
        step = jax.jit(lambda m, t, c: m(t, c, logits="last"), donate_argnums=2)
        memory = step.lower(model, token, cache).compile(compiler_options=usual_compiler).memory_analysis()
        return memory.temp_size_in_bytes, memory.alias_size_in_bytes, cache

    temp, aliased, cache = temporary(4096)
    held = sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert aliased >= held
    assert temp < held / 4


def test_wrong_configs_are_refused():
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        dataclasses.replace(TINY, kv_heads=3)
    with pytest.raises(ValueError, match="one window a layer, got 3"):
        dataclasses.replace(TINY, windows=(1, 2, 3))
