"""Quantized models as other tools' files: bit for bit the published layouts, exact or refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantized_files import (
    ANY,
    LINEARS,
    LLAMA,
    PHI3,
    any_precision,
    awq,
    awq_block,
    checkpoint,
    compressed,
    compressed_block,
    gptq,
    gptq_block,
    write,
)

import jaxllm as jl
from checkpoints_convert import huggingface
from checkpoints_convert.materialize import named_weights
from jaxllm.files import convert

SECOND = gptq_block(checkpoint_format="gptq_v2")
EIGHT = compressed_block(num_bits=8, strategy="channel", group_size=None)

# name: (what to write, what makes a linear, what config.json says, its options)
WRITTEN = {
    **{
        f"gptq, {bits} bits{', zeros' * zeros}": (
            "gptq",
            gptq,
            gptq_block(bits=bits, sym=not zeros, checkpoint_format="gptq_v2"),
            {"bits": bits, "symmetric": not zeros, "version": 2},
        )
        for bits, zeros in ((2, True), (3, True), (4, False), (8, True))
    },
    "gptq, 3 bits, act-order": (
        "gptq",
        gptq,
        gptq_block(bits=3, desc_act=True, group_size=16, checkpoint_format="gptq_v2"),
        {"bits": 3, "act_order": True, "group_size": 16, "version": 2},
    ),
    "gptq, one group": (
        "gptq",
        gptq,
        gptq_block(group_size=-1, checkpoint_format="gptq_v2"),
        {"group_size": -1, "version": 2},
    ),
    "awq": ("awq", awq, awq_block(), {}),
    "compressed": ("compressed-tensors", compressed, compressed_block(), {}),
    "compressed, zeros": (
        "compressed-tensors",
        compressed,
        compressed_block(symmetric=False),
        {"symmetric": False},
    ),
    "compressed, act-order": (
        "compressed-tensors",
        compressed,
        compressed_block(actorder="group"),
        {"act_order": True},
    ),
    "compressed, 8 bits a row": ("compressed-tensors", compressed, EIGHT, {"bits": 8, "group_size": -1}),
    "any-precision": ("any-precision", any_precision, ANY, {}),
}


def said(path):
    """What config.json says of quantized weights."""
    config = json.loads((path / "config.json").read_text())
    return config.get("quantization_config") or config["anyprec"]


@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_written_byte_for_byte_as_they_were_read(name, tmp_path):
    to, make, block, options = WRITTEN[name]
    tensors, _ = checkpoint(tmp_path / "q", make, block, **options)
    convert(tmp_path / "q", tmp_path / "out", to=to)
    written = huggingface.tensor_files.open_directory(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for key, value in tensors.items():
        assert written[key].dtype == value.dtype, key
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    given, got = next(iter(block.values())), said(tmp_path / "out")
    if to == "compressed-tensors":
        given, got = (one["config_groups"]["group_0"]["weights"] for one in (given, got))
    assert {key: got.get(key) for key in given if key != "arch_config"} == {
        key: value for key, value in given.items() if key != "arch_config"
    }


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_linears_stacked_in_one_of_theirs_are_written_stacked(to, tmp_path):
    config = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"model_type": "phi3"}
    make, block, options = (gptq, SECOND, {"version": 2}) if to == "gptq" else (awq, awq_block(), {})
    tensors, _ = checkpoint(tmp_path / "q", make, block, config=config, linears=PHI3, **options)
    convert(tmp_path / "q", tmp_path / "out", to=to)
    written = huggingface.tensor_files.open_directory(tmp_path / "out")
    assert all(np.array_equal(written[key], value) for key, value in tensors.items())


@pytest.fixture(scope="module")
def tiny():
    """A dense model whose linears any scheme can hold."""
    config = dataclasses.replace(jl.models.decoder.TINY, width=64, hidden=64, layers=2)
    return jl.models.decoder.Decoder(config, rngs=nnx.Rngs(0))


def rows_of(model):
    """The numbers of every linear."""
    return {
        name: np.asarray(w if isinstance(w, jax.Array) else w.dequantize_rows(jnp.float32))
        for name, w in named_weights(model).items()
    }


def same_rows(a, b):
    a, b = rows_of(a), rows_of(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)
