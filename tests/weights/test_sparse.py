"""Dense and sparse: what is kept apart, where it lies, and the product with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.storage import manifest
from jaxllm.weights import affine, sparse
from jaxllm.weights.matmul import bits_per_weight, matmul
from jaxllm.weights.planes import bit_planes

N, K, M = 38, 64, 20  # two blocks of 16 outputs, and 6 more


@pytest.fixture(scope="module")
def weight():
    rows = np.random.default_rng(0).standard_t(2, (N, K)).astype(np.float32)
    kept = np.asarray(sparse.highest(jnp.abs(jnp.asarray(rows)), M))
    base = affine.quantize(jnp.asarray(np.where(kept, 0, rows)).T, bits=2, group_size=64)
    return rows, kept, sparse.encode(base, jnp.asarray(rows), jnp.asarray(kept), M)


def test_the_highest_of_each_block_are_kept_and_a_short_one_has_its_share(weight):
    rows, kept, _ = weight
    for start, count in ((0, M), (16, M), (32, M * 6 // 16)):
        block, here = np.abs(rows[start : start + 16]), kept[start : start + 16]
        assert here.sum() == count
        assert block[here].min() >= block[~here].max()


def test_kept_weights_are_float16_and_the_others_are_the_bases(weight):
    rows, kept, w = weight
    base, got = (np.asarray(v.dequantize_rows(jnp.float32)) for v in (w.base, w))
    np.testing.assert_array_equal(got[kept], rows.astype(np.float16)[kept])
    np.testing.assert_array_equal(got[~kept], base[~kept])
    np.testing.assert_array_equal(w.is_kept(), kept)


def test_kept_weights_are_the_same_at_every_width_that_the_base_is_read_at(weight):
    rows, kept, _ = weight
    codes = np.random.default_rng(2).integers(0, 8, (N, K))
    tables = tuple(jnp.asarray(np.random.default_rng(b).normal(size=(N, 2**b))) for b in (1, 2, 3))
    base = bit_planes.from_codes(jnp.asarray(codes), tables, bits=3)
    w = sparse.encode(base, jnp.asarray(rows), jnp.asarray(kept), M)
    for bits in (1, 2, 3):
        plain, got = (np.asarray(bit_planes.read_at(v, bits).dequantize_rows()) for v in (base, w))
        np.testing.assert_array_equal(got[kept], rows.astype(np.float16)[kept])
        np.testing.assert_array_equal(got[~kept], plain[~kept])
    assert bit_planes.read_at(w, 1).kept is w.kept


def test_a_block_that_keeps_few_or_none_changes_nothing_else(weight):
    rows, _, w = weight
    kept = np.zeros((N, K), bool)
    kept[20, 3] = True  # of the second block; of the others, what lies at place 0 has room
    made = sparse.encode(w.base, jnp.asarray(rows), jnp.asarray(kept), M)
    base, got = (np.asarray(v.dequantize_rows(jnp.float32)) for v in (w.base, made))
    kept[[0, 32], 0] = True
    np.testing.assert_array_equal(got, np.where(kept, rows.astype(np.float16), base))


def test_the_product_is_that_of_the_weights_with_the_kept_ones_put_in(weight):
    rows, kept, w = weight
    x = np.random.default_rng(1).standard_normal((3, K), np.float32)
    want = x @ np.where(kept, rows, np.asarray(w.base.dequantize_rows(jnp.float32))).T
    np.testing.assert_allclose(matmul(jnp.asarray(x), w), want, rtol=1e-2, atol=1e-2)


def test_each_place_is_counted_as_32_bits(weight):
    w = weight[2]
    assert w.places.shape == (3, M) and w.places.dtype == np.uint16
    assert bits_per_weight(w) == bits_per_weight(w.base) + 32 * 3 * M / (N * K)


def test_what_a_file_says_of_it_makes_it_again(weight):
    w = weight[2]
    arrays = dict(manifest.arrays_of(w, "w"))
    again = manifest.build(manifest.describe(w, "w"), "w", lambda name, shape, dtype: arrays[name])
    assert jax.tree.structure(again) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, again, w)
