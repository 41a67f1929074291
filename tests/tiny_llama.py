"""A random Llama in Hugging Face's files, written without torch, for tests that load one.

write_checkpoint(tmp_path / "tiny")  # 2 layers, 264 tokens, context 128
write_checkpoint(tmp_path / "tiny", config={**TINY, "rope_theta": 1e6})
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer():
    """A byte-level tokenizer: 256 bytes, a few merges, then begin (262) and end (263)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d")]
    words = [*letters, *("".join(pair) for pair in merges)]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 262,
    "eos_token_id": 263,
    "torch_dtype": "float32",
}


def tiny_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors for `TINY` under Hugging Face's names, standard deviation 0.15."""
    rng = np.random.default_rng(seed)
    width, hidden, vocab = TINY["hidden_size"], TINY["intermediate_size"], TINY["vocab_size"]
    keys = TINY["num_key_value_heads"] * TINY["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    for i in range(TINY["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[layer + "self_attn.q_proj.weight"] = (width, width)
        shapes[layer + "self_attn.k_proj.weight"] = (keys, width)
        shapes[layer + "self_attn.v_proj.weight"] = (keys, width)
        shapes[layer + "self_attn.o_proj.weight"] = (width, width)
        shapes[layer + "mlp.gate_proj.weight"] = (hidden, width)
        shapes[layer + "mlp.up_proj.weight"] = (hidden, width)
        shapes[layer + "mlp.down_proj.weight"] = (width, hidden)
        shapes[layer + "input_layernorm.weight"] = (width,)
        shapes[layer + "post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    return {
        name: (rng.standard_normal(shape) * 0.15 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_checkpoint(directory: Path, *, config: dict = TINY, seed: int = 0) -> Path:
    """Writes a Hugging Face directory: config, one safetensors file, a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tiny_weights(seed), directory / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": config["max_position_embeddings"],
        "chat_template": "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
