"""A prepared text is the same after a stay on the disk, for its own model only."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.cache.coded import QuantizedRows
from jaxllm.models import t5
from jaxllm.models.decoder import TINY, Decoder

CONFIG = dataclasses.replace(TINY, layers=3, windows=(None, 8, None), context=128)
ROWS = [list(range(3, 43)), [5, 9, 2, 7] * 8]


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.slow  # the quick sisters: of plain models in tests/models, of codes in tests/cache/test_coded.py
@pytest.mark.parametrize("bits", [None, 4])
def test_chunks_of_a_text_fill_the_cache_that_one_pass_fills(model, bits):
    whole, parts = (jl.prefill(model, ROWS, slack=16, bits=bits, chunk=n) for n in (64, 12))
    np.testing.assert_array_equal(whole.lengths, [40, 32])
    forward = jax.jit(lambda cache: model(jnp.asarray([[8], [9]]), jl.cache.with_capacity(cache, 66))[0])
    np.testing.assert_allclose(forward(parts), forward(whole), atol=2e-2 if bits else 1e-5)


@pytest.mark.parametrize("bits", [pytest.param(None, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("ratio", [pytest.param(None, marks=pytest.mark.slow), 0.3])
def test_a_saved_cache_comes_back_bit_for_bit(model, tmp_path, bits, ratio):
    cache = jl.prefill(model, ROWS, slack=16, bits=bits)
    if ratio is not None:
        cache = jl.eviction.evict(cache, jl.eviction.random_scores(model, ROWS), ratio=ratio)
    jl.cache.save(cache, tmp_path / "prepared", model)
    again = jl.cache.load(tmp_path / "prepared", model)
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    jax.tree.map(np.testing.assert_array_equal, again, cache)
    outs = [jl.generate(model, None, [[8], [9]], max_new_tokens=3, cache=c) for c in (cache, again)]
    assert outs[0] == outs[1]
    if ratio is not None:  # numbers that point beyond what there is, in a file that its author signed
        for name in ("page_offsets", "page_lengths", "context_of_request"):
            far = dataclasses.replace(cache.context, **{name: getattr(cache.context, name) + 1000})
            jl.cache.save(dataclasses.replace(cache, context=far), tmp_path / name, model)
            with pytest.raises(ValueError, match=f"cache.load: .*{name} must lie in 0 to .*got 1"):
                jl.cache.load(tmp_path / name, model)
        for number, (why, other) in enumerate(misfits(cache)):
            jl.cache.save(other, tmp_path / str(number), model)
            with pytest.raises(ValueError, match=f"cache.load: .*: {why}"):
                jl.cache.load(tmp_path / str(number), model)


def misfits(cache):
    """Caches of which one array fits neither the others nor the model, and what is said of them."""
    context, tail = cache.context, cache.tail
    for why, change in (
        (
            r"page_offsets must be of shape \(2, \d+\), got \(\d+,\)",
            {"page_offsets": context.page_offsets[0]},
        ),
        ("page_head must be int32, got float32", {"page_head": context.page_head.astype(jnp.float32)}),
        ("scores must be of shape", {"scores": context.scores[:, 1:]}),
    ):
        yield why, dataclasses.replace(cache, context=dataclasses.replace(context, **change))
    for why, change in (
        ("it must hold 3 layers, got keys, values, windows of", {"keys": tail.keys[1:]}),
        ("keys of layer 0 must be of shape", {"lengths": jnp.zeros(3, jnp.int32)}),
        ("extents must be of shape", {"extents": tail.extents[:1]}),
    ):
        yield why, dataclasses.replace(cache, tail=dataclasses.replace(tail, **change))
    if isinstance(context.keys, QuantizedRows):
        wide = dataclasses.replace(context.keys, words=jnp.repeat(context.keys.words, 2, axis=2))
        yield (
            r"keys must have \d+ words a row",
            dataclasses.replace(cache, context=dataclasses.replace(context, keys=wide)),
        )


def test_another_model_damage_and_a_place_that_is_taken_are_one_line(model, tmp_path):
    cache = jl.prefill(model, ROWS)
    jl.cache.save(cache, tmp_path / "a", model)
    with pytest.raises(FileExistsError, match="the output must not exist yet"):
        jl.cache.save(cache, tmp_path / "a", model)
    with pytest.raises(ValueError, match="it holds another model's keys"):
        jl.cache.load(tmp_path / "a", Decoder(CONFIG, rngs=nnx.Rngs(1)))
    with pytest.raises(FileNotFoundError, match=r"cache\.json must be in the directory"):
        jl.cache.load(tmp_path / "b", model)
    meta = json.loads((tmp_path / "a" / "cache.json").read_text())
    del meta["cache"]["fields"]["lengths"]
    (tmp_path / "a" / "cache.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"cache\.load: .*cache\.json' must have \d+ bytes, got"):
        jl.cache.load(tmp_path / "a", model)
    with pytest.raises(
        ValueError, match="cannot be opened with this model: .* must have the fields of DenseCache"
    ):
        jl.cache.load(tmp_path / "a", model, verify=False)
    with pytest.raises(ValueError, match=r"prefill: rows must have 1 to 128 tokens, got \[0\]"):
        jl.prefill(model, [[]])
    with pytest.raises(ValueError, match=r"prefill: token ids must lie in \[0, 128\), got token=128"):
        jl.prefill(model, [[128]])
    with pytest.raises(ValueError, match="prefill: the model must be a decoder alone, got T5"):
        jl.prefill(t5.T5(t5.TINY, rngs=nnx.Rngs(0)), [[1]])
