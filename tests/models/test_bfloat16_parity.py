"""How far the logits of a model in bfloat16 lie from those in float32, here and in transformers, by family.

The weights are the same numbers in both types, so that the distance is what is rounded on the way.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from their_models import FAMILIES, their_directory

import jaxllm as jl


def tokens(rows=4, length=24):
    return np.random.default_rng(0).integers(0, 67, (rows, length))


def their_logits(torch, model):
    ids = torch.tensor(tokens())
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **more).logits.float().numpy()


@jax.jit
def our_logits(model):
    ids = jnp.asarray(tokens(), jnp.int32)
    if not hasattr(model, "encode"):
        return model(ids)[0]
    memory = model.encode(ids, jnp.full(len(ids), ids.shape[1], jnp.int32))
    return model(ids[:, ::-1], memory=memory)[0]


def distance(a, b):
    """The root of the mean square."""
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)))


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_lies_no_farther_from_float32_than_in_transformers(torch, name, tmp_path):
    kind, settings = FAMILIES[name]
    theirs, auto = their_directory(tmp_path / "a", kind, settings, torch.float32, torch)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in theirs.named_parameters():
            if value.ndim == 2:
                value.normal_(0.0, 0.2, generator=rng)
    theirs = theirs.bfloat16().float()
    theirs.save_pretrained(tmp_path / "b")
    exact = their_logits(torch, theirs)
    half = their_logits(torch, auto.from_pretrained(tmp_path / "b", dtype=torch.bfloat16).eval())
    ours = our_logits(jl.load(tmp_path / "b")[0])
    assert distance(ours, exact) <= 1e-4 * np.abs(exact).max()
    got = distance(our_logits(jl.load(tmp_path / "b", dtype="bfloat16")[0]), exact)
    print(f"{name}: {got / distance(half, exact):.2f}")
    assert 0 < got <= 1.25 * distance(half, exact)
