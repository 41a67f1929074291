"""A model split over eight virtual devices gives the tokens and logits of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxllm as jl
from jaxllm.models.decoder import TINY, Config, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.models.rope import Rope
from jaxllm.pytree import path_name
from jaxllm.sharding import make_mesh, shard, shardings
from jaxllm.weights.dense import Dense

CONFIG = dataclasses.replace(TINY, heads=8, kv_heads=4, qkv_bias=True, windows=(4, None))
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [9], [3, 4]]


@pytest.fixture(scope="module")
def single():
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 20), 0, CONFIG.vocab)
    outs = jl.generate(model, None, PROMPTS, max_new_tokens=12)
    return model, tokens, jax.jit(model)(tokens)[0], [o.token_ids for o in outs]


@pytest.mark.parametrize("data, parts", [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_tensor_parallel_forward_and_generate_equal_one_device(single, data, parts):
    model, tokens, want, ids = single
    split = shard(model, make_mesh(data=data, model=parts))
    rows = split.layers[0].attention.q.w.get_value().rows
    assert rows.addressable_shards[0].data.shape == (64 // parts, 32)
    got = jax.jit(lambda model, tokens: model(tokens)[0])(split, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
    outs = jl.generate(split, None, PROMPTS, max_new_tokens=12)
    assert [o.token_ids for o in outs] == ids


@pytest.fixture(scope="module")
def with_exceptions(single):
    """The model, of which one output in each of two linears, cut along outputs and inputs, is large."""
    model, new = single[0], {}
    for name in ("layers.0.mlp.up", "layers.1.mlp.down"):
        rows = linear_weights(model)[name].rows
        new[name] = Dense(rows.at[:, 0].set(2.0**-24).at[5, 3].set(3.0))
    return replace_weights(model, new)


@pytest.mark.parametrize("mode", ["fp16", pytest.param("fp8", marks=pytest.mark.slow)])
def test_nested_weights_with_exceptions_give_on_eight_devices_the_logits_of_one(
    single, with_exceptions, mode
):
    model = jl.quantize(with_exceptions, jl.NestedFp(mode=mode), progress=False)
    split = shard(model, make_mesh(data=2, model=4))
    up, down = (linear_weights(split)[f"layers.{i}"] for i in ("0.mlp.up", "1.mlp.down"))
    (K, N), (F, _) = up.shape, down.shape
    shards = [x.addressable_shards[0].data.shape for x in (up.exceptions, up.exception_of_output)]
    assert shards == [(1, K), (N // 4,)]
    assert down.exceptions.addressable_shards[0].data.shape == (1, F // 4)
    forward = jax.jit(lambda model, tokens: model(tokens)[0])
    np.testing.assert_allclose(forward(split, single[1]), forward(model, single[1]), atol=1e-5)


def test_which_outputs_are_exceptions_is_decided_on_the_whole_weight_wherever_its_parts_lie(with_exceptions):
    """Of four devices' outputs only one's are not all eligible, and of each device's inputs others."""
    split = shard(with_exceptions, make_mesh(data=2, model=4))
    whole, parts = (
        linear_weights(jl.quantize(m, jl.NestedFp(), progress=False)) for m in (with_exceptions, split)
    )
    for name, w in whole.items():
        assert jax.tree.structure(parts[name]) == jax.tree.structure(w)
        jax.tree.map(np.testing.assert_array_equal, parts[name], w)
    assert whole["layers.0.mlp.up"].exceptions is not None


def test_key_heads_are_replicated_when_there_are_fewer_than_shards(single):
    specs = shardings(single[0], make_mesh(model=8))
    flat = jax.tree_util.tree_leaves_with_path(specs)
    found = {path_name(path): leaf.spec for path, leaf in flat}
    assert found["layers.0.attention.k.w.value.rows"] == P(None, None)
    assert found["layers.0.attention.q.w.value.rows"] == P("model", None)
    assert found["layers.0.mlp.down.w.value.rows"] == P(None, "model")


def test_what_cannot_be_split_evenly_is_refused():
    model = Decoder(dataclasses.replace(TINY, ffn=63), rngs=None)
    with pytest.raises(ValueError, match=r"must divide layers\.0\.mlp\.down\.w, got \(32, 63\) over 2"):
        shardings(model, make_mesh(model=2))
    six = dataclasses.replace(TINY, heads=6, kv_heads=6, head_dim=8)
    model = Decoder(six, rngs=None)
    with pytest.raises(ValueError, match="must divide the key heads, got 6 heads, 4 shards"):
        shardings(model, make_mesh(model=4))


@pytest.mark.slow
def test_a_70b_layout_is_checked_without_memory():
    config = Config(
        layers=80, width=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=128256,
        context=8192, tied=False, rope=Rope(theta=500_000.0),
    )  # fmt: skip
    model = Decoder(config, rngs=None, dtype=jnp.bfloat16)
    assert sum(x.size for x in jax.tree.leaves(model)) == 70_553_706_496
    placed = shardings(model, make_mesh(model=8))

    def share(x, s):
        return np.prod(s.shard_shape(x.shape)) * 2

    each = sum(jax.tree.leaves(jax.tree.map(share, nnx.state(model), placed)))
    assert each == pytest.approx(141.1e9 / 8, rel=0.01)
