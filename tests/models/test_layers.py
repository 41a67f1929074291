"""A model without numbers: what files fill, and what tables of shapes are read from."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxllm.models import decoder, gpt, t5
from jaxllm.weights.dense import Dense

MODELS = {
    "decoder": (decoder.Decoder, decoder.TINY),
    "gpt": (gpt.Gpt, gpt.TINY),
    "t5": (t5.T5, t5.TINY),
}


@pytest.mark.parametrize("name", MODELS)
def test_without_rngs_a_model_is_what_tracing_its_making_gives(name):
    made, config = MODELS[name]
    traced = nnx.eval_shape(lambda: made(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    model = made(config, rngs=None, dtype=jnp.bfloat16)
    assert jax.tree.structure(model) == jax.tree.structure(traced)
    assert all(type(x) is jax.ShapeDtypeStruct for x in jax.tree.leaves(model))
    assert jax.tree.leaves(model) == jax.tree.leaves(traced)
    assert repr(model) == repr(traced)


def test_numbers_are_drawn_at_the_scale_asked_for():
    model = decoder.Decoder(decoder.TINY, rngs=nnx.Rngs(0))
    weight = model.layers[0].mlp.down.w.get_value()
    assert isinstance(weight, Dense) and weight.rows.dtype == jnp.float32
    K, N = weight.shape
    assert abs(float(weight.rows.std()) * K**0.5 - 1) < 3 / (2 * K * N) ** 0.5
