"""A random checkpoint of each family, written by transformers, for tests that read one.

theirs, auto = their_directory(tmp_path / "a", *FAMILIES["llama"], torch.float32, torch)
"""

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
    "mixtral": ("mixtral", SMALL | {"num_local_experts": 3, "sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", SMALL | {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True,
                  "moe_intermediate_size": 24, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "gpt_oss": ("gpt_oss", SMALL | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8,
                "rope_parameters": YARN}),
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
