"""A fingerprint changes with any one number of a model, and with nothing else."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm import cache as kv
from jaxllm.models import gpt, t5
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.models.linears import linear_weights, replace_weights
from jaxllm.models.rope import Rope
from jaxllm.quant.calibrate import calibrate
from jaxllm.sharding import make_mesh, shard
from jaxllm.storage.fingerprint import fingerprint

ROWS = [list(range(3, 40)), [5, 9, 2, 7]]
EVERY_FORMAT = Path(__file__).parents[1] / "files_of_0_1_0" / "decoder"


@pytest.fixture(scope="module")
def plain():
    return Decoder(dataclasses.replace(TINY, kv_heads=4), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def models(plain):
    return {
        "float32": plain,
        "bfloat16": gpt.Gpt(gpt.TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16),
        "encoder": t5.T5(t5.TINY, rngs=nnx.Rngs(0)),
        "quantized": jl.load(EVERY_FORMAT)[0],
    }


def neighbours(model):
    """The model with the lowest bit of one number turned, for several places of each of its arrays."""
    leaves, tree = jax.tree.flatten(model)
    for i, leaf in enumerate(leaves):
        size, middle = leaf.size, np.random.default_rng(i).integers(leaf.size)
        for at in sorted({0, min(16, size - 1), int(middle), size - 1}):
            flat = np.array(leaf).reshape(-1)
            flat[at : at + 1].view(np.uint8)[0] ^= 1
            other = [*leaves[:i], jnp.asarray(flat.reshape(leaf.shape)), *leaves[i + 1 :]]
            yield jax.tree.unflatten(tree, other)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "encoder")),
        "bfloat16",
        "quantized",
    ],
)
def test_one_bit_of_one_number_anywhere_gives_another_fingerprint(name, models):
    found = [fingerprint(models[name]), *map(fingerprint, neighbours(models[name]))]
    assert len(found) > 80 and len(set(found)) == len(found)


def test_weights_that_are_read_otherwise_give_another_fingerprint():
    made = [
        Decoder(dataclasses.replace(TINY, **more), rngs=nnx.Rngs(0))
        for more in ({}, {"rope": Rope(theta=500.0)}, {"windows": (None, 4)}, {"norm_eps": 1e-6})
    ]
    assert len(set(map(fingerprint, made))) == len(made)


def test_where_and_how_a_model_lies_does_not_matter(plain, models, tmp_path):
    jl.save(models["quantized"], tmp_path / "saved")
    assert fingerprint(jl.load(tmp_path / "saved")[0]) == fingerprint(models["quantized"])
    assert fingerprint(shard(plain, make_mesh(model=2))) == fingerprint(plain)


def test_models_that_differ_behind_the_first_row_refuse_each_others_files(plain, tmp_path):
    """Both had one fingerprint when it was of the first 16 numbers, and logits 6 apart."""
    head = linear_weights(plain)["head"]
    other = replace_weights(plain, {"head": dataclasses.replace(head, rows=head.rows.at[1:].multiply(2))})
    kv.save(jl.prefill(plain, ROWS), tmp_path / "cache", plain)
    with pytest.raises(ValueError, match="another model's keys"):
        kv.load(tmp_path / "cache", other)
    want = {"want": {"hessian_diag"}, "path": tmp_path / "calibration", "progress": False}
    stats = calibrate(plain, ROWS, **want)
    with pytest.raises(ValueError, match="path must be new or hold the same model"):
        calibrate(other, ROWS, **want)
    with pytest.raises(ValueError, match="the calibration must be of this model"):
        jl.quantize(other, jl.Rtn(clip=True), stats, progress=False)
    run = {"checkpoint": tmp_path / "stopped", "progress": False}
    jl.quantize(plain, jl.Rtn(group_size=16), **run)
    with pytest.raises(ValueError, match="must hold the same model, method and text"):
        jl.quantize(other, jl.Rtn(group_size=16), **run)
