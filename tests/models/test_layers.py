"""A model without numbers: what files fill, and what tables of shapes are read from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert.families.family import ACTIVATIONS, activation
from jaxllm.models import decoder, gpt, layers, t5
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


@pytest.mark.parity
def test_activations_are_those_of_transformers_by_all_its_names_for_them(torch):
    from transformers.activations import ACT2CLS, ACT2FN

    assert set(ACT2CLS) - {"prelu", "xielu"} <= set(ACTIVATIONS)  # these have weights
    assert set(ACTIVATIONS.values()) == set(layers.ACTIVATIONS)
    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    for name in set(ACTIVATIONS) & set(ACT2CLS):
        want = ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(
            layers.ACTIVATIONS[activation(name)](jnp.asarray(x)), want, rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="activation must be one of silu, .* got 'prelu'"):
        activation("prelu")


def test_a_norm_without_scale_and_shift_is_one_whose_scale_is_1():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    bare, plain = (
        layers.LayerNorm(8, eps=1e-5, affine=a, rngs=nnx.Rngs(0), dtype=x.dtype) for a in (False, True)
    )
    assert not jax.tree.leaves(bare)
    np.testing.assert_array_equal(bare(x), plain(x))
