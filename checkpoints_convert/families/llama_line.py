"""The Llama line of Hugging Face as tables for `Decoder`: Llama, Mistral, Qwen, Gemma, Phi 3.

A config.json is read as transformers reads it: a missing key has that family's default, rope is
described by `rope_parameters` (transformers 5, one dictionary, or one for each type of layer) or by
`rope_theta` and `rope_scaling` (files on the hub). It is written as transformers 5 writes it.
"""

import dataclasses
from typing import Any

from checkpoints_convert.families.family import ACTIVATIONS, Family, row
from checkpoints_convert.families.rope import SCALED, rope_to_hf, ropes
from jaxllm.models.decoder import Config, Decoder


def windows(raw: dict[str, Any], types: list[str] | None) -> tuple[int | None, ...]:
    """The window of each layer; () where none has one. types: None is a window in all layers."""
    size, layers = raw.get("sliding_window"), raw["num_hidden_layers"]
    if types is None:
        types = ["sliding_attention"] * layers
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        raise ValueError(
            "huggingface.load: layer_types must name full_attention or sliding_attention for each "
            f"layer, got {sorted(set(types))} for {len(types)} of {layers}"
        )
    if size is None or "sliding_attention" not in types:
        return ()
    return tuple(int(size) if kind == "sliding_attention" else None for kind in types)


def types_from(raw: dict[str, Any], first: int) -> list[str]:
    """`layer_types`, or for files without: a window from layer `first` on (Qwen)."""
    if raw.get("layer_types") is not None:
        return raw["layer_types"]
    count = raw["num_hidden_layers"]
    return ["full_attention" if i < first else "sliding_attention" for i in range(count)]


def types_every(raw: dict[str, Any], period: int) -> list[str]:
    """`layer_types`, or for files without: every `period`-th layer has no window (Gemma)."""
    if raw.get("layer_types") is not None:
        return raw["layer_types"]
    count = raw["num_hidden_layers"]
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]


