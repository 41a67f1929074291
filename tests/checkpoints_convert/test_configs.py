"""Configs of Hugging Face directories: both spellings, older names, and what each must mean."""

import json

import numpy as np
import pytest
from tiny_llama import TINY

from checkpoints_convert import huggingface
from jaxllm.models.rope import Rope

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

    settings = TINY | {"head_dim": 32, "max_position_embeddings": 512}
    theirs = LlamaConfig(**settings, rope_parameters={"rope_theta": 5e3, **changes})
    theirs.save_pretrained(tmp_path)
    family, raw = huggingface.read_config(tmp_path)
    rope = huggingface.translate(family, raw, tmp_path).rope
    ours = np.atleast_2d(rope.frequencies(32))
    for row, length in zip(ours, (None, 65), strict=False):
        frequencies, factor = ROPE_INIT_FUNCTIONS[changes["rope_type"]](theirs, seq_len=length)
        np.testing.assert_allclose(row, frequencies.numpy(), rtol=1e-6)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
