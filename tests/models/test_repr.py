"""A model and a cache print in a line what they are and never their numbers, traced and abstract ones too."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models import decoder, gpt, t5

MAKE = {
    "decoder": lambda: decoder.Decoder(decoder.TINY, rngs=nnx.Rngs(0)),
    "gpt": lambda: gpt.Gpt(gpt.TINY, rngs=nnx.Rngs(0)),
    "t5": lambda: t5.T5(t5.TINY, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_a_model_prints_in_a_line_what_it_is(make):
    model = make()
    held = sum(x.nbytes for x in jax.tree.leaves(model))
    text = repr(model)
    assert text.startswith(f"{type(model).__name__}({model.config.layers} layers, width {model.config.width}")
    assert f"{held:,} bytes, 32.00 bits a weight" in text and "float32" in text
    assert "\n" not in text and "Array" not in text
    assert repr(nnx.eval_shape(make)) == text == str(model)


def test_a_quantized_model_prints_its_bits():
    small = jl.quantize(decoder.Decoder(decoder.TINY, rngs=nnx.Rngs(0)), jl.Rtn(bits=4, group_size=16))
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(small)) / jl.report_bytes(small).weights
    assert f"{bits:.2f} bits a weight" in repr(small)


def test_a_cache_prints_in_a_line_what_it_holds():
    model = decoder.Decoder(decoder.TINY, rngs=nnx.Rngs(0))
    cache = jl.prefill(model, [[1, 2, 3], [4, 5]])
    held = jl.cache.num_bytes(cache)
    assert (
        repr(cache) == f"DenseCache(tokens [3, 2] of {cache.capacity}, 2 layers of float32, {held:,} bytes)"
    )
    small = jl.eviction.evict(cache, jnp.ones((2, 2, 2, 3)), ratio=0.5)
    assert repr(small).startswith("PagedCache(") and "tail=DenseCache(tokens [3, 2]" in repr(small)
    assert "2 layers of 4 bits" in repr(model.make_cache(1, 8, bits=4))
    seen = []
    jax.eval_shape(lambda cache: seen.append(repr(cache)), cache)
    assert seen[0].startswith("DenseCache(2 requests of") and "\n" not in seen[0]
