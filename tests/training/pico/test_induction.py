"""Wired models copy before they have been trained at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.models.decoder import TINY, Decoder
from jaxllm.training.pico import induction
from jaxllm.training.pico import recipe as pico


def repeated_tokens_right(model, T=50):
    """Share of a second copy of uniform random tokens that is predicted from the first."""
    half = np.random.default_rng(0).integers(3, 1024, (4, T)).astype(np.int32)
    tokens = np.concatenate([half, half], axis=1)
    logits, _ = jax.jit(lambda m, t: m(t))(model, jnp.asarray(tokens))
    guess = np.argmax(np.asarray(logits), -1)
    return float((guess[:, T + 1 : -1] == tokens[:, T + 2 :]).mean())


@pytest.mark.slow
def test_a_wired_target_copies_before_training():
    plain = Decoder(pico.MEMBERS["target"], rngs=nnx.Rngs(0))
    assert repeated_tokens_right(plain) < 0.02
    assert repeated_tokens_right(induction.wire(plain, 0)) > 0.3


def test_wiring_leaves_the_model_it_was_given():
    config = pico.MEMBERS["draft"]
    plain, other = (Decoder(config, rngs=nnx.Rngs(0)) for _ in range(2))
    wired = induction.wire(plain, 0)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        assert (a == b).all()
    assert jax.tree.structure(wired) == jax.tree.structure(plain)


def test_a_model_too_small_is_refused():
    with pytest.raises(ValueError, match="c.layers=1"):
        small = Decoder(dataclasses.replace(TINY, layers=1), rngs=nnx.Rngs(0))
        induction.wire(small, 0)
