"""Scores of heads are learnt once, kept in a file, and drop whole heads of any context."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.cache import repack
from jaxllm.decoding import prefill
from jaxllm.eviction import kvzip
from jaxllm.eviction.budget import evict
from jaxllm.eviction.heads import broadcast_head_scores, head_scores, load_heads, save_heads
from jaxllm.models.decoder import TINY, Decoder

CONFIG = dataclasses.replace(TINY, layers=3, windows=(None, 8, None), context=128)
ROWS = [list(range(3, 43)), [5, 9, 2, 7] * 8]


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_heads_learnt_from_one_text_keep_all_or_nothing_of_another(model, tmp_path):
    sample = kvzip.kvzip_scores(model, prefill.prefill(model, ROWS, slack=64), ROWS)
    heads = head_scores(sample)
    np.testing.assert_array_equal(heads, np.asarray(sample).max((1, 3)))
    save_heads(heads, tmp_path / "a", model)
    np.testing.assert_array_equal(load_heads(tmp_path / "a", model=model), heads)
    save_heads(heads[::-1], tmp_path / "b", model)
    both = load_heads(tmp_path / "a", tmp_path / "b", model=model)
    np.testing.assert_array_equal(both, np.maximum(heads, heads[::-1]))

    cache = prefill.prefill(model, [list(range(50, 90)), [8, 1] * 10])
    scores = broadcast_head_scores(heads, cache, prefix=2)
    small = evict(cache, scores, ratio=0.5, budget="whole_heads", prefix=2)
    best = np.argsort(-np.asarray(heads).ravel())[:2]
    for i, layer in enumerate(repack.positions_by_head(small)):
        for b, n in enumerate((40, 20)):
            for h in range(2):
                whole = 2 * i + h in best
                np.testing.assert_array_equal(layer[b][h], np.arange(n if whole else 2))
    fewer = evict(small, broadcast_head_scores(heads, small), ratio=0.25, budget="whole_heads", prefix=2)
    assert [len(h) for layer in repack.positions_by_head(fewer) for h in layer[0]].count(40) == 1


def test_other_models_damage_and_wrong_shapes_are_one_line(model, tmp_path):
    save_heads(jnp.ones((2, 2)), tmp_path / "a", model)
    with pytest.raises(FileExistsError, match="the output must not exist yet"):
        save_heads(jnp.ones((2, 2)), tmp_path / "a", model)
    other = Decoder(dataclasses.replace(CONFIG, width=64), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot be used with this model: it is of a model of"):
        load_heads(tmp_path / "a", model=other)
    with pytest.raises(FileNotFoundError, match=r"heads\.json must be in the directory"):
        load_heads(tmp_path / "none", model=model)
    meta = json.loads((tmp_path / "a" / "heads.json").read_text())
    (tmp_path / "a" / "heads.json").write_text(json.dumps(meta | {"scores": [[1.0]]}))
    with pytest.raises(ValueError, match=r"scores must be rows of 2 numbers, got \[\[1.0\]\]"):
        load_heads(tmp_path / "a", model=model, verify=False)
    with pytest.raises(ValueError, match=r"heads\.json' must have \d+ bytes, got"):
        load_heads(tmp_path / "a", model=model)
    cache = prefill.prefill(model, ROWS)
    with pytest.raises(ValueError, match=r"heads must be \[L, K\] = \(2, 2\) of this cache, got \(3, 2\)"):
        broadcast_head_scores(jnp.ones((3, 2)), cache)
    with pytest.raises(ValueError, match="must hold more than the prefix, got prefix=40, 40 tokens"):
        broadcast_head_scores(jnp.ones((2, 2)), cache, prefix=40)
