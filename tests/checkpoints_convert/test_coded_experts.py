"""Experts in files that other tools quantized: GPT-OSS as it is published, in MXFP4, and GPTQ's Mixtral."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantized_files import HIDDEN, LINEARS, LLAMA, WIDTH, checkpoint, gptq, gptq_block, write
from safetensors.numpy import save_file

import jaxllm as jl
from checkpoints_convert import huggingface, tensor_files
from jaxllm.models.decoder import TINY, Decoder
from jaxllm.weights.affine import Affine
from jaxllm.weights.experts import parts

CONFIG = dataclasses.replace(
    TINY, layers=1, ffn=64, experts=2, experts_per_token=1, expert_ffn=64, expert_bias=True, glu_limit=7.0,
    attention_sinks=True, activation="quick_gelu",
)  # fmt: skip
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of random codes, and the codes by name."""
    path = tmp_path_factory.mktemp("mxfp4")
    huggingface.save(Decoder(CONFIG, rngs=nnx.Rngs(0)), None, path / "plain", model_type="gpt_oss")
    tensors = dict(tensor_files.open_directory(path / "plain"))
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj")]:
        X, K, N = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = rng.integers(0, 256, (X, N, K // 32, 16), np.uint8)
        tensors[f"{name}_scales"] = rng.integers(118, 126, (X, N, K // 32), np.uint8)
    raw = json.loads((path / "plain" / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "coded").mkdir()
    (path / "coded" / "config.json").write_text(json.dumps(raw))
    save_file({name: np.array(x) for name, x in tensors.items()}, path / "coded" / "model.safetensors")
    return path / "coded", tensors


def numbers(blocks, scales):
    """[X, N, K], one by one as the format says."""
    values = np.array(VALUES + [-v for v in VALUES], np.float32)
    pairs = np.stack([values[blocks & 15], values[blocks >> 4]], axis=-1).reshape(*scales.shape, 32)
    return (pairs * 2.0 ** (scales[..., None].astype(np.float32) - 127)).reshape(*scales.shape[:2], -1)


def test_experts_are_read_to_the_last_bit(directory):
    path, tensors = directory
    model, _ = huggingface.load(path)
    block = "model.layers.0.mlp.experts."
    both, down = (
        numbers(tensors[f"{block}{name}_proj_blocks"], tensors[f"{block}{name}_proj_scales"])
        for name in ("gate_up", "down")
    )
    mlp = model.layers[0].mlp
    for linear, want in ((mlp.gate, both[:, 0::2]), (mlp.up, both[:, 1::2]), (mlp.down, down)):
        w = linear.w.get_value()
        assert isinstance(w.stack, Affine) and w.shape == (2, want.shape[2], want.shape[1])
        for one, rows in zip(parts(w), want, strict=True):
            np.testing.assert_array_equal(one.dequantize_rows(jnp.float32), rows)


@pytest.mark.slow
@pytest.mark.parity
def test_numbers_are_those_of_transformers(torch, directory):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = directory[1]
    for name in ("gate_up", "down"):
        blocks, scales = (
            tensors[f"model.layers.0.mlp.experts.{name}_proj_{x}"] for x in ("blocks", "scales")
        )
        theirs = convert_moe_packed_tensors(
            torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
        )  # [X, K, N]
        np.testing.assert_array_equal(theirs.numpy().swapaxes(1, 2), numbers(blocks, scales))


def test_what_is_no_scale_is_refused_in_one_line(directory, tmp_path):
    path, tensors = directory
    name = "model.layers.0.mlp.experts.down_proj_scales"
    scales = np.array(tensors[name])
    scales[1, 0, 0] = 255
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    changed = {key: np.array(x) for key, x in tensors.items()} | {name: scales}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.1\.down_proj: scales must be below 255.*got 255$"):
        huggingface.load(tmp_path)


def test_experts_that_gptq_quantized_one_by_one_keep_their_codes(tmp_path):
    experts = {
        f"block_sparse_moe.experts.{e}.{name}": size
        for e in range(2)
        for name, size in (("w1", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH)), ("w3", (WIDTH, HIDDEN)))
    }
    attention = {name: size for name, size in LINEARS.items() if "attn" in name}
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    made, rows = checkpoint(tmp_path / "q", gptq, gptq_block(), config=config, linears=attention | experts)
    raw = json.loads((tmp_path / "q" / "config.json").read_text())
    router = {"model.layers.0.block_sparse_moe.gate.weight": np.ones((2, WIDTH), np.float32)}
    write(tmp_path / "q", raw, made | router)
    mlp = jl.load(tmp_path / "q")[0].layers[0].mlp
    for name, linear in (("w1", mlp.gate), ("w2", mlp.down), ("w3", mlp.up)):
        w = linear.w.get_value()
        assert isinstance(w.stack, Affine)
        for e, one in enumerate(parts(w)):
            want = next(x for key, x in rows.items() if key.endswith(f"experts.{e}.{name}"))
            np.testing.assert_array_equal(one.dequantize_rows(jnp.float32), want)
    left = {key: x for key, x in made.items() if "experts.1.w2" not in key}
    dense = {"model.layers.0.block_sparse_moe.experts.1.w2.weight": np.ones((WIDTH, HIDDEN), np.float32)}
    write(tmp_path / "q", raw, left | router | dense)
    with pytest.raises(ValueError, match="all experts must be stored alike, got 1 of 2 quantized"):
        jl.load(tmp_path / "q")
