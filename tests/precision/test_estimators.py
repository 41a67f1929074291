"""What the next bit would change, estimated: the mathematics of projections and lines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.precision.estimators import errors, fit_line, fit_projection, random_projection
from jaxllm.weights.planes.adaptive_planes import draw, norm
from tests.precision.conftest import nested


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_of_64_rows_91_percent_of_draws_lie_within_15_percent():
    step, x = normal(0, 48, 32), normal(1, 32)
    e = float(jnp.linalg.norm(step @ x))
    keys = jax.random.split(jax.random.key(2), 3000)
    draws = jax.vmap(lambda key: random_projection(key, step, 64) @ x)(keys)
    found = np.asarray(jnp.linalg.norm(draws, axis=1)) / e
    assert 0.89 <= (np.abs(found - 1) < 0.15).mean() <= 0.93
    np.testing.assert_allclose((found**2).mean(), 1, atol=0.02)


def test_an_estimate_by_projection_scales_with_its_input_and_is_that_of_nested_codes():
    w = nested(normal(3, 24, 40))
    step = w.at(4).dequantize_rows() - w.at(3).dequantize_rows()
    G = random_projection(jax.random.key(0), step, 16)
    A = jax.random.normal(jax.random.key(0), (16, 24)) / 4
    np.testing.assert_allclose(G, A @ step, atol=1e-5)
    x = normal(4, 7, 40)
    np.testing.assert_allclose(norm(3 * x @ G.T), 3 * norm(x @ G.T), rtol=1e-5)


def test_a_line_is_that_of_least_squares_and_knows_how_good_it_is():
    rng = np.random.default_rng(5)
    found, e = rng.random(200).astype(np.float32), rng.random(200).astype(np.float32)
    line = fit_line(jnp.asarray(found), jnp.asarray(e))
    slope, offset = np.polyfit(found, e, 1)
    np.testing.assert_allclose([line.slope, line.offset], [slope, offset], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(line.r2, np.corrcoef(found, e)[0, 1] ** 2, atol=1e-4)


def test_steps_alike_in_all_directions_are_lines_and_steps_in_one_are_not():
    x = normal(6, 500, 32)
    alike = jnp.asarray(np.linalg.qr(np.asarray(normal(7, 48, 32)))[0])
    assert fit_line(norm(x), errors(x, alike)).r2 > 0.9999
    one = normal(8, 48, 1) @ normal(9, 1, 32)
    assert fit_line(norm(x), errors(x, one)).r2 < 0.3


def test_errors_that_are_all_equal_are_known_whatever_is_found():
    line = fit_line(jnp.ones(5), jnp.full((5,), 2.0))
    assert (line.slope, line.offset, line.r2) == (0.0, 2.0, 1.0)


def test_a_fitted_projection_is_never_worse_and_mends_a_bias():
    step, x = normal(10, 48, 4) @ normal(11, 4, 32), normal(12, 400, 32)  # four directions alone
    e = errors(x, step)

    def squares(G):
        return float(((norm(x @ G.T) - e) ** 2).mean())

    drawn = random_projection(jax.random.key(1), step, 16)
    fitted = fit_projection(drawn, x, e, steps=60)
    assert squares(fitted) < 0.5 * squares(drawn)
    with_zero = jnp.concatenate([x, jnp.zeros((1, 32))])
    fitted = fit_projection(drawn, with_zero, errors(with_zero, step), steps=60)
    assert squares(fitted) < 0.5 * squares(drawn)
    assert squares(fit_projection(drawn, x, e, steps=0)) <= squares(drawn) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_random_numbers_are_even_and_belong_to_their_row(dtype):
    x = normal(13, 4000, 24).astype(dtype)
    found = np.asarray(draw(x))
    assert 0 <= found.min() and found.max() < 1
    np.testing.assert_allclose(np.histogram(found, 8, (0, 1))[0] / 4000, 1 / 8, atol=0.02)
    np.testing.assert_array_equal(draw(x[7:9]), found[7:9])
    assert abs(np.corrcoef(found, np.asarray(norm(x)))[0, 1]) < 0.05