def sizes(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that every family names alike."""
    activation = raw.get("hidden_activation") or raw.get("hidden_act")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"huggingface.load: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    heads = raw["num_attention_heads"]
    return {
        "layers": raw["num_hidden_layers"],
        "width": raw["hidden_size"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "ffn": raw["intermediate_size"],
        "vocab": raw["vocab_size"],
        "context": raw["max_position_embeddings"],
        "tied": bool(raw["tie_word_embeddings"]),
        "activation": ACTIVATIONS[activation],
        "norm_eps": raw["rms_norm_eps"],
    }


def llama(raw: dict[str, Any]) -> Config:
    bias = bool(raw["attention_bias"])
    return Config(
        **sizes(raw),
        **ropes(raw),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(raw["mlp_bias"]),
    )


def mistral(raw: dict[str, Any]) -> Config:
    return Config(**sizes(raw), **ropes(raw), windows=windows(raw, None))


def qwen2(raw: dict[str, Any]) -> Config:
    return Config(**sizes(raw), **ropes(raw), windows=_qwen_windows(raw), qkv_bias=True)


def qwen3(raw: dict[str, Any]) -> Config:
    bias = bool(raw["attention_bias"])
    return Config(
        **sizes(raw),
        **ropes(raw),
        windows=_qwen_windows(raw),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
    )


def _qwen_windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
    if not raw["use_sliding_window"]:
        return ()
    return windows(raw, types_from(raw, raw["max_window_layers"]))


def _gemma(raw: dict[str, Any], **fields) -> Config:
    if raw.get("use_bidirectional_attention"):
        raise ValueError("huggingface.load: attention must be causal, got use_bidirectional_attention=True")
    made = sizes(raw | {"hidden_activation": raw["hidden_activation"] or "gelu_pytorch_tanh"})
    scalar, bias = raw["query_pre_attn_scalar"], bool(raw["attention_bias"])
    return Config(
        **made,
        **fields,
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=raw["hidden_size"] ** 0.5,
        attention_scale=None if scalar == made["head_dim"] else scalar**-0.5,
        attention_softcap=raw["attn_logit_softcapping"],
        logit_softcap=raw["final_logit_softcapping"],
        qkv_bias=bias,
        out_bias=bias,
    )


def gemma2(raw: dict[str, Any]) -> Config:
    return _gemma(raw, **ropes(raw), windows=windows(raw, types_every(raw, 2)))


def gemma3_text(raw: dict[str, Any]) -> Config:
    period = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    return _gemma(
        raw,
        **ropes(raw, theta=1_000_000.0, local_theta=10_000.0),
        windows=windows(raw, types_every(raw, period)),
        qk_norm=True,
    )


def gemma3(raw: dict[str, Any]) -> Config:
    """The text part of a model that also reads images."""
    text = GEMMA3_TEXT.defaults | raw.get("text_config", {})
    tied = raw.get("tie_word_embeddings", text["tie_word_embeddings"])
    return gemma3_text(text | {"tie_word_embeddings": tied})


def phi3(raw: dict[str, Any]) -> Config:
    fraction = float(raw.get("partial_rotary_factor") or 1.0)
    p = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    fraction = float(p.get("partial_rotary_factor", fraction))
    if (p.get("rope_type") or p.get("type")) == "yarn":
        p["rope_type"] = "longrope"  # the first files said yarn and meant this
    raw = raw | {"rope_scaling": None, "rope_parameters": p}
    return Config(**sizes(raw), **ropes(raw, fraction=fraction), windows=windows(raw, None))


def to_hf_config(c: Config) -> dict[str, Any]:
    """Our config in all keys that a family of this line has; each writes its own of them."""
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
    scalar = c.head_dim if c.attention_scale is None else round(c.attention_scale**-2, 9)
    raw: dict[str, Any] = {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "hidden_act": names[c.activation],
        "rope_parameters": rope_to_hf(c.rope),
    }
    if c.rope.kind in SCALED:
        raw["original_max_position_embeddings"] = c.rope.original_context
    window = {size for size in c.windows if size is not None}
    raw["sliding_window"] = min(window) if window else None
    raw["attention_bias"], raw["mlp_bias"] = c.qkv_bias, c.mlp_bias
    raw["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    raw["attn_logit_softcapping"] = c.attention_softcap
    raw["final_logit_softcapping"] = c.logit_softcap
    return raw


def _types(c: Config) -> list[str]:
    return ["full_attention" if c.window(i) is None else "sliding_attention" for i in range(c.layers)]


SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "original_max_position_embeddings",  # of ropes that know it
)


def written(c: Config, *keys: str) -> dict[str, Any]:
    """The keys that all families have, and those of the others that are named, in one order."""
    return {key: value for key, value in to_hf_config(c).items() if key in SHARED or key in keys}


def llama_to(c: Config) -> dict[str, Any]:
    return written(c, "head_dim", "hidden_act", "attention_bias", "mlp_bias")


def mistral_to(c: Config) -> dict[str, Any]:
    return written(c, "head_dim", "hidden_act", "sliding_window")


def qwen_to(c: Config) -> dict[str, Any]:
    raw = written(c, "head_dim", "hidden_act", "sliding_window", "attention_bias")
    raw |= {"use_sliding_window": bool(c.windows), "layer_types": _types(c)}
    return raw


def gemma_to(c: Config) -> dict[str, Any]:
    own = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    raw = written(c, "head_dim", "sliding_window", "attention_bias", *own)
    raw |= {"hidden_activation": to_hf_config(c)["hidden_act"], "layer_types": _types(c)}
    return raw


def gemma3_to(c: Config) -> dict[str, Any]:
    local = c.rope if c.local_rope is None else c.local_rope
    both = {"full_attention": rope_to_hf(c.rope), "sliding_attention": rope_to_hf(local)}
    return gemma_to(c) | {"rope_parameters": both}


def phi3_to(c: Config) -> dict[str, Any]:
    raw = written(c, "hidden_act", "sliding_window")
    raw["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return raw


LAYER = "model.layers.{i}."
HEAD = (
    row("model.embed_tokens.weight", "embedding.table"),
    row("model.norm.weight", "norm.scale"),
    row("lm_head.weight", "head.w"),
)
NORMS = (
    row(LAYER + "input_layernorm.weight", "layers.{i}.attention_norm.scale"),
    row(LAYER + "post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
)
GEMMA_NORMS = (
    row(LAYER + "input_layernorm.weight", "layers.{i}.attention_norm.scale"),
    row(LAYER + "post_attention_layernorm.weight", "layers.{i}.attention_post_norm.scale"),
    row(LAYER + "pre_feedforward_layernorm.weight", "layers.{i}.mlp_norm.scale"),
    row(LAYER + "post_feedforward_layernorm.weight", "layers.{i}.mlp_post_norm.scale"),
)
ATTENTION = tuple(
    row(LAYER + f"self_attn.{name}_proj.{theirs}", f"layers.{{i}}.attention.{name}.{ours}")
    for name in "qkvo"
    for theirs, ours in (("weight", "w"), ("bias", "bias"))
)
QK_NORMS = tuple(
    row(LAYER + f"self_attn.{name}_norm.weight", f"layers.{{i}}.attention.{name}_norm.scale") for name in "qk"
)
MLP = tuple(
    row(LAYER + f"mlp.{name}_proj.{theirs}", f"layers.{{i}}.mlp.{name}.{ours}")
    for name in ("gate", "up", "down")
    for theirs, ours in (("weight", "w"), ("bias", "bias"))
)
FUSED = (
    row(LAYER + "self_attn.qkv_proj.weight", *(f"layers.{{i}}.attention.{n}.w" for n in "qkv")),
    row(LAYER + "self_attn.o_proj.weight", "layers.{i}.attention.o.w"),
    row(LAYER + "mlp.gate_up_proj.weight", "layers.{i}.mlp.gate.w", "layers.{i}.mlp.up.w"),
    row(LAYER + "mlp.down_proj.weight", "layers.{i}.mlp.down.w"),
)

COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN = COMMON | {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA = COMMON | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    model=Decoder,
    config=llama,
    to_hf_config=llama_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *MLP),
    defaults=COMMON | {"max_position_embeddings": 2048, "eos_token_id": 2},
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    model=Decoder,
    config=mistral,
    to_hf_config=mistral_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *MLP),
    defaults=COMMON
    | {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    model=Decoder,
    config=qwen2,
    to_hf_config=qwen_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *MLP),
    defaults=QWEN,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    model=Decoder,
    config=qwen3,
    to_hf_config=qwen_to,
    rows=(*HEAD, *NORMS, *ATTENTION, *QK_NORMS, *MLP),
    defaults=QWEN | {"head_dim": 128},
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    model=Decoder,
    config=gemma2,
    to_hf_config=gemma_to,
    rows=(*HEAD, *GEMMA_NORMS, *ATTENTION, *MLP),
    defaults=GEMMA
    | {
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
)
GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    model=Decoder,
    config=gemma3_text,
    to_hf_config=gemma3_to,
    rows=(*HEAD, *GEMMA_NORMS, *ATTENTION, *QK_NORMS, *MLP),
    defaults=GEMMA
    | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
    },
)
PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    model=Decoder,
    config=phi3,
    to_hf_config=phi3_to,
    rows=(*HEAD, *NORMS, *FUSED),
    defaults=COMMON
    | {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "eos_token_id": 32_000,
    },
)
# The text part of a checkpoint that reads images too; written back as gemma3_text.
GEMMA3 = dataclasses.replace(
    GEMMA3_TEXT,
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    config=gemma3,
    defaults={},
    ignored=(*GEMMA3_TEXT.ignored, r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\."),
    prefixes=("model.", "model.language_model.", "language_model.model."),
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3_TEXT, PHI3, GEMMA3)
