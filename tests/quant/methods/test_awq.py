"""AWQ: what scaling and clipping may cost, what they gain, and that the format multiplies as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.quant.methods.awq import Awq
from jaxllm.quant.methods.rtn import Rtn
from jaxllm.quant.statistics import Stats
from jaxllm.weights.scaled import Scaled, matmul

N, K, GROUP = 24, 150, 32


@pytest.fixture(scope="module")
def layer():
    """Rows and inputs of which a few carry much."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (N, K)) * 0.1
    x = jax.random.normal(keys[1], (200, K)) * jnp.exp(1.5 * jax.random.normal(keys[2], (K,)))[None]
    return rows, x


@pytest.fixture(scope="module")
def stored(layer):
    rows, x = layer
    return Awq(bits=3, group_size=GROUP).quantize(rows, stats(x), name="w", dtype=jnp.float32)


def stats(x):
    return Stats(mean=jnp.abs(x).mean(0), sample=x)


def loss(rows, stored, x):
    return float(jnp.sum(((rows - stored.dequantize_rows()) @ x.T) ** 2))


@pytest.mark.parametrize("bits", [2, *(pytest.param(b, marks=pytest.mark.slow) for b in (3, 4))])
def test_scaling_beats_round_to_nearest_and_clipping_beats_scaling_alone(layer, bits):
    rows, x = layer
    sizes = {"bits": bits, "group_size": GROUP}
    plain = Rtn(**sizes).quantize(rows, Stats(), name="w", dtype=jnp.float32)
    scaled = Awq(**sizes, clip=False).quantize(rows, stats(x), name="w", dtype=jnp.float32)
    clipped = Awq(**sizes).quantize(rows, stats(x), name="w", dtype=jnp.float32)
    assert loss(rows, clipped, x) < loss(rows, scaled, x) < 0.7 * loss(rows, plain, x)


def test_with_one_power_and_no_clipping_it_is_round_to_nearest(layer):
    rows, x = layer
    got = Awq(bits=3, group_size=GROUP, steps=1, clip=False).quantize(
        rows, stats(x), name="w", dtype=jnp.float32
    )
    want = Rtn(bits=3, group_size=GROUP).quantize(rows, Stats(), name="w", dtype=jnp.float32)
    assert (got.inverse == 1).all()
    jax.tree.map(np.testing.assert_array_equal, got.weight, want)


def test_the_product_is_that_with_the_effective_weight(layer, stored):
    _, x = layer
    want = np.asarray(x, np.float64) @ np.asarray(stored.dequantize_rows(), np.float64).T
    np.testing.assert_allclose(matmul(x, stored), want, rtol=1e-4, atol=1e-3)
    assert matmul(x[0], stored).shape == (N,)
    assert matmul(x.reshape(4, 50, K), stored).shape == (4, 50, N)
    half = x.astype(jnp.bfloat16)
    assert matmul(half, stored).dtype == jnp.float32
    scale = np.abs(want).max()
    np.testing.assert_allclose(matmul(half, stored), want, atol=0.02 * scale)


def test_the_scale_of_the_statistics_does_not_matter(layer, stored):
    rows, x = layer
    for power in (-30, 20):
        method = Awq(bits=3, group_size=GROUP)
        s = Stats(mean=jnp.abs(x).mean(0) * 2.0**power, sample=x * 2.0 ** (power // 2))
        again = method.quantize(rows, s, name="w", dtype=jnp.float32)
        np.testing.assert_array_equal(again.weight.codes.words, stored.weight.codes.words)


def test_dead_inputs_and_statistics_of_nothing_work(layer):
    rows, x = layer
    x = x.at[:, ::7].set(0.0)
    method = Awq(bits=3, group_size=GROUP)
    dead = method.quantize(rows, stats(x), name="w", dtype=jnp.float32)
    assert bool(jnp.isfinite(dead.dequantize_rows()).all()) and (dead.inverse[::7] == 1).all()
    nothing = method.quantize(rows, stats(x * 0), name="w", dtype=jnp.float32)
    plain = Rtn(bits=3, group_size=GROUP).quantize(rows, Stats(), name="w", dtype=jnp.float32)
    np.testing.assert_array_equal(nothing.dequantize_rows(), plain.dequantize_rows())


def test_the_format_has_places_on_a_mesh_and_survives_tree_map_and_vmap(layer, stored):
    _, x = layer
    specs = stored.partition_specs(P("a", "b"))
    assert specs.inverse == P("a") and specs.weight.scale == P("a", "b")
    assert stored.shape == (K, N) and stored.dtype == jnp.float32
    again = jax.tree.map(lambda leaf: leaf + 0, stored)
    assert type(again) is Scaled
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), stored)
    out = jax.vmap(lambda one: matmul(x, one))(stack)
    np.testing.assert_allclose(out[1], matmul(x, stored), rtol=1e-5, atol=1e-4)


def test_a_single_weight_and_a_constant_row_work(layer):
    rows, x = layer
    one = Awq(bits=4).quantize(jnp.full((1, 1), 0.5), stats(x[:, :1]), name="w", dtype=jnp.bfloat16)
    np.testing.assert_allclose(one.dequantize_rows(), 0.5, atol=1e-3)
    assert one.dtype == jnp.bfloat16


def test_what_makes_no_sense_is_refused(layer):
    rows, x = layer
    with pytest.raises(ValueError, match="awq: bits must be 1 to 8, got bits=9"):
        Awq(bits=9)
    with pytest.raises(ValueError, match="awq: steps must be at least 1, got steps=0"):
        Awq(steps=0)
    with pytest.raises(ValueError, match="awq: calibration must give mean, sample, got none"):
        Awq().quantize(rows, Stats(), name="w", dtype=jnp.float32)
    with pytest.raises(ValueError, match="awq: weights must be finite, got NaN"):
        Awq().quantize(rows.at[0, 0].set(jnp.nan), stats(x), name="w", dtype=jnp.float32)
    with pytest.raises(ValueError, match="awq: statistics must be of K inputs, got K=150"):
        Awq().quantize(rows, stats(x[:, :5]), name="w", dtype=jnp.float32)
