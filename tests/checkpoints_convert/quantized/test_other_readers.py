"""What we write, as other tools read it: transformers with compressed-tensors and GPTQModel, AutoAWQ.

A tool that is not installed skips by its name. In an environment of its own:

    pip install compressed-tensors accelerate optimum gptqmodel autoawq
    pytest -n 0 -m parity tests/checkpoints_convert/quantized/test_other_readers.py
"""

import dataclasses
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxllm as jl
from jaxllm.models import decoder

pytestmark = pytest.mark.parity
CONFIG = dataclasses.replace(decoder.TINY, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128)
TOKENS = np.arange(24).reshape(2, 12) * 5 % CONFIG.vocab

# (layout, settings)
CASES = [
    ("compressed-tensors", {"bits": 4, "symmetric": True}),
    ("compressed-tensors", {"bits": 4}),
    ("compressed-tensors", {"bits": 8, "group_size": 64}),
    ("gptq", {"bits": 2}),
    ("gptq", {"bits": 3}),
    ("gptq", {"bits": 4, "symmetric": True}),
    ("gptq", {"bits": 8, "group_size": 16}),
    ("awq", {"bits": 4}),
    ("awq", {"bits": 4, "symmetric": True}),
]
PACKAGES = {
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
}


@pytest.fixture(scope="module")
def dense():
    return decoder.Decoder(CONFIG, rngs=nnx.Rngs(0))


def need(to):
    """Skips where a package is absent that reads a layout."""
    for package in PACKAGES[to]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no package {package}")


def their_logits(path, **more):
    """Logits of what transformers makes of a directory, and their model."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **more)
    with torch.no_grad():
        return theirs(torch.asarray(TOKENS)).logits.float().numpy(), theirs


def dequantizing(to):
    """How a model is loaded.

    subtle: kept compressed, compressed-tensors 0.20 expects zero points that are not packed.
    """
    need(to)
    if to != "compressed-tensors":
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}


@pytest.mark.parametrize(("to", "settings"), CASES, ids=str)
def test_transformers_reads_what_was_written(to, settings, dense, tmp_path):
    more = dequantizing(to)
    small = jl.quantize(dense, jl.Rtn(**settings), progress=False)
    jl.save(small, tmp_path / "out", to=to)
    got, theirs = their_logits(tmp_path / "out", **more)
    assert np.abs(got - small(jnp.asarray(TOKENS))[0]).max() < 1e-2  # they round weights to float16
    if to != "awq":  # whose kernel never has the whole weight: see below
        linear = theirs.model.layers[1].mlp.down_proj
        same_rows(linear.weight if more else linear.dequantize_weight().T, small)


@pytest.mark.parametrize("to", PACKAGES)
def test_transformers_leaves_dense_what_is_dense(to, dense, tmp_path):
    more = dequantizing(to)
    recipe = [("gate", None), (r"\.", jl.Rtn(bits=4, group_size=32, symmetric=True))]
    small = jl.quantize(dense, recipe, progress=False)
    jl.save(small, tmp_path / "out", to=to)
    got, _ = their_logits(tmp_path / "out", **more)
    assert np.abs(got - small(jnp.asarray(TOKENS))[0]).max() < 1e-2


def test_compressed_tensors_reads_several_settings(dense, tmp_path):
    need("compressed-tensors")
    rtn = [jl.Rtn(bits=bits, group_size=32, symmetric=True) for bits in (8, 4)]
    small = jl.quantize(dense, [("mlp.up", rtn[0]), (r"\.", rtn[1])], progress=False)
    jl.save(small, tmp_path / "out", to="compressed-tensors")
    got, _ = their_logits(tmp_path / "out")
    np.testing.assert_allclose(got, small(jnp.asarray(TOKENS))[0], atol=1e-4)


def same_rows(theirs, model):
    """Their weight is ours, as float16."""
    ours = model.layers[1].mlp.down.w.get_value().dequantize_rows(jnp.float32)
    np.testing.assert_allclose(theirs.float().detach().numpy(), ours, rtol=2**-10, atol=2**-20)


def test_autoawq_unpacks_what_was_written(dense, tmp_path):
    found = importlib.util.find_spec("awq")
    if found is None or not found.submodule_search_locations:
        pytest.skip("could not find 'awq'")
    # subtle: the file alone, for the package asks for an older transformers
    file = Path(found.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("awq_packing", file)
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    from safetensors.torch import load_file

    small = jl.quantize(dense, jl.Rtn(bits=4, group_size=32), progress=False)
    jl.save(small, tmp_path / "out", to="awq")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    parts = [tensors[f"model.layers.1.mlp.down_proj.{last}"] for last in ("qweight", "qzeros", "scales")]
    same_rows(packing.dequantize_gemm(*parts, 4, 32).T, small)
