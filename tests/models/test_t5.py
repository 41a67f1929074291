"""T5 means the same however it is run, and its presets have the published sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.cache import truncate
from jaxllm.models import t5
from jaxllm.models.relative_bias import bucket_of_distance
from jaxllm.models.t5 import T5, TINY
from jaxllm.sharding import make_mesh, shard

V1_0 = dataclasses.replace(TINY, head_scale=32**-0.5, buckets=8, max_distance=12)
V1_1 = dataclasses.replace(V1_0, head_scale=1.0, tied=False, gated=True, activation="gelu_tanh")
LENGTHS = jnp.array([17, 1, 6], jnp.int32)


@pytest.fixture(
    scope="module",
    params=[pytest.param(V1_0, id="v1.0", marks=pytest.mark.slow), pytest.param(V1_1, id="v1.1")],
)
def case(request):
    """A model, its jitted parts, sources [3, 17], targets [3, 24], memory, logits of one pass."""
    model = T5(request.param, rngs=nnx.Rngs(0))
    encode = jax.jit(lambda model, *args: model.encode(*args))
    forward = jax.jit(lambda model, *args, **more: model(*args, **more), static_argnames="logits")
    sources = jax.random.randint(jax.random.key(1), (3, 17), 0, TINY.vocab)
    targets = jax.random.randint(jax.random.key(2), (3, 24), 0, TINY.vocab)
    memory = encode(model, sources, LENGTHS)
    want = forward(model, targets, memory=memory)[0]
    return model, (encode, forward), (sources, targets), memory, want


def test_ragged_chunks_steps_and_rollback_give_the_logits_of_one_pass(case):
    model, (_, forward), (_, tokens), memory, want = case
    request, at = np.arange(3), np.array([9, 7, 3])
    cache = model.make_cache(3, 32)
    start = jnp.asarray(at, jnp.int32)
    logits, cache = forward(model, tokens[:, :9], cache, memory=memory, lengths=start)
    for i in range(3):
        np.testing.assert_allclose(logits[i, : at[i]], want[i, : at[i]], atol=2e-5)
    for _ in range(3):  # token by token
        token = tokens[request, at][:, None]
        logits, cache = forward(model, token, cache, memory=memory, logits="last")
        np.testing.assert_allclose(logits, want[request, at], atol=2e-5)
        at += 1
    for _ in range(2):  # a chunk behind a cache, then again after forgetting its last four tokens
        where = (request[:, None], at[:, None] + np.arange(6))
        logits, longer = forward(model, tokens[where], cache, memory=memory)
        np.testing.assert_allclose(logits, want[where], atol=2e-5)
        at += 2
        cache = truncate(longer, jnp.asarray(at, jnp.int32))


def test_padding_of_sources_and_targets_does_not_matter(case):
    model, (encode, forward), (sources, targets), memory, _ = case
    other = jnp.where(jnp.arange(17)[None, :] < LENGTHS[:, None], sources, 0)
    lengths = jnp.array([24, 4, 1], jnp.int32)
    others = jnp.where(jnp.arange(24)[None, :] < lengths[:, None], targets, 0)
    more = {"lengths": lengths, "logits": "last"}
    got, _ = forward(model, others, memory=encode(model, other, LENGTHS), **more)
    np.testing.assert_array_equal(got, forward(model, targets, memory=memory, **more)[0])


def test_pieces_called_alone_make_the_whole(case):
    model, _, (_, targets), memory, want = case

    @jax.jit
    def whole(model, targets, memory):
        x = model.embed(targets)
        for i, layer in enumerate(model.layers):
            x, _ = layer(x, memory=memory, bias=model.relative, index=i)
        return model.unembed(x)

    np.testing.assert_allclose(whole(model, targets, memory), want, atol=2e-5)


def test_a_tap_sees_every_linear_and_can_change_it(case):
    model, _, (sources, targets), _, want = case
    seen = {}

    def look(name, x):
        seen[name] = x.shape
        return 0 * x if name == "encoder.layers.0.mlp.down.out" else x

    @jax.jit
    def forward(model, sources, targets):
        memory = model.encode(sources, LENGTHS, tap=look)
        return model(targets, memory=memory, tap=look)[0]

    changed = forward(model, sources, targets)
    assert np.abs(np.asarray(changed - want)).max() > 1e-2
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    linears = [name.removesuffix(".w.value.rows") for name in names if name.endswith(".w.value.rows")]
    assert len(linears) >= 32
    assert {f"{name}.{end}" for name in linears for end in ("in", "out")} <= set(seen)
    for name in ("encoder.layers.1.out", "layers.1.attention.values", "layers.1.cross.keys"):
        assert seen[name][0] == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_models_follow_the_float32_one_and_give_float32_logits(case, dtype):
    model, (encode, forward), (sources, targets), _, want = case
    half = jax.tree.map(lambda x: x.astype(dtype), model)
    got, _ = forward(half, targets, memory=encode(half, sources, LENGTHS))
    assert got.dtype == jnp.float32 and half.dtype == dtype
    assert np.abs(np.asarray(got - want)).max() < 0.1 * np.abs(np.asarray(want)).max()


def test_float16_stays_finite_beyond_its_range(case):
    model, (encode, forward), (sources, targets), _, _ = case
    large = jax.tree.map(lambda x: (30 * x).astype(jnp.float16), model)
    got, _ = forward(large, targets, memory=encode(large, sources, LENGTHS))
    assert np.isfinite(np.asarray(got)).all()
    x = jnp.full((1, 1, 4), 60_000, jnp.float16)
    assert np.asarray(t5.residual_add(x, x)).max() == np.finfo(np.float16).max


def test_buckets_of_a_small_table_by_hand():
    """Causal, 8 buckets up to distance 12: 0..3 alone, then 4 + floor(4 log(d / 4) / log 3)."""
    behind = [0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 7, 7, 7]
    assert bucket_of_distance(8, 12, causal=True).tolist() == behind[:0:-1] + [0] * 13
    both = bucket_of_distance(8, 12, causal=False)
    assert both[12] == 0 and both[:12].max() == 3 and both[13:].min() == 5 and both.max() == 7


@pytest.mark.parametrize("case", [V1_0], indirect=True, ids=["v1.0"])
def test_generation_begins_with_the_start_token(case):
    model, (_, forward), (sources, _), memory, _ = case
    prompts = [sources[i, :n].tolist() for i, n in enumerate(LENGTHS.tolist())]
    outs = jl.generate(model, None, prompts, max_new_tokens=24)
    start = model.config.decoder_start
    targets = jnp.array([[start, *out.token_ids[:-1]] for out in outs], jnp.int32)
    logits, _ = forward(model, targets, memory=memory)
    assert np.argmax(logits, -1).tolist() == [out.token_ids for out in outs]


@pytest.fixture(scope="module")
def split():
    """A model on one device, and on a mesh of 2 by 4."""
    model = T5(dataclasses.replace(V1_1, heads=8), rngs=nnx.Rngs(0))
    return model, shard(model, make_mesh(data=2, model=4))


def test_a_tensor_parallel_forward_equals_one_device(split):
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocab)
    forward = jax.jit(lambda model, tokens: model(tokens, memory=model.encode(tokens))[0])
    got, want = (forward(model, tokens) for model in split)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_a_tensor_parallel_generate_equals_one_device(split):
    outs = [jl.generate(m, None, [[1, 2, 3, 4], [5, 6]], max_new_tokens=8) for m in split]
    assert [o.token_ids for o in outs[0]] == [o.token_ids for o in outs[1]]


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("T5_SMALL", 60_506_624),
        ("T5_BASE", 222_903_552),
        ("T5_LARGE", 737_668_096),
        ("T5_3B", 2_851_598_336),
        ("T5_11B", 11_307_321_344),
        ("T5_V1_1_SMALL", 76_961_152),
        ("T5_V1_1_BASE", 247_577_856),
        ("T5_V1_1_LARGE", 783_150_080),
        ("T5_V1_1_XL", 2_849_757_184),
        ("T5_V1_1_XXL", 11_135_332_352),
    ],
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    """Counted on models of one layer and of two, because all layers are alike."""
    config = getattr(t5, name)
    small = [dataclasses.replace(config, layers=i, encoder_layers=i) for i in (1, 2)]
    models = [T5(c, rngs=None) for c in small]
    one, two = (sum(x.size for x in jax.tree.leaves(model)) for model in models)
    assert config.layers == config.encoder_layers
    assert one + (config.layers - 1) * (two - one) == parameters


def test_wrong_configs_and_memories_are_refused(case):
    model, _, (_, targets), memory, _ = case
    with pytest.raises(ValueError, match="one source a request, got 3 for"):
        model(targets[:2], memory=memory)
    with pytest.raises(ValueError, match=r"a multiple of 4 .* got self\.buckets=6"):
        dataclasses.replace(TINY, buckets=6)
