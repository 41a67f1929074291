"""Statistics that are counted rather than added up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.quant import sums

counted = jax.jit(sums.most_in_or_above)


def thresholds(x):
    return sums.thresholds(np.asarray(counted(jnp.asarray(x))), x.shape[1])


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    x = (rng.standard_t(2, (sums.TOKENS_AT_ONCE + 44, 70)) * 10.0 ** rng.uniform(-6, 4, 70)).astype(
        np.float32
    )
    x[7] = 0
    x[:, 3] = 0
    x[11, :2] = 2.0**-24, -(2.0**-25)  # the least that counts, and half of it
    x[12, 0] = 2.0**24
    return x


def exact(x):
    return np.sort(np.abs(x), axis=1)[:, ::-1].max(0)


def test_thresholds_bound_every_token_fall_and_are_a_64th_too_high_at_most(x):
    got, want = thresholds(x), exact(x)
    counts = want >= 2.0**-24
    assert (got >= np.where(counts, want, 0)).all() and (got <= want * (1 + 1 / 64))[counts].all()
    assert (got[~counts] == 0).all() and (np.diff(got) <= 0).all()


def test_thresholds_of_two_texts_are_the_greater_of_both(x):
    a, b = thresholds(x[:100]), thresholds(x[100:])
    np.testing.assert_array_equal(np.maximum(a, b), thresholds(x))


def test_one_token_and_one_input_are_enough():
    got = thresholds(np.float32([[3.0, -5.0, 0.0]]))
    np.testing.assert_array_equal(got, np.float32([5 + 1 / 16, 3 + 1 / 32, 0]))
    assert thresholds(np.float32([[1.0]])).shape == (1,)
