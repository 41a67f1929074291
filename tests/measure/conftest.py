"""One tiny model for all measures."""

import dataclasses

import pytest
from flax import nnx

from jaxllm.models.decoder import TINY, Decoder


@pytest.fixture(scope="package")
def model():
    """A random decoder of one layer with 16 tokens of context."""
    return Decoder(dataclasses.replace(TINY, layers=1, context=16), rngs=nnx.Rngs(0))
