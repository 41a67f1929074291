"""Columns at 2 and 4 bits and residuals at 16 in one matrix: every bit counted, and the product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mixed_columns_example import K, N, example, mask_of, matmul, num_bits, solve, values

from jaxllm.weights import mixed_columns
from jaxllm.weights.mixed_columns import stored_bits
from pallas_kernels.words import from_words, to_words


@pytest.fixture(scope="module")
def layer():
    return example()


@pytest.fixture(scope="module")
def w(layer):
    return solve(*layer, mask_of(1, 4, 5), outliers=0.02)


# -- bits


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_in_words_come_back_the_first_lowest(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 5, 64)).astype(np.uint32)
    words = to_words(jnp.asarray(codes), bits)
    assert words.shape == (3, 5, 2 * bits) and (from_words(words, bits) == codes).all()
    assert (np.asarray(words[..., 0]) & (2**bits - 1) == codes[..., 0]).all()


@pytest.mark.parametrize(
    "n, k, groups, p", [(48, 192, (1, 4, 5), 0.02), (20, 100, (0, 6), 0.01), (1, 1, (), 0.0)]
)
def test_the_count_of_bits_is_what_is_stored(n, k, groups, p):
    rows, stats = example(n, k)
    for where in ("exclusive", "none"):
        w = solve(rows, stats, mask_of(*groups, size=-(-k // 16)), outliers=p, where=where, group4=32)
        assert num_bits(w) == stored_bits(k, n, len(groups), group4=32, outliers=p, where=where)


@pytest.mark.parametrize(
    "r, group4, p, want",
    [
        (0.0, 128, 0.0, 2.453),
        (0.125, 16, 0.0, 2.803),
        (0.25, 16, 0.0, 3.152),
        (0.25, 128, 0.0, 2.879),
        (0.25, 128, 0.002, 2.943),
    ],
)
def test_the_count_of_bits_is_the_papers_formula_in_a_large_matrix(r, group4, p, want):
    """2.848 and 2.912, as published, where three groups share 16 bits (`to_interleaved`) and not 18."""
    size = 4096
    four = int(r * size / 16)
    got = stored_bits(size, size, four, group4=group4, outliers=p) / size**2
    formula = 2 + 2 * r + (1 - r) * (6 / 16 + 20 / 256) + r * 20 / group4 + 32 * p
    assert abs(got - formula) < 1e-3 and abs(got - want) < 1e-3
    packed = formula - (1 - r) * (6 / 16 - 16 / 48)
    if (r, group4) == (0.25, 128):
        assert packed == pytest.approx({0: 2.848, 0.002: 2.912}[p], abs=1e-3)


# -- the product


@pytest.mark.parametrize(
    "n, k, groups, p",
    [
        (48, 192, (), 0.0),
        (48, 192, (1, 4, 5), 0.002),
        (20, 100, (0, 6), 0.02),
        pytest.param(33, 64, (0, 1, 2, 3), 0.02, marks=pytest.mark.slow),
        (1, 1, (0,), 0.0),
    ],
)
def test_the_product_is_that_of_the_rows_and_of_the_factored_form(n, k, groups, p):
    rows, stats = example(n, k)
    w = solve(rows, stats, mask_of(*groups, size=-(-k // 16)), outliers=p)
    x = jax.random.normal(jax.random.key(0), (2, 3, k))
    want = np.asarray(x) @ np.asarray(values(w)).T
    np.testing.assert_allclose(matmul(x, w), want, rtol=1e-5, atol=1e-5)
    assert values(w).shape == (n, k)
    if w.two is not None:  # sum of q x less zero times sum of x, once a group
        moved = np.asarray(mixed_columns.permute(x, w)).reshape(2, 3, -1, 16)[:, :, : w.two.shape[1]]
        codes = np.asarray(from_words(w.two[..., None], 2), np.float32)
        scale, zero_point = map(np.asarray, mixed_columns.two_bit_steps(w))
        sums = np.einsum("abci,nci->abnc", moved, codes) - zero_point * moved.sum(-1)[:, :, None]
        dense = np.einsum("abci,nci->abn", moved, (codes - zero_point[..., None]) * scale[..., None])
        np.testing.assert_allclose((sums * scale).sum(-1), dense, rtol=1e-4, atol=1e-5)


def test_steps_known_before_the_codes_give_the_same_rows(layer, w):
    """What the paper overlaps with loading the codes: the order of the two does not change a bit."""
    scale, zero_point = jax.jit(mixed_columns.two_bit_steps)(w)  # without codes
    without = dataclasses.replace(w, two=jnp.zeros_like(w.two))
    assert all(
        (a == b).all() for a, b in zip(mixed_columns.two_bit_steps(without), (scale, zero_point), strict=True)
    )
    codes = from_words(w.two[..., None], 2).astype(jnp.float32)
    late = (codes - zero_point[..., None]) * scale[..., None]
    plain = dataclasses.replace(w, outlier=None, place=None)
    assert (jax.jit(mixed_columns.permuted_rows)(plain)[:, : late[0].size] == late.reshape(N, -1)).all()


def test_sixteen_bit_inputs_accumulate_in_float32(w):
    x = jax.random.normal(jax.random.key(0), (3, K)).astype(jnp.bfloat16)
    got = matmul(x, w)
    want = np.asarray(x, np.float32) @ np.asarray(values(w).astype(jnp.bfloat16), np.float32).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_permuted_columns_hold_the_same_numbers(w):
    assert sorted(np.asarray(w.order).tolist()) == list(range(12)) and np.asarray(w.order)[-3:].tolist() == [
        1,
        4,
        5,
    ]
    wide = np.asarray(mixed_columns.permuted_rows(w)).reshape(N, 12, 16)
    back = np.asarray(values(w)).reshape(N, 12, 16)
    assert (back[:, np.asarray(w.order)] == wide).all()
    x = jnp.arange(K, dtype=jnp.float32)
    assert (np.asarray(mixed_columns.permute(x, w)).reshape(12, 16)[:, 0] == 16 * np.asarray(w.order)).all()


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)])
def test_a_weight_cut_over_devices_gives_the_same_product(spec):
    rows, stats = example(64, 64)
    w = solve(rows, stats, mask_of(2, size=4), outliers=0.02)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    specs = w.partition_specs(spec)
    assert specs.two == P("model", None) and specs.order == P(None)
    placed = jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)), w, specs)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(matmul(x, placed), matmul(x, w), rtol=1e-5, atol=1e-5)


def test_the_weight_survives_tree_maps_and_vmap(w):
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    x = jax.random.normal(jax.random.key(0), (2, 3, K))
    got = jax.jit(jax.vmap(mixed_columns.matmul))(x, stack)
    np.testing.assert_allclose(got, matmul(x, w), rtol=1e-5, atol=1e-5)
    assert w.shape == (K, N) and w.dtype == jnp.float32
