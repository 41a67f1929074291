"""Hugging Face directories: families there and back, both spellings of configs, broken files."""

import json
import os
import subprocess
import sys
import textwrap
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tiny_llama import TINY, tiny_weights, write_checkpoint

from checkpoints_convert import huggingface, tensor_files
from checkpoints_convert.build_model import same
from checkpoints_convert.materialize import materialize, named_leaves
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder
from jaxllm.models.rope import Rope
from jaxllm.sharding import make_mesh

SMALL = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "pad_token_id": 0,
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 9.0], "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip
GPT = {"vocab_size": 67, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64,
       "bos_token_id": 3, "eos_token_id": 5}  # fmt: skip
OPT = {"vocab_size": 67, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
       "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 8,
       "bos_token_id": 3, "eos_token_id": 5, "pad_token_id": 1}  # fmt: skip
T5 = {"vocab_size": 67, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
      "eos_token_id": 5}  # fmt: skip
# name: (model_type, config)
FAMILIES = {
    "llama": ("llama", SMALL | {"rope_parameters": YARN, "attention_bias": True}),
    "mistral": ("mistral", SMALL | {"sliding_window": 8}),
    "qwen2": ("qwen2", {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen3": ("qwen3", SMALL | {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", SMALL | {"query_pre_attn_scalar": 6, "sliding_window": 8}),
    "gemma3": ("gemma3_text", SMALL | {"num_hidden_layers": 7, "sliding_window": 8}),
    "phi3": ("phi3", {k: v for k, v in SMALL.items() if k != "head_dim"}
             | {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "gpt2": ("gpt2", GPT),
    "opt": ("opt", OPT),
    "t5": ("t5", T5),
    "t5 v1.1": ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}  # fmt: skip


def their_directory(path, kind, settings, dtype, torch):
    """A random checkpoint written by transformers; its model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **settings)).to(dtype).eval()
    if kind == "t5" and "tie_word_embeddings" in settings:  # transformers 5 ties all T5 it makes
        model.lm_head.weight = torch.nn.Parameter(torch.randn(settings["vocab_size"], 16))
    model.save_pretrained(path)
    return model, auto


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_byte_for_byte_and_transformers_loads_it(torch, name, tmp_path):
    kind, settings = FAMILIES[name]
    dtype = torch.bfloat16 if name in ("llama", "gemma2", "gpt2") else torch.float32
    theirs, auto = their_directory(tmp_path / "a", kind, settings, dtype, torch)
    model, tokenizer = huggingface.load(tmp_path / "a")
    assert tokenizer is None and model.config.stop_tokens == (5,)
    huggingface.save(model, None, tmp_path / "b", model_type=kind, max_shard_bytes=4000)
    before = tensor_files.open_directory(tmp_path / "a")
    after = tensor_files.open_directory(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    again, info = auto.from_pretrained(tmp_path / "b", output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == dtype
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    tokens = {"bos_token_id", "pad_token_id"}  # a tokenizer's, of which there is none here
    for key in (set(theirs.config.to_dict()) & {*SMALL, "layer_types", "sliding_window"}) - tokens:
        assert getattr(again.config, key) == getattr(theirs.config, key), key


# Configs as the hub has them, written by hand, and what they must mean: (config.json, our fields).
HUB = {
    "Llama-2 with linear scaling": (
        {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 3,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"type": "linear", "factor": 8.0},
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"head_dim": 128, "tied": False, "rope": Rope(kind="linear", factor=8.0), "norm_eps": 1e-5},
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 3,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        {
            "tied": True,
            "kv_heads": 8,
            "rope": Rope(
                kind="llama3",
                theta=5e5,
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_context=8192,
            ),
        },
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 3,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"windows": (4096,) * 3, "rope": Rope()},
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 3,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32768,
        },
        {"windows": (), "rope": Rope(theta=1e6), "kv_heads": 8, "norm_eps": 1e-6},
    ),
    "Qwen2.5 with YaRN": (
        {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {
            "qkv_bias": True,
            "out_bias": False,
            "windows": (),
            "rope": Rope(
                kind="yarn",
                theta=1e6,
                factor=4.0,
                original_context=32768,
                attention_factor=0.1 * np.log(4.0) + 1.0,
            ),
        },
    ),
    "Qwen2 with windows in its upper layers": (
        {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 1,
            "num_attention_heads": 14,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "vocab_size": 151936,
        },
        {"windows": (None, 32768, 32768), "tied": True},
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 3,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"qk_norm": True, "head_dim": 128, "rope": Rope(theta=1e6), "windows": ()},
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2",
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
        {
            "windows": (4096, None, 4096),
            "tied": True,
            "embedding_scale": 48.0,
            "attention_scale": None,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "norm_offset": 1.0,
            "post_norms": True,
            "activation": "gelu_tanh",
        },
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 8,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 168,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        {
            "windows": (512,) * 5 + (None,) + (512,) * 2,
            "rope": Rope(kind="linear", theta=1e6, factor=8.0),
            "local_rope": Rope(theta=1e4),
            "attention_scale": 168**-0.5,
            "qk_norm": True,
        },
    ),
    "Phi-3-mini-128k": (
        {
            "model_type": "phi3",
            "hidden_act": "silu",
            "hidden_size": 96,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "num_attention_heads": 12,
            "num_hidden_layers": 3,
            "num_key_value_heads": 12,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "long_factor": [1.0, 2.0, 4.0, 8.0],
                "short_factor": [1.0, 1.0, 1.1, 1.2],
                "type": "longrope",
            },
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        {
            "windows": (262144,) * 3,
            "rope": Rope(
                kind="longrope",
                original_context=4096,
                long_factors=(1.0, 2.0, 4.0, 8.0),
                short_factors=(1.0, 1.0, 1.1, 1.2),
                attention_factor=float(np.sqrt(1 + np.log(32) / np.log(4096))),
            ),
        },
    ),
    "Phi-4-mini, a part of each head turned": (
        {
            "model_type": "phi3",
            "hidden_act": "silu",
            "hidden_size": 96,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 12,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "partial_rotary_factor": 0.75,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        {"rope": Rope(fraction=0.75), "windows": (), "tied": True},
    ),
}


def our_config(raw: dict, path):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    family, full = huggingface.read_config(path)
    return huggingface.translate(family, full, path)


@pytest.mark.parametrize("name", HUB)
def test_configs_as_the_hub_has_them_mean_the_same_in_both_spellings(name, tmp_path):
    from transformers import AutoConfig

    raw, fields = HUB[name]
    config = our_config(raw, tmp_path / "old")
    for field, value in fields.items():
        got = getattr(config, field)
        if isinstance(value, Rope):  # the attention factor is computed: to the last digit or so
            assert got.attention_factor == pytest.approx(value.attention_factor, rel=1e-12)
            value = type(value)(**(vars(value) | {"attention_factor": got.attention_factor}))
        assert got == value, field
    AutoConfig.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    spelled = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "rope_theta" not in spelled and spelled["rope_parameters"]
    assert our_config(spelled, tmp_path / "again") == config


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_the_first_phi_3_files_call_longrope_by_other_names(kind, tmp_path):
    raw, _ = HUB["Phi-3-mini-128k"]
    want = our_config(raw, tmp_path / "now")
    scaling = raw["rope_scaling"] | {"type": kind}
    assert our_config(raw | {"rope_scaling": scaling}, tmp_path / "then") == want


def test_the_text_part_of_gemma_3_with_images_is_read(tmp_path):
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 7,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    raw = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {},
        "eos_token_id": [1, 106],
    }
    config = our_config(raw, tmp_path / "gemma")
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab) == (8, 4, 256, 262_208)
    assert config.windows == (1024,) * 5 + (None, 1024)
    assert config.rope.factor == 8.0 and config.local_rope == Rope()
    assert config.stop_tokens == (1, 106) and config.tied


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
         "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64,
         "attention_factor": 1.3, "truncate": False},
        {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0 + i for i in range(16)],
         "long_factor": [2.0 + i for i in range(16)], "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "short_factor": [1.0 + i for i in range(16)],
         "long_factor": [2.0 + i for i in range(16)], "attention_factor": 1.2,
         "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_frequencies_and_attention_factors_are_theirs(torch, changes, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = SMALL | {"head_dim": 32, "max_position_embeddings": 512}
    theirs = LlamaConfig(**settings, rope_parameters={"rope_theta": 5e3, **changes})
    theirs.save_pretrained(tmp_path)
    family, raw = huggingface.read_config(tmp_path)
    rope = huggingface.translate(family, raw, tmp_path).rope
    ours = np.atleast_2d(rope.frequencies(32))
    for row, length in zip(ours, (None, 65), strict=False):
        frequencies, factor = ROPE_INIT_FUNCTIONS[changes["rope_type"]](theirs, seq_len=length)
        np.testing.assert_allclose(row, frequencies.numpy(), rtol=1e-6)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def leaf(model, name):
    return np.asarray(named_leaves(model)[name])


def rewrite(path, tensors, config=None):
    """Puts other tensors (and another config) into a directory."""
    entries = [(k, v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()]
    tensor_files.write_file(path / "model.safetensors", entries)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "tiny")


def test_a_loaded_model_holds_the_files_numbers(checkpoint):
    model, _ = huggingface.load(checkpoint)
    weights = tiny_weights()
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(leaf(model, "layers.1.attention.k.w"), weights[name])
    np.testing.assert_array_equal(leaf(model, "head.w"), weights["lm_head.weight"])
    assert model.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_files_of_other_float_types_keep_them_but_float64(checkpoint, dtype):
    weights = {name: value.astype(dtype) for name, value in tiny_weights().items()}
    model, _ = huggingface.load(rewrite(checkpoint, weights))
    want = np.float32 if dtype is np.float64 else dtype
    assert model.dtype == want
    got = leaf(model, "layers.0.mlp.up.w")
    np.testing.assert_array_equal(got, weights["model.layers.0.mlp.up_proj.weight"].astype(want))


def test_weights_are_cast_where_asked(checkpoint):
    model, _ = huggingface.load(checkpoint, dtype=jnp.bfloat16)
    assert {x.dtype for x in named_leaves(model).values()} == {jnp.dtype(jnp.bfloat16)}


def test_the_safetensors_package_reads_what_is_written_and_the_other_way_round(tmp_path):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 5)).astype("f4"), "b": np.float16([1, 2, 3])}
    rewrite(tmp_path, tensors)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])
    save_file(tensors, tmp_path / "theirs.safetensors")
    for name, value in tensor_files.open_file(tmp_path / "theirs.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])


def test_a_mesh_holds_the_same_numbers_each_device_its_part(checkpoint):
    plain, _ = huggingface.load(checkpoint)
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    model, _ = huggingface.load(checkpoint, mesh=mesh)
    for name, value in named_leaves(plain).items():
        np.testing.assert_array_equal(leaf(model, name), value)
    gate = named_leaves(model)["layers.0.mlp.gate.w"]
    assert gate.addressable_shards[0].data.shape == (32, 32)  # of [64, 32]


def test_names_without_their_prefix_old_buffers_and_a_copied_tied_head_are_accepted(checkpoint):
    weights = {name.removeprefix("model."): value for name, value in tiny_weights().items()}
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    weights["lm_head.weight"] = weights["embed_tokens.weight"].copy()
    config = TINY | {"tie_word_embeddings": True}
    model, _ = huggingface.load(rewrite(checkpoint, weights, config))
    assert model.head is None
    np.testing.assert_array_equal(leaf(model, "embedding.table"), weights["embed_tokens.weight"])


def test_a_head_that_should_be_tied_and_is_not_is_an_error(checkpoint):
    rewrite(checkpoint, tiny_weights(), TINY | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        huggingface.load(checkpoint)


def test_missing_and_left_over_names_are_listed(checkpoint):
    weights = tiny_weights()
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    message = (
        r"2 missing \(model.layers.1.mlp.up_proj.weight, model.norm.weight\); "
        r"1 left over \(model.layers.0.self_attn.q_proj.bias\)"
    )
    with pytest.raises(ValueError, match=message):
        huggingface.load(rewrite(checkpoint, weights))


def broken(path, how):
    """Breaks a checkpoint in one way."""
    weights, config = tiny_weights(), dict(TINY)
    file = path / "model.safetensors"
    match how:
        case "shape":
            weights["model.norm.weight"] = np.ones(31, np.float32)
            rewrite(path, weights)
        case "integers":
            from safetensors.numpy import save_file

            save_file(weights | {"model.norm.weight": np.ones(32, np.int32)}, file)
        case "cut off":
            file.write_bytes(file.read_bytes()[:-1])
        case "cut in header":
            file.write_bytes(file.read_bytes()[:100])
        case "empty":
            file.write_bytes(b"")
        case "no JSON inside":
            file.write_bytes(b"\x10" + b"\0" * 7 + b"x" * 99)
        case "no weights":
            file.unlink()
        case "pickled":
            file.rename(path / "pytorch_model.bin")
        case "no config":
            (path / "config.json").unlink()
        case "no JSON":
            (path / "config.json").write_text("{")
        case "lost shard":
            (path / tensor_files.INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}')
        case "tokenizer":
            (path / "tokenizer.json").write_text("{")
        case _:
            config |= how
            (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"model.norm.weight must have shape \(32,\), got \(31,\)"),
        ("integers", "numbers must be of F64, F32, F16, BF16, got model.norm.weight of I32"),
        ("cut off", r"model.safetensors must have \d+ bytes, got \d+: cut off"),
        ("cut in header", "model.safetensors is cut off in its header"),
        ("empty", "model.safetensors is cut off in its header, got 0 bytes"),
        ("no JSON inside", "the header of model.safetensors must be JSON"),
        ("no weights", "no model.safetensors"),
        ("pickled", "a pickle can run code when opened.*convert it.*got pytorch_model.bin"),
        ("no config", "no config.json"),
        ("no JSON", "config.json must be JSON"),
        ("lost shard", "the index names a file that is not there, got ../x.safetensors"),
        ("tokenizer", "the tokenizer files must load"),
        ({"model_type": "mamba"}, r"must be one of llama, mistral, .*, got 'mamba'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "or of gptq .*, awq .*names 'hqq'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "got rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope parameters must have factor"),
        ({"hidden_act": "softplus"}, "activation must be one of silu.*got 'softplus'"),
        ({"hidden_size": 64}, "must have shape"),
    ],
    ids=str,
)
def test_a_broken_checkpoint_is_one_line(checkpoint, how, message):
    broken(checkpoint, how)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        huggingface.load(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_config_without_a_size_says_which(checkpoint):
    config = {key: value for key, value in TINY.items() if key != "hidden_size"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json of llama must have hidden_size"):
        huggingface.load(checkpoint)


def test_a_hub_id_that_is_not_at_hand_is_one_line(monkeypatch):
    with pytest.raises(FileNotFoundError, match="the hub did not give it, got 'no-one/no-model'") as caught:
        huggingface.load("no-one/no-model", local_files_only=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such directory or hub id"):
        huggingface.load("/no/such/directory")


def test_end_tokens_of_generation_config_come_before_those_of_config(checkpoint):
    assert huggingface.load(checkpoint)[0].config.stop_tokens == (263,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [263, 7]}')
    assert huggingface.load(checkpoint)[0].config.stop_tokens == (263, 7)


def test_the_tokenizers_own_policy_decides_about_the_begin_token(checkpoint):
    from tokenizers import Tokenizer, processors

    _, tokenizer = huggingface.load(checkpoint)
    assert tokenizer.encode("in") == [259]
    inner = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 262)])
    inner.save(str(checkpoint / "tokenizer.json"))
    _, tokenizer = huggingface.load(checkpoint)
    assert tokenizer.encode("in") == [262, 259]


def test_saving_keeps_tokenizer_chat_template_end_tokens_and_all_bytes(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [263, 7]}')
    model, tokenizer = huggingface.load(checkpoint)
    huggingface.save(model, tokenizer, tmp_path / "out", max_shard_bytes=20_000)
    again, other = huggingface.load(tmp_path / "out")
    assert again.config == model.config
    assert other.encode("the end") == tokenizer.encode("the end")
    messages = [{"role": "user", "content": "hi"}]
    assert other.apply_chat_template(messages, tokenize=False) == "<s>user: hi\n"
    before = tensor_files.open_directory(checkpoint)
    after = tensor_files.open_directory(tmp_path / "out")
    assert before.keys() == after.keys() and all(same(before[k], after[k]) for k in before)
    index = json.loads((tmp_path / "out" / tensor_files.INDEX).read_text())
    assert set(index["weight_map"]) == set(before)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


@pytest.mark.parametrize(
    ("features", "kind"),
    [
        ({}, "llama"),
        ({"windows": (8, 8)}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "windows": (None, 8)}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
    ],
)
def test_a_model_is_written_as_the_first_family_that_can_say_it(features, kind):
    config = decoder.Config(**(vars(decoder.TINY) | features))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert huggingface.family_of(model).model_type == kind


def test_what_no_family_can_say_is_refused(tmp_path):
    config = decoder.Config(**(vars(decoder.TINY) | {"windows": (4, 8)}))
    model = Decoder(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no family can describe this config: tried llama, mistral"):
        huggingface.save(model, None, tmp_path / "out")
    with pytest.raises(ValueError, match="tried qwen3"):
        plain = Decoder(decoder.TINY, rngs=nnx.Rngs(0))
        huggingface.save(plain, None, tmp_path / "out", model_type="qwen3")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused(checkpoint):
    model, tokenizer = huggingface.load(checkpoint)
    with pytest.raises(FileExistsError, match="the output must not exist yet"):
        huggingface.save(model, tokenizer, checkpoint)


def test_filling_holds_one_tensor_beside_the_model():
    """The counting fake: sources that know how many of them are alive."""
    alive, most, calls = [0], [0], []

    def read(name, shape):
        value = np.zeros(shape, np.float32)
        alive[0] += value.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(value, lambda n=value.nbytes: alive.__setitem__(0, alive[0] - n))
        calls.append(name)
        return value

    model = materialize(lambda: Decoder(decoder.TINY, rngs=nnx.Rngs(0)), read)
    sizes = [value.nbytes for value in named_leaves(model).values()]
    assert most[0] == max(sizes) and alive[0] == 0
    assert len(calls) == len(set(calls)) == len(sizes)


MEASURE = """
import pathlib, sys, threading, time
import jax
from checkpoints_convert import huggingface

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

path, small = sys.argv[1:]
huggingface.load(small)  # imports, the backend, the allocator's first pages
before, most, run = anonymous(), [0], [True]
def watch():
    while run[0]:
        most[0] = max(most[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model, _ = huggingface.load(path)
jax.block_until_ready(model)
run[0] = False
thread.join()
print(most[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_anonymous_memory_stays_under_the_model_and_its_largest_tensor(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
             "num_key_value_heads": 16, "head_dim": 64, "vocab_size": 16_000,
             "num_hidden_layers": 5}  # fmt: skip
    small = write_checkpoint(tmp_path / "small")
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(TINY | sizes))
    family, raw = huggingface.read_config(big)
    config = huggingface.translate(family, raw, big)
    abstract = named_leaves(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    entries = [
        (tensor.theirs, abstract[tensor.ours[0]].shape, np.dtype("<f4"),
         lambda shape=abstract[tensor.ours[0]].shape: rng.random(shape, np.float32))
        for tensor in huggingface.tensors_of(family, abstract)
    ]  # fmt: skip
    tensor_files.write_file(big / "model.safetensors", entries)
    total = sum(tensor_files.num_bytes(entry[1], entry[2]) for entry in entries)
    largest = max(tensor_files.num_bytes(entry[1], entry[2]) for entry in entries)
    assert total >= 400e6
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(big), str(small)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert total * 0.95 < int(done.stdout) < total + largest, (total, largest)
