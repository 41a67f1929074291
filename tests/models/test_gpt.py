"""The GPT line means the same however it is run, and its presets have the published sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.cache import truncate
from jaxllm.models import gpt
from jaxllm.models.gpt import TINY, Gpt
from jaxllm.sharding import make_mesh, shard, shardings

# OPT-350M's features, and others that no preset has.
OTHER = dataclasses.replace(
    TINY,
    position_offset=2,
    norm_first=False,
    final_norm=False,
    embedding_width=16,
    activation="relu",
    tied=False,
    scale_by_layer=True,
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(TINY, id="plain", marks=pytest.mark.slow), pytest.param(OTHER, id="other")],
)
def case(request):
    """A model, its jitted forward, tokens [3, 24], and the logits of one whole pass."""
    model = Gpt(request.param, rngs=nnx.Rngs(0))
    forward = jax.jit(lambda model, *args, **more: model(*args, **more), static_argnames="logits")
    tokens = jax.random.randint(jax.random.key(1), (3, 24), 0, TINY.vocab)
    return model, forward, tokens, forward(model, tokens)[0]


def test_ragged_chunks_steps_and_rollback_give_the_logits_of_one_pass(case):
    model, forward, tokens, want = case
    request, at = np.arange(3), np.array([9, 7, 3])
    cache = model.make_cache(3, 32)
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
    lengths = jnp.array([24, 4, 1], jnp.int32)
    other = jnp.where(jnp.arange(24)[None, :] < lengths[:, None], tokens, 0)
    outs = [forward(model, t, lengths=lengths, logits="last")[0] for t in (tokens, other)]
    np.testing.assert_array_equal(*outs)


def test_padding_may_stand_beyond_the_context():
    small = Gpt(dataclasses.replace(TINY, context=6), rngs=nnx.Rngs(0))
    x = small.embed(jnp.arange(9, dtype=jnp.int32)[None, :])
    np.testing.assert_array_equal(x[:, :6], small.embed(jnp.arange(6, dtype=jnp.int32)[None, :]))
    assert np.isfinite(np.asarray(x)).all()


def test_pieces_called_alone_make_the_whole(case):
    model, _, tokens, want = case

    @jax.jit
    def whole(model, tokens):
        x = model.embed(tokens)
        for layer in model.layers:
            x, _ = layer(x)
        return model.unembed(x)

    np.testing.assert_allclose(whole(model, tokens), want, atol=2e-5)
    positions = jnp.arange(7, 9, dtype=jnp.int32)[None, :]
    part = model.embed(tokens[:, 7:9], positions)
    np.testing.assert_array_equal(part, model.embed(tokens)[:, 7:9])


def test_a_tap_sees_every_linear_and_can_change_it(case):
    model, _, tokens, want = case
    seen = {}

    def look(name, x):
        seen[name] = x.shape
        return 0 * x if name == "layers.0.mlp.down.out" else x

    changed = jax.jit(lambda model, tokens: model(tokens, tap=look)[0])(model, tokens)
    assert np.abs(np.asarray(changed - want)).max() > 1e-2
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    linears = [name.removesuffix(".w.value.rows") for name in names if name.endswith(".w.value.rows")]
    assert len(linears) >= 12
    assert {f"{name}.{end}" for name in linears for end in ("in", "out")} <= set(seen)
    for name in ("queries", "keys", "values"):
        assert seen[f"layers.1.attention.{name}"] == (3, 24, 4, 8)
    assert seen["layers.1.out"] == (3, 24, 32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_models_follow_the_float32_one_and_give_float32_logits(case, dtype):
    model, forward, tokens, want = case
    half = jax.tree.map(lambda x: x.astype(dtype), model)
    got, _ = forward(half, tokens)
    assert got.dtype == jnp.float32 and half.dtype == dtype
    assert np.abs(np.asarray(got - want)).max() < 0.1 * np.abs(np.asarray(want)).max()


@pytest.mark.slow
def test_tensor_parallel_forward_and_generate_equal_one_device():
    model = Gpt(dataclasses.replace(TINY, heads=8, vocab=129), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 129)
    split = shard(model, make_mesh(data=1, model=8))
    assert split.layers[0].attention.k.bias.get_value().addressable_shards[0].data.shape == (4,)
    got = jax.jit(lambda model, tokens: model(tokens)[0])(split, tokens)
    want = jax.jit(lambda model, tokens: model(tokens)[0])(model, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
    prompts = [[1, 2, 3, 4], [5, 6]]
    outs = [jl.generate(m, None, prompts, max_new_tokens=8) for m in (model, split)]
    assert [o.token_ids for o in outs[0]] == [o.token_ids for o in outs[1]]


def abstract(config, dtype=jnp.bfloat16):
    return Gpt(config, rngs=None, dtype=dtype)


def count(config) -> int:
    """Parameters, from models of one layer and of two, because all layers are alike."""
    one, two = (
        sum(x.size for x in jax.tree.leaves(abstract(dataclasses.replace(config, layers=layers))))
        for layers in (1, 2)
    )
    return one + (config.layers - 1) * (two - one)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("GPT2_SMALL", 124_439_808),
        ("GPT2_MEDIUM", 354_823_168),
        ("GPT2_LARGE", 774_030_080),
        ("GPT2_XL", 1_557_611_200),
        ("OPT_125M", 125_239_296),
        ("OPT_350M", 331_196_416),
        ("OPT_1_3B", 1_315_758_080),
        ("OPT_2_7B", 2_651_596_800),
        ("OPT_6_7B", 6_658_473_984),
        ("OPT_13B", 12_853_473_280),
        ("OPT_30B", 29_974_540_288),
        ("OPT_66B", 65_719_701_504),
    ],
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    assert count(getattr(gpt, name)) == parameters


@pytest.mark.parametrize("billions", [39, 101, 175, 341])
def test_gpt3_shapes_have_the_parameters_of_their_names(billions):
    assert round(count(getattr(gpt, f"GPT_{billions}B")) / 1e9) == billions


def test_layers_of_the_175b_layout_shard_abstractly():
    model = abstract(dataclasses.replace(gpt.GPT_175B, layers=4))
    placed = shardings(model, make_mesh(model=8))

    def share(x, s):
        return int(np.prod(s.shard_shape(x.shape)))

    each = sum(jax.tree.leaves(jax.tree.map(share, nnx.state(model), placed)))
    whole = sum(x.size for x in jax.tree.leaves(model))
    assert each == pytest.approx(whole / 8, rel=0.03)  # positions are on every device


def test_wrong_configs_are_refused():
    with pytest.raises(ValueError, match=r"heads must divide width, got self\.heads=3"):
        dataclasses.replace(TINY, heads=3)
