"""The product with a stored weight means the same for every format, in every type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.weights.dense import Dense
from jaxllm.weights.matmul import dequantize, matmul


@pytest.fixture(scope="module")
def operands():
    x = jax.random.normal(jax.random.key(0), (3, 5, 24))
    w = jax.random.normal(jax.random.key(1), (24, 16))
    return x, w


def test_dense_and_plain_arrays_give_x_times_w(operands):
    x, w = operands
    want = np.asarray(x) @ np.asarray(w)
    np.testing.assert_allclose(matmul(x, w), want, atol=1e-5)
    np.testing.assert_allclose(matmul(x, Dense(w.T)), want, atol=1e-5)


def test_dense_is_lossless_and_has_the_logical_shape(operands):
    _, w = operands
    stored = Dense(w.T)
    assert stored.shape == w.shape and stored.dtype == w.dtype
    assert (dequantize(stored) == w).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_sixteen_bit_products_accumulate_in_float32(operands, dtype, rows):
    x, w = (a.astype(dtype) for a in operands)
    x = x.reshape(-1, 24)[:rows]
    want = np.asarray(x, np.float32) @ np.asarray(w, np.float32)
    got = matmul(x, Dense(w.T), jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert matmul(x, Dense(w.T)).dtype == dtype


def test_one_row_keeps_its_leading_axes(operands):
    x, w = operands
    one = x[:1, :1].astype(jnp.bfloat16)
    assert matmul(one, Dense(w.astype(jnp.bfloat16).T)).shape == (1, 1, 16)
    assert matmul(one[0, 0], Dense(w.astype(jnp.bfloat16).T)).shape == (16,)


def test_wrong_inner_sizes_and_unknown_formats_are_refused(operands):
    x, w = operands
    with pytest.raises(ValueError, match=r"matmul: .*x\.shape=\(3, 5, 24\), w\.shape=\(16, 24\)"):
        matmul(x, w.T)

    class Unknown:
        shape = (24, 16)

    with pytest.raises(TypeError, match="no rule for a weight of type Unknown"):
        getattr(matmul, "__wrapped__", matmul)(x, Unknown())  # beneath the tests' type check
