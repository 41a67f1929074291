"""A tiny decoder whose linears can be read at 3 to 6 bits, and text for it."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.layers import RmsNorm
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.weights.planes.bit_planes import BitPlanes, from_codes

SEED, PARENT = 3, 6


def nested(rows, *, seed: int = SEED, parent: int = PARENT) -> BitPlanes:
    """Even grids of each row, nested: the level of a code is the middle of what it stands for."""
    rows = np.asarray(rows, np.float32)
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    codes = np.clip((rows - low) / (high - low) * 2**parent, 0, 2**parent - 1).astype(np.int32)
    tables = tuple(
        jnp.asarray(low + (high - low) * (np.arange(2**b) + 0.5) / 2**b) for b in range(seed, parent + 1)
    )
    return from_codes(jnp.asarray(codes), tables, bits=parent, dtype=jnp.float32)


def with_planes(model):
    """The model with each linear of its blocks in planes."""
    weights = {name: w for name, w in linear_weights(model).items() if "." in name}
    return replace_weights(model, {name: nested(w.rows) for name, w in weights.items()})


def with_scales(model):
    """The model with norms whose scales differ, as trained ones do: equal ones make inputs of one length."""
    rng = np.random.default_rng(7)
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, RmsNorm):
            norm.scale.set_value(
                jnp.asarray(rng.lognormal(0, 0.7, norm.scale.get_value().shape), jnp.float32)
            )
    return model


@pytest.fixture(scope="session")
def planes_model() -> Decoder:
    """Two layers, 128 tokens, context 64."""
    return with_planes(with_scales(Decoder(TINY, rngs=nnx.Rngs(1))))


@pytest.fixture(scope="session")
def text() -> np.ndarray:
    """Eight rows of 24 tokens."""
    return np.random.default_rng(0).integers(0, TINY.vocab, (8, 24)).astype(np.int32)
