"""Bytes counted from arrays, by hand for a small model and for trees of other formats."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.measure import report
from jaxllm.measure.report import report_bytes
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.pytree import pytree, static
from jaxllm.weights.dense import Dense

BLOCK = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32  # q o, k v, gate up down, norms
TABLE = 128 * 32


def make(config=TINY, dtype=jnp.float32):
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def test_a_decoder_is_counted_by_layer():
    got = report_bytes(make())
    assert {part.name: part.weights for part in got.layers} == {
        "embedding": TABLE,
        "layers.0": BLOCK,
        "layers.1": BLOCK,
        "norm": 32,
        "head": TABLE,
    }
    assert got.weights == 2 * TABLE + 2 * BLOCK + 32
    assert got.weight_bytes == 4 * got.weights
    assert got.bits_per_weight == 32


def test_a_tied_head_and_half_the_precision_take_fewer_bytes():
    got = report_bytes(make(dataclasses.replace(TINY, tied=True), jnp.bfloat16))
    assert got.weights == TABLE + 2 * BLOCK + 32
    assert got.weight_bytes == 2 * got.weights and got.bits_per_weight == 16


@pytree
class Nibbles:
    """A [K, N] weight of 4 bits: two codes a byte, one scale a column."""

    codes: jax.Array
    scale: jax.Array
    shape: tuple[int, int] = static()


def test_a_format_counts_with_its_logical_size_and_all_its_leaves(monkeypatch):
    monkeypatch.setattr(report, "FORMATS", (Dense, Nibbles))
    packed = Nibbles(jnp.zeros((16, 8), jnp.uint8), jnp.zeros((8,), jnp.float16), (32, 8))
    tree = {"layers": [{"w": packed}, {"w": nnx.Param(packed)}], "b": jnp.zeros((8,), jnp.float32)}
    got = report_bytes(tree)
    first = {part.name: part for part in got.layers}["layers.0"]
    assert (first.weights, first.weight_bytes) == (32 * 8, 16 * 8 + 8 * 2)
    assert first.bits_per_weight == 8 * 144 / 256
    assert first.dtypes == ("float16", "uint8")


def test_a_shared_array_counts_once():
    table = jnp.zeros((8, 4), jnp.float32)
    got = report_bytes({"a": table, "b": Dense(table), "c": jnp.zeros((4,), jnp.float32)})
    assert [part.name for part in got.layers] == ["a", "c"]
    assert (got.weights, got.weight_bytes) == (36, 144)


def test_the_report_is_a_table_for_people_and_json_for_programs():
    got = report_bytes({"layers": [np.zeros((1000, 2), np.float16), np.zeros((4,), np.float32)]})
    assert str(got).splitlines() == [
        "part      weights  bytes  bits/weight  arrays",
        "layers.0    2,000  4,000       16.000  float16",
        "layers.1        4     16       32.000  float32",
        "all         2,004  4,016       16.032  float16 float32",
    ]
    found = json.loads(json.dumps(dataclasses.asdict(got)))
    assert found["weight_bytes"] == 4016 and found["bits_per_weight"] == 8 * 4016 / 2004
    assert found["layers"][1] == {
        "name": "layers.1",
        "weight_bytes": 16,
        "weights": 4,
        "dtypes": ["float32"],
    }


def test_a_tree_without_arrays_is_refused():
    with pytest.raises(ValueError, match="needs a tree with arrays, got dict"):
        report_bytes({})
