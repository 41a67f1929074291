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
from jaxllm.models.rope import Rope
from jaxllm.pytree import path_name
from jaxllm.sharding import make_mesh, shard, shardings

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
