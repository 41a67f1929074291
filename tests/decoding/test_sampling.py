"""Samplers filter as their papers say, and draw from what is left in proportion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.decoding.sampling import Sampler, process_logits, sample

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.15, 0.1, 0.05]], jnp.float32))


def kept(sampler, logits=LOGITS):
    """Which tokens survive the filters."""
    return np.isfinite(np.asarray(process_logits(logits, sampler.params())))[0].tolist()


def test_top_k_keeps_the_k_likeliest():
    assert kept(Sampler(temperature=1.0, top_k=2)) == [True, True, False, False, False]
    assert kept(Sampler(temperature=1.0, top_k=99)) == [True] * 5


def test_top_p_keeps_the_fewest_tokens_that_reach_p_and_always_one():
    assert kept(Sampler(temperature=1.0, top_p=0.69)) == [True, True, False, False, False]
    assert kept(Sampler(temperature=1.0, top_p=0.71)) == [True, True, True, False, False]
    assert kept(Sampler(temperature=1.0, top_p=1e-6)) == [True, False, False, False, False]


def test_top_p_does_not_depend_on_the_order_of_the_vocabulary():
    order = jnp.array([3, 0, 4, 1, 2])
    got = kept(Sampler(temperature=1.0, top_p=0.71), LOGITS[:, order])
    assert got == [False, True, False, True, True]


def test_min_p_is_a_share_of_the_likeliest():
    assert kept(Sampler(temperature=1.0, min_p=0.3)) == [True, True, True, False, False]


def test_filters_apply_in_order_after_the_temperature():
    # squared probabilities are .16 .09 .0225 .01 .0025 of .285: the first two reach 0.87
    assert kept(Sampler(temperature=0.5, top_p=0.87)) == [True, True, False, False, False]
    assert kept(Sampler(temperature=0.5, top_p=0.95)) == [True, True, True, False, False]
    assert kept(Sampler(temperature=1.0, top_k=3, min_p=0.5)) == [True, True, False, False, False]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    seen = jnp.array([[True, True, False]])
    got = process_logits(logits, Sampler(repetition_penalty=2.0).params(), seen)
    np.testing.assert_allclose(got, [[1.0, -4.0, 1.0]])


def draws(sampler, n=4000):
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    logits = jnp.broadcast_to(LOGITS, (n, 5))
    return np.asarray(sample(logits, sampler.params(), keys, jnp.zeros((n,), jnp.int32)))


def test_draws_follow_the_filtered_distribution():
    share = np.bincount(draws(Sampler(temperature=1.0, top_k=3)), minlength=5) / 4000
    want = np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85
    assert np.abs(share - want).max() < 4 * np.sqrt(0.25 / 4000)  # four standard errors


def test_zero_temperature_takes_the_likeliest():
    assert set(draws(Sampler(), 5)) == {0}


def test_another_temperature_needs_no_new_compilation():
    one, other = (Sampler(temperature=t, top_p=p).params() for t, p in ((0.7, 0.9), (1.3, 0.5)))
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature must be 0 or a positive number, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or a positive number, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)
