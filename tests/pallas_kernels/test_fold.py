"""Products of a few rows where the codes stand, against float64 in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fold
from pallas_kernels.any_precision_gemm import few_rows as any_precision_gemm
from pallas_kernels.codebook_gemm import few_rows as codebook_gemm
from pallas_kernels.nested_fp_gemm import few_rows as nested_fp_gemm
from pallas_kernels.words import from_blocks


@pytest.mark.parametrize("bits", range(1, 9))
def test_sums_over_any_words_are_those_of_their_codes(bits):
    rng = np.random.default_rng(bits)
    words = jnp.asarray(rng.integers(0, 2**32, (5, 3, bits), np.uint32))
    x = jnp.asarray(rng.integers(-8, 9, (2, 90)), jnp.float32)  # whole: every order of a sum is exact
    codes = np.asarray(from_blocks(words, 96), np.float64)

    @jax.jit
    def product(x, words):
        return fold.folded(fold.packed_inputs(x, bits), (words,), fold.words_apart, fold.packed_sums)

    np.testing.assert_array_equal(product(x, words), np.asarray(x, np.float64) @ codes[:, :90].T)


def test_a_tree_of_selections_is_a_look_up():
    codes, levels = jnp.arange(8, dtype=jnp.uint32), [jnp.full(8, 10.0 + i) for i in range(8)]
    masks = [(codes & np.uint32(1 << b)) != 0 for b in range(3)]
    np.testing.assert_array_equal(fold.chosen(masks, levels), 10.0 + np.arange(8))


def test_levels_in_pairs_are_those_of_the_table_but_for_what_is_too_small_to_count():
    rng = np.random.default_rng(2)
    table = rng.standard_normal((5, 16)) * 10.0 ** np.array([[0], [-4], [3], [-6], [0]])
    table[4, :3] = 0.0, 2.0**-24, -(2.0**-20)  # no normal float16
    table = jnp.asarray(table, jnp.float16)
    codes = jnp.asarray(rng.integers(0, 16, (5, 64)), jnp.uint32)
    pairs, back = fold.in_pairs(table)
    masks = [(codes & np.uint32(1 << b)) != 0 for b in range(4)]
    found = fold.chosen_of_pairs(masks, [pairs[:, i, None] for i in range(8)])
    found = np.asarray(found * np.float32(2.0**112) * back[:, None])
    np.testing.assert_array_equal(found, np.take_along_axis(np.asarray(table, np.float32), codes, axis=1))


def test_a_table_that_holds_no_number_gives_no_number():
    table = jnp.ones((3, 16), jnp.float16).at[1, 5].set(jnp.inf).at[2, 0].set(jnp.nan)
    np.testing.assert_array_equal(np.isfinite(fold.in_pairs(table)[1]), [True, False, False])


@pytest.mark.parametrize("size", [3e38, 1.0, 1e-30, 0.0])
def test_rows_brought_to_an_exponent_come_back_exactly(size):
    x = jnp.asarray(np.float32([[size, size / 3, -size / 7]]))
    scaled, back = fold.to_exponent(x, 97)
    assert size < 2.0**-29 or 2.0**96 <= jnp.abs(scaled).max() < 2.0**97
    np.testing.assert_array_equal(scaled * back, x)


def test_nothing_of_the_codes_is_unpacked_ahead_of_the_rows(usual_compiler):
    N, K = 256, 1024
    words = jax.ShapeDtypeStruct((N, K // 32, 4), jnp.uint32)

    def product(x, words):
        return fold.folded(fold.packed_inputs(x, 4), (words,), fold.words_apart, fold.packed_sums)

    lowered = jax.jit(product).lower(jax.ShapeDtypeStruct((4, K), jnp.float32), words)
    memory = lowered.compile(usual_compiler).memory_analysis()
    copy, sums = words.size * 4, 4 * N * K // 32  # codes tied to the row, and what is summed of them
    assert memory.temp_size_in_bytes < 1.2 * (copy + sums)  # unpacked they would be 4 N K


def words_of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


def of_words(x, words):
    return fold.folded(fold.packed_inputs(x, 4), (words,), fold.words_apart, fold.packed_sums)


def of_planes(x, planes, levels):
    return any_precision_gemm.any_precision_gemm(x, planes, (levels,))


LEVELS = jax.ShapeDtypeStruct((256, 16), jnp.float16)
BYTES = jax.ShapeDtypeStruct((256, 1024), jnp.uint8)
FP16 = functools.partial(nested_fp_gemm.nested_fp_gemm, mode="fp16")


@pytest.mark.parametrize(
    "product, weight",
    [
        (of_words, (words_of(256, 32, 4),)),
        (FP16, (BYTES, BYTES)),
        pytest.param(codebook_gemm.codebook_gemm, (words_of(256, 32, 4), LEVELS), marks=pytest.mark.slow),
        pytest.param(of_planes, (words_of(6, 256, 32), LEVELS), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("M", [1, 3])
def test_a_decoding_loop_copies_the_codes_of_one_layer_at_a_time(product, weight, M, usual_compiler):
    layers = [weight] * 8

    def steps(x, layers):
        def step(_, x):
            for layer in layers:
                x = x + product(x, *layer).sum(axis=1, keepdims=True)
            return x

        return jax.lax.fori_loop(0, 10, step, x)

    lowered = jax.jit(steps).lower(jax.ShapeDtypeStruct((M, 1024), jnp.float32), layers)
    memory = lowered.compile(usual_compiler).memory_analysis()
    size = sum(a.size * a.dtype.itemsize for a in weight)
    assert memory.temp_size_in_bytes < 3 * size  # a layer's and its sums; all would be 8
