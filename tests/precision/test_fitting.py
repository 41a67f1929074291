"""Which estimator a linear gets: what it saves in bits, less what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.precision.estimators import bits_of_projection, bits_saved, errors
from jaxllm.precision.fitting import fit_estimator
from jaxllm.weights.planes.adaptive_planes import always
from jaxllm.weights.planes.bit_planes import from_codes
from tests.precision.conftest import nested


def rng(seed):
    return np.random.default_rng(seed)


def test_exact_errors_save_the_most_and_chance_saves_nothing():
    e = rng(0).lognormal(size=4000).astype(np.float32)
    guesses = {
        "exact": e,
        "noisy": e * rng(1).lognormal(0, 0.5, 4000),
        "chance": rng(2).random(4000),
        "wrong": -e,
    }
    saved = {
        name: bits_saved(jnp.asarray(g, jnp.float32), jnp.asarray(e), [0.5]) for name, g in guesses.items()
    }
    assert saved["exact"] > saved["noisy"] > 0.05 > abs(saved["chance"]) and saved["wrong"] < -0.2
    half = np.sort(e.astype(np.float64) ** 2)[::-1]
    np.testing.assert_allclose(saved["exact"], half[:2000].sum() / half.sum() - 0.5, rtol=1e-6)


def test_bits_saved_are_those_that_chance_would_read_more():
    """What remains behind a choice of half is what chance leaves at half and `saved` more."""
    e = np.array([4.0, 3.0, 2.0, 1.0], np.float32)
    saved = bits_saved(jnp.asarray(e), jnp.asarray(e), [0.5])
    np.testing.assert_allclose((1 - (0.5 + saved)) * (e**2).sum(), (e[2:] ** 2).sum(), rtol=1e-6)
    assert bits_saved(jnp.asarray(e), jnp.asarray(e), [0.0, 1.0]) == 0
    assert bits_saved(jnp.asarray(e), jnp.zeros(4), [0.5]) == 0
    np.testing.assert_allclose(
        bits_saved(jnp.asarray([jnp.nan, 3, 2, 1]), jnp.asarray(e), [0.25]), 9 / 30 - 0.25
    )


def in_one_direction(N: int):
    """A weight whose step from 3 to 4 bits is of rank one: what it changes depends on a token's direction."""
    u, v = rng(3).normal(size=N), np.tile([1.0, 0, 0, 0], 8)
    codes = np.where(v > 0, 1, 0)[None] * np.ones((N, 1), np.int32)
    tables = (np.zeros((N, 8), np.float32), np.zeros((N, 16), np.float32))
    tables[1][:, 1] = u
    return from_codes(jnp.asarray(codes), tuple(map(jnp.asarray, tables)), bits=4, dtype=jnp.float32)


def fit(held, x, kind="auto", parts=None, rows=16):
    w = always(held, (3.5,))
    parts = {3: [0.5]} if parts is None else parts
    return fit_estimator(w, x, x, parts, kind, key=jax.random.key(0), rows=rows, r2=0.9)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(rng(4).normal(size=(400, 32)), jnp.float32)


def test_a_projection_is_taken_where_it_saves_more_than_it_reads(tokens):
    """The same errors: with 2,000 outputs four rows cost 0.03 bits, with 64 a bit."""
    wide, narrow = fit(in_one_direction(2000), tokens), fit(in_one_direction(64), tokens)
    assert (wide.estimator, narrow.estimator) == ("projection", "linear")
    assert bits_of_projection(4, 64) == 1.0
    e = errors(tokens, wide.held.at(4).dequantize_rows() - wide.held.at(3).dequantize_rows())
    found = wide.estimate(tokens, jnp.int32(0))
    assert np.corrcoef(np.asarray(found), np.asarray(e))[0, 1] > 0.99
    assert fit(in_one_direction(64), tokens, "published").projection.shape == (1, 16, 32)


def test_more_rows_are_taken_only_where_they_pay(tokens):
    assert fit(in_one_direction(2000), tokens).projection.shape == (1, 4, 32)  # one direction needs no more


@pytest.mark.parametrize("kind", ["auto", "published"])
def test_a_line_is_taken_where_it_says_all(kind):
    """Lengths that differ much, steps alike in all directions."""
    x = jnp.asarray(rng(5).normal(size=(200, 64)) * rng(6).lognormal(size=(200, 1)), jnp.float32)
    assert fit(nested(rng(7).normal(size=(256, 64)), parent=4), x, kind).estimator == "linear"
